"""Pictures: read from any common file, written with the settings they were made with; grids and previews.

Pixels as tensors are float32 in [-1, 1], (B, 3, H, W).
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from plainsd.disk import draft_of, under_free_name, written_whole
from plainsd.errors import UserError
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.pictures.texts.comfyui import parse_workflow
from plainsd.pictures.texts.embedded import exif_of, settings_in

WRITTEN_AS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # formats of pictures that are written
LOSSY: dict[str, dict] = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
JPEG_EXIF = 65_533  # bytes that fit into one segment
SETTINGS_FILES = (".txt", ".json")  # settings without a picture
LARGEST_TEXT = 2**25  # bytes
MAX_PIXELS = 89_478_485  # pixels; Pillow's own warning limit, a quarter of a gibibyte of RGB


# --- pictures and tensors --------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of any mode -> (1, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return pixels.float() / 127.5 - 1


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), about [-1, 1] -> B pictures of mode RGB. Values outside are clamped."""
    pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def enlarged_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A preview scaled to this size by nearest neighbour; unchanged if it has the size."""
    return image if image.size == size else image.resize(size, Image.Resampling.NEAREST)


def to_mask(image: Image.Image) -> Tensor:
    """A picture whose light parts are to be repainted -> (1, 1, H, W) of 0 and 1. Transparent parts count as dark."""
    light = np.array(to_rgb(image, background="black").convert("L")) >= 128
    return torch.from_numpy(light)[None, None].float()


# --- reading ---------------------------------------------------------------------------------------------------------


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey levels -> 8-bit ones, divided by 257, so that white stays white. Pillow itself would clip them."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65_535:
        raise UserError("has 32-bit grey levels of unknown range; save it with 8 or 16 bits")
    return Image.fromarray((levels / 257).round().astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Pixels in another colour space (CMYK, Display P3) -> sRGB, by the profile in the file."""
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        made = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return image if made is None else made  # None means in place, which is not requested
    except (ImageCms.PyCMSError, OSError):
        return image  # unreadable profile: take the pixels as they are, as viewers do


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any mode -> RGB; transparent parts show the background."""
    if image.mode == "F":
        raise UserError("has floating-point pixels of unknown range; save it with 8 or 16 bits")
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return _srgb(image, profile).convert("RGB")


def open_picture(path: str | Path | BytesIO, background: str = "white") -> Image.Image:
    """A picture file -> RGB, rotated by its EXIF data. UserError, with the reason, for a damaged file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"claims {image.width}x{image.height} pixels; scale it below {MAX_PIXELS} in all")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a second view behind it
                raise UserError(f"is animated or has several pages ({frames}); save the one you want on its own")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image), background)
    except UserError as error:
        raise UserError(f"picture '{path}' {error}") from None
    except FileNotFoundError:
        raise UserError(f"picture '{path}' does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"picture '{path}' is a folder; give one file") from None
    except PermissionError:
        raise UserError(f"picture '{path}' may not be read; check its permissions") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"'{path}' is not a picture in a format that can be read; use PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise UserError(f"picture '{path}' claims too many pixels; scale it below {MAX_PIXELS} in all") from None
    except Exception as error:  # decoders raise errors of every kind on hostile bytes
        raise UserError(f"picture '{path}' is broken or cut short ({error}); download or save it again") from None


def read_settings(path: str | Path | BytesIO) -> Settings:
    """The settings in a picture's metadata, or in a text or JSON file of settings; UserError if there are none."""
    if isinstance(path, (str, Path)) and Path(path).suffix.lower() in SETTINGS_FILES:
        return _settings_alone(Path(path))
    try:
        with Image.open(path) as image:
            image.load()  # metadata may follow the pixels
            held = image.copy() if image.format == "MPO" else image
    except Exception:
        open_picture(path)  # raises the error that fits
        raise
    try:
        return settings_in(held)
    except UserError as error:
        raise UserError(f"picture '{path}': {error}") from None


def _settings_alone(path: Path) -> Settings:
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"'{path}' is larger than {LARGEST_TEXT} bytes; give one picture's settings")
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text; save it as UTF-8") from None
    return parse_workflow(text) if text.lstrip().startswith(("{", "[")) else parse_settings(text)


# --- writing ---------------------------------------------------------------------------------------------------------


