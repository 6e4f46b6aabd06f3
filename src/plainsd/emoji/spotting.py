"""Find the background and all objects of a scene, without any learned part and without its prompt.

1. The background is the pattern and the two colours that fit the picture's border best, of which objects cover little.
2. What differs from it falls into connected parts. Emoji such as sparkles have several, so parts are joined where one
   emoji explains them better together than two do apart.
3. Each part is compared with all emoji over that background, both stretched to the same small square; the likeliest are
   drawn at the place and size that this implies, and a few beside it, and the one with the least squared error is it.

Shape letters: S side of the picture in pixels, K emoji, G side of the canvas that they are kept on, Q side of the small
square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from plainsd.emoji.painting import Painter, background_pixels, fitted_size, pattern_shares, put_over, scaled_to
from plainsd.emoji.scenes import PATTERNS, SceneObject
from plainsd.emoji.scorer import nearest_name

CANVAS, SQUARE_SIDE = 24, 16  # G, Q
DIFFERENT = 26  # of 255: a pixel is not background if a channel is off by more
SOFT_EDGES = 1.5  # of 255: mean error of the border from which a pattern's edges count as soft
KEPT_BORDER = 0.8  # share of the border's pixels, the best ones, that the background is fitted_size to
GRID_CELLS = 64  # side of the grid on which connected parts are found
SMALLEST_PART, MOST_PARTS = 0.0012, 9  # share of the picture; smaller ones are noise
FARTHEST = 0.22  # of the side: parts farther apart are not one emoji
PART_COST = 6.0  # squared error, colours in 0..1, that joining two parts may cost for being simpler
LIKELY, BEST = 8, 3  # emoji drawn once, and of those the ones drawn at several places
CLEAR = 0.4  # of the next one's error: then the likeliest alone is drawn at several places
GOOD = 1.0  # squared error: a part that is explained so well is not half an emoji
ASPECT_WEIGHT = 0.03  # of the squared difference of the logarithms of two shapes, width by height


class PartBox(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    def around(self, other: "PartBox") -> "PartBox":
        low, high = (min(a, b) for a, b in zip(self[:2], other[:2], strict=True)), zip(self[2:], other[2:], strict=True)
        return PartBox(*low, *(max(a, b) for a, b in high))

    def gap(self, other: "PartBox") -> int:
        return max(self.left - other.right, other.left - self.right, self.top - other.bottom, other.top - self.bottom)


@dataclass(frozen=True)
class Spotted:
    """What a picture shows. `errors`: of each object, the squared error that it leaves, colours in 0..1."""

    pattern: str
    colours: tuple[str, ...]
    objects: tuple[SceneObject, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Looks:
    """All emoji over one colour: stretched to squares (K, Q * Q * 3) in 0..1; and the boxes (K, 4), on the canvas, of
    what can be seen of them."""

    squares: np.ndarray
    boxes: np.ndarray


class Spotter:
    """Finds the emoji of a set in pictures of its size."""

    def __init__(self, painter: Painter):
        self.painter, self.made_of, self.size = painter, painter.made_of, painter.made_of.size
        canvases = np.stack([self._canvas(i) for i in range(len(self.made_of.nouns))])  # (K, G, G, 4) in 0..1
        self.planes = np.ascontiguousarray(np.moveaxis(canvases, 3, 0))  # (4, K, G, G)
        self.boxes = seen_boxes(self.planes[3] > 0.1)
        self.squares = stretched(canvases, self.boxes)  # (K, Q, Q, 4)
        self.looks_over = lru_cache(maxsize=64)(self._looks_over)
        self.scaled = lru_cache(maxsize=4096)(lambda concept, side: scaled_to(self.painter.glyph(concept), side))

    def _canvas(self, concept: int) -> np.ndarray:
        glyph = self.painter.glyph(concept)
        width, height = fitted_size(glyph.size, CANVAS)
        canvas: np.ndarray = np.zeros((CANVAS, CANVAS, 4), np.float32)
        left, top = (CANVAS - width) // 2, (CANVAS - height) // 2
        scaled = np.asarray(glyph.resize((width, height), Image.Resampling.LANCZOS), np.float32)
        canvas[top : top + height, left : left + width] = scaled / 255
        return canvas

    def _looks_over(self, colour: tuple[int, int, int]) -> Looks:
        ground, alpha = np.array(colour, np.float32) / 255, self.planes[3]
        visible = np.zeros(alpha.shape, bool)
        for plane, value in zip(self.planes, ground, strict=False):
            visible |= np.abs(plane - alpha * value) > DIFFERENT / 255  # what the emoji changes
        boxes = np.where(visible.any((1, 2))[:, None], seen_boxes(visible), self.boxes)
        squares = self.squares[..., :3] + (1 - self.squares[..., 3:]) * ground
        for k in np.nonzero((boxes != self.boxes).any(1))[0]:  # a part of them is of the ground's colour
            over = np.moveaxis(self.planes[:, k], 0, 2)
            over = np.where(visible[k, ..., None], over[..., :3] + (1 - over[..., 3:]) * ground, ground)
            squares[k] = stretched(over[None], boxes[k : k + 1])[0]
        return Looks(squares.reshape(len(squares), -1), boxes)

    def __call__(self, picture: Image.Image) -> Spotted:
        picture = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        pattern, a, b, error = fitted_background(pixels)
        names = tuple(
            nearest_name(np.asarray(colour) / 255, self.made_of.colours)
            for colour in ([a] if pattern == "plain" else [a, b])
        )
        ground = background_pixels(pattern, a, b, self.size)
        different = np.abs(pixels.astype(np.int16) - ground).max(-1) > DIFFERENT
        if pattern in ("stripes", "dots") and error > SOFT_EDGES:
            different = without_lines(different)  # soft edges of the pattern are no objects
        parts = connected_parts(different)
        found = [self._explained(pixels, ground, different, box) for box in parts]
        self._join(pixels, ground, different, parts, found)
        order = sorted(range(len(found)), key=lambda i: (found[i][0].top, found[i][0].left))
        return Spotted(pattern, names, tuple(found[i][0] for i in order), tuple(found[i][1] for i in order))

    def _join(self, pixels, ground, different, parts: list[PartBox], found: list[tuple[SceneObject, float]]) -> None:
        """Joins parts, nearest first, for as long as that explains the picture better."""
        tried: set[frozenset[PartBox]] = set()
        while True:
            pairs = [(parts[i].gap(parts[j]), i, j) for i in range(len(parts)) for j in range(i)]
            near = [
                pair
                for pair in sorted(pairs)
                if pair[0] < FARTHEST * self.size
                and max(found[pair[1]][1], found[pair[2]][1]) > GOOD
                and frozenset((parts[pair[1]], parts[pair[2]])) not in tried
            ]
            if not near:
                return
            _, i, j = near[0]
            tried.add(frozenset((parts[i], parts[j])))
            both = parts[i].around(parts[j])
            together = self._explained(pixels, ground, different, both)
            if together[1] < found[i][1] + found[j][1] + PART_COST:
                for k in (i, j):  # i > j
                    del parts[k], found[k]
                parts.append(both)
                found.append(together)

    def _explained(self, pixels, ground, different, box: PartBox) -> tuple[SceneObject, float]:
        """The emoji that explains a part best, and the squared error that it leaves in the part and a little around."""
        here = (slice(box.top, box.bottom), slice(box.left, box.right))
        mean = ground[here].reshape(-1, 3).mean(0)
        shown = np.where(different[here][..., None], pixels[here], mean).astype(np.float32) / 255
        query = stretched(shown[None], np.array([[0, 0, box.right - box.left, box.bottom - box.top]])).reshape(-1)
        looks = self.looks_over(tuple(int(min(255, round(value / 16) * 16)) for value in mean))
        shapes = np.log((looks.boxes[:, 2] - looks.boxes[:, 0]) / (looks.boxes[:, 3] - looks.boxes[:, 1]))
        shape = np.log((box.right - box.left) / (box.bottom - box.top))
        far = ((looks.squares - query) ** 2).mean(1) + ASPECT_WEIGHT * (shapes - shape) ** 2
        likely = np.argsort(far)[:LIKELY]
        drawn = [self._drawn(pixels, ground, box, self._implied(int(i), looks.boxes[i], box)) for i in likely]
        drawn = sorted(drawn, key=lambda one: one[1])[:BEST]
        drawn = [one for one in drawn if drawn[0][1] >= CLEAR * one[1] or one is drawn[0]]
        return min((self._refined(pixels, ground, box, one) for one in drawn), key=lambda one: one[1])

    def _implied(self, concept: int, look: np.ndarray, box: PartBox) -> SceneObject:
        """Where the emoji's square lies if its visible part fills the box."""
        scale = ((box.right - box.left) * (box.bottom - box.top) / ((look[2] - look[0]) * (look[3] - look[1]))) ** 0.5
        side = max(4, min(self.size, round(CANVAS * scale)))
        centre = [(box[k] + box[k + 2]) / 2 - scale * ((look[k] + look[k + 2]) / 2 - CANVAS / 2) for k in (0, 1)]
        left, top = (min(max(0, round(middle - side / 2)), self.size - side) for middle in centre)
        return SceneObject(concept, left, top, side)

    def _drawn(self, pixels, ground, box: PartBox, one: SceneObject) -> tuple[SceneObject, float]:
        """With the squared error in the box and 3 % of the side around it, colours in 0..1."""
        reach = max(2, self.size // 32)
        here = (
            slice(max(0, box.top - reach), box.bottom + reach),
            slice(max(0, box.left - reach), box.right + reach),
        )
        canvas = ground.copy()
        put_over(canvas, self.scaled(one.concept, one.side), one)
        return one, float(((canvas[here].astype(np.float32) - pixels[here]) ** 2).sum()) / 255**2

    def _refined(self, pixels, ground, box: PartBox, one: tuple[SceneObject, float]) -> tuple[SceneObject, float]:
        """The best nearby size and place: steps of a pixel that make the error less, until none does."""
        for _ in range(8):
            better = min(
                (self._drawn(pixels, ground, box, other) for other in self._beside(one[0])), key=lambda found: found[1]
            )
            if better[1] >= one[1]:
                break
            one = better
        return one

    def _beside(self, one: SceneObject) -> Iterator[SceneObject]:
        steps = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (-1, -1, 2), (1, 1, -2), (0, 0, 1), (0, 0, -1))
        for across, down, more in steps:
            side, left, top = one.side + more, one.left + across, one.top + down
            if side >= 4 and left >= 0 and top >= 0 and left + side <= self.size and top + side <= self.size:
                yield SceneObject(one.concept, left, top, side)


