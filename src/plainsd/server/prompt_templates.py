"""Prompt templates: styles, wildcards and choices, resolved by each picture's seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plainsd.errors import UserError
from plainsd.server.folders import changed_at, read_cached
from plainsd.text.styles import Style, read_styles, styled
from plainsd.text.wildcard_files import Wildcards
from plainsd.text.wildcards import settled


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


def settled_field(name: str, text: str, seed: int, wildcards: Wildcards) -> str:
    """A prompt with choices and wildcards resolved by the picture's seed. UserError, with its field, for a bad one."""
    try:
        return settled(text, seed, wildcards)
    except UserError as error:
        raise UserError(str(error), field=name, value=error.value) from None
