"""Listing of folders, and lines of text files.

Hidden files are no data: `.ipynb_checkpoints`, and the `._cat.png` that macOS puts beside `cat.png` on foreign disks.
Symlinked folders are followed, once. Suffixes are case-insensitive. Only a newline ends a line: U+2028, U+0085 and the
like are characters of a caption, though `str.splitlines` splits there.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from plainsd.errors import UserError

FOREIGN_FOLDERS = ("__MACOSX", "@eaDir")  # folders that archivers and file servers add, with thumbnails and metadata


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or added by some program."""
    return name.startswith(".") or name in FOREIGN_FOLDERS


def suffix_of(path: Path) -> str:
    """`.png` for `cat.PNG`."""
    return path.suffix.lower()


def files_below(
    folder: Path, without: Iterable[Path] = (), unreadable: Callable[[OSError], None] | None = None
) -> list[Path]:
    """Every file of a folder and its subfolders, symlinked ones too, sorted; not hidden ones or those in `without`.

    A folder that is reached twice counts once, so link cycles end. Files and folders in `without` are excluded however
    they are reached, except `folder` itself and its parents. `unreadable` is called with subfolders that cannot be
    read; without it they are skipped.
    """
    apart, seen, found = others(folder, without), {folder.resolve()}, []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        here = [Path(place, name) for name in sorted(folders) if not hidden(name)]
        here.sort(key=Path.is_symlink)  # a real folder comes before links to it
        folders.clear()
        for path in here:
            if (real := path.resolve()) not in seen and not lies_in(real, apart):
                seen.add(real)
                folders.append(path.name)
        found += [Path(place, name) for name in names if not hidden(name)]
    files = (path for path in found if path.is_file() or path.is_symlink())  # broken links fail when opened
    return sorted(path for path in files if not (apart and lies_in(path.resolve(), apart)))


def others(folder: Path, without: Iterable[Path]) -> list[Path]:
    """The resolved paths to exclude from a folder: all but the folder itself and its parents."""
    root = folder.resolve()
    return [real for place in without if not root.is_relative_to(real := place.resolve())]


def lies_in(real: Path, places: Iterable[Path]) -> bool:
    """Whether a file or folder is one of `places`, or inside one. All are resolved paths."""
    return any(real.is_relative_to(place) for place in places)


def file_named(folder: Path, name: str) -> Path | None:
    """The file of this name in a folder, ignoring case."""
    exact = folder / name
    if exact.is_file():
        return exact
    return next((path for path in sorted(folder.iterdir()) if path.name.lower() == name and path.is_file()), None)


def lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte-order mark. Raises OSError or UnicodeDecodeError."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def read_prompts(path: Path) -> list[str]:
    """One prompt per line. Blank lines and those that begin with `#` are skipped."""
    try:
        stripped = [line.strip() for line in lines_of(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in '{path}' ({error}); give a text file in UTF-8") from None
    prompts = [line for line in stripped if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"'{path}' has no prompts; write one a line")
    return prompts
