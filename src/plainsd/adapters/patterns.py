r"""Regular expressions from files, matched in time proportional to the pattern's length times the name's.

PEFT's settings name modules by regular expressions. Python's matcher goes back to each place where it could have chosen
otherwise, so that a pattern such as `(a*)*b` takes time exponential in the name's length. Here all choices are followed
at once, as a set of states (Thompson 1968, Regular expression search algorithm, CACM 11(6)). What people write in such
patterns is read: literals, `.`, classes, `\d \w \s`, groups, `|`, `* + ? {m,n}`, `^ $`. Look-around and back-references
are refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

LONGEST_PATTERN, MOST_STATES, LONGEST_NAME = 1000, 2000, 1000  # of a pattern, of its machine, of a name
MOST_WORK = 10**7  # states in all, of all matches of one file; ordinary files need thousands
DEEPEST_GROUP = 50  # groups inside each other
ESCAPED = re.compile(r"\\[dDwWsS]|\\[^a-zA-Z0-9]")
CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
QUANTIFIER = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
PLAIN_NAME, POINT = re.compile(r"(\^?)((?:[\w-]|\\?\.)*+)\$?"), "\0"
PatternNode = tuple[
    str, Any
]  # ("reads", a pattern for one character), ("anchor", its sign), ("choice", sequences of nodes),
# ("repeat", (node, least, most or None))


class BadPattern(ValueError):
    """The pattern cannot be read; the message is the reason."""


class PatternReader:
    """Reads a pattern into nodes."""

    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def whole(self) -> PatternNode:
        if len(self.pattern) > LONGEST_PATTERN:
            raise BadPattern(f"it has {len(self.pattern)} characters, and at most {LONGEST_PATTERN} are read")
        node = self.choice(0)
        if self.at < len(self.pattern):
            raise BadPattern("it closes a bracket that is not open")
        return node

    def choice(self, depth: int) -> PatternNode:
        """Alternatives, up to a closing bracket or the end."""
        if depth > DEEPEST_GROUP:
            raise BadPattern("its brackets are too deep inside each other")
        options: list[list[PatternNode]] = [[]]
        while (sign := self.next()) not in ("", ")"):
            if sign == "|":
                self.at += 1
                options.append([])
                continue
            node = self.one(sign, depth)
            counts = self.counts()
            if counts and node[0] == "anchor":
                raise BadPattern("it repeats an anchor")
            options[-1].append(("repeat", (node, *counts)) if counts else node)
        return ("choice", options)

    def one(self, sign: str, depth: int) -> PatternNode:
        """A character, a class, a group or an anchor."""
        if sign in "*+?":
            raise BadPattern("it repeats nothing")
        if sign in "\\[":
            match = (ESCAPED if sign == "\\" else CLASS).match(self.pattern, self.at)
            if match is None:
                raise BadPattern("it has an escape or a class that is not read here")
            self.at = match.end()
            return ("reads", character(match[0]))
        self.at += 1
        if sign in "^$":
            return ("anchor", sign)
        if sign != "(":
            return ("reads", character("." if sign == "." else re.escape(sign)))
        if self.pattern.startswith("?:", self.at):
            self.at += 2
        elif self.next() == "?":
            raise BadPattern("groups with a question mark are not read here")
        node = self.choice(depth + 1)
        if self.next() != ")":
            raise BadPattern("it leaves a bracket open")
        self.at += 1
        return node

    def counts(self) -> tuple[int, int | None] | None:
        """The quantifier that stands here, if any: its least and its most."""
        found: tuple[int, int | None]
        sign = self.next()
        if sign and sign in "*+?":
            self.at += 1
            found = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        elif (match := QUANTIFIER.match(self.pattern, self.at)) and (match[1] or match[3]):
            self.at = match.end()
            low = int(match[1] or 0)
            found = (low, int(match[3]) if match[3] else None if match[2] else low)
            if found[1] is not None and found[1] < low:
                raise BadPattern("it counts down")
        else:
            return None
        if self.next() == "?":
            self.at += 1  # as few as can be, which for a whole text is of no matter
        if self.next() and self.next() in "*+?":
            raise BadPattern("it repeats a repetition")
        return found

    def next(self) -> str:
        return self.pattern[self.at : self.at + 1]


class Matcher:
    """A pattern as a machine: state i reads a character that `reads[i]` accepts and goes to i + 1, or goes on without
    one to each of `jumps[i]`."""

    def __init__(self, pattern: str):
        self.reads: list[re.Pattern[str] | None] = []
        self.jumps: list[list[int]] = []
        self.anchors: dict[int, str] = {}
        self.work = 0  # states that were passed so far
        self._add(PatternReader(pattern).whole())
        self.end = self._state()

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text is of the pattern's language; never for names of more than LONGEST_NAME."""
        if len(text) > LONGEST_NAME:
            return False
        states = self._reached({0}, 0, len(text))
        for place, one in enumerate(text, 1):
            moved = {i + 1 for i in states if (reads := self.reads[i]) and reads.fullmatch(one)}
            states = self._reached(moved, place, len(text))
            self.work += len(states)
            if not states:
                return False
        return self.end in states

    def _reached(self, states: set[int], place: int, length: int) -> set[int]:
        """These states with all that they reach without a character."""
        waiting, found = list(states), set(states)
        while waiting:
            state = waiting.pop()
            anchor = self.anchors.get(state)
            if (anchor == "^" and place) or (anchor == "$" and place < length):
                continue
            new = set(self.jumps[state]) - found
            found |= new
            waiting += new
        return found

    def _state(self, reads: re.Pattern[str] | None = None) -> int:
        if len(self.reads) >= MOST_STATES:
            raise BadPattern("it counts too far")
        self.reads.append(reads)
        self.jumps.append([])
        return len(self.reads) - 1

    def _on(self) -> int:
        """A state that goes on to the next one."""
        state = self._state()
        self.jumps[state].append(state + 1)
        return state

    def _add(self, node: PatternNode) -> None:
        """The states of a node; what they match, the state behind them is reached with."""
        kind, content = node
        if kind == "reads":
            self._state(content)
        elif kind == "anchor":
            self.anchors[self._on()] = content
        elif kind == "choice":
            self._add_choice(content)
        else:
            self._add_repeat(*content)

    def _add_choice(self, options: list[list[PatternNode]]) -> None:
        fork, ends = self._state(), []
        for option in options:
            self.jumps[fork].append(len(self.reads))
            for node in option:
                self._add(node)
            ends.append(self._state())
        last = self._on()
        for end in ends:
            self.jumps[end].append(last)

    def _add_repeat(self, node: PatternNode, low: int, high: int | None) -> None:
        for number in range(max(low, 1) if high is None else high):
            fork = self._on()
            self._add(node)
            out = self._on()
            if number >= low:
                self.jumps[fork].append(out)
            if high is None and number == max(low, 1) - 1:
                self.jumps[out].append(fork)


