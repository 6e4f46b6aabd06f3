#!/usr/bin/env bash
# Expected: torch._int_mm, a product of two int8 matrices with int32 results, is exact everywhere; it is a
# product of whole numbers that fit. A layer that torchao quantizes to int8, activations too, is off by about
# a hundredth on any processor.
# What happens: on x86 processors without VNNI (AMD before Zen 4, most of Intel before Ice Lake) oneDNN makes the
# signed activations unsigned and adds pairs of products in 16 bits, which saturate. Values up to 64 are
# right; at full range, which is what quantization fills, nine results in ten are wrong, and without any
# warning. Here such a processor is had by oneDNN's own setting on any machine.
# Who meets it: who runs a model with int8 activations (torchao's Int8DynamicActivationInt8WeightConfig) on an
# older CPU, after it was checked on a newer one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy
cat > "$folder/try.py" <<'EOF'
import logging

import torch

logging.disable(logging.WARNING)
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # noqa: E402

torch.manual_seed(0)
for most in (64, 127):
    a = torch.randint(-most, most + 1, (64, 128), dtype=torch.int8)
    b = torch.randint(-most, most + 1, (32, 128), dtype=torch.int8).t()
    wrong = (torch._int_mm(a, b).double() != a.double() @ b.double()).double().mean().item()
    print(f"numbers up to {most}: {wrong:.0%} wrong")
layer, x = torch.nn.Linear(128, 128), torch.randn(64, 128)
with torch.no_grad():
    true = layer(x)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    print(f"int8 layer off by {((layer(x) - true).norm() / true.norm()).item():.2f}")
EOF
"$folder/bin/pip" list 2>/dev/null | grep -E "^torch(ao)? "
usual=$("$folder/bin/python" -W ignore "$folder/try.py" 2>/dev/null)
older=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/bin/python" -W ignore "$folder/try.py" 2>/dev/null)
printf 'This processor:\n%s\nAs one without VNNI:\n%s\n' "$usual" "$older"
grep -q "up to 64: 0% wrong" <<< "$older"
grep -qE "up to 127: 9[0-9]% wrong" <<< "$older"
grep -qE "off by 0\.[1-9]" <<< "$older"
if grep -q vnni /proc/cpuinfo; then
    grep -q "up to 127: 0% wrong" <<< "$usual"
    grep -q "off by 0.01" <<< "$usual"
fi
