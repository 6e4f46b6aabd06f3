#!/usr/bin/env bash
# Expected: torch.utils.checkpoint gives the gradients of the block as it ran. Both passes lie inside the same
# TorchFunctionMode (what changes attention, counts or casts by function), so the block is recomputed as it was.
# What happens: in the backward pass the mode is off, whether it begins with loss.backward() or with
# torch.autograd.backward(loss), and the block is recomputed by other functions. Shapes and dtypes are the same, which is
# all that checkpoint compares: the gradients are of neither function, without a warning. Inputs saved by the mode's own
# functions meet outputs of the plain ones. With context_fn the mode can be entered again, and the gradients are right.
# Who meets it: who replaces functions of a network by a mode, and turns on gradient checkpointing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/python" -W ignore - <<'EOF'
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

print("torch", torch.__version__)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.sin else out


def block(x):
    return torch.sin(x).exp()


def gradient(name, method):
    x = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)
    with Doubled():
        if name == "plain":
            y = block(x)
        else:
            again = {"context_fn": lambda: (nullcontext(), Doubled())} if name == "with context_fn" else {}
            y = checkpoint(block, x, use_reentrant=False, **again)
        loss = y.sum()
        loss.backward() if method else torch.autograd.backward(loss)
    return x.grad


true = gradient("plain", True)
for name in ("plain", "checkpointed", "with context_fn"):
    for method in (True, False):
        found = gradient(name, method)
        way = "loss.backward()" if method else "torch.autograd.backward(loss)"
        print(f"{name}, {way}: {[round(number, 3) for number in found.tolist()]}")
        assert torch.equal(found, true) == (name != "checkpointed")
x = torch.linspace(0, 1, 5, dtype=torch.float64)
mixed = torch.exp(torch.sin(x)) * 2 * torch.cos(x)  # d exp(2 sin x) would have exp(2 sin x) here
assert torch.allclose(gradient("checkpointed", True), mixed)
EOF
