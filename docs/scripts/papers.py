"""The map from paper to file, docs/papers.md: writes its last column from the arXiv numbers in src/plainsd.

.venv/bin/python docs/scripts/papers.py
"""

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "papers.md"
SOURCES = ROOT / "src" / "plainsd"
NUMBER = re.compile(r"\barXiv:(\d{4}\.\d{4,5})\b|arxiv\.org/abs/(\d{4}\.\d{4,5})\b", re.IGNORECASE)
ROW = re.compile(
    r"^\| (?P<who>.+), \[(?P<number>[\d.]+)\]\(https://arxiv\.org/abs/(?P=number)\) \| (?P<what>.+?) \|.*\|$"
)


def named(folder: Path = SOURCES) -> dict[str, list[str]]:
    """arXiv number -> the Python files below the folder that name it."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for number in sorted({a or b for a, b in NUMBER.findall(path.read_text("utf-8"))}):
            found.setdefault(number, []).append(path.relative_to(folder).as_posix())
    return found


def updated(text: str, sources: Mapping[str, list[str]]) -> str:
    """The page with the files of each paper. ValueError where papers and rows are not the same."""
    lines, rows = text.splitlines(), []
    for at, line in enumerate(lines):
        if row := ROW.match(line):
            rows.append(row["number"])
            files = ", ".join(f"[{file}](../src/plainsd/{file})" for file in sources.get(row["number"], []))
            link = f"[{row['number']}](https://arxiv.org/abs/{row['number']})"
            lines[at] = f"| {row['who']}, {link} | {row['what']} | {files} |"
    missing, unknown = sorted(sources.keys() - set(rows)), sorted(set(rows) - sources.keys())
    twice = sorted({number for number in rows if rows.count(number) > 1})
    if missing or unknown or twice:
        raise ValueError(f"papers without a row: {missing}; rows that no file names: {unknown}; twice: {twice}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8"), named()), "utf-8")
