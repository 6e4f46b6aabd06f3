"""Scenes as pictures, exact to the byte: the glyphs of the font, scaled, over a background of one or two colours.

A pattern is a fixed picture of shares, 0 to 255, of the second colour, so that the background is a blend of two colours
everywhere. Colours are blended in whole numbers, the glyphs' premultiplied by their alpha.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from plainsd.emoji import drawing
from plainsd.emoji.scenes import Scene, SceneObject, SceneSet
from plainsd.errors import UserError

PERIOD = 8  # stripes' pairs, and dots, along a side
FINER = 8  # dots are drawn so many times as large, and scaled down


@lru_cache(16)
def pattern_shares(pattern: str, size: int) -> np.ndarray:
    """The second colour's share, 0 to 255: (size, size, 1) uint16. Gradients run from top to bottom."""
    if pattern == "gradient":
        shares = np.broadcast_to((np.arange(size) * 255 // (size - 1))[:, None], (size, size))
    elif pattern == "stripes":
        shares = np.broadcast_to(255 * (np.arange(size) * 2 * PERIOD // size % 2), (size, size))
    elif pattern == "dots":
        fine = ((np.arange(size * FINER) + 0.5) * PERIOD / (size * FINER) + 0.5) % 1 - 0.5  # some on the border
        dots = fine[:, None] ** 2 + fine**2 < 0.3**2
        shares = dots.reshape(size, FINER, size, FINER).mean((1, 3)) * 255 // 1
    else:
        shares = np.zeros((size, size))
    return np.ascontiguousarray(shares, np.uint16)[..., None]


def background_pixels(pattern: str, first: Sequence[int], second: Sequence[int], size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    if pattern == "plain":
        return np.full((size, size, 3), first, np.uint8)
    shares, a, b = pattern_shares(pattern, size), np.array(first, np.uint16), np.array(second, np.uint16)
    return ((a * (255 - shares) + b * shares + 127) // 255).astype(np.uint8)


class Painter:
    """Draws the scenes of a set. Glyphs are read from the font when they are first wanted, and kept."""

    def __init__(self, made_of: SceneSet, font: Path | str | None = None):
        """UserError for another font than the set's, whose drawings would differ."""
        path = drawing.font_path(font)
        self.made_of, self.font = made_of, drawing.open_font(path)
        if (found := drawing.font_identity(path)["sha256"]) != made_of.font["sha256"]:
            raise UserError(
                f"{path} is another font than the set was made with (SHA-256 {found[:12]}..., not"
                f" {made_of.font['sha256'][:12]}...); give that one, by --font or {drawing.FONT_VARIABLE}"
            )
        self.glyphs: dict[int, Image.Image] = {}

    def glyph(self, concept: int) -> Image.Image:
        """Cropped to its visible part, colours premultiplied by alpha (mode RGBa)."""
        if concept not in self.glyphs:
            noun = self.made_of.nouns[concept]
            glyph = drawing.draw_glyph(self.font, noun.character)
            if glyph is None:
                raise UserError(f"the font has no picture of {noun.name!r} ({noun.character}); give the set's own font")
            self.glyphs[concept] = glyph.convert("RGBa")
        return self.glyphs[concept]

    def __call__(self, scene: Scene) -> Image.Image:
        """RGB, of the set's size."""
        return Image.fromarray(self.pixels(scene))

    def pixels(self, scene: Scene) -> np.ndarray:
        """(size, size, 3) uint8."""
        a, b = (self.made_of.colours[name] for name in (scene.colours[0], scene.colours[-1]))
        pixels = background_pixels(scene.pattern, a, b, self.made_of.size)
        for one in scene.objects:
            put_over(pixels, scaled_to(self.glyph(one.concept), one.side), one)
        return pixels


def scaled_to(glyph: Image.Image, side: int) -> np.ndarray:
    """A premultiplied glyph with its longer side at `side` pixels: (h, w, 4) uint16."""
    return np.asarray(glyph.resize(fitted_size(glyph.size, side), Image.Resampling.LANCZOS), np.uint16)


def put_over(pixels: np.ndarray, scaled: np.ndarray, one: SceneObject) -> None:
    """Draws a scaled glyph into the object's square."""
    height, width = scaled.shape[:2]
    left, top = one.left + (one.side - width) // 2, one.top + (one.side - height) // 2
    part = pixels[top : top + height, left : left + width]
    part[...] = np.minimum(scaled[..., :3] + (part * (255 - scaled[..., 3:]) + 127) // 255, 255)


def fitted_size(glyph_size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a glyph whose longer side is `side`."""
    longer = max(glyph_size)
    return max(1, round(glyph_size[0] * side / longer)), max(1, round(glyph_size[1] * side / longer))
