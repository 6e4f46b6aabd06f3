"""Every family with every task and every sampler, on tiny networks: pictures that are finite, drawn in the steps that
were asked for, and the same again; and diffusers' pictures wherever diffusers has the combination."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, difference, pipeline, seeded, smooth_picture, tiny_sd
from PIL import Image

import plainsd
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.generate import batch, final, image_to_image, inpaint, outpaint, text_to_image
from plainsd.pictures import drawing
from plainsd.pictures.model import StableDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own, thousands of them
SIZE = 32
PHOTO = smooth_picture(SIZE)
HOLE = (8, 8, 24, 32)  # left, top, right, bottom
MASK = Image.new("L", PHOTO.size)
MASK.paste(255, HOLE)

GELU = replace(TINY.text[0], activation="gelu")
SD2 = replace(TINY, name="tiny-2", unet=replace(TINY.unet, heads=(1, 2)), text=(GELU,), conv_projections=False)


def reading_masks(variant):
    return replace(variant, name=f"{variant.name}-inpainting", unet=replace(variant.unet, in_channels=9))


FAMILIES = {
    "sd1": TINY,
    "sd1-inpainting": reading_masks(TINY),
    "sd1-lcm": replace(TINY, name="tiny-lcm", unet=replace(TINY.unet, guidance_dim=12), sampler="lcm"),
    "sd2-base": SD2,
    "sd2-768": replace(SD2, name="tiny-2-v", prediction="v_prediction"),
    "sd2-inpainting": reading_masks(SD2),
    "sdxl-base": TINY_XL,
    "sdxl-inpainting": reading_masks(TINY_XL),
    "sdxl-refiner": TINY_REFINER,
}


@pytest.fixture(scope="module")
def models() -> dict[str, StableDiffusion]:
    made = {name: tiny_sd(variant) for name, variant in FAMILIES.items()}
    made["sdxl-refiner"].vae = made["sdxl-base"].vae  # real ones share it too
    made["sdxl-refined"] = replace(made["sdxl-base"], refiner=made["sdxl-refiner"])
    return made


# --- all of them -----------------------------------------------------------------------------------------------------


def from_text(sd, **options):
    return text_to_image(sd, "a red apple", "blurred", size=SIZE, **options), (), 3


def over_picture(sd, **options):
    return image_to_image(sd, "a red apple", PHOTO, 0.7, "blurred", **options), (PHOTO,), 2


def into_hole(sd, **options):
    return inpaint(sd, "a red apple", PHOTO, MASK, 1.0, "blurred", **options), (PHOTO, MASK), 3


def past_edges(sd, **options):
    """24 pixels of the picture, and 8 more at its right."""
    events = outpaint(sd, "a red apple", PHOTO.crop((0, 0, 24, SIZE)), right=8, strength=0.7, **options)
    canvas, mask = PHOTO.copy(), Image.new("L", PHOTO.size, "white")
    canvas.paste(PHOTO.crop((23, 0, 24, SIZE)).resize((8, SIZE)), (24, 0))
    mask.paste("black", (0, 0, 24, SIZE))
    return events, (canvas, mask), 2


TASKS = {"text": from_text, "image": over_picture, "inpaint": into_hole, "outpaint": past_edges}
GRID = [(family, task) for family in [*FAMILIES, "sdxl-refined"] for task in TASKS
        if task in ("inpaint", "outpaint") or not family.endswith("inpainting")]  # fmt: skip


@pytest.mark.parametrize(("family", "task"), GRID)
def test_every_sampler_draws_and_draws_the_same_again(models, family, task):
    sd, drawn = models[family], set()
    for sampler in SAMPLERS:
        events, given, count = TASKS[task](sd, steps=3, sampler=sampler, seed=5)
        assert events.steps == count
        *steps, (images, settings, latents) = events
        assert [step.index for step in steps] == list(range(count))
        assert all(step.x.isfinite().all() and step.denoised.isfinite().all() for step in steps), sampler
        assert latents.shape == (1, 4, SIZE // 8, SIZE // 8) and latents.isfinite().all(), sampler
        assert images[0].size == PHOTO.size and np.asarray(images[0]).std() > 5, sampler
        if len(given) == 2:
            assert difference(Image.composite(given[0], images[0], given[1]), given[0]) == 0, sampler
        again = islice(batch(sd, settings, *given), count)  # what it is decoded to need not be seen again
        assert all(torch.equal(a.x, b.x) for a, b in zip(steps, again, strict=True)), sampler
        drawn.add(images[0].tobytes())
    assert len(drawn) > 0.6 * len(SAMPLERS)  # in two steps those that remember more are those that remember less


# --- against diffusers -----------------------------------------------------------------------------------------------
# Left out: lms and dpmpp_sde, whose diffusers classes need packages that tests do without, dpmpp_2s_a and dpmpp_3m_sde,
# which diffusers lacks (tests/test_samplers.py has the trajectories of all four); plms in the middle of the noise
# levels, where diffusers cuts off PNDM's repeated first step, and then tells the network of levels that x is not at;
# dpm2 and dpm2_a where the known part is put back at every step, which diffusers' KDPM2 schedulers put back at the end
# of a step where its middle is due.

SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "dpmpp_2m_sde_heun": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
ALL = tuple(SCHEDULERS)
OVER = tuple(name for name in SCHEDULERS if name != "plms")
PUT_BACK = tuple(name for name in OVER if name not in ("dpm2", "dpm2_a"))
SOME = ("ddim", "euler_a", "dpmpp_2m")


@pytest.fixture(scope="module")
def pipe(models, tmp_path_factory):
    """A pipeline of diffusers over a family's weights, with the scheduler of one of our samplers."""
    place, made = tmp_path_factory.mktemp("families"), {}

    def scheduled(name: str, family: str, sampler: str):
        import diffusers

        if not (place / family).exists():
            plainsd.save(models[family], place / family)
        if (name, family) not in made:
            made[name, family] = pipeline(name, place / family, "DDIMScheduler")
            made[name, family].own = made[name, family].scheduler.config
        scheduler, options = SCHEDULERS[sampler]
        if sampler not in ("lcm", "tcd"):
            options = {**options, "timestep_spacing": SAMPLERS[sampler].spacing}
        one = made[name, family]
        one.scheduler = getattr(diffusers, scheduler).from_config(one.own, **options)
        return one

    return scheduled


