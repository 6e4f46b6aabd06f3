"""Settings resolved and checked: the model's defaults in place of None, an error for what does not fit.

Everything a user can get wrong in a task's settings is caught here, before any network runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plainsd.diffusion.conventions import automatic_spacing, convention, planned_levels
from plainsd.diffusion.samplers import SAMPLERS, check_names
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError, unknown
from plainsd.listing import suffix_of
from plainsd.models.tiny_vae import AnyVAEConfig, TinyVAEConfig
from plainsd.models.variants import edits
from plainsd.pictures.guidance import check_guidance
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.sampling import levels_of, second_pass
from plainsd.pictures.settings import (
    AUTOMATIC,
    DEFAULTS,
    LATENT_MODES,
    MASK_OPTIONS,
    NEEDS,
    RANDOM,
    SEEDS,
    SIZES,
    UPSCALERS,
    Resolved,
    Settings,
    check_needs,
    drawn_seed,
    noise_of,
)
from plainsd.text.prompts import tagged_loras

IMAGE_GUIDANCE = 1.5  # default, for models that edit a picture
HANDOVER = 0.8  # default: where a refiner takes over
OF_HIRES = [name for name in NEEDS if name.startswith("hires_")]
MULTIPLE = 8  # of the sides of pictures, in pixels, unless the VAE's factor is more


def resolved(sd: StableDiffusion, settings: Settings) -> Resolved:
    """Settings with the model's defaults in place of None. UserError for invalid values."""
    settings.check()
    check_needs([name for name in OF_HIRES if getattr(settings, name) is not None], ["hires"] if settings.hires else [])
    settings = replace(settings, upscaler=own_upscaler_name(sd, settings.upscaler))
    check_guidance(sd, settings)
    refined = check_refiner(sd, settings)
    variant = sd.variant
    sampler = settings.sampler or variant.sampler
    check_names(sampler, settings.spacing)
    like = None if settings.like == "diffusers" else settings.like
    edm = isinstance(sd.schedule, EDMSchedule)
    spacing = automatic_spacing(like, sampler, variant.spacing, settings.spacing, timesteps=not edm)
    if spacing == "uniform" and settings.spacing is None and edm:
        spacing = variant.spacing or "karras"  # EDM models have no table of timesteps
    if spacing == "align_your_steps" and sd.unet.config.vector is not None:
        spacing = "align_your_steps_xl"
    steps = settings.steps or variant.steps
    planned_levels(sd.schedule, sampler, steps, spacing, like)  # raises if they do not go together
    if settings.eta is not None and "eta" not in SAMPLERS[sampler].takes:
        raise UserError(
            f"sampler {sampler!r} has no eta; leave eta out, or choose one such as 'ddim'",
            field="eta",
            value=settings.eta,
        )
    if settings.eta is not None and sampler == "sa_solver" and edm:
        raise UserError(
            "sa_solver adds noise between timesteps 200 and 800, and this model was trained at all noise levels (EDM); "
            "leave eta out, or choose another sampler",
            field="eta",
            value=settings.eta,
        )
    check_mask_options(settings)
    check_seed_resize(settings.seed_resize, sd.vae.config.factor)
    if (
        not encodes(sd)
        and settings.strength is not None
        and not isinstance(settings, Resolved)  # the second pass, of what was checked before
        and not (settings.hires and settings.upscaler in LATENT_MODES)
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
    if guidance == 0 and not convention(like).guidance_zero and "pair" not in SAMPLERS[sampler].takes:
        guidance = 1  # off, as in diffusers and on the model cards of Turbo models; CFG++ at 1 is on
    choices: dict[str, Any] = {"sampler": sampler, "spacing": spacing, "steps": steps, "guidance": float(guidance)}
    choices["like"] = like
    seeds = {name: drawn_seed() for name in SEEDS if getattr(settings, name) == RANDOM}
    if edits(sd.unet.config, sd.vae.config) and settings.image_guidance is None:
        choices["image_guidance"] = IMAGE_GUIDANCE
    named = {"model": model_name(sd), "noise": noise_of(settings)}
    whole = Resolved(**vars(settings) | choices | seeds | named | refined)
    return with_second_pass(sd, settings, whole) if settings.hires else whole


def with_second_pass(sd: StableDiffusion, settings: Settings, whole: Resolved) -> Resolved:
    """Resolves the hires pass: another sampler gets its own default spacing. UserError for steps that do not fit."""
    wanted: dict[str, Any] = {
        **dict.fromkeys(("hires", *OF_HIRES)),
        "handover": None,
        "eta": None,
        "spacing": None if settings.hires_spacing == AUTOMATIC else settings.hires_spacing or settings.spacing,
        "guidance": settings.guidance if settings.hires_guidance is None else settings.hires_guidance,
    }
    again = resolved(sd, replace(second_pass(whole), **wanted))
    steps = replace(again, hires_steps=whole.hires_steps)  # all of which run
    levels_of(sd, steps, on_picture=True, second_pass=True)  # raises likewise
    own = settings.hires_sampler or settings.hires_spacing
    kept = settings.hires_guidance is None and again.guidance == whole.guidance
    return replace(whole, hires_spacing=again.spacing if own else None, hires_guidance=None if kept else again.guidance)


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
    tiny = isinstance(ours, TinyVAEConfig) or isinstance(its, TinyVAEConfig)  # TAESD takes the UNet's own latents
    if ours.latent_channels != sd.refiner.unet.config.in_channels or scales[0] != scales[1] and not tiny:
        names = f"{model_name(sd.refiner)!r} cannot refine what {model_name(sd)!r} draws"
        raise UserError(f"{names}: their latents differ; choose a refiner of the same family", field="refiner")
    return {"refiner": model_name(sd.refiner), "handover": HANDOVER if settings.handover is None else settings.handover}


def own_upscaler_name(sd: StableDiffusion, name: str) -> str:
    """The upscaler's own name, whatever the capitals of this one. UserError for an unknown one."""
    own = [] if sd.upscaler is None else [sd.upscaler.name]
    names = {one.lower(): one for one in (*own, *UPSCALERS)}
    if name.lower() not in names:
        raise unknown(
            "upscaler", name, [*UPSCALERS, *own, "or give a network's file with --upscaler"], field="upscaler"
        )
    return names[name.lower()]


def check_mask_options(settings: Settings) -> None:
    """UserError for the first that is set where there is no mask."""
    for name in MASK_OPTIONS:
        if (value := getattr(settings, name)) != DEFAULTS[name] and not (settings.masked or settings.outpaint):
            raise UserError(
                f"{name.replace('_', ' ')} {value} without a mask; give one, or leave it out", field=name, value=value
            )


def check_seed_resize(size: tuple[int, int] | None, factor: int) -> None:
    if size is not None and min(size) < factor:
        what = f"seed resize {size[0]}x{size[1]} holds no latent of this model"
        raise UserError(f"{what}; both sides must be {factor} or more", field="seed_resize", value=size)


def encodes(sd: StableDiffusion) -> bool:
    return not isinstance(sd.vae.config, TinyVAEConfig) or sd.vae.config.encodes


def model_name(sd: StableDiffusion) -> str:
    """The model's name for a picture's settings, without its path on this machine."""
    if sd.path is None:
        return sd.variant.name
    if sd.path.parent.name == "snapshots":  # hub cache: models--owner--name/snapshots/hash
        return sd.path.parents[1].name.split("--")[-1]
    return sd.path.stem if suffix_of(sd.path) in (".safetensors", ".ckpt") else sd.path.name


def settings_of_each(
    settings: Resolved, prompt: str | Sequence[str], negative: str | Sequence[str], count: int
) -> list[Resolved]:
    """Settings for each picture: each prompt `count` times, with consecutive seeds."""
    if count < 1:
        raise UserError(f"count {count} is out of range; choose 1 or more", field="count", value=count)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts or len(prompts) != len(negatives):
        counts = f"{len(prompts)} prompts and {len(negatives)} negative prompts"
        raise UserError(f"{counts}; give at least one, and as many of both", field="negative")
    again = {name: [getattr(settings, name) or ""] for name in ("hires_prompt", "hires_negative")}
    for name, texts in {"prompt": prompts, "negative": negatives, **again}.items():
        for text in texts:
            check_untagged(name, text)
    settings.check_count(len(prompts) * count)
    if settings.counted == "batch_index" and settings.batch_size is None:
        settings = replace(settings, batch_size=settings.batch_index + len(prompts) * count)
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(count)]
    each = []
    for i, (p, n) in enumerate(pairs):
        seed: dict[str, Any] = {settings.counted: getattr(settings, settings.counted) + i}
        each.append(replace(settings, prompt=p, negative=n, **seed))
    return each


