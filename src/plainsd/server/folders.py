"""Folders of adapters, whose files are selected by name. Unusable files are skipped, and logged once."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from plainsd.errors import UserError
from plainsd.listing import files_below, suffix_of

Content = TypeVar("Content")
log = logging.getLogger("plainsd.server")


def named_files(folder: Path | None, suffixes: tuple[str, ...] = (".safetensors",)) -> dict[str, Path]:
    """Files with these suffixes by stem, or by path below the folder if a stem occurs twice."""
    if folder is None:
        return {}
    paths = [path for path in files_below(folder) if suffix_of(path) in suffixes and path.is_file()]
    stems = Counter(path.stem for path in paths)
    places = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return {path.stem if stems[path.stem] == 1 else place: path for path, place in zip(paths, places, strict=True)}


def changed_at(path: Path) -> int:
    """Modification time in nanoseconds; 0 if the file no longer exists."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def readable_files(
    read: Callable[[Path], Content],
    folder: Path | None,
    unusable: dict[str, str],
    suffixes: tuple[str, ...] = (".safetensors",),
) -> dict[str, tuple[Path, Content]]:
    """The result of `read` for each file of a folder, by name; failures go to `unusable`, with the reason."""
    found: dict[str, tuple[Path, Content]] = {}
    unusable.clear()
    for name, path in named_files(folder, suffixes).items():
        content, why = read_cached(read, path, changed_at(path))
        if not content:
            unusable[printable_name(name)] = why.replace(str(path), name)
        else:
            found[name] = path, content
    return found


@lru_cache(4096)
def read_cached(read: Callable[[Path], Content], path: Path, _: int) -> tuple[Content | None, str]:
    """Reads a file once per modification time. None with the reason if it cannot be used."""
    if not path.name.isprintable():
        why = "its name has characters that cannot be shown; rename it"
    else:
        try:
            return read(path), ""
        except UserError as error:
            why = str(error)
        except Exception as error:  # foreign files fail in many ways
            why = f"it cannot be read ({type(error).__name__}: {error})"
    why = printable_name(why)[:300]
    log.warning("skipped %s: %s", printable_name(str(path)), why)
    return None, why


def printable_name(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
