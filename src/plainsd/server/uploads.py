"""Uploaded pictures: checked before they are decoded.

Only PNG, JPEG and WebP are decoded. Pictures are never downloaded from a URL.
"""

import binascii
import re
from base64 import b64decode
from io import BytesIO

from PIL import Image, ImageOps

from plainsd.errors import UserError
from plainsd.pictures.images import open_picture
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.text.prompts import LoraTag, tagged_loras

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=-]+)*;base64,")


class NamedBytes(BytesIO):
    """Bytes that error messages refer to by the name of their field."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.field = name

    def __str__(self) -> str:
        return self.field


def decoded(text: str, field: str) -> bytes:
    """Decodes base64, plain or as a data: URL."""
    if re.match(r"\s*(?:https?|file|ftp):", text):
        raise APIError(422, f"{field} {text[:60]!r} is a URL; send the picture itself, in base64", field)
    found = DATA_URL.match(text)
    try:
        return b64decode("".join(text[found.end() if found else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise APIError(422, f"{field} {text[:20]!r}... is not base64; encode a PNG, JPEG or WebP file", field) from None


def opened(content: bytes, field: str, limits: Limits, background: str | None = "white") -> Image.Image:
    """Decodes a picture file to RGB, or RGBA without a background."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            width, height = file.size
    except Image.UnidentifiedImageError:
        raise APIError(422, f"{field} is not a PNG, JPEG or WebP picture; save it as one of these", field) from None
    except Image.DecompressionBombError:
        width = height = 10**6
    except Exception as error:  # decoders raise errors of every kind on hostile bytes
        raise APIError(422, f"{field} is broken ({error}); save it again", field) from None
    if width * height > limits.upload_pixels:
        raise APIError(
            413, f"{field} has {width}x{height} pixels; scale it down to {limits.upload_pixels} in total", field
        )
    try:
        image = open_picture(NamedBytes(content, field), background or "white")
    except UserError as error:
        raise APIError(422, str(error), field) from None
    if background is None:
        with Image.open(BytesIO(content), formats=FORMATS) as whole:
            image.putalpha(ImageOps.exif_transpose(whole).convert("RGBA").getchannel("A"))
    return image


def picture(text: str, field: str, limits: Limits, background: str | None = "white") -> Image.Image:
    return opened(decoded(text, field), field, limits, background)


def without_tags(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without LoRA tags, and the LoRAs."""
    rest, loras = tagged_loras(prompt)
    return (rest.strip() if loras else prompt), loras


# --- masks -----------------------------------------------------------------------------------------------------------


def size_mismatch(mask: Image.Image, image: Image.Image) -> APIError:
    sizes = f"mask {mask.width}x{mask.height} and image {image.width}x{image.height}"
    return APIError(422, f"{sizes} differ in size; make them the same", "mask", list(mask.size))


# --- sizes -----------------------------------------------------------------------------------------------------------


def check_pixels(size: tuple[int, int], limits: Limits, field: str = "size") -> None:
    """APIError if a size is below 8x8 or above the limit."""
    width, height = size
    if min(size) < 8 or width * height > limits.pixels:
        raise APIError(422, f"{field} {width}x{height} is out of range; choose a size from 8x8 to {limits.pixels} "
                      "pixels in total", field, [width, height])  # fmt: skip


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
