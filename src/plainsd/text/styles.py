"""Styles: prompts by name that are laid around one's own, in the file that A1111's web UI keeps them in.

`styles.csv` has the columns name, prompt and negative_prompt. Where a style says {prompt}, one's own goes there; else
the style follows it after a comma.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from plainsd.errors import UserError, unknown
from plainsd.text.prompts import tagged_loras
from plainsd.text.wildcard_files import LONGEST_FILE

PLACE = "{prompt}"
COLUMNS = ("name", "prompt", "negative_prompt")


class Style(NamedTuple):
    prompt: str
    negative: str


def read_styles(path: Path) -> dict[str, Style]:
    """The styles of a file, by name. UserError where it is none."""
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise UserError(f"{path} has more than {LONGEST_FILE} bytes; give a file of styles")
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            prompt = "prompt" if "prompt" in (rows.fieldnames or ()) else "text"  # as it was called at first
            if not {"name", prompt} <= {*(rows.fieldnames or ())}:
                raise UserError(f"{path} is not a styles file: its first line should read {','.join(COLUMNS)}")
            styles = {
                row["name"]: Style(row[prompt] or "", row.get("negative_prompt") or "")
                for row in rows
                if row["name"] and not row["name"].startswith("#")  # a comment
            }
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file of styles") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a styles file ({error}); save it as CSV in UTF-8") from None
    return styles


def styled(prompt: str, negative: str, names: Iterable[str], styles: Mapping[str, Style]) -> tuple[str, str]:
    """Prompt and negative prompt with these styles around them, one after the other."""
    for name in names:
        if name not in styles:
            raise unknown("style", name, styles or ["none: there is no styles file"], field="styles")
        prompt, negative = _around(prompt, styles[name].prompt), _around(negative, styles[name].negative)
    return prompt, negative


def without_style_loras(text: str, own: str) -> str:
    """A prompt of the second pass in its styles, without the LoRAs that they bring along: those of the first pass act.
    `own`: the prompt before; LoRAs that it has are left, to be told."""
    return text if tagged_loras(own)[1] else tagged_loras(text)[0]


def _around(own: str, style: str) -> str:
    if len(style) + style.count(PLACE) * len(own) > LONGEST_FILE:
        raise UserError(f"these styles make a prompt of more than {LONGEST_FILE} characters; choose fewer",
                        field="styles")  # fmt: skip
    if PLACE in style:
        return style.replace(PLACE, own)
    return ", ".join(text for text in (own.strip(), style.strip()) if text)
