"""Finds the pictures of a folder, with their captions and masks.

    metadata.jsonl         one line a picture: `file_name`, and `text` (or another of TEXT_COLUMNS): a caption or a
                           list of them; perhaps `mask` and `cond`
    cat.png + cat.txt      or pairs, one caption a line, in cat.txt or cat.caption; cat.mask.png is the mask, and
                           cat.cond.png the map that a ControlNet reads. Subfolders count
    10_sks dog/            with `kohya:`, a subfolder that is read 10 times an epoch, and whose pictures without a
                           caption have "sks dog"

Suffixes are case-insensitive, and a mask or a map may have any picture suffix. Pictures that are not used are reported.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from plainsd.errors import UserError
from plainsd.json_reader import parsed_json
from plainsd.listing import file_named, files_below, hidden, lies_in, lines_of, others, suffix_of

METADATA = "metadata.jsonl"
TEXT_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "description", "json")
CAPTIONS = (".txt", ".caption")
KOHYA_NAME = re.compile(r"(\d+)_(.*\S)")  # repeats and class
MAPS = ("cond", "conditioning_image")  # keys and columns with maps; the second is diffusers' word
PICTURES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    *(".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga", ".ppm", ".pgm", ".pnm", ".qoi"),
    *(".heic", ".heif", ".jxl"),  # read by Pillow with plugins only; otherwise an error
)
UNREAD = (
    ".svg",
    ".xcf",
    ".exr",
    ".hdr",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".orf",
    ".raf",
    ".rw2",
)  # reported


@dataclass(frozen=True)
class Reading:
    """How sources are read."""

    caption: str | None = None  # for pictures without one
    picture_column: str | None = None
    text_column: str | None = None
    split: str = "train"
    stream: bool = False
    limit: int | None = None  # only the first so many pictures
    bad_share: float = 0.01
    heldout: bool = False  # of scenes, those that training never sees
    without: tuple[Path, ...] = ()  # files and folders inside a source that are for something else


PLAIN_READING = Reading()


class FoundPicture(NamedTuple):
    """A picture in a folder; `fault`: what is wrong with it already."""

    path: Path
    texts: tuple[str, ...] = ()
    mask: Path | None = None
    map: Path | None = None  # for a ControlNet
    fault: str | None = None


def found_in(
    folder: Path, without: Iterable[Path], say: Callable[[str], None], text_column: str | None = None
) -> list[FoundPicture]:
    """All pictures of a folder. `without`: files and folders to skip. `text_column`: the key of captions in its
    metadata.jsonl, if it is unusual."""
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; --data wants a folder of captioned pictures")
    without = list(without)
    files = files_below(folder, without, refused)
    metadata = file_named(folder, METADATA)
    found = list(of_metadata(metadata, others(folder, without), text_column) if metadata else of_pairs(files, say))
    used = {os.path.abspath(path) for one in found for path in (one.path, one.mask, one.map) if path}
    bare = {path.with_suffix("") for path in files if is_picture(path) and not is_beside(path)}
    rest = [path for path in files if os.path.abspath(path) not in used]
    for why, these in (
        (f"not in {METADATA}", [path for path in rest if metadata and is_picture(path)]),
        ("masks without a picture", [p for p in rest if not metadata and is_mask(p) and masked(p) not in bare]),
        ("maps without a picture", [p for p in rest if not metadata and is_map(p) and masked(p) not in bare]),
        ("of kinds that are not read here; save them as PNG", [p for p in rest if is_unread(p)]),
    ):
        if these:
            say(f"{folder}: {len(these)} not used, {why}: {first_few([path.relative_to(folder) for path in these])}")
    return found


def kohya_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """Its folders whose names have repeats and a class, as kohya's trainer (sd-scripts) wants them, with both."""
    there = [path for path in sorted(folder.iterdir()) if path.is_dir() and not hidden(path.name)]
    named = [(path, KOHYA_NAME.fullmatch(path.name)) for path in there]
    return [(path, int(name[1]), name[2].strip()) for path, name in named if name and int(name[1])]


