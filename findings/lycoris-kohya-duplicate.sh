#!/usr/bin/env bash
# Expected: lycoris.kohya.create_network_from_weights puts a LoRA file of one layer on a UNet of
# diffusers.
# What happens: it first builds a network over all of the UNet's layers, where the two layers of the
# time embedding are found twice, once by their class (TimestepEmbedding) and once by their name, and
# an assertion about duplicated names fails. create_network does the same with its "full" preset.
# Who meets it: whoever loads a LoRA or LyCORIS file with this function on any UNet2DConditionModel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet lycoris-lora==4.1.3 diffusers==0.42.1 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "lycoris-lora", "diffusers", "transformers")), sep=", ")
import logging

import torch
from diffusers import UNet2DConditionModel
from lycoris.kohya import create_network, create_network_from_weights

logging.disable(logging.CRITICAL)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
    attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
)
layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
file = {
    f"{layer}.lora_down.weight": torch.ones(4, 32),
    f"{layer}.lora_up.weight": torch.ones(32, 4),
    f"{layer}.alpha": torch.tensor(4.0),
}


def outcome(make, *arguments, **options):
    try:
        return f"{len(make(*arguments, **options).unet_loras)} layers"
    except AssertionError as error:
        return f"AssertionError: {error}"


seen = {
    "a file": outcome(create_network_from_weights, 1.0, None, None, None, unet, weights_sd=file),
    "a new network, preset full": outcome(create_network, 1.0, 4, 4, None, None, unet, preset="full"),
    "a new network, preset unet-transformer-only": outcome(
        create_network, 1.0, 4, 4, None, None, unet, preset="unet-transformer-only"
    ),
}
for name, result in seen.items():
    print(f"{name}: {result}")
duplicated = "AssertionError: duplicated lora name: lora_unet_time_embedding_linear_1"
first, second, third = seen.values()
assert first == second == duplicated and third.endswith(" layers") and third != "0 layers", seen
EOF
