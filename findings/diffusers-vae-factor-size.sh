#!/usr/bin/env bash
# Expected: a size that the VAE cannot make is refused, as one that is no multiple of 8 is, or the picture has it.
# What happens: pipelines check for multiples of 8 whatever the VAE. With a VAE of 16 pixels a latent the size is divided by 16 and
# rounded down, so that 72x88 is accepted and gives a picture of 64x80, without a word. With SD's own VAE (8) it gives 72x88.
# Who meets it: whoever puts a VAE of a larger factor into a Stable Diffusion pipeline, or trains one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")), sep=", ")
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def pipeline(levels):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe, width, height):
    text = torch.randn(1, 8, 32)
    return pipe(prompt_embeds=text, negative_prompt_embeds=text, width=width, height=height,
                num_inference_steps=1).images[0].size


sizes = {}
for levels in (4, 5):
    pipe = pipeline(levels)
    for asked in ((64, 64), (72, 88), (104, 120)):
        sizes[pipe.vae_scale_factor, asked] = drawn(pipe, *asked)
        print(f"VAE of {pipe.vae_scale_factor} pixels a latent, {asked} asked: {sizes[pipe.vae_scale_factor, asked]}")
try:
    drawn(pipe, 72, 84)
except ValueError as error:
    print(error)
    assert "divisible by 8" in str(error)
else:
    raise SystemExit("72x84 is accepted")
assert all(sizes[8, asked] == asked for asked in ((64, 64), (72, 88), (104, 120)))
assert (sizes[16, (64, 64)], sizes[16, (72, 88)], sizes[16, (104, 120)]) == ((64, 64), (64, 80), (96, 112))
EOF
