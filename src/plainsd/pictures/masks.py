"""Inpainting masks: blurring, filling what is under them, cropping around them, and pasting the result back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from plainsd.diffusion.conventions import convention
from plainsd.errors import UserError
from plainsd.pictures.images import to_rgb

Box = tuple[int, int, int, int]  # left, top, right, bottom
BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))  # A1111's: radius, and how often it is laid on top


@dataclass(frozen=True)
class MaskOptions:
    """How a mask is used. Pixels are those of the picture."""

    blur: float | tuple[float, float] = 0.0  # standard deviation of the edge's blur, in pixels; or across and down
    grow: int = 0  # pixels to dilate by, or below 0 to erode by
    padding: int | None = None  # draw only the masked part, at full size, with this much around it
    fill: str = "original"
    soft: bool = False  # grey levels set when a pixel begins to change (Levin and Fried 2023, arXiv:2306.00950)
    like: str | None = None  # the program whose masks these are, see diffusion/conventions.py
    resize: str = "stretch"  # picture and mask, where no part alone is drawn: see `resized`

    @property
    def rounded(self) -> bool:
        return convention(self.like).masks_rounded and not self.soft


@dataclass(frozen=True)
class Canvas:
    """The picture to draw on, and where the result goes."""

    image: Image.Image  # at the size of the run
    hole: Image.Image  # L: what is repainted, 0 or 255; of a soft mask, and in A1111, the grey levels
    whole: Image.Image | None = None  # the picture to paste into, if any ...
    alpha: Image.Image | None = None  # ... with this opacity, of its size
    box: Box | None = None  # ... in this part of it

    def part_of(self, picture: Image.Image, resize: str = "stretch") -> Image.Image:
        """What lies under this canvas, at its size, of a picture that covers the whole one, of any mode and size;
        `resize`: how that gets the whole one's shape."""
        if self.whole is None or self.box is None:
            return picture
        return part_in_box(in_shape_of(picture, self.whole.size, resize), self.whole.size, self.box, self.image.size)

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The new picture in its place."""
        if self.whole is not None and self.alpha is not None:
            return pasted(drawn, self.whole, self.alpha, self.box)
        return Image.composite(drawn, self.image, hole_of(self.hole))


def canvas_of(image: Image.Image, mask: Image.Image, size: tuple[int, int], how: MaskOptions) -> Canvas:
    """Prepares a picture and its mask, of one size, for a run at `size`. UserError for an all-dark mask."""
    levels = Image.fromarray(np.array(to_rgb(mask, background="black").convert("L")))
    levels = grown(levels if how.soft or how.rounded else hard(levels), how.grow)
    alpha = levels if how.blur in (0, (0, 0)) else levels.filter(ImageFilter.GaussianBlur(how.blur))
    if alpha.getbbox() is None:
        raise UserError(
            "the mask is dark everywhere, so nothing would be drawn; make it white where you want a change",
            field="mask",
        )
    if how.padding is not None:
        box = box_around(alpha, how.padding, size)
        part, levels = (in_place(one.crop(box), size) for one in (image, alpha))
        hole = levels if how.soft or how.rounded else hole_of(levels)
        canvas = Canvas(part, hole, image, hole_of(alpha) if how.soft else alpha, box)
    elif how.rounded:
        image, small = resized(image, size, how.resize), resized(alpha, size, how.resize)
        canvas = Canvas(image, small, image, small.point(lambda level: min(2 * level, 255)))
    else:
        image = resized(image, size, how.resize)
        small = resized(alpha, size, how.resize, Image.Resampling.NEAREST)
        plain = how.soft or how.blur in (0, (0, 0))
        canvas = Canvas(image, small if how.soft else hole_of(small), *(() if plain else (image, small)))
    if how.rounded and how.fill != "original":
        return replace(canvas, image=blurred_hole(canvas.image, canvas.hole))
    if how.fill == "fill":
        return replace(canvas, image=filled_hole(canvas.image, hole_of(canvas.hole)))
    return canvas


def latent_mask(levels: Tensor, factor: int, *, rounded: bool) -> Tensor:
    """Which latents are repainted, (1, 1, H, W) -> (1, 1, h, w), 0 to 1: each that has such a pixel, or, rounded, where
    the mask scaled to latents is nearer to white, as in A1111."""
    if not rounded:
        return F.max_pool2d((levels > 0).float(), factor)
    pixels = Image.fromarray((levels[0, 0] * 255).round().byte().numpy())
    small = hard(pixels.resize((pixels.width // factor, pixels.height // factor), Image.Resampling.BICUBIC))
    return torch.from_numpy(np.array(small))[None, None] / 255.0


def hard(levels: Image.Image) -> Image.Image:
    """0 or 255, whichever is nearer."""
    return levels.point(lambda level: 255 if level >= 128 else 0)


def grown(levels: Image.Image, pixels: int) -> Image.Image:
    """The mask dilated by so many pixels, or eroded if below 0: the most, or least, of a square around a pixel, first
    along columns, then along rows. Windows that overlap make a wider one, so that the width costs its logarithm."""
    further, window = np.maximum if pixels > 0 else np.minimum, 2 * abs(pixels) + 1
    found = np.pad(np.asarray(levels), abs(pixels), mode="edge")
    for _ in range(2):
        width = 1
        while width < window:
            step = min(width, window - width)
            found, width = further(found[step:], found[:-step]), width + step
        found = found.T
    return Image.fromarray(np.ascontiguousarray(found))


def hole_of(alpha: Image.Image) -> Image.Image:
    """What is repainted: everywhere that alpha is above 0."""
    return alpha.point(lambda level: 255 if level else 0)


def filled_hole(image: Image.Image, hole: Image.Image) -> Image.Image:
    """The hole filled smoothly with the colours around it: each pixel from the finest grid of means that has one."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()  # (1, 3, H, W)
    known = torch.from_numpy(np.array(hole) == 0)[None, None].double()  # (1, 1, H, W)
    result, weight, size = pixels * known, known, pixels.shape[2:]
    side = 2
    while (weight == 0).any() and side <= 2 * max(size):
        pad = (0, -size[1] % side, 0, -size[0] % side)
        share = F.avg_pool2d(F.pad(known, pad), side)
        means = F.avg_pool2d(F.pad(pixels * known, pad), side) / share.clamp(min=1e-12)
        wide = F.interpolate(
            torch.cat([means * (share > 0), (share > 0).double()], 1), scale_factor=side, mode="nearest"
        )
        wide = wide[..., : size[0], : size[1]]
        fresh = (weight == 0) & (wide[:, 3:] > 0)
        result, weight = torch.where(fresh, wide[:, :3], result), torch.where(fresh, 1.0, weight)
        side *= 2
    return Image.fromarray(result[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy())


def blurred_hole(image: Image.Image, levels: Image.Image) -> Image.Image:
    """The hole filled as in A1111: what is around it, blurred ever less, and laid over what was blurred more."""
    keep = ImageChops.invert(levels)
    around = Image.merge("RGBa", [*(ImageChops.multiply(channel, keep) for channel in image.split()), keep])
    filled = Image.new("RGBA", image.size)
    for radius, times in BLURS:
        layer = around.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(layer)
    return filled.convert("RGB")


def box_around(alpha: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The part of the picture around the mask, with the aspect ratio of `size` as far as the picture has room."""
    left, top, right, bottom = alpha.getbbox() or (0, 0, *alpha.size)
    left, top = max(0, left - padding), max(0, top - padding)
    right, bottom = min(alpha.width, right + padding), min(alpha.height, bottom + padding)
    width, height, wanted = right - left, bottom - top, size[0] / size[1]
    if width < height * wanted:
        left, right = widened(left, right, round(height * wanted), alpha.width)
    else:
        top, bottom = widened(top, bottom, round(width / wanted), alpha.height)
    return left, top, right, bottom


def widened(start: int, end: int, length: int, room: int) -> tuple[int, int]:
    """The interval widened to `length`, within 0 to `room`."""
    length = min(max(length, end - start), room)
    start = min(max(0, (start + end - length) // 2), room - length)
    return start, start + length


def part_in_box(picture: Image.Image, whole: tuple[int, int], box: Box, size: tuple[int, int]) -> Image.Image:
    """The part of a picture of any mode and size that lies in `box` once it is scaled to `whole`; itself at `size`,
    padded with its edges' colours where it has another shape."""
    across, down = picture.width / whole[0], picture.height / whole[1]
    own = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    left, top, right, bottom = place_of(box, size)
    part = to_rgb(picture, background="black").resize((right - left, bottom - top), Image.Resampling.LANCZOS, own)
    return padded(part, size)


def in_place(part: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A part of a picture in one of this size, padded likewise."""
    left, top, right, bottom = place_of((0, 0, *part.size), size)
    return padded(resized(part, (right - left, bottom - top)), size)


def place_of(box: Box, size: tuple[int, int]) -> Box:
    """Where a part of a picture lies in one of this size: in its middle, as large as its shape lets it be; all over it
    where the shapes differ by rounding alone."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(size[0] / width, size[1] / height)
    across, down = size[0] - max(1, round(width * scale)), size[1] - max(1, round(height * scale))
    if max(across, down) <= 1:
        across = down = 0
    return across // 2, down // 2, size[0] - (across - across // 2), size[1] - (down - down // 2)


def resized(
    image: Image.Image,
    size: tuple[int, int],
    how: str = "stretch",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The picture at this size: stretched, cropped ("crop"), or padded with its edges' colours ("fill")."""
    if how == "crop":
        return ImageOps.fit(image, size, resample)
    if how == "fill":
        return padded(ImageOps.contain(image, size, resample), size)
    return image if image.size == size else image.resize(size, resample)


def in_shape_of(picture: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """A picture of any mode in the shape of one of this size, at its own scale: cropped or padded, or, to be stretched,
    as it is."""
    if how == "stretch":
        return picture
    scale = (min if how == "crop" else max)(here / there for here, there in zip(picture.size, size, strict=True))
    return resized(
        to_rgb(picture, background="black"), (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), how
    )


def padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the middle of one of this size, around it its edges' colours."""
    across, down = size[0] - image.width, size[1] - image.height
    pad = ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    pixels = np.array(image)
    return Image.fromarray(np.pad(pixels, pad[: pixels.ndim], mode="edge")) if across or down else image


def pasted(drawn: Image.Image, base: Image.Image, alpha: Image.Image, box: Box | None) -> Image.Image:
    """The new picture pasted into the old one."""
    whole = base.copy()
    if box:
        drawn = drawn.crop(place_of(box, drawn.size))
    box = box or (0, 0, *base.size)
    whole.paste(resized(drawn, (box[2] - box[0], box[3] - box[1])), box[:2])
    return Image.composite(whole, base, alpha)
