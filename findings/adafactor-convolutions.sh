#!/usr/bin/env bash
# Expected: Adafactor keeps a row and a column of second moments for each layer, and so hardly any memory: for SD 1.5's UNet,
# whose 860 million weights Adam keeps a second moment each for, some 1.5 million numbers, 0.2 %.
# What happens: rows and columns are those of the last two axes. A convolution's are the 3x3 of its kernel: six numbers are
# kept for nine weights, and for a kernel of 1x1 two for each one. Of that UNet, two thirds of which are convolutions,
# 458 million are kept: 53 %. torch and transformers do the same. With each kernel taken as a matrix, outputs by all the
# rest, it would be the 1.5 million.
# Who meets it: who takes Adafactor to fit the full training of a UNet, a VAE or convolutional adapters into memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0
TRANSFORMERS_VERBOSITY=error "$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")), sep=", ")
import torch
from diffusers import UNet2DConditionModel
from transformers.optimization import Adafactor as Transformers

KINDS = {
    "torch.optim.Adafactor": torch.optim.Adafactor,
    "transformers' Adafactor": lambda weights: Transformers(weights, lr=1e-3, relative_step=False, scale_parameter=False),
}


def kept(kind, shape):
    """The numbers that the optimizer holds for a weight of this shape, apart from single ones."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.ones(shape)
    optimizer = kind([weight])
    optimizer.step()
    return sum(value.numel() for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.dim())


for name, kind in KINDS.items():
    for shape, expected in (((64, 32), 96), ((64, 32, 3, 3), 64 * 32 * 6), ((64, 32, 1, 1), 64 * 32 * 2)):
        number = kept(kind, shape)
        print(f"{name}: {number} numbers for {torch.Size(shape).numel()} weights {shape}")
        assert number == expected

with torch.device("meta"):
    shapes = [tuple(weight.shape) for weight in UNet2DConditionModel(cross_attention_dim=768).parameters()]  # SD 1.5's
weights = sum(torch.Size(shape).numel() for shape in shapes)
convolutions = sum(torch.Size(shape).numel() for shape in shapes if len(shape) == 4)
sizes = {shape: torch.Size(shape) for shape in shapes}


def last_two(shape):
    size = sizes[shape].numel()
    return size if len(shape) == 1 else size // shape[-1] + size // shape[-2]


def matrix(shape):
    return shape[0] if len(shape) == 1 else shape[0] + sizes[shape].numel() // shape[0]


held, expected = (sum(map(count, shapes)) for count in (last_two, matrix))
print(f"SD 1.5's UNet: {weights:,} weights, {convolutions / weights:.0%} of them convolutions'")
print(f"kept: {held:,} ({held / weights:.1%}); with each kernel as a matrix {expected:,} ({expected / weights:.1%})")
assert weights == 859_520_964 and 0.53 < held / weights < 0.54 and expected / weights < 0.002
EOF
