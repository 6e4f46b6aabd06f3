#!/usr/bin/env bash
# Expected: StableDiffusionPipeline with a TCDScheduler draws with the scheduler's own eta, 0.3, the
# strategic noise that TCD models are made for, where none is given.
# What happens: the pipeline's default for eta is 0.0, and it is handed to every scheduler whose
# `step` takes an eta. So the noise is off, without a word; the same scheduler stepped by hand adds it.
# Who meets it: whoever draws with a TCD LoRA and leaves eta out, or compares a pipeline with a loop
# of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version
from inspect import signature

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, TCDScheduler, UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 16), norm_num_groups=8, cross_attention_dim=8, attention_head_dim=2,
    layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
pipe = StableDiffusionPipeline(
    vae, None, None, unet, TCDScheduler(), None, None, requires_safety_checker=False
)
pipe.set_progress_bar_config(disable=True)
embeds, start = torch.randn(1, 5, 8), torch.randn(1, 4, 8, 8)


def drawn(**options):
    generator = torch.Generator().manual_seed(1)
    return pipe(
        prompt_embeds=embeds, latents=start.clone(), num_inference_steps=4, guidance_scale=1.0, output_type="latent",
        generator=generator, **options,
    ).images


def by_hand():
    scheduler, x, generator = TCDScheduler(), start.clone(), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=embeds).sample
            x = scheduler.step(noise, t, x, generator=generator).prev_sample
    return x


own = signature(TCDScheduler.step).parameters["eta"].default
print("eta of TCDScheduler.step:", own)
gaps = {name: (drawn(**options) - by_hand()).abs().max().item() for name, options in
        {"pipeline, eta left out": {}, "pipeline, eta=0.3": {"eta": 0.3}}.items()}
for name, gap in gaps.items():
    print(f"{name}: largest difference from the scheduler stepped by hand {gap:.1e}")
assert own == 0.3 and torch.equal(drawn(), drawn(eta=0.0))
assert gaps["pipeline, eta left out"] > 0.01 and gaps["pipeline, eta=0.3"] < 1e-4
EOF
