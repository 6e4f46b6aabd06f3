"""Recognize the background and the emoji of a picture, without any learned part.

A picture's background is the median colour of its border, named after the nearest colour of the set. Its object is the
emoji which, drawn on that background at the best place and size, has the least mean squared error over the whole
picture. All places are tried at once by correlation in Fourier space, first for every emoji on a coarse grid, then for
the best few on a finer one.

Shape letters: K drawn emoji (each at several sizes), G side of the search grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from plainsd.emoji import drawing

COARSE, FINE = 32, 64  # sides of the two search grids, in cells
FINE_CANDIDATES = 16  # candidates of the coarse search for the fine one
SEARCHED = 256  # drawn emoji that are searched at once: what that makes stays in the cache
COARSE_SIZES = 10  # sizes from the smallest to the largest, tried on the coarse grid


@dataclass(frozen=True)
class Drawn:
    """Drawn emoji, ready for the search on one grid: spectra of alpha * colour and alpha at the grid's corner."""

    spectrum: Tensor  # (K, 4, G, G // 2 + 1) complex
    energy: Tensor  # (K, 5): sums over the grid of (alpha colour)^2; alpha^2 colour, three; alpha^2
    room: Tensor  # (K, 2): number of rows and columns it can be placed at, inside the frame


@dataclass(frozen=True)
class Score:
    """The scorer's result for one picture: the background's name, and the likeliest concepts, best first."""

    background: str
    objects: tuple[int, ...]
    error: float  # mean squared error of the best one over the picture, colours in 0..1


class Scorer:
    """Recognizes background and object of pictures `size` pixels wide, among the given glyphs. `cells`: of the set's
    pictures, if its sizes and places are multiples of a cell."""

    def __init__(
        self,
        glyphs: Sequence[Image.Image],
        backgrounds: dict[str, Sequence[int]],
        size: int,
        cells: int | None = None,
    ):
        self.glyphs, self.backgrounds, self.size = list(glyphs), backgrounds, size
        smallest, largest = self.range = [scale * size for scale in drawing.scale_range(cells)]
        self.step = (largest - smallest) / (COARSE_SIZES - 1)
        self.sizes = [smallest + i * self.step for i in range(COARSE_SIZES)]
        each = [self.draw(glyph, round(longer), COARSE) for glyph in self.glyphs for longer in self.sizes]
        self.coarse = gathered(each)
        self.draw_fine = lru_cache(maxsize=4096)(lambda i, longer: self.draw(self.glyphs[i], longer, FINE))

    def draw(self, glyph: Image.Image, longer: int, grid: int) -> Drawn:
        """One emoji at one size, drawn in pixels and averaged down to the grid's cells."""
        scaled = np.asarray(drawing.scaled_glyph(glyph, longer), np.float32) / 255
        alpha = scaled[..., 3:]
        canvas = torch.zeros(1, 4, self.size, self.size)
        canvas[0, :, : scaled.shape[0], : scaled.shape[1]] = torch.from_numpy(
            np.concatenate([scaled[..., :3] * alpha, alpha], -1)
        ).permute(2, 0, 1)
        cells = interpolate(canvas, (grid, grid), mode="area")
        colour, alpha = cells[:, :3], cells[:, 3:]
        energy = torch.cat([(colour**2).sum().view(1, 1), (colour * alpha).sum((2, 3)), (alpha**2).sum((2, 3))], 1)
        room = [int((self.size - side) * grid / self.size + 1e-6) + 1 for side in scaled.shape[:2]]
        return Drawn(torch.fft.rfft2(cells), energy, torch.tensor([room]))

    def __call__(self, picture: Image.Image) -> Score:
        """Coarse search over every emoji, then the fine one over the best `FINE_CANDIDATES` of them."""
        picture = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BOX)
        pixels = np.asarray(picture, np.float32) / 255
        colour = border_colour(pixels)
        difference = torch.from_numpy(pixels - colour).permute(2, 0, 1)[None]
        colour = torch.from_numpy(colour)
        errors = best_errors(difference, colour, self.coarse, COARSE).view(len(self.glyphs), COARSE_SIZES)
        near = errors.min(1).values.argsort()[:FINE_CANDIDATES].tolist()
        fine = [self.fine_error(difference, colour, i, self.sizes[int(errors[i].argmin())]) for i in near]
        order = sorted(range(len(near)), key=fine.__getitem__)
        return Score(nearest_name(colour.numpy(), self.backgrounds), tuple(near[k] for k in order), min(fine))

    def fine_error(self, difference: Tensor, colour: Tensor, concept: int, longer: float) -> float:
        """The least error of one emoji at sizes one fine cell apart, around the coarse search's best."""
        low, high = math.ceil(self.range[0]), math.floor(self.range[1])
        reach, step = round(self.step), max(1, self.size // FINE)
        sizes = {min(max(round(longer) + offset, low), high) for offset in range(-reach, reach + 1, step)}
        drawn = gathered([self.draw_fine(concept, size) for size in sorted(sizes)])
        return float(best_errors(difference, colour, drawn, FINE).min())


def gathered(drawn: Sequence[Drawn]) -> Drawn:
    return Drawn(*(torch.cat([getattr(one, name) for one in drawn]) for name in ("spectrum", "energy", "room")))


def best_errors(difference: Tensor, colour: Tensor, drawn: Drawn, grid: int) -> Tensor:
    """For each drawn emoji, the least mean squared error over all its places in the frame: (K,).

    With d = picture - background b, alpha a and colour c, the error of a place is the sum of (d - a (c - b))^2, that is
    |d|^2 - 2 <d, a c> + 2 <d . b, a> + |a c|^2 - 2 b . <a c, a> + |b|^2 |a|^2. The two inner products for all places at
    once are one circular correlation; it never wraps, as only places inside the frame are used.
    """
    cells = interpolate(difference, (grid, grid), mode="area")[0]  # (3, G, G)
    against = (cells * colour[:, None, None]).sum(0, keepdim=True)
    spectrum = torch.fft.rfft2(torch.cat([cells, -against]))  # (4, G, G // 2 + 1)
    each = zip(drawn.spectrum.split(SEARCHED), drawn.room.split(SEARCHED), strict=True)
    best = torch.cat([best_inner(spectrum, some, room, grid) for some, room in each])
    energy = drawn.energy[:, 0] - 2 * drawn.energy[:, 1:4] @ colour + drawn.energy[:, 4] * (colour**2).sum()
    return ((cells**2).sum() - 2 * best + energy) / (3 * grid * grid)


def best_inner(picture: Tensor, drawn: Tensor, room: Tensor, grid: int) -> Tensor:
    """The greatest inner product of a picture and each drawn emoji over its places in the frame: (K,)."""
    inner = torch.fft.irfft2((picture * drawn.conj()).sum(1), s=(grid, grid))  # (K, G, G)
    rows, columns = (torch.arange(grid) < room[:, axis, None] for axis in (0, 1))
    inside = rows[:, :, None] & columns[:, None, :]
    return inner.masked_fill(~inside, -math.inf).amax((1, 2))


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """Median over the outermost two pixels. A glyph touches at most two sides, so the median is background."""
    edge = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[2:-2, :2].reshape(-1, 3),
            pixels[2:-2, -2:].reshape(-1, 3),
        ]
    )
    return np.median(edge, 0).astype(np.float32)


def nearest_name(colour: np.ndarray, backgrounds: Mapping[str, Sequence[int]]) -> str:
    """The name of the nearest colour; `colour` in 0..1, the table in 0..255."""
    return min(backgrounds, key=lambda name: float(((colour * 255 - np.asarray(backgrounds[name])) ** 2).sum()))