PROMPTS = {"prompt": "a red apple", "negative": "blurred", "steps": 5, "guidance": 5.0, "seed": 3}


def theirs(pipe, **more):
    words = {"prompt": "a red apple", "negative_prompt": "blurred", "num_inference_steps": 5, "guidance_scale": 5.0}
    if type(pipe.scheduler).__name__ == "TCDScheduler":
        more["eta"] = 0.3  # the scheduler's own, which pipelines put out of force
    if "LatentConsistency" in type(pipe).__name__:
        del words["negative_prompt"]
    return pipe(**words, **{"generator": seeded(3)} | more).images[0]


@pytest.mark.parametrize(
    ("family", "name", "samplers"),
    [
        ("sd1", "StableDiffusionPipeline", SOME),
        ("sd1-lcm", "LatentConsistencyModelPipeline", ("lcm",)),
        ("sd1-lcm", "StableDiffusionPipeline", SOME),
        ("sd2-base", "StableDiffusionPipeline", SOME),
        ("sd2-768", "StableDiffusionPipeline", ALL),
        ("sdxl-base", "StableDiffusionXLPipeline", ALL),
    ],
)
def test_text_to_image_is_diffusers_picture(models, pipe, family, name, samplers):
    for sampler in samplers:
        expected = theirs(pipe(name, family, sampler), height=SIZE, width=SIZE)
        found = final(text_to_image(models[family], size=SIZE, sampler=sampler, **PROMPTS))[0]
        assert difference(found, expected) <= 1, sampler
        assert np.asarray(found).std() > 5