@lru_cache(4096)
def character(pattern: str) -> re.Pattern[str]:
    """Of a pattern for one character."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadPattern(str(error)) from None


class Patterns:
    """The patterns of one file, with a budget of work for all of their matches."""

    def __init__(self) -> None:
        self.made: dict[str, Matcher] = {}
        self.work = 0

    def fits(self, pattern: str, name: str) -> bool:
        """Whether a pattern fits a whole name. Raises BadPattern."""
        one = self.made.get(pattern)
        if one is None:
            one = self.made[pattern] = Matcher(pattern)
        before, fits = one.work, one.fullmatch(name)
        self.work += one.work - before
        if self.work > MOST_WORK:
            raise BadPattern("with the others it takes too long to match")
        return fits

    def fits_end(self, pattern: str, name: str) -> bool:
        """Whether a pattern fits a name, or its end behind a point, as in PEFT. Raises BadPattern."""
        plain = PLAIN_NAME.fullmatch(pattern)  # as nearly all are; its points stand for any character
        if plain is None:
            return self.fits(rf"(.*\.)?({pattern})", name)
        wanted = plain[2].replace("\\.", POINT)
        before, end = name[: max(0, len(name) - len(wanted))], name[len(name) - len(wanted) :]
        if len(end) < len(wanted) or (before and (plain[1] or before[-1] != ".")):
            return False
        return end == wanted.replace(POINT, ".") or all(
            sign in (".", one) or (sign == POINT and one == ".") for sign, one in zip(wanted, end, strict=True)
        )
