r"""Regular expressions from files, for the names of modules, within a budget of work.

PEFT's settings name modules by regular expressions. Python's matcher goes back to each place where it could have chosen
otherwise, so that a pattern such as `(a*)*b` takes time exponential in the name's length. Read is what people write in
such patterns: literals, `.`, classes, `\d \w \s`, repetitions of one of these, groups, `|`, `^` and `$`. Repeated
groups, look-around and back-references are refused.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

LONGEST_PATTERN, LONGEST_NAME = 1000, 1000  # characters
MOST_WORK = 10**9  # ways to try in all, for all matches of one file; ordinary files have some millions
PLAIN_PATTERN = re.compile(r"[\w.-]+")
PATTERN_TOKEN = re.compile(
    r"(?:\\[dDwWsS]|\\[^a-zA-Z0-9]|\[\^?\]?[^\]\\]*\]|[^\\\[\](){}*+?|^$])"  # what reads one character, ...
    r"(?P<count>(?:[*+?]|\{\d{1,2}(?:,\d{0,2})?\}|\{,\d{1,2}\})\??)?"  # ... repeated
    r"|\((?:\?:)?|\)\??|[|^$]"
)


class BadPattern(ValueError):
    """The pattern cannot be read; the message is the reason."""


@lru_cache(4096)
def checked(pattern: str) -> tuple[re.Pattern[str], float, int]:
    """A pattern, and a bound on the ways in which it can be tried on n characters: factor * n**power. BadPattern if it
    has none."""
    if len(pattern) > LONGEST_PATTERN:
        raise BadPattern(f"it has {len(pattern)} characters, and at most {LONGEST_PATTERN} are read")
    at, power, factor, open_groups = 0, 0, 1.0, [1]  # alternatives of each
    while at < len(pattern):
        token = PATTERN_TOKEN.match(pattern, at)
        if token is None:
            raise BadPattern(f"{pattern[at : at + 10]!r} is not read here, such as a repeated group")
        at, text, count = token.end(), token[0], token["count"]
        power += count is not None and count[0] != "?"
        if text.startswith("("):
            open_groups.append(1)
        elif text == "|":
            open_groups[-1] += 1
        elif text.startswith(")") and len(open_groups) > 1:
            factor *= open_groups.pop()
        factor *= 2 if text == ")?" or (count or "")[:1] == "?" else 1
    try:
        return re.compile(pattern), factor * open_groups[0], power
    except (re.error, RecursionError, OverflowError) as error:
        raise BadPattern(str(error)) from None


class Patterns:
    """The patterns of one file, with a budget of work for all of their matches."""

    def __init__(self) -> None:
        self.work = 0.0

    def fits(self, pattern: str, name: str, start: int = 0) -> bool:
        """Whether a pattern fits a whole name, or its end from `start` on. Raises BadPattern."""
        if len(name) > LONGEST_NAME:
            return False
        compiled, factor, power = checked(pattern)
        self.work += factor * math.pow(len(name) - start + 1, power)
        if self.work > MOST_WORK:
            raise BadPattern("with the others it takes too long to match")
        return compiled.fullmatch(name, start) is not None  # ^ fits at 0 only, as in PEFT

    def fits_end(self, pattern: str, name: str) -> bool:
        """Whether a pattern fits a name, or its end behind a point, as in PEFT. Raises BadPattern."""
        if PLAIN_PATTERN.fullmatch(pattern) and not name.endswith(pattern[-1]) and pattern[-1] != ".":
            return False  # most patterns are another module's name
        once = pattern.startswith(("^", ".*")) and "|" not in pattern  # what it fits, it fits from the beginning
        starts = [] if once else [i + 1 for i, sign in enumerate(name) if sign == "."]
        return any(self.fits(pattern, name, start) for start in (0, *starts))