# ---- the background --------------------------------------------------------------------------------------------------


def fitted_background(pixels: np.ndarray) -> tuple[str, tuple[int, ...], tuple[int, ...], float]:
    """Pattern and colours of the border of (S, S, 3), and their mean error: plain unless another pattern fits clearly
    better."""
    size = len(pixels)
    border: np.ndarray = np.ones((size, size), bool)
    width = max(1, size // 40)
    border[width:-width, width:-width] = False
    values = pixels[border].astype(np.float64)  # (n, 3)
    fits = {pattern: border_fit(pattern_shares(pattern, size)[border, 0] / 255, values) for pattern in PATTERNS}
    best = min(fits, key=lambda pattern: fits[pattern][1])
    if fits["plain"][1] <= 1.2 * fits[best][1] + 2:
        best = "plain"
    a, b = (tuple(int(value) for value in np.clip(colour.round(), 0, 255)) for colour in fits[best][0])
    return best, a, b, fits[best][1]


def border_fit(shares: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """The two colours (2, 3) whose blend by the shares (n,) is nearest to the values (n, 3), and the mean error of the
    pixels that it fits best. Least squares, three times: after the first without the others."""
    kept: np.ndarray = np.ones(len(shares), bool)
    for _ in range(3):
        blend = np.stack([1 - shares[kept], shares[kept]], 1)
        colours = np.linalg.lstsq(blend, values[kept], rcond=None)[0]
        errors = np.abs(np.stack([1 - shares, shares], 1) @ colours - values).mean(1)
        limit = np.quantile(errors, KEPT_BORDER)
        kept = errors <= limit
    if not shares.any():
        colours[1] = colours[0]
    return colours, float(errors[kept].mean())


# ---- connected parts -------------------------------------------------------------------------------------------------


def without_lines(mask: np.ndarray) -> np.ndarray:
    """Without what is thinner than three pixels: erosion, then dilation, by 3 x 3."""

    def grown(mask: np.ndarray) -> np.ndarray:
        wide = np.pad(mask, 1)
        down = wide[:-2] | wide[1:-1] | wide[2:]
        return down[:, :-2] | down[:, 1:-1] | down[:, 2:]

    return grown(~grown(~mask))


def connected_parts(mask: np.ndarray) -> list[PartBox]:
    """The boxes, in pixels, of the largest connected parts of (S, S), on a grid of at most GRID_CELLS a side."""
    size = len(mask)
    cell = max(1, size // GRID_CELLS)
    side = size // cell
    cells = mask[: side * cell, : side * cell].reshape(side, cell, side, cell).any((1, 3))
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(cells), strict=True)}
    parts: list[tuple[int, PartBox]] = []
    while left:
        waiting = [left.pop()]
        part = []
        while waiting:
            y, x = waiting.pop()
            part.append((y, x))
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (y + dy, x + dx) in left]
            left.difference_update(near)
            waiting += near
        rows, columns = zip(*part, strict=True)
        inside = (
            slice(min(rows) * cell, (max(rows) + 1) * cell),
            slice(min(columns) * cell, (max(columns) + 1) * cell),
        )
        here = mask[inside]  # to the pixel
        ys, xs = np.nonzero(here.any(1))[0], np.nonzero(here.any(0))[0]
        top, first = inside[0].start, inside[1].start
        box = PartBox(first + int(xs[0]), top + int(ys[0]), first + int(xs[-1]) + 1, top + int(ys[-1]) + 1)
        parts.append((len(part), box))
    parts = [one for one in sorted(parts, reverse=True) if one[0] >= SMALLEST_PART * side * side]
    return [box for _, box in parts[:MOST_PARTS]]


