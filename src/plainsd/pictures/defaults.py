"""What is wanted, made complete and checked: the model's defaults where nothing is said, an error where nothing fits.

Everything a user can get wrong in a task's settings is found here, before any network runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plainsd.diffusion.samplers import SAMPLERS, check_names, sampler_levels
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError, unknown
from plainsd.listing import suffix_of
from plainsd.models.tiny_vae import TinyVAEConfig
from plainsd.models.variants import edits
from plainsd.pictures.guidance import check_guidance
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.sampling import steps_of_strength
from plainsd.pictures.seamless import check_seamless
from plainsd.pictures.settings import RANDOM, SEEDS, SIZES, UPSCALERS, Resolved, Settings, drawn_seed, noise_of
from plainsd.text.prompts import lora_tags

IMAGE_GUIDANCE = 1.5  # of models that edit a picture, if nothing is said
HANDOVER = 0.8  # where a refiner takes over, if nothing is said
MULTIPLE = 8  # sides of pictures, in pixels; also where a VAE's own factor is less


def resolved(sd: StableDiffusion, settings: Settings) -> Resolved:
    """Nothing left open: the model's defaults in place of None. UserError where a value cannot be."""
    settings.check()
    check_guidance(sd, settings)
    refined = check_refiner(sd, settings)
    variant = sd.variant
    sampler = settings.sampler or variant.sampler
    check_names(sampler, settings.spacing)
    own = SAMPLERS[sampler].spacing
    spacing = settings.spacing or (own if own == "distilled" else variant.spacing or own)
    steps = settings.steps or variant.steps
    sampler_levels(sd.schedule, sampler, steps, spacing)  # raises where they do not go together
    if settings.eta is not None and "eta" not in SAMPLERS[sampler].takes:
        raise UserError(
            f"sampler {sampler!r} has no eta; leave eta out, or choose one such as 'ddim'",
            field="eta",
            value=settings.eta,
        )
    check_upscaler(sd, settings.upscaler)
    if settings.tiling:
        check_seamless(sd.unet, sd.vae)
    if (
        not encodes(sd)
        and settings.strength is not None
        and not (settings.hires and settings.upscaler.startswith("latent"))
    ):
        raise UserError(
            "this model's autoencoder is a decoder alone, and the picture would have to be encoded; put taesd_encoder "
            "beside taesd_decoder, or choose another with --vae",
            field="vae",
        )
    if settings.variation_strength and settings.variation_seed is None:
        raise UserError(
            f"variation strength {settings.variation_strength} without a variation seed; give both",
            field="variation_strength",
            value=settings.variation_strength,
        )
    guidance = variant.guidance if settings.guidance is None else settings.guidance
    if guidance == 0 and settings.like is None:
        guidance = 1  # off, as diffusers has it, and as Turbo models' cards write it
    choices: dict[str, Any] = {"sampler": sampler, "spacing": spacing, "steps": steps, "guidance": float(guidance)}
    seeds = {name: drawn_seed() for name in SEEDS if getattr(settings, name) == RANDOM}
    if edits(sd.unet.config, sd.vae.config) and settings.image_guidance is None:
        choices["image_guidance"] = IMAGE_GUIDANCE
    named = {"model": model_name(sd), "noise": noise_of(settings)}
    whole = Resolved(**vars(settings) | choices | seeds | named | refined)
    return with_second_pass(sd, settings, whole) if settings.hires else whole


def with_second_pass(sd: StableDiffusion, settings: Settings, whole: Resolved) -> Resolved:
    """The spacing of another sampler is its own, unless one is wanted. UserError where its steps cannot be."""
    wanted: dict[str, Any] = {
        "hires": None,
        "handover": None,
        "eta": None,
        "spacing": settings.hires_spacing or settings.spacing,
    }
    again = resolved(sd, replace(second_pass(whole), **wanted))
    own = settings.hires_sampler or settings.hires_spacing
    return replace(whole, hires_spacing=again.spacing if own else None)


def second_pass(one: Resolved) -> Resolved:
    """What the second pass of hires draws with. Where it has a number of steps of its own, all of these run, the last
    of a longer drawing, so that they begin where the strength says (as in A1111)."""
    names = ("sampler", "spacing", "prompt", "negative", "guidance")
    own: dict[str, Any] = {name: value for name in names if (value := getattr(one, f"hires_{name}")) is not None}
    if one.hires_steps is not None:
        own["steps"] = max(one.hires_steps, int(one.hires_steps / (one.strength or math.inf)))
    return replace(one, **own)