def of_metadata(file: Path, without: Sequence[Path] = (), text_column: str | None = None) -> Iterator[FoundPicture]:
    folder, keys, seen = file.parent, (text_column,) if text_column else TEXT_COLUMNS, False
    try:
        lines = lines_of(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} ({error}); give a text file in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parsed_json(line)
            seen = seen or text_column in row
            texts = next((row[key] for key in keys if row.get(key)), ())
            texts = texts if isinstance(texts, list) else [texts] if texts else []
            mask = folder / row["mask"] if row.get("mask") else None
            map = next((folder / row[key] for key in MAPS if row.get(key)), None)
            one = FoundPicture(folder / row["file_name"], spoken(texts), mask, map)
            place, *_ = [path.resolve() for path in (one.path, mask, map) if path]  # ValueError for what is no name
        except (ValueError, KeyError, TypeError, AttributeError):
            place = folder / f"{file.name} line {number}"
            one = FoundPicture(place, fault='not {"file_name": ..., "text": ...}')
        if not lies_in(place, without):
            yield one
    if text_column and not seen:
        raise UserError(f"{file}: no line has {text_column!r}; name another with --text-column, or leave it out")


def of_pairs(files: Sequence[Path], say: Callable[[str], None]) -> Iterator[FoundPicture]:
    captions: dict[Path, list[Path]] = {}
    beside: dict[tuple[Path, bool], list[Path]] = {}  # a picture's masks, and its maps
    for path in files:
        if suffix_of(path) in CAPTIONS:
            captions.setdefault(path.with_suffix(""), []).append(path)
        elif is_beside(path):
            beside.setdefault((masked(path), is_map(path)), []).append(path)
    pictures = [path for path in files if is_picture(path) and not is_beside(path)]
    if several := [these for p in pictures if len(these := captions.get(p.with_suffix(""), [])) > 1]:
        names = " and ".join(path.name for path in several[0])
        say(f"{len(several)} pictures have captions in several files ({names}); one is picked at random each time")
    for path in pictures:
        bare = path.with_suffix("")
        masks, maps = beside.get((bare, False), []), beside.get((bare, True), [])
        for what, these in (("masks", masks), ("maps", maps)):
            if len(these) > 1:
                names = first_few([p.name for p in these])
                yield FoundPicture(path, fault=f"it has {len(these)} {what} ({names})")
                break
        else:
            mask, map = (these[0] if these else None for these in (masks, maps))
            try:
                texts = spoken(line for file in captions.get(bare, ()) for line in lines_of(file))
                yield FoundPicture(path, texts, mask, map)
            except UnicodeDecodeError:
                yield FoundPicture(path, mask=mask, fault="its caption is not text in UTF-8")
            except OSError as error:
                yield FoundPicture(path, mask=mask, fault=f"its caption cannot be read ({error.strerror})")


def is_picture(path: Path) -> bool:
    return suffix_of(path) in PICTURES


def is_mask(path: Path) -> bool:
    """`cat.mask.png`."""
    return is_picture(path) and path.stem.lower().endswith(".mask")


def is_map(path: Path) -> bool:
    """`cat.cond.png`."""
    return is_picture(path) and path.stem.lower().endswith(".cond")


def is_beside(path: Path) -> bool:
    """Whether it belongs to another picture."""
    return is_mask(path) or is_map(path)


def masked(path: Path) -> Path:
    """`cat` for `cat.mask.png` and `cat.cond.png`."""
    return path.with_suffix("").with_suffix("")


def is_unread(path: Path) -> bool:
    """Pictures that hold more, or something else, than pixels to train on: those that Pillow opens beside PICTURES."""
    return not is_picture(path) and (suffix_of(path) in UNREAD or suffix_of(path) in pillows())


@cache
def pillows() -> frozenset[str]:
    Image.init()
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def spoken(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if text.strip())


def first_few(names: Sequence[object]) -> str:
    return f"{', '.join(map(str, names[:5]))}{' ...' if len(names) > 5 else ''}"


def refused(error: OSError) -> None:
    """An unreadable subfolder is an error: its pictures would be missing silently."""
    if not isinstance(error, FileNotFoundError):  # gone meanwhile
        raise UserError(f"cannot read the folder {error.filename} ({error.strerror}); check its permissions") from None
