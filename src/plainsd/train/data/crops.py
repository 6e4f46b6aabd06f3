"""Crops of training pictures: size, position, mirroring.

A picture is scaled to cover its box, and cropped to it. The box is a square, or, with buckets, the one of about the
same area with the nearest aspect ratio, so that little is cut off (NovelAI 2022, "aspect ratio bucketing"). Each
picture has a fixed number of views, so that the latents of all views can be cached.

All sizes are (width, height) in pixels.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from PIL import Image, ImageOps

from plainsd.errors import UserError
from plainsd.pictures.conditioning import Size
from plainsd.pictures.defaults import MULTIPLE


class View(NamedTuple):
    """The picture is scaled to `scaled`, mirrored or not, and the box of `size` cut out at (left, top)."""

    scaled: Size
    left: int
    top: int
    size: Size
    mirrored: bool = False


def view_of(original: Size, size: Size, across: float = 0.5, down: float = 0.5, mirrored: bool = False) -> View:
    """A view of the given size; `across` and `down` place it, from 0 (left, top) to 1 (right, bottom)."""
    scale = max(box / side for box, side in zip(size, original, strict=True))
    scaled = max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))
    left, top = int((scaled[0] - size[0]) * across), int((scaled[1] - size[1]) * down)
    return View(scaled, left, top, size, mirrored)


def cut_out(picture: Image.Image, view: View) -> Image.Image:
    if picture.size != view.scaled:
        picture = picture.resize(view.scaled, Image.Resampling.LANCZOS)
    if view.mirrored:
        picture = ImageOps.mirror(picture)
    return picture.crop((view.left, view.top, view.left + view.size[0], view.top + view.size[1]))


@dataclass(frozen=True)
class Framing:
    """How views are chosen. The default is one centre crop."""

    buckets: bool = False
    crop: Literal["centre", "random"] = "centre"
    places: int = 4  # random crops per picture
    flip: bool = False  # each also mirrored
    multiple: int = MULTIPLE  # of the sides of buckets, in pixels

    def __post_init__(self):
        if self.crop not in ("centre", "random"):
            raise UserError(f"unknown crop {self.crop!r}; choose centre or random")
        if self.places < 1:
            raise UserError(f"{self.places} places for random crops; give at least 1")

    @property
    def count(self) -> int:
        """Views a picture."""
        return (self.places if self.crop == "random" else 1) * (1 + self.flip)

    def views(self, name: str, original: Size, size: int) -> list[View]:
        """All views of a picture. Random positions are seeded by its name, so that they are the same in every run."""
        box = nearest_box(original, size, self.multiple) if self.buckets else (size, size)
        places = [(0.5, 0.5)]
        if self.crop == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            places = torch.rand(self.places, 2, generator=generator, dtype=torch.float64).tolist()
        flips = (False, True) if self.flip else (False,)
        return [view_of(original, box, *place, mirrored) for place in places for mirrored in flips]


def check_whole_latents(size: int, factor: int) -> None:
    """UserError unless a side of `size` pixels is a whole number of latents of `factor` pixels."""
    if size % factor:
        near = sorted({max(1, size // factor) * factor, (size // factor + 1) * factor})
        raise UserError(
            f"--size {size} is no multiple of {factor}, the pixels of one latent; take {' or '.join(map(str, near))}"
        )


@lru_cache
def boxes(size: int, multiple: int = MULTIPLE) -> list[Size]:
    """The boxes of about size x size pixels, from half as wide to twice as wide, none larger in area, all
    sides multiples of `multiple`; the square too, where it lies between the steps of the others."""
    step = 64 if size >= 512 else max(MULTIPLE, size // 64 * MULTIPLE)
    step = -(-step // multiple) * multiple
    square = max(multiple, size // multiple * multiple)
    found = {(square, square)}
    for side in range(max(step, size // 2 // step * step), 2 * size + 1, step):
        other = size * size // side // step * step
        if other:
            found |= {(side, other), (other, side)}
    return sorted(found)


def nearest_box(original: Size, size: int, multiple: int = MULTIPLE) -> Size:
    """The box whose shape is nearest to the picture's; of equals, the larger."""
    shape = math.log(original[0] / original[1])
    return min(boxes(size, multiple), key=lambda box: (abs(math.log(box[0] / box[1]) - shape), -box[0] * box[1]))