def running_again(one: Resolved) -> int:
    """How many steps of the second pass run; none without one."""
    if not one.hires:
        return 0
    return one.hires_steps or steps_of_strength(one.steps, one.strength)


def check_refiner(sd: StableDiffusion, settings: Settings) -> dict:
    """The refiner's name, and where it takes over."""
    if sd.refiner is None:
        if settings.handover is not None:
            raise UserError(
                f"handover {settings.handover} needs a refiner; load one with --refiner, or leave it out",
                field="handover",
                value=settings.handover,
            )
        return {"refiner": None}
    ours, its = sd.vae.config, sd.refiner.vae.config
    if isinstance(sd.schedule, EDMSchedule) or isinstance(sd.refiner.schedule, EDMSchedule):
        raise UserError(
            f"{model_name(sd.refiner)!r} cannot refine what {model_name(sd)!r} draws: one of them was trained at other "
            "noise levels (EDM); leave --refiner out"
        )
    scales = [(config.scaling_factor, config.latents_mean, config.latents_std) for config in (ours, its)]
    tiny = isinstance(ours, TinyVAEConfig) or isinstance(its, TinyVAEConfig)  # the UNet's own latents, whose it may be
    if ours.latent_channels != sd.refiner.unet.config.in_channels or scales[0] != scales[1] and not tiny:
        names = f"{model_name(sd.refiner)!r} cannot refine what {model_name(sd)!r} draws"
        raise UserError(f"{names}: their latents differ; choose a refiner of the same family", field="refiner")
    return {"refiner": model_name(sd.refiner), "handover": HANDOVER if settings.handover is None else settings.handover}


def check_upscaler(sd: StableDiffusion, name: str) -> None:
    own = [] if sd.upscaler is None else [sd.upscaler.name]
    if name.lower() not in (*UPSCALERS, *(one.lower() for one in own)):
        raise unknown(
            "upscaler", name, [*UPSCALERS, *own, "or give a network's file with --upscaler"], field="upscaler"
        )


def encodes(sd: StableDiffusion) -> bool:
    return not isinstance(sd.vae.config, TinyVAEConfig) or sd.vae.config.encodes


def model_name(sd: StableDiffusion) -> str:
    """What stands in a picture's settings: the model's own name, and nothing of where it lies on this machine."""
    if sd.path is None:
        return sd.variant.name
    if sd.path.parent.name == "snapshots":  # hub cache: models--owner--name/snapshots/hash
        return sd.path.parents[1].name.split("--")[-1]
    return sd.path.stem if suffix_of(sd.path) in (".safetensors", ".ckpt") else sd.path.name


def settings_of_each(
    settings: Resolved, prompt: str | Sequence[str], negative: str | Sequence[str], count: int
) -> list[Resolved]:
    """One for each picture: each prompt `count` times, and one seed after the other."""
    if count < 1:
        raise UserError(f"count {count} is out of range; choose 1 or more", field="count", value=count)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts or len(prompts) != len(negatives):
        counts = f"{len(prompts)} prompts and {len(negatives)} negative prompts"
        raise UserError(f"{counts}; give at least one, and as many of both", field="negative")
    again = [text for text in (settings.hires_prompt, settings.hires_negative) if text]
    for text in (*prompts, *negatives, *again):
        if loras := lora_tags(text)[1]:
            raise UserError(
                f"<lora:{loras[0][0]}> in the prompt: take the tag out, and load the LoRA with the model",
                field="prompt",
            )
    settings.check_count(len(prompts) * count)
    if settings.counted == "batch_index" and settings.batch_size is None:
        settings = replace(settings, batch_size=settings.batch_index + len(prompts) * count)
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(count)]
    each = []
    for i, (p, n) in enumerate(pairs):
        seed: dict[str, Any] = {settings.counted: getattr(settings, settings.counted) + i}
        each.append(replace(settings, prompt=p, negative=n, **seed))
    return each


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    if any(side % MULTIPLE or not SIZES[0] <= side <= SIZES[1] for side in size):
        width, height = (min(max(round(side / MULTIPLE), 1), SIZES[1] // MULTIPLE) * MULTIPLE for side in size)
        raise UserError(
            f"size {size[0]}x{size[1]}: both sides must be multiples of {MULTIPLE} from {SIZES[0]} to {SIZES[1]}; "
            f"try {width}x{height}",
            field="size",
            value=size,
        )
    return size


def enlarged_size(size: tuple[int, int], times: float) -> tuple[int, int]:
    """The size of the second pass, in multiples of 8."""
    width, height = (round(side * times / MULTIPLE) * MULTIPLE for side in size)
    return width, height
