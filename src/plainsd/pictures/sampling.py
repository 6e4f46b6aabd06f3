"""What every task shares: encoding and decoding by the VAE, and the sampling loop from noise to clean latents.

Precision changes in two places: around the UNet (`guidance.predict`) and around the VAE (`through_vae`). Everything
else is float32.

Shape letters: B pictures at once, L latent channels, H W height and width in pixels, h w those of the latents.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from plainsd.diffusion.conventions import convention, planned_levels, told_timestep, whole_row
from plainsd.diffusion.denoiser import (
    Denoise,
    Pair,
    differential,
    inpainting,
    inpainting_clean,
    spread_of,
    with_timesteps,
)
from plainsd.diffusion.noise import Path
from plainsd.diffusion.samplers import SAMPLERS, Levels, Step
from plainsd.diffusion.schedule import EDMSchedule, Level, NoiseSchedule
from plainsd.errors import UserError
from plainsd.models import vae_bands
from plainsd.models.deep_cache import DeepCache
from plainsd.models.tiny_vae import AnyVAE
from plainsd.pictures.control import Controls, Fitted
from plainsd.pictures.guidance import Estimates, Join, UNetCall, guided_denoise, guided_pair, switched_off
from plainsd.pictures.image_prompt import ImagePrompt, ImagePrompts
from plainsd.pictures.memory import in_bands, on_stage
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.noise import Draw, NoiseOfEach
from plainsd.pictures.plan import encode_prompt
from plainsd.pictures.seamless import seamless, wrapped_edges
from plainsd.pictures.settings import Resolved

DECODED_AT_ONCE = 2**18  # pixels: one picture of 512x512, which takes about 2 GB


# --- the VAE ---------------------------------------------------------------------------------------------------------


def through_vae(sd: StableDiffusion, run: Callable[[AnyVAE, Tensor], Tensor], x: Tensor) -> Tensor:
    """`run` of the VAE on x, in the VAE's dtype; float32 outside. On overflow it runs again in float32.

    On a CPU maps lie channels last: oneDNN's convolutions take a fifth less time so, whatever the weights' layout.
    """
    vae = on_stage(sd, sd.vae)
    given = x.to(next(vae.parameters()))
    if given.device.type == "cpu":
        given = given.contiguous(memory_format=torch.channels_last)
    y = run(vae, given).float()
    if y.isfinite().all():
        return y
    if x.isfinite().all():
        warnings.warn(f"the VAE overflowed in {next(sd.vae.parameters()).dtype}; done again in float32", stacklevel=2)
        y = run(deepcopy(sd.vae).float(), x.to(sd.device)).float()
    if not y.isfinite().all():
        raise UserError(
            "the model computed numbers that are not finite; try --dtype float32, or a lower guidance", field="guidance"
        )
    return y


def encode(sd: StableDiffusion, pixels: Tensor, draw: NoiseOfEach, *, tiling: bool = False) -> Tensor:
    """One picture, or one each (1 or B, 3, H, W) -> latents (B, L, h, w) sampled from the encoder's distribution."""
    mean, logvar = moments_of(sd, pixels, tiling=tiling)
    return sd.vae.config.scaled(mean + torch.exp(0.5 * logvar) * draw.encoder(mean.shape[1:]))


def moments_of(sd: StableDiffusion, pixels: Tensor, *, tiling: bool = False) -> Tensor:
    """(1 or B, 3, H, W) -> mean and log variance, (2, 1 or B, L, h, w), unscaled."""
    banded = not tiling and in_bands(sd, pixels.shape[0] * pixels.shape[2] * pixels.shape[3])

    def moments(vae: AnyVAE, x: Tensor) -> Tensor:
        with wrapped_edges(vae) if tiling else nullcontext():
            gaussian = vae_bands.encode_in_bands(vae, x) if banded else vae.encode(x)
        return torch.stack([gaussian.mean, gaussian.logvar])

    pieces = [through_vae(sd, moments, piece) for piece in pixels.split(at_once(sd, len(pixels)))]
    return torch.cat(pieces, dim=1)


