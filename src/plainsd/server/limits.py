"""Limits of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request, checked before anything is queued."""

    pixels: int = 2048 * 2048  # of one picture, after enlarging
    steps: int = 150
    count: int = 64  # pictures of one job
    prompt: int = 4000  # characters
    nesting: int = 64  # nesting depth of brackets in a prompt
    text: int = 65536  # characters of settings, as a picture carries them
    upload: int = 32 * 2**20  # bytes of one request
    upload_pixels: int = 40_000_000  # of one picture that is sent
    queue: int = 256  # jobs that wait or run
    selection: int = 500  # pictures of the history that are marked, deleted or packed at once
    undo: float = 60  # seconds for which deleted pictures can be restored
    seconds: float = 3600  # of drawing, for one job

    @property
    def reading(self) -> int:
        """Characters times steps: a prompt is read for each step, and all cells of a grid draw on this together."""
        return 2 * self.prompt * self.steps
