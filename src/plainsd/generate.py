"""The tasks: from a prompt, a picture, a mask to pictures (Rombach et al. 2022, arXiv:2112.10752).

Every task checks its input at once and returns a generator: a `Step` for each step of the sampler, and at the end
`Pictures`. pictures/drawing.py is what each of them does, pictures/sampling.py the loop that they share.

A model may have several of these begun, in one thread or in several: each step has the model to itself. For threads
that draw at the same time give each a model of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from plainsd.diffusion.samplers import Step
from plainsd.errors import UserError
from plainsd.models.variants import edits
from plainsd.pictures.control import Control
from plainsd.pictures.control_checks import check_control
from plainsd.pictures.defaults import check_size, enlarged_size, resolved, settings_of_each, size_multiple
from plainsd.pictures.drawing import Pictures, from_picture, from_text, repainted, side_by_side
from plainsd.pictures.image_prompt import ImagePrompt, check_image_prompts
from plainsd.pictures.images import continued, to_rgb
from plainsd.pictures.masks import Canvas, MaskOptions, canvas_of
from plainsd.pictures.model import StableDiffusion, alone
from plainsd.pictures.sampling import steps_to_run
from plainsd.pictures.settings import MASK_OPTIONS, SIZES, Resolved, Settings, content_notes

STRENGTH = 0.75  # default for image to image
HIRES_STRENGTH = 0.7  # default for the hires pass


class Events:
    """A running task: an iterator over its events. Only its own code runs in inference mode, not the caller's.

    `size`: of the finished pictures; `others`: the networks beside the model's, of controls and image prompts.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        events: Generator[Step | Pictures],
        settings: list[Resolved],
        steps: int,
        size: tuple[int, int],
        others: Iterable[nn.Module] = (),
    ):
        self.size = size
        self._sd, self._events, self.settings, self.steps = sd, events, settings, steps  # steps: their total number
        self._others = list(others)

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Step | Pictures:
        with alone(self._sd, self._others), torch.inference_mode():
            return next(self._events)

    def close(self) -> None:
        """Stops the task after the step that is running; nothing more comes."""
        with alone(self._sd, self._others):
            self._events.close()


def final(events: Iterable[Step | Pictures]) -> list[Image.Image]:
    """Runs a task to its end, and returns the pictures."""
    last: Step | Pictures | None = None
    for event in events:
        last = event
    if not isinstance(last, Pictures):
        raise UserError("this task has ended before, and gives its pictures once; begin another")
    return last.images


def _started(
    task: Callable[..., Generator[Step | Pictures]],
    sd: StableDiffusion,
    each: list[Resolved],
    steps: int,
    control: Sequence[Control],
    image_prompt: Sequence[ImagePrompt],
    *inputs: Image.Image | Canvas,
) -> Events:
    """The events of a task of pictures/drawing.py, one of its functions."""
    others: list[nn.Module] = [one.net for one in control]
    others += [network for one in image_prompt for network in (one.adapter.adapter, one.adapter.tower)]
    one = each[0]
    whole = next((canvas.whole for canvas in inputs if isinstance(canvas, Canvas)), None)
    size = whole.size if whole else one.size
    if one.hires:
        size = enlarged_size(size, one.hires, size_multiple(sd.vae.config), one.like)
    return Events(sd, side_by_side(task, sd, each, *inputs, control, image_prompt), each, steps, size, others)


# --- tasks -----------------------------------------------------------------------------------------------------------


