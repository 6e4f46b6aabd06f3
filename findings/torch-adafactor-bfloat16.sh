#!/usr/bin/env bash
# Expected: torch.optim.Adafactor steps by lr times the size of the weights, however small the gradients are, since it divides
# by their size: in bfloat16 as in float32.
# What happens: unless eps is given, its floor under that size is the precision of the weights' dtype: 0.0078 in bfloat16,
# 0.00000012 in float32. In bfloat16 gradients below about 0.01 are divided by the floor instead: at 0.0001 the step is a
# hundredth of what was asked, and rounding takes a part of that. (A gradient of norm 1 over the 860 million weights of
# SD 1.5's UNet is 0.00003 in each.)
# And the floor of the first weight is kept for all that come after it in its group: a float32 weight behind a bfloat16
# one has bfloat16's, before it its own; with foreach=True, each its own. eps=(torch.finfo(torch.float32).eps, 1e-3)
# gives the step of float32. Adafactor of transformers has it without.
# Who meets it: who takes Adafactor to train large networks in bfloat16 throughout, for which it is known: they hardly move.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")), sep=", ")
import torch
from torch.optim import Adafactor
from transformers.optimization import Adafactor as Transformers

LR = 0.05


def moved(size, dtype, kind=Adafactor, before=None, **options):
    """How far one step with gradients of this size moves a weight, relative to its own size."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64).to(dtype))
    gradient, start = (torch.randn(64, 64) * size).to(dtype), weight.detach().float().clone()
    weights = [weight] if before is None else [torch.nn.Parameter(torch.ones(8, 8, dtype=before)), weight]
    for other in weights:
        other.grad = torch.ones_like(other)
    weight.grad = gradient
    kind(weights, lr=LR, **options).step()
    return ((weight.detach().float() - start).norm() / start.norm()).item()


half, full = torch.bfloat16, torch.float32
COLUMNS = {
    "float32": lambda size: moved(size, full),
    "bfloat16": lambda size: moved(size, half),
    "bfloat16 with float32's eps": lambda size: moved(size, half, eps=(torch.finfo(full).eps, 1e-3)),
    "bfloat16, transformers": lambda size: moved(size, half, Transformers, relative_step=False, scale_parameter=True),
    "float32 after a bfloat16 weight": lambda size: moved(size, full, before=half),
    "the same, foreach": lambda size: moved(size, full, before=half, foreach=True),
    "bfloat16 after a float32 weight": lambda size: moved(size, half, before=full),
}
SIZES = (1, 1e-2, 1e-3, 1e-4, 1e-5)
print("asked for", LR, "with gradients of", *SIZES)
for name, column in COLUMNS.items():
    steps = [column(size) for size in SIZES]
    print(f"{name}:", *(f"{step:.2g}" for step in steps))
    if name in ("bfloat16", "float32 after a bfloat16 weight"):
        assert all(abs(step / LR - 1) < 0.02 for step in steps[:2])
        assert steps[2] < 0.2 * LR and steps[3] < 0.02 * LR and steps[4] < 0.002 * LR
    else:
        assert all(abs(step / LR - 1) < 0.02 for step in steps)
EOF
