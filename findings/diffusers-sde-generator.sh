#!/usr/bin/env bash
# Expected: a pipeline that is given torch.Generator().manual_seed(1) draws the same picture each time, with any scheduler, and
# leaves PyTorch's global random numbers alone.
# What happens: DPMSolverSDEScheduler takes no generator. Its noise comes from a seed that it draws from the global numbers, so
# that the same call gives another picture, and changes what the program draws next. With noise_sampler_seed=7 a picture
# comes again, but then every picture gets the same noise at its steps, whatever its generator.
# Who meets it: whoever notes seeds of "DPM++ SDE" pictures to draw them again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 torchsde==0.2.6
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "torchsde")), sep=", ")
import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 16), norm_num_groups=8, cross_attention_dim=8, attention_head_dim=2,
    layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
vae, embeds, start = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8), torch.randn(1, 5, 8), torch.randn(1, 4, 8, 8)


def drawn(scheduler, seed=1):
    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=embeds, latents=start.clone(), num_inference_steps=5, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images


repeats = {}
for name, options in {
    "EulerAncestralDiscreteScheduler": {}, "KDPM2AncestralDiscreteScheduler": {}, "DDPMScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"}, "DPMSolverSDEScheduler": {},
}.items():
    make = lambda: getattr(diffusers, name)(**options)
    first, again, other = drawn(make()), drawn(make()), drawn(make(), seed=2)
    repeats[name] = torch.equal(first, again)
    print(f"{name}: same generator, same picture: {repeats[name]}; another generator, another: {not torch.equal(first, other)}")
assert [name for name, same in repeats.items() if not same] == ["DPMSolverSDEScheduler"]

torch.manual_seed(5)
without = torch.rand(1)
torch.manual_seed(5)
drawn(diffusers.DPMSolverSDEScheduler())
same = torch.equal(torch.rand(1), without)
print("what the program draws next is the same:", same)
assert not same

one, two = (drawn(diffusers.DPMSolverSDEScheduler(noise_sampler_seed=7), seed=seed) for seed in (1, 2))
print("noise_sampler_seed=7: another generator, another picture:", not torch.equal(one, two))
assert torch.equal(one, two)
EOF
