"""Where a picture's file holds its settings, and what form they have there.

PNG               text chunks: `parameters` (A1111 and most others); `prompt`, `workflow` (ComfyUI)
JPEG, WebP, AVIF  EXIF: UserComment (A1111); Make and Model, as "workflow: ..." and "prompt: ..." (ComfyUI)
JPEG              a comment, "parameters", a zero byte and the text (stable-diffusion.cpp); so in GIF, without the word
WebP              XMP, <sdcpp:parameters> (stable-diffusion.cpp)
"""

import html
import re
from contextlib import suppress

from PIL import ExifTags, Image

from plainsd.errors import UserError
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import parse_settings
from plainsd.pictures.texts.comfyui import parse_workflow
from plainsd.pictures.texts.entries import LONGEST_TEXT

CODE = 8  # bytes before an EXIF comment that say how it is written
UNICODE, ASCII, JIS = b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0"
MOST_BYTES = 32 * LONGEST_TEXT  # bytes of any one text; ComfyUI's may hold whole workflows
XMP = re.compile(rb"<sdcpp:parameters>([^<]*)</sdcpp:parameters>")


def settings_in(image: Image.Image) -> Settings:
    """The settings that a loaded picture carries. UserError where there are none, or none that can be read."""
    texts = texts_in(image)
    if graph := texts.get("prompt") or texts.get("workflow"):
        try:
            return parse_workflow(graph)
        except UserError:
            if "parameters" not in texts:  # some of ComfyUI's nodes write A1111's text too
                raise
    if "parameters" not in texts:
        raise UserError("it carries no settings of plainsd, A1111, ComfyUI or stable-diffusion.cpp; give one that does")
    return parse_settings(texts["parameters"])


def texts_in(image: Image.Image) -> dict[str, str]:
    """All that a loaded picture carries under the names of PNG's chunks: parameters, prompt, workflow."""
    found = {}
    for name in ("parameters", "prompt", "workflow"):
        if isinstance(text := image.info.get(name), str):
            found[name] = text
    if "parameters" not in found:
        if text := commented(image):
            found["parameters"] = text
    with suppress(Exception):  # EXIF nobody can read: as if there were none
        exif = image.getexif()
        for tag in (ExifTags.Base.Make, ExifTags.Base.Model):
            kind, _, text = str(exif.get(tag, "")).partition(":")
            if kind.lower() in ("prompt", "workflow"):
                found.setdefault(kind.lower(), text.rstrip("\0"))
    return {name: text for name, text in found.items() if text.strip()}


def commented(image: Image.Image) -> str:
    """What stands in a comment of the file: EXIF's, the format's own, or XMP; nothing where there is none."""
    with suppress(Exception):
        if value := image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment):
            return comment_text(value) if isinstance(value, bytes) else str(value)
    comment = image.info.get("comment", b"")
    if isinstance(comment, bytes) and 0 < len(comment) <= MOST_BYTES:
        return comment.removeprefix(b"parameters\0").rstrip(b"\0").decode("utf-8", "replace")
    xmp = image.info.get("xmp", b"")
    if isinstance(xmp, bytes) and len(xmp) <= MOST_BYTES and (match := XMP.search(xmp)):
        return html.unescape(match[1].decode("utf-8", "replace"))
    return ""


def comment_text(comment: bytes) -> str:
    """An EXIF UserComment -> its text. UNICODE is UTF-16 of either byte order, of which nothing tells: A1111 writes it
    big-endian, others as the file has its numbers. The zeros of its Latin letters do tell."""
    if len(comment) > MOST_BYTES:
        raise UserError(f"a comment of {len(comment)} bytes is too long; {MOST_BYTES} is the most that is read")
    code, text = comment[:CODE], comment[CODE:]
    if code == UNICODE:
        if text[:2] in (b"\xfe\xff", b"\xff\xfe"):
            return text.decode("utf-16", "replace").rstrip("\0")
        big = text[::2].count(0) >= text[1::2].count(0)
        return text.decode("utf-16-be" if big else "utf-16-le", "replace").rstrip("\0")
    if code == JIS:
        return text.decode("iso2022_jp" if b"\x1b" in text else "shift_jis", "replace").rstrip("\0")
    known = code in (ASCII, bytes(CODE))
    return (text if known else comment).decode("utf-8", "ignore").rstrip("\0")


def exif_of(text: str) -> bytes:
    """EXIF with the text as its UserComment, as A1111 writes it into JPEG and WebP files."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = UNICODE + text.encode("utf-16-be", "surrogatepass")
    return exif.tobytes()
