#!/usr/bin/env bash
# Expected: a LoRA file of kohya's trainer is scaled by alpha / rank of each layer.
# What happens: where alpha differs between layers, diffusers gives each to_q, to_k, to_v and to_out
# of the UNet the commonest alpha of the file; layers of the feed-forward part get their own. The
# names of the attention layers are kept in an older form among the alphas and match no layer. A
# layer without an alpha of its own, alpha = rank in the format, gets the commonest as well.
# Who meets it: whoever loads a LoRA made by merging, resizing or by an alpha per block.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")), sep=", ")
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.lora import LoraLayer


def unet():
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )


block = "mid_block.attentions.0.transformer_blocks.0."


def alphas_read(alphas, rank=4):
    """The alpha that each layer of the UNet gets from a file with these alphas (None: not in the file)."""
    network, file = unet(), {}
    for name, alpha in alphas.items():
        out, into = network.get_submodule(block + name).weight.shape
        key = "lora_unet_" + (block + name).replace(".", "_")
        file[f"{key}.lora_down.weight"] = torch.ones(rank, into)
        file[f"{key}.lora_up.weight"] = torch.ones(out, rank)
        if alpha is not None:
            file[f"{key}.alpha"] = torch.tensor(float(alpha))
    weights, network_alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(file)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(weights, network_alphas, network, adapter_name="lora")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layers[block + name].scaling["lora"] * rank for name in alphas}


cases = (
    {"attn1.to_q": 2, "attn1.to_k": 2, "attn1.to_v": 2},
    {"attn1.to_q": 2, "attn1.to_k": 2, "attn1.to_out.0": 2, "attn1.to_v": 1},
    {"attn1.to_q": 2, "attn1.to_k": 2, "attn1.to_out.0": 1},
    {"attn1.to_q": 2, "attn1.to_k": 2, "ff.net.2": 1},
    {"attn1.to_q": 2, "attn1.to_k": 2, "attn1.to_v": None},
)
seen = []
for alphas in cases:
    seen.append(alphas_read(alphas))
    print(f"in the file {alphas}, read as {seen[-1]}")
assert [list(read.values()) for read in seen] == [[2] * 3, [2] * 4, [2] * 3, [2, 2, 1], [2] * 3], seen
EOF
