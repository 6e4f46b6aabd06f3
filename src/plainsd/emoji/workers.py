"""Scenes drawn by other processes. This module needs no torch, so that they start fast and stay small."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from plainsd.emoji.captions import captions_of
from plainsd.emoji.painting import Painter
from plainsd.emoji.scenes import Scene, SceneSet, make_scene


@dataclass(frozen=True, eq=False)
class SceneSource:
    """The scenes of one kind of a set, as pictures with captions."""

    made_of: SceneSet
    kind: str
    font: Path | None = None

    @cached_property
    def painter(self) -> Painter:
        return Painter(self.made_of, self.font)

    def __reduce__(self) -> tuple:
        return SceneSource, (self.made_of, self.kind, self.font)  # each process reads the font itself

    def scene(self, index: int) -> Scene:
        return make_scene(self.made_of, self.kind, index)

    def pixels(self, index: int) -> np.ndarray:
        return self.painter.pixels(self.scene(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return captions_of(self.made_of, self.scene(index), self.kind, index)


class Wanted(NamedTuple):
    """One picture to draw: scene `index` of a source, by its number."""

    source: int
    index: int  # type: ignore[assignment]  # hides the tuple's method


sources: Sequence[SceneSource] = ()  # of this process
side = 0  # pixels


def start_worker(these: Sequence[SceneSource], pixels: int) -> None:
    """In each process, once. Ctrl-C is the trainer's to handle; a process whose parent has died ends."""
    global sources, side
    sources, side = these, pixels
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(0)


def drawn_by_worker(wanted: Sequence[Wanted]) -> np.ndarray:
    """(B, side, side, 3) uint8."""
    return np.stack([to_pixels(sources[number].pixels(index), side) for number, index in wanted])


def to_pixels(pixels: np.ndarray, side: int) -> np.ndarray:
    if len(pixels) == side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))
