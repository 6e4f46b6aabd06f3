"""Scenes of emoji as training pictures, drawn when they are wanted: `--data emoji:SET.json`, see plainsd.emoji.scenes.

As `--heldout emoji:SET.json` they are those that break a rule of holding out.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from plainsd.emoji.scenes import read_set
from plainsd.emoji.workers import SceneSource
from plainsd.pictures.conditioning import Size

SCENE_PREFIX = "emoji:"


@dataclass(frozen=True, slots=True)
class SceneEntry:
    """Scene `index` of a source."""

    source: SceneSource
    index: int
    size: Size
    repeats: int = 1

    @property
    def computed(self) -> bool:
        return True

    @property
    def texts(self) -> tuple[str, ...]:
        return self.source.captions(self.index)

    @property
    def masked(self) -> bool:
        return False

    @property
    def mapped(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"{self.source.kind} scene {self.index}"

    @property
    def place(self) -> None:
        return None

    def mark(self) -> str:
        return f"{self.source.made_of.digest} {self.source.kind} {self.index}"

    def content(self) -> bytes:
        return self.mark().encode()

    def open(self) -> Image.Image:
        return Image.fromarray(self.source.pixels(self.index))

    def open_mask(self) -> Image.Image:
        raise NotImplementedError("scenes have no masks")

    def open_map(self) -> Image.Image:
        raise NotImplementedError("scenes have no maps")


def read_scenes(place: str, *, heldout: bool, limit: int | None = None, repeats: int = 1) -> tuple[SceneEntry, ...]:
    """The scenes of `emoji:SET.json`: as many as the set says, or `limit`."""
    made_of = read_set(Path(place.removeprefix(SCENE_PREFIX)))
    source = SceneSource(made_of, "heldout" if heldout else "train")
    source.painter  # noqa: B018  # a font that is missing, or another one, is said at once
    count = limit or (made_of.heldout_count if heldout else made_of.count)
    return tuple(SceneEntry(source, i, (made_of.size, made_of.size), repeats) for i in range(count))
