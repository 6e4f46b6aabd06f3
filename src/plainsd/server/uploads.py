"""Pictures that come in: checked before they are decoded, and made ready for drawing on.

Only PNG, JPEG and WebP are decoded. A picture is never fetched from an address.
"""

import binascii
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps

from plainsd.errors import UserError
from plainsd.pictures.images import open_picture
from plainsd.server.errors import Refused
from plainsd.server.limits import Limits
from plainsd.text.prompts import lora_tags

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=-]+)*;base64,")
Box = tuple[int, int, int, int]  # left, top, right, bottom


class NamedBytes(BytesIO):
    """Bytes whose name in an error message is that of their field."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.field = name

    def __str__(self) -> str:
        return self.field


def decoded(text: str, field: str) -> bytes:
    """Base64, bare or as a data: address."""
    if re.match(r"\s*(?:https?|file|ftp):", text):
        raise Refused(422, f"{field} {text[:60]!r} is an address; send the picture itself, in base64", field)
    found = DATA_URL.match(text)
    try:
        return b64decode("".join(text[found.end() if found else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(
            422, f"{field} {text[:20]!r}... is not base64; send the bytes of a PNG, JPEG or WebP file so", field
        ) from None


def opened(content: bytes, field: str, limits: Limits, background: str | None = "white") -> Image.Image:
    """The bytes of a file -> a picture, RGB; with no background, RGBA."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            width, height = file.size
    except Image.UnidentifiedImageError:
        raise Refused(422, f"{field} is no PNG, JPEG or WebP picture; save it as one of them", field) from None
    except Image.DecompressionBombError:
        width = height = 10**6
    except Exception as error:  # decoders meet hostile bytes with errors of every kind
        raise Refused(422, f"{field} is broken ({error}); save it again", field) from None
    if width * height > limits.upload_pixels:
        raise Refused(413, f"{field} has {width}x{height} pixels; scale it below {limits.upload_pixels} in all", field)
    try:
        image = open_picture(NamedBytes(content, field), background or "white")
    except UserError as error:
        raise Refused(422, str(error), field) from None
    if background is None:
        with Image.open(BytesIO(content), formats=FORMATS) as whole:
            image.putalpha(ImageOps.exif_transpose(whole).convert("RGBA").getchannel("A"))
    return image


def picture(text: str, field: str, limits: Limits, background: str | None = "white") -> Image.Image:
    return opened(decoded(text, field), field, limits, background)


def without_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt that is left when its LoRAs are taken out, and these."""
    rest, loras = lora_tags(prompt)
    return (rest.strip() if loras else prompt), loras


# --- masks -----------------------------------------------------------------------------------------------------------


def differing(mask: Image.Image, image: Image.Image) -> Refused:
    sizes = f"mask {mask.width}x{mask.height} and image {image.width}x{image.height}"
    return Refused(422, f"{sizes} differ in size; make them the same", "mask", list(mask.size))


def alpha_of(mask: Image.Image, blur: float | tuple[float, float] = 0, *, inverted: bool = False) -> Image.Image:
    """A picture whose light parts are to be drawn anew -> opacity of the new, 0 to 255, with soft edges if blurred: all
    round, or across and down."""
    alpha = mask.convert("L").point(lambda level: 255 if level >= 128 else 0)
    if inverted:
        alpha = ImageChops.invert(alpha)
    return alpha if blur in (0, (0, 0)) else alpha.filter(ImageFilter.GaussianBlur(blur))


def hole_of(alpha: Image.Image) -> Image.Image:
    """All that shows anything of the new is drawn anew."""
    return alpha.point(lambda level: 255 if level else 0)


def filled_hole(image: Image.Image, hole: Image.Image) -> Image.Image:
    """The hole filled with the colours around it, smoothly: means over ever coarser grids, until there is one."""
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


def box_around(alpha: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The part of the picture around the mask, in the proportions of `size` as far as the picture has room."""
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
    """A stretch of that length around the one given, inside 0 to room."""
    length = min(max(length, end - start), room)
    start = min(max(0, (start + end - length) // 2), room - length)
    return start, start + length


# --- sizes -----------------------------------------------------------------------------------------------------------


def check_pixels(size: tuple[int, int], limits: Limits, field: str = "size") -> None:
    """Refused for a picture that is larger than this server draws, or none at all."""
    width, height = size
    if min(size) < 8 or width * height > limits.pixels:
        raise Refused(422, f"{field} {width}x{height} is out of range; choose a size from 8x8 to {limits.pixels} "
                      "pixels in all", field, [width, height])  # fmt: skip


def resized(image: Image.Image, size: tuple[int, int], how: str = "stretch") -> Image.Image:
    """To that size: stretched, cut ("crop"), or with the edges' colours beside it ("fill")."""
    if how == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if how == "fill":
        inner = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
        across, down = size[0] - inner.width, size[1] - inner.height
        pad = ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
        pixels = np.array(inner)
        return Image.fromarray(np.pad(pixels, pad[: pixels.ndim], mode="edge"))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def pasted(drawn: Image.Image, base: Image.Image, alpha: Image.Image, box: Box | None) -> Image.Image:
    """The new picture in its place in the old one."""
    whole = base.copy()
    box = box or (0, 0, *base.size)
    whole.paste(resized(drawn, (box[2] - box[0], box[3] - box[1])), box[:2])
    return Image.composite(whole, base, alpha)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
