"""What every task shares: repeatable noise, the VAE on both sides, and the one loop from noise to clean latents.

Precision changes in two places: around the UNet (`guidance.predict`) and around the VAE (`through_vae`). Everything
else is float32.

Shape letters: B pictures at once, L latent channels, H W height and width in pixels, h w those of the latents.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plainsd.diffusion.denoiser import Denoise, add_noise, inpainting, spread_of
from plainsd.diffusion.noise import Path
from plainsd.diffusion.samplers import SAMPLERS, Levels, Step, sampler_levels
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.models import vae_bands
from plainsd.models.deep_cache import DeepCache
from plainsd.models.tiny_vae import AnyVAE
from plainsd.pictures import conditioning
from plainsd.pictures.control import Controls, Fitted
from plainsd.pictures.guidance import Estimates, UNetCall, guided_denoise
from plainsd.pictures.memory import in_bands, on_stage
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.noise import NoiseOfEach
from plainsd.pictures.seamless import seamless, wrapped_edges
from plainsd.pictures.settings import Resolved

DECODED_AT_ONCE = 2**18  # pixels: one picture of 512x512, which takes about 2 GB


# --- the VAE ---------------------------------------------------------------------------------------------------------


def through_vae(sd: StableDiffusion, run: Callable[[AnyVAE, Tensor], Tensor], x: Tensor) -> Tensor:
    """`run` of the VAE on x, in the VAE's precision; float32 outside. What overflows there is done again in float32."""
    y = run(on_stage(sd, sd.vae), x.to(next(sd.vae.parameters()))).float()
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
    """One picture, or one each (1 or B, 3, H, W) -> a latent each (B, L, h, w), drawn from what the encoder gives."""
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


