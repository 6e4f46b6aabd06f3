"""One kind of error for everything a user can fix: one line that says what, which value, and what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 300  # characters of a message; what stands in files may be of any length
LONG_WORD = re.compile(r"\S{80,}")
WITH_NAMES, WITH_CHOICES = 600, 1500  # of one that lists names from a file; of one that lists choices


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """A text in one line of at most `most` characters. Where it is longer, long words lose their middle, such as paths,
    and then the text does: a message begins with what is wrong, and ends with what to do."""
    if len(text) > most:
        text = LONG_WORD.sub(lambda word: f"{word[0][:25]}...{word[0][-50:]}", text)
    if len(text) > most:
        end = most // 2
        text = f"{text[: most - end - 5]} ... {text[-end:]}"
    return " ".join(text.splitlines())


class UserError(ValueError):
    """Wrong input. The message is one complete line, `what, which value; what to do`; the command line prints it and
    exits with code 2.

    `field` names the setting that is wrong, as `Settings` and the server's requests spell it (`clip_skip`), and `value`
    is its value; None if the error is not about a single setting. The page marks that field. `entry` is the index in
    a setting that is a list, from 0.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: Any = None,
        entry: int | None = None,
        most: int = LONGEST_MESSAGE,
    ):
        super().__init__(shortened(message, most))
        self.field, self.value, self.entry = field, value, entry

    @property
    def what(self) -> str:
        """The message up to its first semicolon: what is wrong, and the value."""
        return str(self).partition("; ")[0]

    @property
    def remedy(self) -> str | None:
        """The rest of the message: what to do."""
        return str(self).partition("; ")[2] or None


class DiskError(UserError):
    """A failed write; `reason` is the system's message. On a server it is not the request's fault."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"cannot write {path}: {reason}; nothing was written; choose another folder, or free disk space"
        )
        self.reason = reason


def unknown(what: str, value: object, choices: Iterable[str], *, field: str | None = None) -> UserError:
    """`unknown sampler 'eular'; did you mean 'euler'? choose from ...`"""
    names = list(choices)
    near = get_close_matches(str(value)[:100], names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    shown = shortened(repr(value), 100)
    return UserError(f"unknown {what} {shown}{hint} choose from {', '.join(names)}", field=field, value=value,
                     most=WITH_CHOICES)  # fmt: skip
