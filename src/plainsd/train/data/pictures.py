"""Captioned pictures: from a folder, checked, cropped to the training sizes.

folders.py finds the files of a folder; sources.py reads other sources into the same classes.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from plainsd.disk import read_cache, written_whole
from plainsd.errors import UserError
from plainsd.pictures.conditioning import Size
from plainsd.pictures.images import open_picture, to_tensor
from plainsd.train.data.crops import Framing, View, cut_out, view_of
from plainsd.train.data.folders import Reading, found_in
from plainsd.train.data.heldout import chosen_pictures, digests

SOME_COMPUTED = 2000  # pictures whose captions stand for those of all computed ones
SMALLEST = 8  # pixels of a picture's shorter side


class Entry(Protocol):
    """One captioned picture from any source. Entries are frozen dataclasses, so that a scan can fill in `size`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # what makes it a dataclass to `replace`

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def repeats(self) -> int:
        """Repeats per epoch."""

    @property
    def size(self) -> Size | None:
        """Known after a scan."""

    @property
    def masked(self) -> bool: ...

    @property
    def mapped(self) -> bool:
        """Whether it has a map, for a ControlNet."""

    @property
    def computed(self) -> bool:
        """Whether picture and texts are a function of `mark`, so that there is nothing to check."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str | None:
        """Its real path, where it has a file of its own."""

    def mark(self) -> str:
        """Changes when the picture does, or its mask or map."""

    def content(self) -> bytes:
        """The picture as it is stored."""

    def open(self) -> Image.Image: ...

    def open_mask(self) -> Image.Image: ...

    def open_map(self) -> Image.Image: ...


@dataclass(frozen=True)
class Item:
    """A picture in a file of its own."""

    path: Path
    texts: tuple[str, ...]
    repeats: int = 1
    size: Size | None = None
    mask: Path | None = None
    map: Path | None = None

    @property
    def computed(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def place(self) -> str:
        return str(self.path.resolve())

    @property
    def masked(self) -> bool:
        return self.mask is not None

    @property
    def mapped(self) -> bool:
        return self.map is not None

    def mark(self) -> str:
        beside = {"mask": self.mask, "map": self.map}
        return " ".join([file_mark(self.path), *(f"{name} {file_mark(path)}" for name, path in beside.items() if path)])

    def content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read picture '{self.path}': {error.strerror}; put it back, or remove its caption"
            ) from error

    def open(self) -> Image.Image:
        return open_picture(self.path)

    def open_mask(self) -> Image.Image:
        assert self.mask is not None  # of those that are `masked`
        return open_picture(self.mask, background="black")

    def open_map(self) -> Image.Image:
        assert self.map is not None  # of those that are `mapped`
        return open_picture(self.map, background="black")


def file_mark(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


@dataclass(frozen=True)
class PictureSet:
    """Pictures of about `size` x `size` pixels, with their cropping and caption options."""

    items: tuple[Entry, ...]
    size: int
    framing: Framing = Framing()
    tags: int | None = None  # captions are lists with commas: all but the first `tags` entries are shuffled

    def __len__(self) -> int:
        return len(self.items)

    def views(self, index: int) -> list[View]:
        item = self.items[index]
        return self.framing.views(item.name, item.size or item.open().size, self.size)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """The first view of each, of the same size all of them: (B, 3, H, W) in [-1, 1]."""
        return torch.cat([self._first(self.items[i].open(), self.items[i].name) for i in indices])

    def maps(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Of each picture's view the map, cut alike: (B, 3, H, W), 0 to 1. All must have one."""
        cut = [self.map(index, view) for index, view in zip(indices, views, strict=True)]
        return torch.cat([(to_tensor(map) + 1) / 2 for map in cut])

    def map(self, index: int, view: int = 0) -> Image.Image:
        return cut_out(self.items[index].open_map(), self.views(index)[view])

    def _first(self, picture: Image.Image, name: str) -> Tensor:
        return to_tensor(cut_out(picture, self.framing.views(name, picture.size, self.size)[0]))

    def caption(self, index: int, generator: torch.Generator) -> str:
        """One of the picture's captions, drawn with `generator`."""
        texts = self.items[index].texts
        text = texts[int(torch.randint(len(texts), (), generator=generator))]
        return text if self.tags is None else shuffled(text, self.tags, generator)

    def split(self, share: float, held: Collection[int] | None = None) -> tuple["PictureSet", "PictureSet"]:
        """(the others, a share of the pictures, at least one), chosen as heldout.py says, or those of `held`."""
        held = chosen_pictures(digests(self.items), share) if held is None else held
        parts = [tuple(item for i, item in enumerate(self.items) if (i in held) == wanted) for wanted in (False, True)]
        return replace(self, items=parts[0]), replace(self, items=parts[1])


def shuffled(text: str, keep: int, generator: torch.Generator) -> str:
    """`a, b, c, d` with all but the first `keep` entries in another order."""
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    head, tail = entries[:keep], entries[keep:]
    return ", ".join([*head, *(tail[i] for i in torch.randperm(len(tail), generator=generator).tolist())])


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    """The middle square, scaled to `size`."""
    return cut_out(picture, view_of(picture.size, (size, size)))


# ---- reading a folder


