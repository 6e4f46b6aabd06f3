"""Atomic writes: files are whole or absent. Texts and JSON are read with one clear error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from plainsd.errors import DiskError, UserError
from plainsd.json_reader import LONGEST_JSON, BadJSON, parsed_json


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; at the end it atomically replaces `path`, or on an error is deleted.

    Parent folders are created. DiskError if the disk refuses any of this; then `path` is unchanged.
    """
    with draft_of(path) as draft:
        yield draft
        flush(draft)
        os.replace(draft, path)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; a file still there at the end is deleted."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with refusals(path, draft):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
    finally:
        with suppress(OSError):
            draft.unlink()


def under_free_name(draft: Path, path: Path) -> Path:
    """Renames a written file to the first free name of `x.png`, `x-2.png`, `x-3.png`, ...; returns it.

    A hard link fails if the name is taken, so that two programs writing at once both keep their files.
    """
    flush(draft)
    for name in chain([path], (path.with_stem(f"{path.stem}-{n}") for n in count(2))):
        try:
            os.link(draft, name)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            if name.exists():
                continue
            os.replace(draft, name)
        break
    return name


@contextmanager
def refusals(path: Path, draft: Path) -> Iterator[None]:
    """Turns an OSError about writing `path` into a DiskError. Errors about other files that are read meanwhile, or
    about the pipe of a progress bar, pass unchanged."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        at = Path(error.filename or draft)
        if error.errno is None or not (at.is_relative_to(draft) or at == path or at in path.parents):
            raise
        raise DiskError(path, error.strerror or str(error)) from error


def flush(path: Path) -> None:
    """Syncs a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Syncs a folder's entries, so that they survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text_file(path: Path, remedy: str = "fetch it again") -> str:
    try:
        size = path.stat().st_size
        if size > 4 * LONGEST_JSON:
            raise UserError(f"{path} has {size} bytes, and at most {4 * LONGEST_JSON} are read; {remedy}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a model's folder needs this file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text; {remedy}") from error


def cache_folder() -> Path:
    """The user's cache folder. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainsd"


def read_json(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """The table in a JSON file. UserError, which ends with the remedy, for anything else."""
    text = read_text_file(path, remedy)
    try:
        content = parsed_json(text)
    except BadJSON as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a table of settings; {remedy}")
    return content


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write into, which replaces `target` on success, and is deleted on an error.

    DiskError if the disk refuses any of this; then `target` is unchanged.
    """
    ours = ("model_index.json", "config.json")  # the folder of a model or a part may be replaced
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not any((target / name).is_file() for name in ours):
        raise UserError(f"{target} exists and is no folder of a model; choose another place")
    draft, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        with refusals(target, draft):
            shutil.rmtree(draft, ignore_errors=True)  # left by a killed process
            draft.mkdir(parents=True)
            yield draft
            for path in draft.rglob("*"):
                if path.is_file():
                    flush(path)
            if target.exists():
                os.replace(target, old)
            os.replace(draft, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
