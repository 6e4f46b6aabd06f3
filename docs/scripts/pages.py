"""What a page of the documentation consists of: fenced blocks, and answers to exercises."""

import re
from typing import NamedTuple

OPENING = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$")
ANSWER = re.compile(r"^ *<details>\s*<summary>Answer.*?</summary>.*?^ *</details>", re.MULTILINE | re.DOTALL)


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