def to_edit(sd: StableDiffusion, pixels: Tensor, *, tiling: bool = False) -> Tensor:
    """Pictures (B, 3, H, W) as inputs of a model that edits them: the encoder's mean, (B, L, h, w), unscaled except for
    EDM models (CosXL)."""
    mean = moments_of(sd, pixels, tiling=tiling)[0]
    return sd.vae.config.scaled(mean) if isinstance(sd.schedule, EDMSchedule) else mean


def at_once(sd: StableDiffusion, most: int) -> int:
    """How many pictures go through the VAE together."""
    return most if sd.saving.rows is None else min(most, sd.saving.rows)


def decode(sd: StableDiffusion, latents: Tensor, *, tiling: bool = False) -> Tensor:
    """(B, L, h, w) -> pixels (B, 3, H, W), a few pictures at a time. `tiling`: see seamless.py; it takes no bands."""
    unscaled = sd.vae.config.unscaled(latents)
    area = latents.shape[-1] * latents.shape[-2] * sd.vae.config.factor**2
    pieces = unscaled.split(at_once(sd, max(1, DECODED_AT_ONCE // area)))
    banded = not tiling and in_bands(sd, len(pieces[0]) * area)

    def pixels(vae: AnyVAE, z: Tensor) -> Tensor:
        with wrapped_edges(vae) if tiling else nullcontext():
            return vae_bands.decode_in_bands(vae, z) if banded else vae.decode(z)

    return torch.cat([through_vae(sd, pixels, piece) for piece in pieces])


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The given parts of a picture: latents to start from, masks, and extra input channels."""

    latents: Tensor | None  # (B, L, h, w), clean; None: sampling starts from pure noise
    mask: Tensor | None = None  # (1, 1, h, w), 1 where to repaint; elsewhere the latents are kept
    change: Tensor | None = None  # (1, 1, h, w), 0 to 1: how early each position begins to change, see `differential`
    concat: Tensor | None = None  # (B, 1 + L, h, w): mask and masked picture; (B, L, h, w): a picture to edit


def levels_of(sd: StableDiffusion, one: Resolved, *, on_picture: bool = False, second_pass: bool = False) -> Levels:
    """The levels of a run, from pure noise or on a given picture."""
    strength, whole = one.strength if on_picture else None, second_pass and all_run(one)
    return planned_levels(sd.schedule, one.sampler, one.steps, one.spacing, one.like, strength, all_run=whole)


def row_of(sd: StableDiffusion, one: Resolved, *, second_pass: bool = False) -> tuple[Level, ...]:
    """The full schedule, of which the last part runs on a picture."""
    whole = second_pass and all_run(one)
    return whole_row(sd.schedule, one.sampler, one.steps, one.spacing, one.like, one.strength, all_run=whole)


def all_run(one: Resolved) -> bool:
    """Whether the hires pass runs all its steps, the strength only setting where they begin."""
    return one.hires_steps is not None or convention(one.like).second_pass_whole


def second_pass(one: Resolved) -> Resolved:
    """The settings of the hires pass."""
    names = ("sampler", "spacing", "prompt", "negative", "guidance", "steps")
    return replace(one, **{name: value for name in names if (value := getattr(one, f"hires_{name}")) is not None})


def edited_steps(one: Resolved) -> int:
    """The steps by which prompts are edited: of some samplers A1111 counts each twice."""
    return one.steps * (2 if one.sampler in convention(one.like).second_order else 1)


def from_nothing(one: Resolved) -> bool:
    """Whether inpainting and editing start from pure noise, at full strength."""
    return one.strength == 1 and not convention(one.like).image_keeps


def steps_to_run(sd: StableDiffusion, one: Resolved, *, on_picture: bool = False) -> int:
    """How many steps a task yields; with a hires pass those of both passes."""
    first = len(levels_of(sd, one, on_picture=on_picture).sigmas) - 1
    if on_picture or not one.hires:
        return first
    return first + len(levels_of(sd, second_pass(one), on_picture=True, second_pass=True).sigmas) - 1


def prepare_latents(sd: StableDiffusion, size: tuple[int, int], draw: NoiseOfEach) -> Tensor:
    """The initial noise for a picture of this width and height in pixels: (B, L, h, w)."""
    width, height = (side // sd.vae.config.factor for side in size)
    return draw.first((sd.vae.config.latent_channels, height, width))


def sample(
    sd: StableDiffusion,
    each: Sequence[Resolved],
    size: tuple[int, int],
    noise: Tensor,
    draw: NoiseOfEach | Draw,
    known: Known | None = None,
    first_pass: int | None = None,
    control: Sequence[Fitted] = (),
    image_prompt: Sequence[ImagePrompt] = (),
    shown: tuple[int, int] | None = None,
) -> Generator[Step, None, Tensor]:
    """Yields the sampler's steps; returns clean latents (B, L, h, w).

    `each` differ in prompts, seeds and guidance scale only; `size` is the picture's, for SDXL's conditioning; `noise`
    is the initial noise, and `draw` gives more; `first_pass` is `edited_steps` of an earlier pass; `control` and
    `image_prompt` do not act on a refiner; `shown` is the size of the picture that is cut out of this one, if not all.
    """
    one, shape = each[0], noise.shape[1:]
    again = first_pass is not None
    levels = levels_of(sd, one, on_picture=known is not None, second_pass=again)
    row = levels.sigmas if known is None else row_of(sd, one, second_pass=again)
    anew = known is not None and known.mask is not None and known.change is None and from_nothing(one)
    if known is None or known.latents is None or anew:
        x = levels.from_noise(noise)
        start: float = levels.sigmas[0]
    else:
        x = levels.from_picture(known.latents, noise)
        start = math.inf
    path = None
    if "path" in SAMPLERS[one.sampler].takes:
        assert isinstance(draw, NoiseOfEach)  # samplers that take a path are all batched
        path = draw.path(shape, row, levels.sigmas)
    calls = count() if convention(one.like).prompts == "batches" else None
    concat, done = known.concat if known else None, 0
    count_run = len(levels.sigmas) - 1
    joins: list[Join] = [Controls(sd, control, count_run, tiling=one.tiling)] if control else []
    joins += [ImagePrompts(sd, image_prompt, size, count_run, shown)] if image_prompt else []
    for models, own in turns(sd, one, levels, second=again):
        denoise, *later = (
            _denoise(model, each, size, levels, concat, first_pass, joins if model is sd else [], calls)
            for model in models
        )
        if later:
            denoise = handed_over(denoise, later[0], sd.schedule, one.handover)
        if (timestep := told_timestep(sd.schedule, one.sampler, one.like)) is not None:
            denoise = with_timesteps(denoise, timestep)
        if known is not None and known.change is not None:
            denoise = differential(denoise, known.latents, known.change, levels.sigmas)
        elif known is not None and known.mask is not None:
            denoise = _masked(denoise, known, noise, start, sd.schedule, one)
        options = sampler_options(models[0], one, own, path, denoise)
        for step in SAMPLERS[one.sampler].run(denoise, x, own.sigmas, lambda: draw(shape), **options):
            yield step._replace(index=done + step.index)
        x, done = step.x, done + len(own.sigmas) - 1
    clean = levels.clean(step.x, step.sigma)
    if known is not None and known.mask is not None:
        clean = known.mask * clean + (1 - known.mask) * known.latents
    return clean


def _masked(
    denoise: Denoise | Pair,
    known: Known,
    noise: Tensor,
    start: float,
    schedule: NoiseSchedule | EDMSchedule,
    one: Resolved,
) -> Denoise | Pair:
    """The network, and outside the mask what is known: as it is shown to the network by this program."""
    rules = convention(one.like)
    if not rules.keeps_own:
        return inpainting(denoise, known.latents, known.mask, noise, start=start)
    if one.sampler in rules.by_timesteps and isinstance(schedule, NoiseSchedule):
        return inpainting_clean(denoise, known.latents, known.mask)
    return inpainting(denoise, known.latents, known.mask, noise, start=0.0)


def turns(
    sd: StableDiffusion, one: Resolved, levels: Levels, *, second: bool = False
) -> list[tuple[list[StableDiffusion], Levels]]:
    """Which model samples which levels: the base model, and after the fraction `handover` of the timesteps (in ComfyUI,
    of the steps) its refiner, if any (Podell et al. 2023, arXiv:2307.01952, section 2.5). Each starts the sampler
    afresh, as two pipelines would; if the handover is inside the sampler, both are listed for all levels. `second`: in
    the second pass of hires."""
    if sd.refiner is None or (one.hires and not second and convention(one.like).refines_second_pass):
        return [([sd], levels)]
    if convention(one.like).refines_midway:
        return [([sd, sd.refiner], levels)]
    assert one.handover is not None  # ensured by `check_refiner`
    entries = len(sd.schedule)
    last = round(entries - one.handover * entries)
    own = sum(timestep >= last for timestep in levels.timesteps)
    if convention(one.like).refines_by_steps:
        own = round(one.handover * one.steps)
    both = (([sd], levels.part(0, own)), ([sd.refiner], levels.part(own)))
    return [(models, part) for models, part in both if len(part.sigmas) > 1]


def handed_over(
    denoise: Denoise, refined: Denoise, schedule: NoiseSchedule | EDMSchedule, handover: float | None
) -> Denoise:
    """The first model, and from the first call after the fraction `handover` of the table's timesteps on the second
    one, also where a sampler goes back up."""
    assert isinstance(schedule, NoiseSchedule) and handover is not None  # ensured by `check_refiner`
    table, switched = schedule.sigmas, False

    def either(x: Tensor, sigma: float) -> Tensor:
        nonlocal switched
        nearest = int((table - sigma).abs().argmin())
        switched = switched or (len(table) - 1 - nearest) / len(table) >= handover
        return (refined if switched else denoise)(x, sigma)

    return either


def sampler_options(
    sd: StableDiffusion, one: Resolved, levels: Levels, path: Path | None, pair: Denoise | Pair
) -> dict[str, Any]:
    """The sampler's keyword arguments that are not left at their defaults."""
    options = {
        "eta": one.eta,
        "prediction": "epsilon" if one.like == "a1111" else sd.prediction,
        "sigma_data": spread_of(sd.schedule),
        "strides": levels.strides,
        "path": path,
        "sigma_at": sd.schedule.sigma if isinstance(sd.schedule, NoiseSchedule) else None,
        "pair": pair,
        "around": None if convention(one.like).plain_levels else levels.around,  # the others cut their rows
    }
    taken = {name: options[name] for name in SAMPLERS[one.sampler].takes if options[name] is not None}
    return {**convention(one.like).solvers.get(one.sampler, {}), **taken}


def _denoise(
    sd: StableDiffusion,
    each: Sequence[Resolved],
    size: tuple[int, int],
    levels: Levels,
    concat: Tensor | None,
    first_pass: int | None,
    joins: Sequence[Join],
    calls: Iterator[int] | None,
) -> Denoise | Pair:
    """The network with prompts, guidance and controls; for samplers that take a pair, both estimates."""
    one, steps = each[0], len(levels.sigmas) - 1
    if calls is not None:  # counting all requested steps, run or not
        steps = edited_steps(one)
    if sd.unet.config.in_channels == sd.vae.config.latent_channels:
        concat = None  # a refiner after an inpainting model
    planned = {
        pair: encode_prompt(sd, *pair, steps, clip_skip=one.clip_skip, first_pass=first_pass, like=one.like, size=size)
        for pair in dict.fromkeys((s.prompt, s.negative) for s in each)
    }
    plans = [planned[s.prompt, s.negative] for s in each]
    network: UNetCall = DeepCache(sd.unet, one.cache) if one.cache else sd.unet
    if one.tiling:
        network = seamless(sd.unet, network)
    scales = [1.0 if switched_off(s) else s.guidance for s in each]
    estimates = Estimates(sd, plans, concat, levels.sigmas, scales, network, joins, calls, bool(one.cache))
    composed = any(len(plan.parts) > 1 for plan in plans)
    distilled = sd.unet.config.guidance_dim is not None
    guide = guided_pair if "pair" in SAMPLERS[one.sampler].takes else guided_denoise
    return guide(
        estimates,
        each,
        sd.prediction,
        spread_of(sd.schedule),
        composed=composed,
        distilled=distilled,
        device=sd.device,
    )
