#!/usr/bin/env bash
# Expected: an adapter on a convolution gives an output of the convolution's shape.
# What happens: T-LoRA changes a 3x3 convolution's kernel for a 1x1 one but keeps the padding, and
# LoRA with bypass_mode=True drops the dilation; both raise a RuntimeError on the first forward pass,
# when the change has another size than the output it is added to.
# Who meets it: whoever trains T-LoRA over all layers of a UNet, or LoRA in bypass on dilated layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet lycoris-lora==4.1.3
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "lycoris-lora")), sep=", ")
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.tlora import TLoraModule


def outcome(kind, layer, **options):
    adapter = kind("layer", layer, **options)
    try:
        return str(tuple(adapter(torch.ones(1, 8, 8, 8)).shape))
    except RuntimeError as error:
        return f"RuntimeError: {error}"


plain, dilated = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2)
seen = {
    "LoRA, 3x3": outcome(LoConModule, plain),
    "LoRA, 3x3, bypass": outcome(LoConModule, plain, bypass_mode=True),
    "LoRA, 3x3, dilation 2": outcome(LoConModule, dilated),
    "LoRA, 3x3, dilation 2, bypass": outcome(LoConModule, dilated, bypass_mode=True),
    "T-LoRA, 1x1": outcome(TLoraModule, torch.nn.Conv2d(8, 8, 1)),
    "T-LoRA, 3x3": outcome(TLoraModule, plain),
}
for name, result in seen.items():
    print(f"{name}: {result}")
assert [name for name in seen if seen[name] != "(1, 8, 8, 8)"] == ["LoRA, 3x3, dilation 2, bypass", "T-LoRA, 3x3"], seen
EOF
