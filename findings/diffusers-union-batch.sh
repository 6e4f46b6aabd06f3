#!/usr/bin/env bash
# Expected: a row of a batch gives what it gives alone.
# What happens: the transformer with which ControlNetUnionModel joins its maps is an
# nn.MultiheadAttention without batch_first that is handed (batch, maps, channels): it attends along
# the batch. So what a row gives depends on its neighbours, with one map as with several, and the two
# halves of guidance, or two pictures at once, change each other.
# Who meets it: whoever draws more than one picture at once with a union net, compares guidance in one
# call with guidance in two, or another program with diffusers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

SIZES = dict(
    block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
    cross_attention_dim=32, conditioning_embedding_out_channels=(8, 8), layers_per_block=1,
)


def random(net):
    torch.manual_seed(0)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return net.double().eval()


union = random(ControlNetUnionModel(num_trans_channel=32, num_proj_channel=32, addition_time_embed_dim=256, **SIZES))
plain = random(ControlNetModel(**SIZES))
x, context, edges = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 7, 32).double(), torch.rand(2, 3, 16, 16).double()
time = torch.tensor(5)


def of_union(rows):
    kinds = torch.eye(6)[:1].repeat(len(x[rows]), 1).double()
    return union(x[rows], time, context[rows], [edges[rows]], kinds, [0], return_dict=False)[1]


def of_plain(rows):
    return plain(x[rows], time, context[rows], edges[rows], return_dict=False)[1]


for name, run in (("ControlNetModel", of_plain), ("ControlNetUnionModel", of_union)):
    with torch.no_grad():
        alone, beside = run(slice(0, 1)), run(slice(0, 2))[:1]
    gap = ((beside - alone).abs().max() / alone.abs().max()).item()
    print(f"{name}: row 0 alone and beside another differ by {gap:.1e} of the largest number")
    assert gap > 1e-3 if run is of_union else gap < 1e-12
EOF