# ---- small squares ---------------------------------------------------------------------------------------------------


def seen_boxes(visible: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of what is true in each of (K, G, G): (K, 4)."""
    sides = [np.asarray(visible.any(axis)) for axis in (1, 2)]  # across, down
    first, last = [one.argmax(1) for one in sides], [one[:, ::-1].argmax(1) for one in sides]
    return np.stack([*first, *(visible.shape[1] - one for one in last)], 1)


def stretched(pictures: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The box (left, top, right, bottom) of each picture (K, H, W, C), averaged down to (K, Q, Q, C)."""
    across = averaged(np.swapaxes(pictures, 1, 2), boxes[:, 0], boxes[:, 2])  # (K, Q, H, C)
    return averaged(np.swapaxes(across, 1, 2), boxes[:, 1], boxes[:, 3])


def averaged(rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Means of Q equal parts of rows `first` to `last` of each (K, N, ...), by differences of the cumulated sum: parts
    of rows count."""
    total = np.concatenate([np.zeros_like(rows[:, :1]), rows.cumsum(1)], 1)  # (K, N + 1, ...)
    at = first[:, None] + (last - first)[:, None] * np.arange(SQUARE_SIDE + 1) / SQUARE_SIDE  # (K, Q + 1)
    low = np.minimum(at.astype(int), rows.shape[1] - 1)
    each = np.arange(len(rows))[:, None]
    share = (at - low).astype(rows.dtype)[..., None, None]
    sums = total[each, low] * (1 - share) + total[each, low + 1] * share
    return np.diff(sums, axis=1) * (SQUARE_SIDE / (last - first)).astype(rows.dtype)[:, None, None, None]
