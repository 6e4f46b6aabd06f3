"""Command lines by tyro, read from a command's dataclass. What is wrong is one line that names the flag."""

from __future__ import annotations

import io
import re
import textwrap
from contextlib import redirect_stderr

from plainsd.errors import UserError

REWORDED = (  # tyro's messages, and ours
    (r"^Error parsing (?=--|[A-Z])", ""),
    (r"^Missing value for argument '(.+?)'\. Expected 1 values?", r"\1 needs a value"),
    (r"^Missing value for argument '(.+?)'\. Expected (\d+) values", r"\1 needs \2 values"),
)
CHOICE = re.compile(r"^invalid choice ('.*?') for argument '(.+?)'\. Expected one of \((.*)\)")


def parsed(kind: type, name: str, arguments: list[str]):
    """The flags as an instance of the command's dataclass; None if help was printed. One-line errors."""
    import tyro

    from plainsd.arguments import number_registry

    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return tyro.cli(kind, prog=f"plainsd {name}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,),
                            registry=number_registry())  # fmt: skip
    except SystemExit as stop:
        if not stop.code:
            return None
        raise UserError(f"{in_one_line(stderr.getvalue())}; see plainsd {name} --help") from None


def in_one_line(box: str) -> str:
    """The message in tyro's framed box under a title, up to the next rule: `Error parsing --steps: ...`."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.strip().splitlines()[1:]]
    lines = lines[1:] if lines and not lines[0].strip("-─") else lines  # the frame in ASCII terminals
    ends = (i for i, line in enumerate(lines) if (line and not line.strip("-─")) or line == "Got errors:")
    end = next(ends, len(lines))
    line = " ".join(lines[:end])
    missing = re.findall(
        r"^[^\w-]{0,2} {4}(--[a-z-]+|[A-Z][A-Z-]+)\b", box, re.MULTILINE
    )  # their help is indented by 8
    if line.startswith("Missing from") and missing:
        line = f"missing: {', '.join(missing)}"
    for pattern, text in REWORDED:
        line = re.sub(pattern, text, line)
    if found := CHOICE.match(line):
        line = f"{found[2]}: {found[1]} is not one of {found[3].replace(chr(39), '').rstrip(',')}"
    if "Perhaps you meant:" in lines:
        line += f"; did you mean {lines[lines.index('Perhaps you meant:') + 1].split()[0]}?"
    return textwrap.shorten(line, 300).rstrip(".")
