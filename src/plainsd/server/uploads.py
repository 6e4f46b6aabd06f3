"""Pictures that come in: checked before they are decoded, and made ready for drawing on.

Only PNG, JPEG and WebP are decoded. A picture is never fetched from an address.
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
from plainsd.text.prompts import lora_tags

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=-]+)*;base64,")


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
        raise APIError(422, f"{field} {text[:60]!r} is an address; send the picture itself, in base64", field)
    found = DATA_URL.match(text)
    try:
        return b64decode("".join(text[found.end() if found else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise APIError(
            422, f"{field} {text[:20]!r}... is not base64; send the bytes of a PNG, JPEG or WebP file so", field
        ) from None


def opened(content: bytes, field: str, limits: Limits, background: str | None = "white") -> Image.Image:
    """The bytes of a file -> a picture, RGB; with no background, RGBA."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            width, height = file.size
    except Image.UnidentifiedImageError:
        raise APIError(422, f"{field} is no PNG, JPEG or WebP picture; save it as one of them", field) from None
    except Image.DecompressionBombError:
        width = height = 10**6
    except Exception as error:  # decoders meet hostile bytes with errors of every kind
        raise APIError(422, f"{field} is broken ({error}); save it again", field) from None
    if width * height > limits.upload_pixels:
        raise APIError(413, f"{field} has {width}x{height} pixels; scale it below {limits.upload_pixels} in all", field)
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


def without_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt that is left when its LoRAs are taken out, and these."""
    rest, loras = lora_tags(prompt)
    return (rest.strip() if loras else prompt), loras


# --- masks -----------------------------------------------------------------------------------------------------------


def size_mismatch(mask: Image.Image, image: Image.Image) -> APIError:
    sizes = f"mask {mask.width}x{mask.height} and image {image.width}x{image.height}"
    return APIError(422, f"{sizes} differ in size; make them the same", "mask", list(mask.size))


# --- sizes -----------------------------------------------------------------------------------------------------------


def check_pixels(size: tuple[int, int], limits: Limits, field: str = "size") -> None:
    """APIError for a picture that is larger than this server draws, or none at all."""
    width, height = size
    if min(size) < 8 or width * height > limits.pixels:
        raise APIError(422, f"{field} {width}x{height} is out of range; choose a size from 8x8 to {limits.pixels} "
                      "pixels in all", field, [width, height])  # fmt: skip


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