def text_to_image(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    negative: str | Sequence[str] = "",
    *,
    size: tuple[int, int] | int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    seed: int = 0,
    count: int = 1,
    control: Sequence[Control] = (),
    image_prompt: Sequence[ImagePrompt] = (),
    **more,
) -> Events:
    """Pictures from a prompt, `count` of each; picture i has seed + i. None takes the model's default.

    Seed -1 draws a random one; guidance 0 turns it off, as 1 does. `size` is (width, height) in pixels, multiples of 8,
    or of the VAE's factor if that is more. `more`: the other fields of `Settings`. With `hires`, a second pass runs on
    the enlarged picture, and its steps follow those of the first. `control` and `image_prompt` act in both passes.
    """
    if sd.unet.config.in_channels != sd.vae.config.latent_channels:
        if edits(sd.unet.config, sd.vae.config):
            raise UserError("this model edits pictures; it needs one (image_to_image, or --image)", field="image")
        raise UserError(
            "this is an inpainting model; it needs a picture and a mask (inpaint, or --image and --mask)", field="image"
        )
    multiple = size_multiple(sd.vae.config)
    size = check_size((size, size) if isinstance(size, int) else size or (sd.variant.size, sd.variant.size), multiple)
    settings = Settings(
        size=size,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        spacing=spacing,
        seed=seed,
        control=check_control(sd, control, size),
        image_prompt=check_image_prompts(sd, image_prompt),
        **more,
    )
    if settings.strength is not None and not settings.hires:
        raise UserError(
            f"strength {settings.strength} needs a picture, or hires; leave it out",
            field="strength",
            value=settings.strength,
        )
    if settings.hires:
        check_size(enlarged_size(size, settings.hires, multiple, settings.like), multiple)
        settings = replace(settings, strength=HIRES_STRENGTH if settings.strength is None else settings.strength)
    one = resolved(sd, settings)
    each = settings_of_each(one, prompt, negative, count)
    return _started(from_text, sd, each, steps_to_run(sd, one), control, image_prompt)


def image_to_image(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    image: Image.Image,
    strength: float | None = None,
    negative: str | Sequence[str] = "",
    *,
    size: tuple[int, int] | None = None,
    count: int = 1,
    control: Sequence[Control] = (),
    image_prompt: Sequence[ImagePrompt] = (),
    **choices,
) -> Events:
    """Image to image (Meng et al. 2021, "SDEdit", arXiv:2108.01073): noise is added to a picture, and the last
    steps run from there.

    Of the steps, min(int(steps * strength), steps) run; strength None is 0.75. A model that edits pictures
    (InstructPix2Pix, Brooks et al. 2023, arXiv:2211.09800) gets the picture as extra input channels: the prompt says
    what to change, `image_guidance` how much of the picture stays, and strength None is 1, from pure noise. Any size
    from 8 to 4096 works, padded internally. With `size` it is scaled first. `choices` as for `text_to_image`.
    """
    editing = edits(sd.unet.config, sd.vae.config)
    if sd.unet.config.in_channels != sd.vae.config.latent_channels and not editing:
        raise UserError("this is an inpainting model; it needs a mask (inpaint, or --mask)", field="mask")
    strength = (1.0 if editing else STRENGTH) if strength is None else strength
    image = _fitted(image, size)
    notes = {
        "control": check_control(sd, control, image.size, "picture"),
        "image_prompt": check_image_prompts(sd, image_prompt),
    }
    settings, steps = _with_picture(sd, image, strength, notes | choices)
    each = settings_of_each(settings, prompt, negative, count)
    return _started(from_picture, sd, each, steps, control, image_prompt, image)


def _with_picture(sd: StableDiffusion, image: Image.Image, strength: float, choices: dict) -> tuple[Resolved, int]:
    """The settings, and how many steps will run."""
    settings = resolved(sd, Settings(size=image.size, strength=strength, **choices))
    if settings.hires:
        raise UserError(
            "hires works on pictures made from text alone; leave it out, or scale the picture with size",
            field="hires",
            value=settings.hires,
        )
    return settings, steps_to_run(sd, settings, on_picture=True)


def _fitted(image: Image.Image, size: tuple[int, int] | int | None) -> Image.Image:
    """The picture scaled to `size`, in RGB."""
    size, image = _fitted_size(image, size), to_rgb(image)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _fitted_size(image: Image.Image, size: tuple[int, int] | int | None) -> tuple[int, int]:
    width, height = (size, size) if isinstance(size, int) else size or image.size
    if not all(SIZES[0] <= side <= SIZES[1] for side in (width, height)):
        low, high = SIZES
        raise UserError(
            f"size {width}x{height}: both sides must be from {low} to {high}; choose another with size",
            field="size",
            value=(width, height),
        )
    return width, height