def check_untagged(field: str, text: str) -> None:
    """UserError for a LoRA's tag in a text that is drawn as it is."""
    try:
        loras = tagged_loras(text)[1]
    except UserError as error:  # a tag that cannot be read
        raise UserError(str(error), field=field) from None
    if loras:
        which = field.replace("_", " ").replace("negative", "negative prompt")
        raise UserError(
            f"<lora:{loras[0].name}> in the {which}: take the tag out, and load the LoRA with the model", field=field
        )


def size_multiple(vae: AnyVAEConfig) -> int:
    """What the sides of pictures are multiples of, in pixels: latents are whole."""
    return max(MULTIPLE, vae.factor)


def check_size(size: tuple[int, int], multiple: int = MULTIPLE) -> tuple[int, int]:
    if any(side % multiple or not SIZES[0] <= side <= SIZES[1] for side in size):
        width, height = (min(max(round(side / multiple), 1), SIZES[1] // multiple) * multiple for side in size)
        raise UserError(
            f"size {size[0]}x{size[1]}: both sides must be multiples of {multiple} from {max(SIZES[0], multiple)} to "
            f"{SIZES[1]}; try {width}x{height}",
            field="size",
            value=size,
        )
    return int(size[0]), int(size[1])


def enlarged_size(
    size: tuple[int, int], times: float, multiple: int = MULTIPLE, like: str | None = None
) -> tuple[int, int]:
    """The size of the second pass: the nearest in whole latents; in A1111, int(side * times) cut to them."""
    if convention(like).second_size_floored:
        width, height = (int(side * times) // multiple * multiple for side in size)
    else:
        width, height = (round(side * times / multiple) * multiple for side in size)
    return width, height
