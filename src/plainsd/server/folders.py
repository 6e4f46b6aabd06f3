"""Folders of adapters, whose files are selected by name. Unusable files are skipped, and logged once.

A file is read once for each time that it was changed. One that cannot be used is tried again after UNUSABLE_SECONDS, as
the reason may lie outside it: a network disk that is away, too many open files.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from plainsd.errors import UserError
from plainsd.listing import files_below, suffix_of

Content = TypeVar("Content")
log = logging.getLogger("plainsd.server")
UNUSABLE_SECONDS = 30.0


class CachedFile(NamedTuple):
    """What reading a file gave."""

    changed: int  # the file, at that time
    content: Any  # None if it cannot be used ...
    why: str  # ... for this reason
    until: float  # time.monotonic() at which it is read again


CACHED_FILES: dict[tuple[Callable, Path], CachedFile] = {}


def named_files(
    folder: Path | None,
    suffixes: tuple[str, ...] = (".safetensors",),
    unreadable: Callable[[OSError], None] | None = None,
    saved_as: tuple[str, ...] = (),
) -> dict[str, Path]:
    """Files with these suffixes by stem, or by path below the folder if a stem occurs twice. One that is called as in
    `saved_as` takes the name of the folder that it was saved in, if nothing else has it. `unreadable` is called with
    folders that cannot be read, `folder` itself included; without it they are skipped."""
    if folder is None:
        return {}
    below = files_below(folder, unreadable=unreadable)
    paths = [path for path in below if suffix_of(path) in suffixes and path.is_file()]
    own = [path.relative_to(folder).with_suffix("") for path in paths]
    saved = [at.parent if path.name in saved_as and at.parent.name else at for path, at in zip(paths, own, strict=True)]
    taken = Counter(saved)
    places = [place if taken[place] == 1 else at for place, at in zip(saved, own, strict=True)]
    count = Counter(place.name for place in places)
    named = [place.name if count[place.name] == 1 else place.as_posix() for place in places]
    return dict(zip(named, paths, strict=True))


def changed_at(path: Path) -> int:
    """When the file or its permissions were changed, in nanoseconds; 0 if it no longer exists."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return max(found.st_mtime_ns, found.st_ctime_ns)


def changed_below(path: Path) -> int:
    """When a file, or anything in a folder, was changed."""
    return max(map(changed_at, [path, *path.rglob("*")])) if path.is_dir() else changed_at(path)


def readable_files(
    read: Callable[[Path], Content],
    folder: Path | None,
    unusable: dict[str, str],
    suffixes: tuple[str, ...] = (".safetensors",),
    saved_as: tuple[str, ...] = (),
) -> dict[str, tuple[Path, Content]]:
    """The result of `read` for each file of a folder, by name; failures are added to `unusable`, with the reason."""
    found: dict[str, tuple[Path, Content]] = {}

    def unreadable(error: OSError) -> None:
        assert folder is not None  # it has been looked into
        place = Path(error.filename)
        name = folder.name if place == folder else place.relative_to(folder).as_posix()
        unusable[printable_name(name)] = f"the folder cannot be read ({error.strerror}); make it readable"

    for name, path in named_files(folder, suffixes, unreadable, saved_as).items():
        content, why = read_cached(read, path, changed_at(path))
        if not content:
            unusable[printable_name(name)] = why.replace(str(path), name)
        else:
            found[name] = path, content
    return found


def read_cached(read: Callable[[Path], Content], path: Path, changed: int) -> tuple[Content | None, str]:
    """What a file holds. None with the reason if it cannot be used."""
    known = CACHED_FILES.get((read, path))
    if known is None or known.changed != changed or known.until <= time.monotonic():
        content, why = read_now(read, path)
        if why and (known is None or known.why != why):
            log.warning("skipped %s: %s", printable_name(str(path)), why)
        known = CachedFile(changed, content, why, time.monotonic() + UNUSABLE_SECONDS if why else math.inf)
        CACHED_FILES[read, path] = known
    return known.content, known.why


def read_now(read: Callable[[Path], Content], path: Path) -> tuple[Content | None, str]:
    if not path.name.isprintable():
        return None, "its name has characters that cannot be shown; rename it"
    try:
        return read(path), ""
    except UserError as error:
        why = str(error)
    except Exception as error:  # foreign files fail in many ways
        why = f"it cannot be read ({type(error).__name__}: {error})"
    return None, printable_name(why)[:300]


def printable_name(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
