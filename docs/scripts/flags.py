"""Writes the tables of docs/flags.md: every flag of every command, as `plainsd COMMAND --help` has them.

.venv/bin/python docs/scripts/flags.py
"""

import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from plainsd.arguments import number_registry
from plainsd.cli import COMMANDS

PAGE = Path(__file__).parents[1] / "flags.md"
MARK = "<!-- flags -->\n"
DEFAULT = re.compile(r"\(default: (.*)\)\s*$", re.DOTALL)


def rows_of(kind: type, name: str) -> list[tuple[str, str, str]]:
    """Each argument of a command with its placeholder, what it does, and its default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of get_parser, which has no successor yet
        parser = tyro.extras.get_parser(
            kind, prog=f"plainsd {name}", config=(tyro.conf.FlagCreatePairsOff,), registry=number_registry()
        )
    rows = []
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        text = " ".join((action.help or "").split()).replace("%%", "%")  # argparse's own spelling
        found = DEFAULT.search(text)
        usage = " ".join(part for part in (*action.option_strings[-1:], placeholder(action)) if part)
        rows.append((usage, DEFAULT.sub("", text).strip(), found[1] if found else ""))
    return rows


def placeholder(action: Any) -> str:
    if action.nargs == 0:
        return ""
    return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())


def cell(text: str) -> str:
    """In a table of Markdown: signs that would end it, or be taken for HTML or a footnote, as they are."""
    return re.sub(r"[|<>*_\[\]$]", lambda sign: f"\\{sign[0]}", text)


def code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def tables() -> str:
    lines = []
    for name, (module, kind, summary) in COMMANDS.items():
        rows = rows_of(getattr(import_module(module), kind), name)
        lines += [f"## plainsd {name}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += ["| flag | what it does | default |", "|---|---|---|"]
        lines += [f"| {code(usage)} | {cell(text)} | {cell(default)} |" for usage, text, default in rows]
        lines.append("")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The page with its tables as the commands are now."""
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} lacks the line {MARK.strip()}, below which its tables stand")
    return f"{head}{MARK}\n{tables()}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8")), "utf-8")
