#!/usr/bin/env bash
# Expected: torch.compile(model, options={"freezing": True}) compiles the weights in, as the option is accepted, and listed by
# torch._inductor.list_options(): on a CPU convolutions and linear layers then have their weights laid out once.
# What happens: nothing is frozen, without a word. Dynamo decides while it traces, and asks the process-wide setting, where
# the options are applied only later: the weights stay inputs of the graph, and a convolution's are laid out anew at
# each call. With torch._inductor.config.freezing set, or patched around the first call, the same model is frozen.
# Who meets it: who compiles a model for inference on a CPU, and compares that with other ways.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/python" -W ignore - <<'EOF'
from contextlib import nullcontext

import torch
from torch._inductor.utils import run_and_get_code

print("torch", torch.__version__)
assert "freezing" in torch._inductor.list_options()


def generated(options, setting):
    """The code that a small convolution is compiled to."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Conv2d(16, 32, 3, padding=1).eval()
    x = torch.randn(1, 16, 24, 24)
    with torch.inference_mode():
        expected = model(x)
        with setting:
            out, (code, *_) = run_and_get_code(torch.compile(model, options=options), x)
    assert (out - expected).abs().max() < 1e-4
    return code


ways = {
    "neither": (None, nullcontext()),
    "options": ({"freezing": True}, nullcontext()),
    "setting": (None, torch._inductor.config.patch(freezing=True)),
}
for name, way in ways.items():
    code = generated(*way)
    frozen, mkldnn = "_frozen_param" in code, "torch.ops.mkldnn._convolution_pointwise" in code
    print(f"{name}: weights frozen {frozen}, convolution with a weight laid out for it {mkldnn}")
    assert frozen == (name == "setting")
EOF
