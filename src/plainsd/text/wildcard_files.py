"""The folder of wildcards: text files with a choice per line, read for the prompts of one request."""

import os
import re
from pathlib import Path

from plainsd.errors import UserError, unknown

WILDCARD_NAME = re.compile(r"[\w*][\w*. -]*(?:/[\w*][\w*. -]*)*")
LONGEST_FILE = 10**6  # bytes
WILDCARD_WORK = 10 * LONGEST_FILE  # characters of files, lines and options that the prompts of one request may take


class Wildcards:
    """The wildcards of a folder, for the prompts of one request: each is read once, and all that choices and wildcards
    take together is bounded by WILDCARD_WORK."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.left = folder, WILDCARD_WORK
        self.known: dict[str, list[str]] = {}

    def spend(self, characters: int) -> None:
        """Counts work. UserError once it is more than WILDCARD_WORK."""
        self.left -= characters
        if self.left < 0:
            what = f"the choices and wildcards of the prompt take more than {WILDCARD_WORK} characters"
            raise UserError(f"{what}; use fewer or shorter ones", field="prompt")

    def lines(self, name: str) -> list[str]:
        """The choices that a wildcard stands for. UserError where it has none."""
        if name not in self.known:
            self.known[name] = self._read(name)
        return self.known[name]

    def _read(self, name: str) -> list[str]:
        if self.folder is None:
            raise UserError(
                f"__{name}__ is a wildcard, and there is no folder of them; give one with --wildcards, or take it out",
                field="prompt",
                value=name,
            )
        files = files_named(name, self.folder)
        if not files:
            paths = sorted(self.folder.rglob("*.txt"))[:50]
            known = [path.relative_to(self.folder).with_suffix("").as_posix() for path in paths]
            raise unknown("wildcard", name, known or ["none: the folder holds no .txt file"], field="prompt")
        found: list[str] = []
        for path in files:
            text = content_of_wildcard(path)
            self.spend(len(text))
            lines = (line.strip() for line in text.splitlines())
            found += [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(
                f"the wildcard {name!r} has no lines; write a choice a line into {files[0].name}", field="prompt"
            )
        return found


def files_named(name: str, folder: Path) -> list[Path]:
    if not WILDCARD_NAME.fullmatch(name) or ".." in name:
        return []
    paths = sorted(folder.glob(f"{name}.txt")) if "*" in name else [folder / f"{name}.txt"]
    return [path for path in paths if os.path.isfile(path)]  # False, too, for a name that is too long for a file


def content_of_wildcard(path: Path) -> str:
    """UserError, which does not reveal the folder, if the file cannot be read."""
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise UserError(f"{path.name} has more than {LONGEST_FILE} bytes; make several wildcards of it")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path.name} ({error.strerror}); make it readable, or remove it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is not UTF-8 text; save it as UTF-8") from None
