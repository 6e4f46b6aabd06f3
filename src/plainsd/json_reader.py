"""JSON within bounds. Every JSON text that comes from outside is read here: settings, headers, workflows, answers.

Python's parser takes any depth that its stack allows, integers of thousands of digits, and a hundred bytes of memory
for each value of two characters. What people's files hold is far below the bounds here.
"""

import json
import re
from typing import Any

from plainsd.errors import shortened

LONGEST_JSON = 2**25  # characters
MOST_VALUES = 1_000_000  # a value takes about 100 bytes of memory
MOST_DEPTH = 100  # lists and tables inside each other
MOST_DIGITS = 40  # of an integer
STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'  # one that never ends too: else each quote in it would be tried
STRINGS = re.compile(STRING, re.DOTALL)
STRINGS_IN_BYTES = re.compile(STRING.encode(), re.DOTALL)
STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJSON(ValueError):
    """The text is no JSON, or beyond a bound. The message is the reason, a part of a line."""


def parsed_json(text: str | bytes, *, longest: int = LONGEST_JSON, most: int = MOST_VALUES) -> Any:
    """The value that a text holds; bytes are UTF-8. Takes time and memory in proportion to the length. Raises
    BadJSON."""
    if len(text) > longest:
        raise BadJSON(f"it has {len(text)} characters, and at most {longest} are read")
    check_values(text, most)
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(text, parse_int=_integer)
    except BadJSON:
        raise
    except RecursionError:
        raise BadJSON(f"its values are more than {MOST_DEPTH} deep inside each other") from None
    except ValueError as error:  # UnicodeDecodeError is one too
        raise BadJSON(shortened(str(error), 100)) from None
    _check_depth(content)
    if SURROGATE.search(text):
        _check_text(content)
    return content


def check_values(text: str | bytes | bytearray, most: int = MOST_VALUES) -> None:
    """BadJSON for a text of more values than `most`. It need not be JSON; it is looked through, not parsed."""
    if _count_signs(text) > most:
        bare = STRINGS.sub("", text) if isinstance(text, str) else STRINGS_IN_BYTES.sub(b"", text)
        if _count_signs(bare) > most:  # what strings hold is no value
            raise BadJSON(f"it holds more than {most} values")


class ValueCounter:
    """Counts the values of a JSON text that arrives in pieces, so that a long one is never looked through at once.

    The text need not be JSON. Work is bounded, too: with so many values a text has at most twice as many strings.
    """

    def __init__(self, most: int):
        self.most, self.values, self.strings = most, 0, 0
        self.in_string = self.escaped = False  # where the last piece ended

    def add(self, piece: bytes) -> None:
        """BadJSON once there are more values than `most`."""
        at = 0
        if piece and self.escaped:
            at, self.escaped = 1, False
        while at < len(piece):
            if self.in_string:
                at = self._after_string(piece, at)
            else:
                at = self._after_signs(piece, at)
            if self.values > self.most or self.strings > 2 * self.most + 2:
                raise BadJSON(f"it holds more than {self.most} values")

    def _after_signs(self, piece: bytes, at: int) -> int:
        end = piece.find(b'"', at)
        self.in_string = end >= 0
        end = end if self.in_string else len(piece)
        self.strings += self.in_string
        self.values += sum(piece.count(sign, at, end) for sign in (b",", b"[", b"{"))
        return end + 1

    def _after_string(self, piece: bytes, at: int) -> int:
        found = STRING_REST.match(piece, at)
        assert found is not None  # it matches nothing, too
        end = found.end()
        if end < len(piece):
            self.in_string, self.escaped = piece[end : end + 1] != b'"', piece[end : end + 1] == b"\\"
        return end + 1


def _count_signs(text: str | bytes | bytearray) -> int:
    """At least the number of values: each but the first has a sign of these before it."""
    if isinstance(text, str):
        return sum(text.count(sign) for sign in ",[{")
    return sum(text.count(sign) for sign in (b",", b"[", b"{"))


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise BadJSON(f"it has a number of {len(digits)} digits")
    return int(digits)


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MOST_DEPTH):
        inside = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise BadJSON(f"its values are more than {MOST_DEPTH} deep inside each other")


def _check_text(content: Any) -> None:
    """BadJSON for half a surrogate pair, which is no character and cannot be written anywhere."""
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadJSON("it has half a character (a surrogate without its partner)") from None