def inpaint(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    image: Image.Image,
    mask: Image.Image,
    strength: float = 1.0,
    negative: str | Sequence[str] = "",
    *,
    size: tuple[int, int] | None = None,
    count: int = 1,
    control: Sequence[Control] = (),
    image_prompt: Sequence[ImagePrompt] = (),
    **choices,
) -> Events:
    """Repaints the light part of the mask to fit its surroundings; every other pixel is unchanged.

    Inpainting models get mask and masked picture as extra input channels; with others, the known latents are restored
    at every step (Lugmayr et al. 2022, "RePaint"). Strength 1 starts from pure noise. Mask options in `choices`, in
    pixels of the picture: `mask_blur` softens its edge, `mask_grow` dilates it, `masked_padding` draws only the masked
    part, with so much around it, at `size`; `masked_content` is what is under it at the start, below strength 1:
    "original", "fill" (the colours around), "noise" or "nothing"; `soft_mask` uses its grey levels for how early each
    position begins to change (Levin and Fried 2023, arXiv:2306.00950). Otherwise as `image_to_image`.
    """
    if edits(sd.unet.config, sd.vae.config):
        raise UserError("this model edits whole pictures and reads no mask; leave the mask, or outpainting, out")
    if mask.size != image.size:
        sizes = f"the mask is {mask.width}x{mask.height} and the picture {image.width}x{image.height}"
        raise UserError(f"{sizes}; make them the same size", field="mask")
    how = mask_options(choices)
    if how.soft and sd.unet.config.in_channels != sd.vae.config.latent_channels:
        raise UserError("soft masks are for models that read none, and this one does; leave soft_mask out",
                        field="soft_mask")  # fmt: skip
    canvas = canvas_of(_fitted(image, None), mask, _fitted_size(image, size), how)
    notes = {
        "masked": "outpaint" not in choices,
        "control": check_control(sd, control, canvas.image.size if canvas.box is None else image.size, "mask"),
        "image_prompt": check_image_prompts(sd, image_prompt),
    }
    settings, steps = _with_picture(sd, canvas.image, strength, notes | choices)
    for note in content_notes(settings):
        warnings.warn(note, stacklevel=2)
    each = settings_of_each(settings, prompt, negative, count)
    return _started(repainted, sd, each, steps, control, image_prompt, canvas)


def mask_options(choices: Mapping[str, Any]) -> MaskOptions:
    """The mask options among a task's choices; UserError for one out of range."""
    given = Settings(**{name: choices[name] for name in MASK_OPTIONS if name in choices})
    given.check()
    return replace(MaskOptions(*(getattr(given, name) for name in MASK_OPTIONS)), like=choices.get("like"))


def outpaint(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    image: Image.Image,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    **choices,
) -> Events:
    """Extends a picture past its edges by so many pixels on each side. Otherwise as `inpaint`."""
    sides = (left, top, right, bottom)
    if not all(0 <= side <= SIZES[1] for side in sides) or not any(sides):
        wanted = f"give pixels to add on each side, 0 to {SIZES[1]}, at least one above 0"
        raise UserError(f"outpaint {' '.join(map(str, sides))}: {wanted}", field="outpaint", value=sides)
    canvas, mask = continued(image, sides)
    return inpaint(sd, prompt, canvas, mask, outpaint=sides, **choices)


# --- batches ---------------------------------------------------------------------------------------------------------


def batch(
    sd: StableDiffusion,
    each: Sequence[Resolved],
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    control: Sequence[Control] = (),
    image_prompt: Sequence[ImagePrompt] = (),
    *,
    composed: bool = True,
) -> Events:
    """Pictures from resolved settings, such as those of `Events.settings`, as one batch.

    They may differ in prompts and seeds only; each picture is the same as alone. Input picture, mask, controls and
    image prompts are shared by all; picture and mask have the size of the settings. Without `composed`, masked pictures
    are returned whole, for the caller to paste.
    """
    each, one = list(each), each[0]
    if image is None:
        return _started(from_text, sd, each, steps_to_run(sd, one), control, image_prompt)
    steps = steps_to_run(sd, one, on_picture=True)
    if mask is None:
        return _started(from_picture, sd, each, steps, control, image_prompt, image)
    canvas = canvas_of(image, mask, image.size, MaskOptions(soft=one.soft_mask, like=one.like))
    if not composed:
        canvas = replace(canvas, whole=image, alpha=Image.new("L", image.size, 255))
    return _started(repainted, sd, each, steps, control, image_prompt, canvas)
