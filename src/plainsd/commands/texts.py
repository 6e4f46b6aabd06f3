"""The texts of each picture of a run: in the styles asked for, and with their choices made by the picture's seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from plainsd.errors import UserError
from plainsd.text.styles import PLACE, Style, styled, without_style_loras
from plainsd.text.wildcards import combinations, settled

TEXTS_BESIDE = ("negative", "hires_prompt", "hires_negative")  # a picture's texts beside its prompt


def texts_of_each(
    prompts: Sequence[str],
    beside: Mapping[str, str],
    made: Collection[str],
    styles: Mapping[str, Style],
    wildcards: Path | None,
    every: bool,
    *,
    seed: int,
    count: int,
    counted: bool = True,
) -> tuple[list[str], list[dict[str, str]]]:
    """The prompt of each picture, and its other texts by their fields: each prompt `count` times, seeds from `seed` on;
    unless `counted` that one for all.

    `made`: the fields whose choices are made already, as a picture records them; only those of the `styles`, which lie
    around the texts in this order, are then left. `every`: a prompt stands for all its combinations.
    """
    if wildcards is not None and not wildcards.is_dir():
        raise UserError(f"--wildcards '{wildcards}': no such folder; give one of text files")
    every = every and "prompt" not in made
    if every:
        prompts = [text for prompt in prompts for text in combinations(in_styles("prompt", prompt, styles), wildcards)]
    repeated = [prompt for prompt in prompts for _ in range(count)]

    def text(name: str, own: str, index: int) -> str:
        its_seed = seed + index * counted
        if name in made:
            return in_styles(name, own, settled_styles(styles, its_seed, wildcards))
        return settled(in_styles(name, own, styles), its_seed, wildcards)

    each = [{name: text(name, own, index) for name, own in beside.items()} for index in range(len(repeated))]
    return repeated if every else [text("prompt", own, index) for index, own in enumerate(repeated)], each


def in_styles(name: str, text: str, styles: Mapping[str, Style]) -> str:
    """A text in its styles; the second pass's as those of the first, as in A1111."""
    prompt, negative = styled(text, text, styles, styles)
    found = negative if name in ("negative", "hires_negative") else prompt
    return without_style_loras(found, text) if name.startswith("hires_") else found


def settled_styles(styles: Mapping[str, Style], seed: int, wildcards: Path | None) -> dict[str, Style]:
    """The styles with their choices made; {prompt} stays."""
    mark = "\0"  # in no prompt
    return {
        name: Style(*(settled(text.replace(PLACE, mark), seed, wildcards).replace(mark, PLACE) for text in style))
        for name, style in styles.items()
    }
