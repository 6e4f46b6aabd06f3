"""What folders and text files hold, as people and their programs leave them.

Hidden files are nobody's data: `.ipynb_checkpoints`, and the `._cat.png` that macOS puts beside `cat.png` on disks of
other systems. Linked folders are followed, once. Endings are the same in either case. A line ends at a newline and
nowhere else: U+2028, U+0085 and their like are characters of a caption, though `str.splitlines` parts it there.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from plainsd.errors import UserError

OTHERS = ("__MACOSX", "@eaDir")  # folders of archivers and file servers, with previews and notes


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is some program's own."""
    return name.startswith(".") or name in OTHERS


def suffix_of(path: Path) -> str:
    """`.png` for `cat.PNG`."""
    return path.suffix.lower()


def files_below(
    folder: Path, without: Iterable[Path] = (), unreadable: Callable[[OSError], None] | None = None
) -> list[Path]:
    """Every file of a folder and its subfolders, linked ones too, sorted. Neither hidden ones, nor those in `without`.

    A folder that is reached twice counts once, so links in a circle end. `without` names files and folders that are
    left out, whatever way they are reached; but not where one is `folder` itself, or around it. `unreadable` hears of
    subfolders that may not be read; without it they are passed over.
    """
    apart, seen, found = others(folder, without), {folder.resolve()}, []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        here = [Path(place, name) for name in sorted(folders) if not hidden(name)]
        here.sort(key=Path.is_symlink)  # a folder's own name comes before those of links to it
        folders.clear()
        for path in here:
            if (real := path.resolve()) not in seen and not lies_in(real, apart):
                seen.add(real)
                folders.append(path.name)
        found += [Path(place, name) for name in names if not hidden(name)]
    files = (path for path in found if path.is_file() or path.is_symlink())  # links to nothing are told when opened
    return sorted(path for path in files if not (apart and lies_in(path.resolve(), apart)))


def others(folder: Path, without: Iterable[Path]) -> list[Path]:
    """The real names of what is to be left out of a folder: of all that is not the folder itself, or around it."""
    root = folder.resolve()
    return [real for place in without if not root.is_relative_to(real := place.resolve())]


def lies_in(real: Path, places: Iterable[Path]) -> bool:
    """Whether a file or folder is one of these, or in one of them. All of them by their real names."""
    return any(real.is_relative_to(place) for place in places)


def file_named(folder: Path, name: str) -> Path | None:
    """A folder's file of this name, in whatever case."""
    exact = folder / name
    if exact.is_file():
        return exact
    return next((path for path in sorted(folder.iterdir()) if path.name.lower() == name and path.is_file()), None)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte-order mark. OSError and UnicodeDecodeError else."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Blank lines are skipped, and those that begin with `#`."""
    try:
        stripped = [line.strip() for line in lines_of(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in '{path}' ({error}); give a text file in UTF-8") from None
    prompts = [line for line in stripped if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"'{path}' has no prompts; write one a line")
    return prompts
