"""What a page of the documentation consists of: fenced blocks, answers to exercises, links.

The tests, the notebooks and the site all read the pages through these functions, so that they agree on what is code.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GITHUB = "https://github.com/plainsd/plainsd"
OPENING = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$")
ANSWER = re.compile(r"^ *<details>\s*<summary>Answer.*?</summary>.*?^ *</details>", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<bracket>!?\[(?:[^\[\]]|\[[^\[\]]*\](?:\([^)]*\))?)*\])\((?P<target>[^)\s]+)(?P<title>[^)]*)\)")


class Fence(NamedTuple):
    """A fenced block: its info string (`python`, `sh serve`), its text, and the lines of the page it covers."""

    language: str
    code: str
    lines: slice


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a page, in order. Those in a list or in `<details>` are indented; their code is not.

    As CommonMark has it: a block ends at a fence of the same marks, at least as many, with nothing behind them; each
    line loses as many spaces as stand before the opening fence.
    """
    found, opening, start = [], None, 0
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if opening is None:
            opening, start = OPENING.match(line.rstrip("\n")), number
        elif re.fullmatch(rf" *{opening['marks'][0]}{{{len(opening['marks'])},}} *", line.rstrip("\n")):
            code = "".join(re.sub(rf"^ {{0,{len(opening['indent'])}}}", "", one) for one in lines[start + 1 : number])
            found.append(Fence(opening["info"].strip(), code, slice(start, number + 1)))
            opening = None
    if opening is not None:
        raise ValueError(f"line {start + 1}: the fence '{opening[0].strip()}' is not closed")
    return found


def blocks(text: str, language: str) -> list[str]:
    """The code of the fenced blocks whose info string is `language`."""
    return [fence.code for fence in fences(text) if fence.language == language]


def answers(text: str) -> list[str]:
    """The folded answers of a chapter's exercises, each with its `<details>` around it."""
    return ANSWER.findall(text)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """The page with `change` made to what lies between fenced blocks."""
    lines, parts, end = text.splitlines(keepends=True), [], 0
    for fence in fences(text):
        parts += [change("".join(lines[end : fence.lines.start])), "".join(lines[fence.lines])]
        end = fence.lines.stop
    return "".join([*parts, change("".join(lines[end:]))])
