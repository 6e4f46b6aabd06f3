#!/usr/bin/env bash
# Expected: DeepCacheSDHelper, once enabled, makes each picture from itself: its first step is reckoned in full, and what is
# kept for the steps after it is its own.
# What happens: the helper counts the steps to be reckoned in full from the place of the schedule where the first picture since
# enable() began, for ever. A picture of another strength begins elsewhere; its first steps may then be such as take what
# is kept, and what is kept is the last picture's: the same call draws something else after another picture,
# and something else again after a third, further from the uncached picture than caching alone takes it. No error or
# warning. disable() and enable() before each call make it come again.
# Who meets it: who keeps a pipeline for img2img or inpainting with DeepCache open, and changes the strength.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 deepcache==0.1.1
TRANSFORMERS_VERBOSITY=error "$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "deepcache")), sep=", ")
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 16), norm_num_groups=8, cross_attention_dim=8, attention_head_dim=2,
    layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()  # fmt: skip
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8).eval()
pipe = StableDiffusionImg2ImgPipeline(
    vae, None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False
)
pipe.set_progress_bar_config(disable=True)
embeds, pictures = torch.randn(1, 5, 8), {name: torch.randn(1, 4, 8, 8) for name in "ABC"}  # as latents


def draw(name, strength):
    return pipe(
        prompt_embeds=embeds, image=pictures[name], strength=strength, num_inference_steps=10, guidance_scale=1.0,
        output_type="latent", generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


def last(*calls):
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    for call in calls:
        drawn = draw(*call)
    helper.disable()
    return drawn


plain, full = draw("C", 0.9), ("C", 0.9)
alone = last(full)
seen = {
    "without the helper": plain,
    "with it, first": alone,
    "after A of the same strength": last(("A", 0.9), full),
    "after A of strength 0.6": last(("A", 0.6), full),
    "after A of strength 0.5": last(("A", 0.5), full),
    "after B of strength 0.5": last(("B", 0.5), full),
}
off = {}
for name, drawn in seen.items():
    off[name] = [((drawn - other).norm() / other.norm()).item() for other in (plain, alone)]
    print("picture C, {}: off by {:.3f} from the plain one, by {:.3f} from the first".format(name, *off[name]))
alike = {name for name, (_, first) in off.items() if first == 0}
assert alike == {"with it, first", "after A of the same strength", "after A of strength 0.6"}
after = seen["after A of strength 0.5"], seen["after B of strength 0.5"]
assert all(off[f"after {name} of strength 0.5"][0] > 1.5 * off["with it, first"][0] for name in "AB")
apart = ((after[0] - after[1]).norm() / alone.norm()).item()
print(f"picture C after A and after B of strength 0.5: {apart:.3f} apart")
assert apart > 0.01
EOF