class PictureFile(NamedTuple):
    """A picture as a file's content, with its settings in it: encoding takes longer than sending or writing it."""

    content: bytes
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image, suffix: str, settings: Settings | None = None) -> "PictureFile":
        """The content that `write_png` and `write_new_picture` write."""
        check_side(image.size, suffix)
        buffer = BytesIO()
        _save(image, buffer, WRITTEN_AS[suffix.lower()], settings)
        return cls(buffer.getvalue(), image.size)


MOST_PIXELS = {"JPEG": 65_500, "WEBP": 16_383}  # on a side, by the format


def check_side(size: tuple[int, int], suffix: str) -> None:
    """UserError for a picture that is too long for its format."""
    most = MOST_PIXELS.get(WRITTEN_AS[suffix.lower()])
    if most is not None and max(size) > most:
        raise UserError(f"{size[0]}x{size[1]} is more than the {most} pixels of a {suffix.lower()} file; write a .png")


def write_png(image: Image.Image, path: str | Path, settings: Settings | None = None) -> None:
    """Writes the picture with its settings as `parameters`, atomically; an existing file is replaced."""
    with written_whole(Path(path)) as temporary:
        _save(image, temporary, "PNG", settings)


def write_new_picture(image: Image.Image, path: Path, settings: Settings | None = None) -> Path:
    """Writes PNG, JPEG or WebP by the suffix, with the settings, never over an existing file: under the first free name
    of `x.png`, `x-2.png`, `x-3.png`, ..."""
    return write_new_file(PictureFile.of(image, path.suffix, settings), path)


def write_new_file(picture: PictureFile, path: Path) -> Path:
    """As `write_new_picture`."""
    with draft_of(path) as draft:
        draft.write_bytes(picture.content)
        return under_free_name(draft, path)


def _save(image: Image.Image, path: Path | BytesIO, kind: str, settings: Settings | None) -> None:
    if settings is None:
        return image.save(path, format=kind, **LOSSY[kind])
    text = format_settings(settings)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        return image.save(path, format=kind, pnginfo=info)
    exif = exif_of(text)
    if kind == "JPEG" and len(exif) > JPEG_EXIF:
        raise UserError(f"settings of {len(text)} characters do not fit into a JPEG file; write PNG or WebP")
    image.save(path, format=kind, exif=exif, **LOSSY[kind])


# --- grids -----------------------------------------------------------------------------------------------------------


class SheetLayout(NamedTuple):
    """Where things stand on a sheet, in pixels: the cell of one picture, the room left of and above the cells, and the
    size of all."""

    width: int
    height: int
    left: int
    top: int
    size: tuple[int, int]
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont


def sheet_layout(
    sizes: Sequence[tuple[int, int]], columns: int, rows: int, across: Sequence[str] = (), down: Sequence[str] = ()
) -> SheetLayout:
    """The layout of `grid` for pictures of these (width, height). Columns are as wide as their pictures and labels."""
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    font = ImageFont.load_default(max(12, height // 24))
    width = max(width, *(round(font.getlength(label)) + 12 for label in across), 0)
    left = max((round(font.getlength(label)) + 16 for label in down), default=0)
    top = round(font.getbbox("Ag")[3]) + 12 if across else 0
    return SheetLayout(width, height, left, top, (left + columns * width, top + rows * height), font)


def grid(
    images: Sequence[Image.Image], columns: int, across: Sequence[str] = (), down: Sequence[str] = ()
) -> Image.Image:
    """A sheet of pictures, row by row, with labels above the columns (`across`) and left of the rows (`down`)."""
    rows = -(-len(images) // columns)
    width, height, left, top, size, font = sheet_layout([image.size for image in images], columns, rows, across, down)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(across):
        draw.text((left + (i + 0.5) * width, top / 2), label, "black", font, anchor="mm")
    for i, label in enumerate(down):
        draw.text((left - 8, top + (i + 0.5) * height), label, "black", font, anchor="rm")
    for i, image in enumerate(images):
        beside = (width - image.width) // 2 if across else 0
        sheet.paste(image, (left + i % columns * width + beside, top + i // columns * height))
    return sheet


# --- previews --------------------------------------------------------------------------------------------------------


def continued(image: Image.Image, sides: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """The picture extended by so many pixels at the left, top, right and bottom, in the colours of its edges; and a
    mask that is light there."""
    left, top, right, bottom = sides
    pixels = np.pad(np.array(to_rgb(image)), ((top, bottom), (left, right), (0, 0)), mode="edge")
    canvas = Image.fromarray(pixels)
    mask = Image.new("L", canvas.size, "white")
    mask.paste("black", (left, top, left + image.width, top + image.height))
    return canvas, mask
