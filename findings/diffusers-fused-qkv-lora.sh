#!/usr/bin/env bash
# Expected: unet.fuse_qkv_projections() makes one product of three, and changes no picture: a LoRA that the UNet has, or gets
# afterwards, acts as before.
# What happens: the fused layer is a copy of the base weights of to_q, to_k and to_v, in which the LoRA has no part, and the
# layers that carry it are not called any more. In self-attention a LoRA on the three does nothing at all, in
# cross-attention only that on to_q is left; those on to_out and the feed-forward part go on. Neither order gives an
# error or a warning. Only after fuse_lora() is the LoRA copied along, and unfuse_lora() then leaves it in.
# Who meets it: who fuses the projections for speed and draws with a LoRA, most of which sit on just these layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft")), sep=", ")
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
given = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 16)


def add(unet, layers):
    torch.manual_seed(1)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False))


DO = {
    "LoRA": add,
    "fuse_qkv": lambda unet, layers: unet.fuse_qkv_projections(),
    "unfuse_qkv": lambda unet, layers: unet.unfuse_qkv_projections(),
    "fuse_lora": lambda unet, layers: unet.fuse_lora(),
    "unfuse_lora": lambda unet, layers: unet.unfuse_lora(),
}


@torch.no_grad()
def change(layers, *steps):
    """How far the steps move what the UNet gives, relative to what it gave."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), norm_num_groups=8, cross_attention_dim=16, attention_head_dim=4,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    before = unet(*given).sample
    for step in steps:
        DO[step](unet, layers)
    return round(((unet(*given).sample - before).norm() / before.norm()).item(), 4)


ORDERS = {
    "alone": ("LoRA",),
    "then fuse_qkv": ("LoRA", "fuse_qkv"),
    "after fuse_qkv": ("fuse_qkv", "LoRA"),
    "fused in, then fuse_qkv": ("LoRA", "fuse_lora", "fuse_qkv"),
    "the same and unfuse_lora": ("LoRA", "fuse_lora", "fuse_qkv", "unfuse_lora"),
    "then fuse_qkv and unfuse_qkv": ("LoRA", "fuse_qkv", "unfuse_qkv"),
}
PLACES = {
    "self-attention": r".*attn1\.to_(q|k|v)",
    "cross-attention": r".*attn2\.to_(q|k|v)",
    "cross-attention's to_q": r".*attn2\.to_q",
}
print("fuse_qkv without a LoRA changes", change(None, "fuse_qkv"))
seen = {place: {name: change(layers, *steps) for name, steps in ORDERS.items()} for place, layers in PLACES.items()}
for place, changes in seen.items():
    for name, number in changes.items():
        print(f"LoRA on {place}, {name}: changes {number}")
assert change(None, "fuse_qkv") == 0
for place, (alone, fused, after, merged, unmerged, unfused) in ((p, list(c.values())) for p, c in seen.items()):
    assert alone > 0.01 and abs(merged - alone) < 1e-3 and abs(unfused - alone) < 1e-3
    expected = {"self-attention": 0, "cross-attention's to_q": alone}
    assert abs(fused - expected.get(place, fused)) < 1e-3 and fused == after
    assert place != "cross-attention" or abs(fused - alone) > 0.3 * alone
    assert place != "self-attention" or abs(unmerged - alone) < 1e-3
EOF
