"""What each task does, from resolved settings to pictures: from noise, over a picture, under a mask.

Shape letters: B pictures at once, L latent channels, H W height and width in pixels, h w those of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.diffusion.conventions import convention
from plainsd.diffusion.samplers import SAMPLERS, Step
from plainsd.models.variants import edits
from plainsd.pictures.control import Control, fitted
from plainsd.pictures.defaults import enlarged_size, size_multiple
from plainsd.pictures.image_prompt import ImagePrompt
from plainsd.pictures.images import to_pil, to_tensor
from plainsd.pictures.masks import Canvas, latent_mask
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.noise import NoiseOfEach
from plainsd.pictures.sampling import (
    Known,
    decode,
    edited_steps,
    encode,
    from_nothing,
    prepare_latents,
    sample,
    second_pass,
    to_edit,
)
from plainsd.pictures.settings import LATENT_MODES, UPSCALERS, Resolved
from plainsd.pictures.upscaling import upscaled


class Pictures(NamedTuple):
    """The last event of every task."""

    images: list[Image.Image]
    settings: list[Resolved]  # one per picture, fully resolved: enough to reproduce it
    latents: Tensor  # (B, L, h, w), as the UNet sees them, clean


def from_text(
    sd: StableDiffusion, each: list[Resolved], control: Sequence[Control], image_prompt: Sequence[ImagePrompt]
) -> Generator[Step | Pictures]:
    one, draw = each[0], NoiseOfEach(each, sd.device, sd.vae.config.factor)
    noise = prepare_latents(sd, one.size, draw)
    maps = fitted(control, one.size)
    latents = yield from sample(sd, each, one.size, noise, draw, control=maps, image_prompt=image_prompt)
    if one.hires:
        size = enlarged_size(one.size, one.hires, size_multiple(sd.vae.config), one.like)
        known = Known(_enlarged(sd, latents, size, one, draw))
        again, maps = [second_pass(one) for one in each], fitted(control, size)
        draw = draw.anew(again)
        noise = prepare_latents(sd, size, draw)
        joins: dict[str, Any] = {"control": maps, "image_prompt": image_prompt}
        latents = yield from sample(sd, again, size, noise, draw, known, first_pass=edited_steps(one), **joins)
    yield Pictures(to_pil(decode(sd, latents, tiling=one.tiling)), each, latents)


def _enlarged(sd: StableDiffusion, latents: Tensor, size: tuple[int, int], one: Resolved, draw: NoiseOfEach) -> Tensor:
    if one.upscaler in LATENT_MODES:
        width, height = (side // sd.vae.config.factor for side in size)
        mode, antialias = LATENT_MODES[one.upscaler]
        return F.interpolate(latents, (height, width), mode=mode, antialias=antialias)
    decoded = to_pil(decode(sd, latents, tiling=one.tiling))
    if one.upscaler in UPSCALERS:
        pictures = [image.resize(size, Image.Resampling.LANCZOS) for image in decoded]
    else:
        assert sd.upscaler is not None  # `own_upscaler_name` sees to it
        pictures = [upscaled(image, sd.upscaler, size) for image in decoded]
    return encode(sd, torch.cat([to_tensor(picture) for picture in pictures]), draw, tiling=one.tiling)


def from_picture(
    sd: StableDiffusion,
    each: list[Resolved],
    image: Image.Image,
    control: Sequence[Control],
    image_prompt: Sequence[ImagePrompt],
) -> Generator[Step | Pictures]:
    draw, pixels = NoiseOfEach(each, sd.device, sd.vae.config.factor), _padded(sd, to_tensor(image))
    size = (pixels.shape[3], pixels.shape[2])
    editing = edits(sd.unet.config, sd.vae.config)
    latents = None if editing and from_nothing(each[0]) else encode(sd, pixels, draw, tiling=each[0].tiling)
    tiling = each[0].tiling
    shown = to_edit(sd, pixels, tiling=tiling).expand(len(each), -1, -1, -1) if editing else None
    known = Known(latents, concat=shown)
    noise, maps = prepare_latents(sd, size, draw), fitted(control, image.size, image)
    joins: dict[str, Any] = {"control": maps, "image_prompt": image_prompt, "shown": image.size}
    latents = yield from sample(sd, each, size, noise, draw, known, **joins)
    drawn = to_pil(decode(sd, latents, tiling=each[0].tiling))
    yield Pictures([picture.crop((0, 0, *image.size)) for picture in drawn], each, latents)


def _padded(sd: StableDiffusion, pixels: Tensor) -> Tensor:
    """Its last row and column repeated until latents are whole."""
    (height, width), multiple = pixels.shape[2:], size_multiple(sd.vae.config)
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def repainted(
    sd: StableDiffusion,
    each: list[Resolved],
    canvas: Canvas,
    control: Sequence[Control],
    image_prompt: Sequence[ImagePrompt],
) -> Generator[Step | Pictures]:
    one, image = each[0], canvas.image
    rounded = convention(one.like).masks_rounded and not (one.soft_mask or one.outpaint)
    draw, factor = NoiseOfEach(each, sd.device, sd.vae.config.factor), sd.vae.config.factor
    pixels = _padded(sd, to_tensor(image))
    levels = _padded(sd, torch.from_numpy(np.array(canvas.hole))[None, None] / 255.0)  # (1, 1, H, W)
    size = (pixels.shape[3], pixels.shape[2])
    mask = latent_mask(levels, factor, rounded=rounded).to(sd.device)
    reads_mask = sd.unet.config.in_channels != sd.vae.config.latent_channels
    latents = None if reads_mask and from_nothing(one) else encode(sd, pixels, draw, tiling=one.tiling)
    noise = prepare_latents(sd, size, draw)
    if latents is not None and one.masked_content in ("noise", "nothing"):
        latents = (1 - mask) * latents + mask * (noise if one.masked_content == "noise" else 0)
    if reads_mask:
        light = levels.round() if rounded else (levels > 0).float()
        around = encode(sd, pixels * (1 - light), draw, tiling=one.tiling)  # the hole is mid-grey
        shown = light[..., ::factor, ::factor].to(sd.device) if rounded else mask
        concat = torch.cat([shown.expand(len(each), -1, -1, -1), around], dim=1)
        known = Known(latents, mask if rounded else None, concat=concat)
    elif one.soft_mask:
        known = Known(latents, mask, F.avg_pool2d(levels, factor).to(sd.device))
    else:
        known = Known(latents, mask)
    if canvas.box is not None:
        control = [replace(c, image=c.image and [canvas.part_of(one, c.resize) for one in c.images]) for c in control]
        image_prompt = [replace(p, mask=p.mask and [*map(canvas.part_of, p.masks)]) for p in image_prompt]
    maps = fitted(control, image.size, image, canvas.hole)
    joins: dict[str, Any] = {"control": maps, "image_prompt": image_prompt, "shown": image.size}
    latents = yield from sample(sd, each, size, noise, draw, known, **joins)
    drawn = to_pil(decode(sd, latents, tiling=one.tiling))
    yield Pictures([canvas.finished(picture.crop((0, 0, *image.size))) for picture in drawn], each, latents)


def side_by_side(
    task: Callable[..., Generator[Step | Pictures]], sd: StableDiffusion, each: list[Resolved], *args: Any
) -> Generator[Step | Pictures]:
    """The task's events. If a sampler's step sizes depend on the latents, each picture is sampled alone, interleaved
    step by step, so that none depends on the rest of the batch."""
    samplers = filter(None, (each[0].sampler, each[0].hires_sampler))
    if all(SAMPLERS[sampler].batched for sampler in samplers):
        yield from task(sd, each, *args)
        return
    for events in zip(*(task(sd, [one], *args) for one in each), strict=True):
        if isinstance(events[0], Step):
            x, denoised = torch.cat([event.x for event in events]), torch.cat([event.denoised for event in events])
            yield Step(events[0].index, max(event.sigma for event in events), x, denoised)
        else:
            images, latents = [event.images[0] for event in events], torch.cat([event.latents for event in events])
            yield Pictures(images, [event.settings[0] for event in events], latents)
