"""What prompts are made with: styles around them, and choices, which each picture's seed settles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plainsd.errors import UserError
from plainsd.text.styles import Style, read_styles, styled
from plainsd.text.wildcards import settled


@dataclass(frozen=True)
class PromptTemplates:
    """The server's wildcards and styles, read anew each time."""

    wildcards: Path | None = None  # folder
    styles: Path | None = None  # file

    def known_styles(self) -> dict[str, Style]:
        return {} if self.styles is None else read_styles(self.styles)

    def styled(self, prompt: str, negative: str, names: list[str]) -> tuple[str, str]:
        """Both with these styles around them. UserError for one that is not there."""
        if names and self.styles is None:
            raise UserError(
                f"styles {names[0]!r}: there are none here; start the server with --styles FILE",
                field="styles",
                value=names[0],
            )
        return styled(prompt, negative, names, self.known_styles()) if names else (prompt, negative)

    def settled(self, name: str, text: str, seed: int) -> str:
        """A text with every choice made, by the picture's seed. UserError, about the field of that name, where one
        cannot be read."""
        try:
            return settled(text, seed, self.wildcards)
        except UserError as error:
            raise UserError(str(error), field=name, value=error.value) from None
