"""Files that are whole or absent, whatever happens while they are written; texts and JSON read with one clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from plainsd.errors import DiskError, UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, to be written; at the end it becomes `path` in one step, or it vanishes.

    Folders above it are made. DiskError where the disk refuses any of this; then `path` is what it was before.
    """
    with draft_of(path) as draft:
        yield draft
        flush(draft)
        os.replace(draft, path)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what still bears it at the end vanishes."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with refusals(path, draft):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
    finally:
        with suppress(OSError):
            draft.unlink()


def under_free_name(draft: Path, path: Path) -> Path:
    """Gives a written file the first free name of `x.png`, `x-2.png`, `x-3.png`, ...; says which.

    A hard link fails where the name is taken, so that two programs writing at once keep both their files.
    """
    flush(draft)
    for name in chain([path], (path.with_stem(f"{path.stem}-{n}") for n in count(2))):
        try:
            os.link(draft, name)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if name.exists():
                continue
            os.replace(draft, name)
        break
    return name


@contextmanager
def refusals(path: Path, draft: Path) -> Iterator[None]:
    """Inside, whatever the disk refuses of `path` becomes a DiskError. What fails about another file, which is read
    meanwhile, or about a pipe that shows a bar, stays what it is."""
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
    """Waits until a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder safe against a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a model's folder needs this file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text; fetch it again") from error


def cache_folder() -> Path:
    """The user's own, for what can always be made again. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainsd"


def read_json(path: Path) -> dict[str, Any]:
    text = read_text_file(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the former also of a number with thousands of digits
        raise UserError(f"{path} is damaged: it is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a table of settings; fetch it again")
    return content


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when all went well, and vanishes if not.

    DiskError where the disk refuses any of this; then `target` is what it was before.
    """
    ours = ("model_index.json", "config.json")  # a model's folder, or a part's, may be replaced
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not any((target / name).is_file() for name in ours):
        raise UserError(f"{target} exists and is no folder of a model; choose another place")
    draft, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        with refusals(target, draft):
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
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
