"""Prompt templates: styles, wildcards and choices, resolved by each picture's seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plainsd.errors import UserError
from plainsd.text.styles import Style, read_styles, styled
from plainsd.text.wildcards import settled


@dataclass(frozen=True)
class PromptTemplates:
    """The server's wildcards and styles, read at each access."""

    wildcards: Path | None = None  # folder
    styles: Path | None = None  # file

    def known_styles(self) -> dict[str, Style]:
        return {} if self.styles is None else read_styles(self.styles)

    def styled(self, prompt: str, negative: str, names: list[str]) -> tuple[str, str]:
        """Applies styles to prompt and negative prompt. UserError if one does not exist."""
        if names and self.styles is None:
            raise UserError(
                f"there is no style {names[0]!r}; start the server with --styles FILE",
                field="styles",
                value=names[0],
            )
        return styled(prompt, negative, names, self.known_styles()) if names else (prompt, negative)

    def settled(self, name: str, text: str, seed: int) -> str:
        """Resolves choices and wildcards by the picture's seed. UserError with that field if the text is invalid."""
        try:
            return settled(text, seed, self.wildcards)
        except UserError as error:
            raise UserError(str(error), field=name, value=error.value) from None