def to_edit(sd: StableDiffusion, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as a model that edits them reads them: the encoder's mean, (B, L, h, w), not scaled, except
    for EDM models (CosXL)."""
    mean = moments_of(sd, pixels)[0]
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
    """What a task knows of the picture beforehand."""

    latents: Tensor | None  # (B, L, h, w), clean; None: the drawing starts from noise alone
    mask: Tensor | None = None  # (1, 1, h, w), 1 where it is drawn anew; elsewhere the latents are put back
    concat: Tensor | None = None  # (B, 1 + L, h, w): mask and masked picture, for networks trained to read them
    running: int | None = None  # how many of the steps, the last; None: as many as the strength says


def steps_of_strength(steps: int, strength: float | None) -> int:
    """How many of the steps run on a given picture, as diffusers counts them; None: all."""
    running = steps if strength is None else min(int(steps * strength), steps)
    if not running:
        raise UserError(
            f"strength {strength} of {steps} steps leaves none to run; give at least {1 / steps:.2g}",
            field="strength",
            value=strength,
        )
    return running


def prepare_latents(sd: StableDiffusion, size: tuple[int, int], draw: NoiseOfEach) -> Tensor:
    """What the drawing of a picture of this size, width and height in pixels, begins with: (B, L, h, w)."""
    width, height = (side // sd.vae.config.factor for side in size)
    return draw.first((sd.vae.config.latent_channels, height, width))


def sample(
    sd: StableDiffusion,
    each: Sequence[Resolved],
    size: tuple[int, int],
    noise: Tensor,
    draw: NoiseOfEach,
    known: Known | None = None,
    first_pass: int | None = None,
    control: Sequence[Fitted] = (),
) -> Generator[Step, None, Tensor]:
    """Yields the sampler's steps; returns clean latents (B, L, h, w).

    `each` differ in prompts, seeds and scale of guidance only; `size` is the picture's, as SDXL is told it; `noise` is
    the first one, and `draw` gives more; `first_pass` counts the steps of a pass before this one, for prompts that
    change on the way; `control` are maps to follow, which a refiner does not.
    """
    one, shape = each[0], noise.shape[1:]
    levels = sampler_levels(sd.schedule, one.sampler, one.steps, one.spacing)
    schedule = levels.sigmas
    if known is not None:
        levels = levels.part(one.steps - (known.running or steps_of_strength(one.steps, one.strength)))
    if known is None or known.latents is None or (known.mask is not None and one.strength == 1):
        x = noise * levels.first_scale
        start: float = levels.sigmas[0]
    else:
        x = add_noise(known.latents, noise, levels.sigmas[0])
        start = math.inf
    path = draw.path(shape, schedule, levels.sigmas) if "path" in SAMPLERS[one.sampler].takes else None
    done = 0
    for model, own in turns(sd, one, levels):
        followed = control if model is sd else ()
        denoise = _denoise(model, each, size, levels, known.concat if known else None, first_pass, followed)
        if known is not None and known.mask is not None:
            denoise = inpainting(denoise, known.latents, known.mask, noise, start=start)
        for step in SAMPLERS[one.sampler].run(
            denoise, x, own.sigmas, lambda: draw(shape), **sampler_options(model, one, own, path)
        ):
            yield step._replace(index=done + step.index)
        x, done = step.x, done + len(own.sigmas) - 1
    clean = step.x / math.sqrt(1 + step.sigma**2)  # some samplers leave a little noise; it stays
    if known is not None and known.mask is not None:
        clean = known.mask * clean + (1 - known.mask) * known.latents
    return clean


def turns(sd: StableDiffusion, one: Resolved, levels: Levels) -> list[tuple[StableDiffusion, Levels]]:
    """Who draws between which levels: the model, and below the share `handover` of the timesteps its refiner, if it has
    one (Podell et al. 2023, arXiv:2307.01952, section 2.5). Each runs the sampler anew, as two pipelines would."""
    if sd.refiner is None:
        return [(sd, levels)]
    assert one.handover is not None  # `check_refiner` sees to it
    count = len(sd.schedule)
    last = round(count - one.handover * count)
    own = sum(timestep >= last for timestep in levels.timesteps)
    both = ((sd, levels.part(0, own)), (sd.refiner, levels.part(own)))
    return [(model, part) for model, part in both if len(part.sigmas) > 1]


def sampler_options(sd: StableDiffusion, one: Resolved, levels: Levels, path: Path | None) -> dict[str, Any]:
    """What the sampler takes by name, where it is not left to its default."""
    options = {
        "eta": one.eta,
        "prediction": sd.prediction,
        "sigma_data": spread_of(sd.schedule),
        "strides": levels.strides,
        "path": path,
    }
    return {name: options[name] for name in SAMPLERS[one.sampler].takes if options[name] is not None}


def _denoise(
    sd: StableDiffusion,
    each: Sequence[Resolved],
    size: tuple[int, int],
    levels: Levels,
    concat: Tensor | None,
    first_pass: int | None,
    control: Sequence[Fitted],
) -> Denoise:
    """The network with its prompts, guidance and maps."""
    one, steps = each[0], len(levels.sigmas) - 1
    if sd.unet.config.in_channels == sd.vae.config.latent_channels:
        concat = None  # a refiner after an inpainting model
    planned = {
        pair: conditioning.encode_prompt(sd, *pair, steps, clip_skip=one.clip_skip, first_pass=first_pass, size=size)
        for pair in dict.fromkeys((s.prompt, s.negative) for s in each)
    }
    plans = [planned[s.prompt, s.negative] for s in each]
    network: UNetCall = DeepCache(sd.unet, one.cache) if one.cache else sd.unet
    if one.tiling:
        network = seamless(sd.unet, network)
    controls = Controls(sd, control, steps) if control else None
    estimates = Estimates(sd, plans, concat, levels.sigmas, [s.guidance for s in each], network, controls)
    composed = any(len(plan.parts) > 1 for plan in plans)
    distilled = sd.unet.config.guidance_dim is not None
    return guided_denoise(
        estimates,
        each,
        sd.prediction,
        spread_of(sd.schedule),
        composed=composed,
        distilled=distilled,
        device=sd.device,
    )
