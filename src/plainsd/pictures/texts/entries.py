"""The last line of a settings text: `key: value, key: value`, read and written in one pass, whatever stands in it."""

import json
import re

from plainsd.errors import UserError
from plainsd.json_reader import parsed_json

LONGEST_TEXT = 2**20  # characters of a text; A1111's have some hundreds to some thousands
KEY = re.compile(r"\w[\w \-/]+")
NOT_KEY = re.compile(r"[^\w \-/]")
QUOTED = re.compile(r'"(?:[^"\\]|\\.)++"', re.DOTALL)
SPECIAL = re.compile(r'[,:\n\r"]')


def quote(text: str) -> str:
    """A value with a comma, a colon, a quote, a line break or space at its ends is a JSON string; others are bare."""
    return json.dumps(text, ensure_ascii=False) if SPECIAL.search(text) or text != text.strip() else text


def unquote(text: str) -> str:
    try:
        read = parsed_json(text) if text.startswith('"') else text
    except ValueError:  # another program's bare value that starts with a quote
        return text
    return read if isinstance(read, str) else text


def entries(line: str) -> list[tuple[str, str]]:
    """Keys and values of a line. What stands before the first key, or has none, is passed over.

    A key is two or more letters, digits, spaces, - or / before a colon; a value a JSON string or all up to the next
    comma. Each place of the line is looked at a bounded number of times.
    """
    found = []
    start = 0
    while (colon := line.find(":", start)) >= 0:
        key = _key_before(line, start, colon)
        start = colon + 1
        if key is None:
            continue
        begin = colon + 1
        while begin < len(line) and line[begin].isspace():
            begin += 1
        quoted = QUOTED.match(line, begin)
        if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
            end = quoted.end()
        else:
            comma = line.find(",", begin)
            end = len(line) if comma < 0 else comma
        found.append((key, unquote(line[begin:end].strip())))
        start = end + 1
    return found


def _key_before(line: str, start: int, colon: int) -> str | None:
    piece = NOT_KEY.split(line[start:colon])[-1].lstrip(" -/")
    return piece if len(piece) > 1 and KEY.fullmatch(piece) else None


def check_length(text: str, longest: int = LONGEST_TEXT) -> None:
    """UserError for a text that no program writes."""
    if len(text) > longest:
        raise UserError(f"a settings text of {len(text)} characters is too long; {longest} is the most that is read")
