"""Captioned pictures from any source: a folder, parquet files, tar shards, a dataset on the hub.

    cats                     a folder with metadata.jsonl, or with name.png + name.txt pairs; needs nothing else
    kohya:dogs               a folder of folders such as `10_sks dog`, as kohya's trainer (sd-scripts) reads it
    cats:10                  any source: ten times an epoch
    shards/ or one.parquet   parquet files with a picture and a text column      }
    shards/ or one.tar       tar files in the webdataset form                    } these need the
    pictures/                pictures with metadata.csv or metadata.parquet      } `datasets` library
    owner/name[@revision]    a dataset on the hub                                }
    emoji:SET.json           scenes of emoji, drawn when they are wanted: see plainsd.emoji.scenes

What a folder may hold is said in folders.py, what a row in tables.py.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from plainsd.errors import UserError
from plainsd.listing import file_named, files_below, lies_in, others, suffix_of
from plainsd.train.data.folders import METADATA, PLAIN_READING, Reading, first_few, is_picture, kohya_folders, refused
from plainsd.train.data.pictures import Entry, PictureSet, items_of, scan
from plainsd.train.data.scenes import SCENE_PREFIX, read_scenes
from plainsd.train.data.tables import by_split, dataset_rows, fetched_rows

KOHYA_PREFIX = "kohya:"
SOURCE = re.compile(r"(.+?)(?::(\d+))?")  # with a number of repeats
HUB_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def read_source(
    source: str, size: int, cache: Path, reading: Reading = PLAIN_READING, say: Callable[[str], None] = print
) -> PictureSet:
    """The pictures of one source, checked. `cache` is a folder for downloads, conversions and scans."""
    place, repeats = parse_source(source)
    if place.startswith(SCENE_PREFIX):
        if reading.caption or reading.stream or reading.text_column or reading.picture_column:
            raise UserError(
                f"{place}: scenes are drawn with their captions; leave out --caption, --stream, --text-column and "
                "--picture-column"
            )
        return PictureSet(read_scenes(place, heldout=reading.heldout, limit=reading.limit, repeats=repeats), size)
    found = found_at(place, repeats, cache, reading, say)[: reading.limit]
    return PictureSet(scan(found, place, reading.bad_share, known=cache / "scanned.json", say=say), size)


def found_at(
    place: str, repeats: int, cache: Path, reading: Reading, say: Callable[[str], None]
) -> list[tuple[Entry, str | None]]:
    """The pictures of a source, given without the number of repeats, and that number; each with what is wrong with it
    already, or None."""
    path = Path(place.removeprefix(KOHYA_PREFIX))
    if place.startswith(KOHYA_PREFIX):
        parts = kohya_parts(path, reading, say)
        return [
            one
            for part, times, caption in parts
            for one in found_at(str(part), repeats * times, cache, replace(reading, caption=caption), say)
        ]
    kind, files = source_kind(path, reading.without)
    if kind is None and not path.exists() and not HUB_NAME.fullmatch(place):
        raise UserError(
            f"there is no folder or file {place!r}; --data wants a folder of captioned pictures, parquet or "
            "tar files, or a dataset on the hub such as owner/name"
        )
    if kind == "folder":
        for named, _, _ in [] if file_named(path, METADATA) else kohya_folders(path)[:1]:
            say(f"{path}: {named.name!r} is read like any folder; with --data 'kohya:{path}' its name counts")
        return items_of(path, reading, repeats, say)
    split = by_split(path, files, reading.split)
    if isinstance(split, dict) and (apart := len(files) - sum(map(len, split.values()))):
        say(f"{path}: {apart} of {len(files)} files are of other splits than {reading.split}, and are left out")
    if reading.stream:
        folder = fetched_rows(place, kind, files, cache, reading)
        return items_of(folder, Reading(reading.caption), repeats, say)
    rows = dataset_rows(place, kind, files, cache, reading)
    if not rows:
        raise UserError(f"{place}: no rows; give a dataset with pictures")
    return [(replace(row, repeats=repeats), None) for row in rows]


def kohya_parts(folder: Path, reading: Reading, say: Callable[[str], None]) -> list[tuple[Path, int, str]]:
    """Of each folder `10_sks dog` in a folder the path, the repeats, and the caption of pictures without one: the
    class, if --caption does not say another. Pictures beside those folders are reported."""
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; {KOHYA_PREFIX} wants one with folders such as '10_sks dog'")
    parts = [
        (path, repeats, reading.caption or words)
        for path, repeats, words in kohya_folders(folder)
        if not lies_in(path.resolve(), others(folder, reading.without))
    ]
    if not parts:
        raise UserError(f"{folder} has no folders such as '10_sks dog' (repeats and class); leave {KOHYA_PREFIX} out")
    files = files_below(folder, [*reading.without, *(path for path, _, _ in parts)], refused)
    if rest := [path.relative_to(folder) for path in files if is_picture(path)]:
        say(f"{folder}: {len(rest)} not used, outside of folders such as '10_sks dog': {first_few(rest)}")
    return parts


def is_table(source: str, without: Iterable[Path] = ()) -> bool:
    """Whether a source has columns and splits."""
    place, _ = parse_source(source)
    return not place.startswith((SCENE_PREFIX, KOHYA_PREFIX)) and source_kind(Path(place), without)[0] != "folder"


def is_listed(source: str) -> bool:
    """Whether a source has a metadata.jsonl."""
    folder = folder_of(source)
    parts = [path for path, _, _ in kohya_folders(folder)] if source.startswith(KOHYA_PREFIX) else []
    return any(path.is_dir() and file_named(path, METADATA) is not None for path in (folder, *parts))


def folder_of(source: str) -> Path:
    """Where a source's files lie."""
    return Path(parse_source(source)[0].removeprefix(KOHYA_PREFIX))


def real_source(source: str) -> str:
    """A source with the real path of what it names, and its repeats: `cats`, `./cats/` and `cats:1` are the same."""
    place, repeats = parse_source(source)
    prefix = next((one for one in (SCENE_PREFIX, KOHYA_PREFIX) if place.startswith(one)), "")
    path = Path(place.removeprefix(prefix))
    return f"{prefix}{path.resolve() if path.exists() else path}:{repeats}"


def parse_source(source: str) -> tuple[str, int]:
    """A source's path or name, and its repeats per epoch."""
    found = None if Path(source).exists() else SOURCE.fullmatch(source)
    if not found:
        return source, 1
    repeats = int(found[2] or 1)
    if repeats < 1:
        raise UserError(f"--data {source} repeats its pictures {repeats} times; give 1 or more, or leave it out")
    return found[1], repeats


def source_kind(path: Path, without: Iterable[Path] = ()) -> tuple[str | None, list[str]]:
    """What a path holds: "folder" (read here), a builder of `datasets` with its files, or None."""
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(suffix_of(path))
        if kind is None:
            raise UserError(f"{path} is not a source of pictures; give a folder, a .parquet or a .tar file")
        return kind, [str(path)]
    if not path.is_dir():
        return None, []
    for name in ("metadata.csv", "metadata.parquet"):
        if table := file_named(path, name):
            if table.name != name:
                raise UserError(f"{table}: the datasets library reads it under the name {name}; call it that")
            return "imagefolder", [str(path)]
    files = files_below(path, without, refused)
    if not file_named(path, METADATA) and not any(map(is_picture, files)):
        for kind, wanted in (("parquet", ".parquet"), ("webdataset", ".tar")):
            if found := [str(file) for file in files if suffix_of(file) == wanted]:
                return kind, found
    return "folder", []