def read_pictures(
    folder: str | Path,
    size: int,
    *,
    bad_share: float = 0.01,
    check: bool = True,
    caption: str | None = None,
    text_column: str | None = None,
    repeats: int = 1,
    limit: int | None = None,
    known: Path | None = None,
    without: Iterable[Path] = (),
    say: Callable[[str], None] = print,
) -> PictureSet:
    """All captioned pictures of a folder. Broken pictures and empty captions are left out, counted and listed.

    More than `bad_share` of them is a UserError: then the folder itself is wrong. `caption` is for pictures without
    one; `text_column` is the key of captions in metadata.jsonl. `known`: a cache file of checked pictures. `without`:
    files and folders to skip.
    """
    found = items_of(Path(folder), Reading(caption, text_column=text_column, without=tuple(without)), repeats, say)
    return PictureSet(scan(found[:limit], str(folder), bad_share, check, known, say), size)


def items_of(
    folder: Path, reading: Reading, repeats: int, say: Callable[[str], None]
) -> list[tuple[Entry, str | None]]:
    """The pictures of a folder, each with what is wrong with it already, or None. UserError where there are none."""
    found = found_in(folder, reading.without, say, reading.text_column)
    if not found:
        raise UserError(f"{folder}: no pictures; put metadata.jsonl there, or pairs such as cat.png and cat.txt")
    spare = (reading.caption,) if reading.caption else ()
    return [(Item(one.path, one.texts or spare, repeats, None, one.mask, one.map), one.fault) for one in found]


# ---- checking


def scan(
    found: Sequence[tuple[Entry, str | None]],
    where: str,
    bad_share: float,
    check: bool = True,
    known: Path | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Entry, ...]:
    """The entries that can be used, with their sizes. `found` has each with what is wrong with it already, or None."""
    whole = {mark: size for mark, size in read_cache(known, say).items() if is_size(size)}
    entries, bad, before = [], [], len(whole)
    for entry, fault in tqdm(found, "checking pictures", disable=None if check else True, leave=False):
        fault = fault or (None if entry.texts else "no caption")
        if check and not fault:
            entry, fault = _checked(entry, whole)
        if fault:
            name = entry.name.encode(errors="backslashreplace").decode()  # of a file, it may be any bytes
            bad.append(f"{name}: {fault}")
        else:
            entries.append(entry)
    if known and len(whole) > before:
        with written_whole(known) as unfinished:
            unfinished.write_text(json.dumps(whole), encoding="utf-8")
    if bad:
        say(f"left out {len(bad)} of {len(found)} pictures: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    if not entries or len(bad) > bad_share * len(found):
        raise UserError(
            f"{where}: {len(bad)} of {len(found)} pictures cannot be used, more than {bad_share:.0%} "
            f"(first: {bad[0]}); fix them or raise --bad-share"
        )
    return tuple(entries)


def is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side >= SMALLEST for side in value)


def _checked(entry: Entry, whole: dict[str, Sequence[int]]) -> tuple[Entry, str | None]:
    """The entry with its size, or what is wrong with it. Marks in `whole` are believed, and new ones put there."""
    try:
        mark = entry.mark()
        if not is_text(mark):
            return entry, "its name, or that of its mask or map, is not text in UTF-8; rename it"
        if mark not in whole:
            size = entry.open().size
            if min(size) < SMALLEST:
                return entry, f"only {size[0]}x{size[1]} pixels"
            if entry.masked and entry.open_mask().size != size:
                return entry, f"its mask is of another size than its {size[0]}x{size[1]} pixels"
            if entry.mapped and entry.open_map().size != size:
                return entry, f"its map is of another size than its {size[0]}x{size[1]} pixels"
            whole[mark] = size
        return replace(entry, size=tuple(whole[mark])), None
    except UserError as error:
        return entry, str(error)
    except OSError as error:
        return entry, f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"


def is_text(name: str) -> bool:
    """Whether a name can be written down: file names may be any bytes."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def described(pictures: PictureSet) -> str:
    """A summary of a scan, in a line or two."""
    sides = [min(item.size) for item in pictures.items if item.size]
    small = sum(side < pictures.size for side in sides)
    texts, more = some_texts(pictures.items)
    repeated = sum(item.repeats for item in pictures.items)
    captions = f"{len(texts)}{' or more' if more else ''} captions"
    lines = [
        f"{len(pictures)} pictures{f', {repeated} an epoch' if repeated != len(pictures) else ''}, "
        f"{captions}; shorter sides {min(sides)} to {max(sides)} px, median {statistics.median(sides):g}"
        f"{f'; {small} are enlarged to {pictures.size}' if small else ''}"
    ]
    if pictures.framing.buckets:
        sizes = Counter(pictures.views(i)[0].size for i in range(len(pictures)))
        lines.append("sizes: " + ", ".join(f"{w}x{h} {count}" for (w, h), count in sizes.most_common()))
    return "\n".join(lines)


def some_texts(items: Sequence[Entry]) -> tuple[set[str], bool]:
    """Their captions, of computed ones those of the first SOME_COMPUTED; and whether there are others."""
    read = [item for item in items if not item.computed]
    computed = [item for item in items if item.computed]
    texts = {text for item in (*read, *computed[:SOME_COMPUTED]) for text in item.texts}
    return texts, len(computed) > SOME_COMPUTED


def joined_sets(parts: Iterable[PictureSet]) -> PictureSet:
    """Several sets as one, with the options of the first."""
    parts = list(parts)
    return replace(parts[0], items=tuple(item for part in parts for item in part.items))
