#!/usr/bin/env bash
# Expected: OFTConfig(use_cayley_neumann=True) approximates, by a series, the rotation that
# use_cayley_neumann=False reckons exactly, and better with each term.
# What happens: the exact form is (I - Q)(I + Q)^-1, the series that of (I + Q)(I - Q)^-1. The same
# weights turn one way under one setting and the other way under the other. And 3 and 4 terms are
# the same series.
# Who meets it: whoever trains under one setting and loads under the other, reads OFT weights with
# code of their own, or chooses num_cayley_neumann_terms=4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "peft", "transformers")), sep=", ")
import torch
from peft import OFTConfig, get_peft_model


def rotation(**options):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).double()
    model = get_peft_model(network, OFTConfig(target_modules=["0"], oft_block_size=4, r=0, **options))
    module = model.base_model.model[0].oft_R["default"].double()
    module.weight.data = torch.arange(1.0, 7.0, dtype=torch.float64)[None] / 50
    return module.get_weight().detach()


def distance(one, other):
    return (one - other).abs().max().item()


exact = rotation(use_cayley_neumann=False)
series = {terms: rotation(num_cayley_neumann_terms=terms) for terms in (2, 3, 4, 5, 20)}
for terms, turned in series.items():
    print(f"{terms} terms: {distance(turned, exact):.1e} from the exact rotation, "
          f"{distance(turned, exact.T):.1e} from its inverse")
print(f"3 and 4 terms are equal: {torch.equal(series[3], series[4])}")
assert distance(series[20], exact) > 0.1 and distance(series[20], exact.T) < 1e-7
assert torch.equal(series[3], series[4]) and not torch.equal(series[4], series[5])
EOF
