"""Prompt templates: styles, wildcards and choices, resolved by each picture's seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plainsd.errors import UserError
from plainsd.server.folders import changed_at, read_cached
from plainsd.server.prompt_checks import prompts_in
from plainsd.server.schema import JobRequest
from plainsd.text.styles import Style, read_styles, styled, without_style_loras
from plainsd.text.wildcard_files import Wildcards
from plainsd.text.wildcards import settled

PROMPT_PAIRS = (("prompt", "negative"), ("hires_prompt", "hires_negative"))
HELD = "\0"  # in no prompt: stands for each character of one that is settled already


@dataclass(frozen=True)
class PromptTemplates:
    """The server's wildcards and styles; changed files are read again."""

    wildcards: Path | None = None  # folder
    styles: Path | None = None  # file

    def known_styles(self) -> dict[str, Style]:
        """The styles by name; none if their file cannot be read, see `unusable`."""
        return self.read()[0]

    def unusable(self) -> dict[str, str]:
        """The file of styles, and why it cannot be read; empty if it can."""
        return {self.styles.name: why} if self.styles and (why := self.read()[1]) else {}

    def read(self) -> tuple[dict[str, Style], str]:
        """The styles, or why there are none."""
        if self.styles is None:
            return {}, ""
        styles, why = read_cached(read_styles, self.styles, changed_at(self.styles))
        return styles or {}, why.replace(str(self.styles), self.styles.name)

    def styled(self, prompt: str, negative: str, names: list[str]) -> tuple[str, str]:
        """Applies styles to prompt and negative prompt. UserError if one does not exist."""
        if names and self.styles is None:
            raise UserError(
                f"there is no style {names[0]!r}; start the server with --styles FILE",
                field="styles",
                value=names[0],
            )
        if not names:
            return prompt, negative
        styles, why = self.read()
        if why:
            raise UserError(f"styles cannot be used: {why}", field="styles", value=names[0])
        return styled(prompt, negative, names, styles)


def texts_of(request: JobRequest, templates: PromptTemplates) -> dict[str, str]:
    """The prompts by their fields, those of the second pass too if it has its own, with styles applied (as in A1111).
    LoRAs of the styles are the first pass's, and act in both. Prompts that are settled already are HELD back."""
    texts = prompts_in(request)
    texts |= {name: HELD * len(texts[name]) for name in request.settled if name in texts}
    for names in PROMPT_PAIRS:
        own = [texts.get(name, "") for name in names]
        styled = templates.styled(own[0], own[1], request.styles)
        for name, text, before in zip(names, styled, own, strict=True):
            if name in texts:
                texts[name] = without_style_loras(text, before) if name.startswith("hires_") else text
    return texts


def settled_texts(
    request: JobRequest, texts: dict[str, str], seeds: list[int], wildcards: Wildcards | None
) -> list[dict[str, str]]:
    """Those of each picture: with its choices made by its seed, unless there are no `wildcards`, and with what was held
    back."""
    own = prompts_in(request)

    def text(name: str, seed: int) -> str:
        found = texts[name] if wildcards is None else settled_field(name, texts[name], seed, wildcards)
        return found.replace(HELD * len(own[name]), own[name]) if name in request.settled else found

    return [{name: text(name, seed) for name in texts} for seed in seeds]


def settled_field(name: str, text: str, seed: int, wildcards: Wildcards) -> str:
    """A prompt with choices and wildcards resolved by the picture's seed. UserError, with its field, for a bad one."""
    try:
        return settled(text, seed, wildcards)
    except UserError as error:
        raise UserError(str(error), field=name, value=error.value) from None