@pytest.mark.parametrize(
    ("family", "name", "samplers"),
    [
        ("sd1-lcm", "StableDiffusionImg2ImgPipeline", ("lcm",)),
        ("sd2-base", "StableDiffusionImg2ImgPipeline", SOME),
        ("sd2-768", "StableDiffusionImg2ImgPipeline", OVER),
        ("sdxl-base", "StableDiffusionXLImg2ImgPipeline", SOME),
        ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", OVER),
    ],
)
def test_image_to_image_is_diffusers_picture(models, pipe, family, name, samplers):
    for sampler in samplers:
        expected = theirs(pipe(name, family, sampler), image=PHOTO, strength=0.7)
        found = final(image_to_image(models[family], image=PHOTO, strength=0.7, sampler=sampler, **PROMPTS))[0]
        assert difference(found, expected) <= 1, sampler
        assert difference(found, PHOTO) > 50


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize(
    ("family", "name", "samplers"),
    [
        ("sd1-inpainting", "StableDiffusionInpaintPipeline", OVER),
        ("sd2-inpainting", "StableDiffusionInpaintPipeline", SOME),
        ("sd2-768", "StableDiffusionInpaintPipeline", PUT_BACK),
        ("sdxl-inpainting", "StableDiffusionXLInpaintPipeline", SOME),
        ("sdxl-base", "StableDiffusionXLInpaintPipeline", SOME),
        ("sdxl-refiner", "StableDiffusionXLInpaintPipeline", SOME),
    ],
)
def test_inpainting_is_diffusers_picture(models, pipe, monkeypatch, family, name, samplers, strength):
    """To networks that do not read it, diffusers encodes the masked picture too, which draws noise once more."""
    if models[family].unet.config.in_channels == 4:
        prepared = drawing.prepare_latents
        monkeypatch.setattr(drawing, "prepare_latents", lambda sd, size, draw: (
            noise := prepared(sd, size, draw), draw(noise.shape[1:]))[0])  # fmt: skip
    for sampler in samplers:
        told = {"image": PHOTO, "mask_image": MASK, "height": SIZE, "width": SIZE}
        expected = theirs(pipe(name, family, sampler), **told, strength=strength)
        found = final(inpaint(models[family], image=PHOTO, mask=MASK, strength=strength, sampler=sampler, **PROMPTS))[0]
        assert difference(found.crop(HOLE), expected.crop(HOLE)) <= 1, sampler
        assert difference(found.crop(HOLE), PHOTO.crop(HOLE)) > 50


# --- the refiner's part ----------------------------------------------------------------------------------------------
# heun, dpm2 and dpm2_a are left out: diffusers' base pipeline counts their two calls a step one by one, and may stop
# between them.

HANDED_OVER = ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis",
               "sa_solver", "tcd")  # fmt: skip


@pytest.mark.parametrize("handover", [0.4, 0.7])
def test_the_hand_over_to_the_refiner_is_diffusers_picture(models, pipe, handover):
    for sampler in HANDED_OVER:
        generator = seeded(3)
        base = pipe("StableDiffusionXLPipeline", "sdxl-base", sampler)
        told = {"denoising_end": handover, "output_type": "latent", "generator": generator}
        latents = theirs(base, **told, height=SIZE, width=SIZE)[None]
        refiner = pipe("StableDiffusionXLImg2ImgPipeline", "sdxl-refiner", sampler)
        expected = theirs(refiner, image=latents, denoising_start=handover, generator=generator)
        found = final(text_to_image(models["sdxl-refined"], size=SIZE, sampler=sampler, handover=handover, **PROMPTS))[
            0
        ]
        assert difference(found, expected) <= 1, sampler
        alone = final(text_to_image(models["sdxl-base"], size=SIZE, sampler=sampler, **PROMPTS))[0]
        assert difference(found, alone) > 5, sampler
