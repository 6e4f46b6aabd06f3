"""Captioned emoji: which ones, how they are drawn, and their captions. For `recipes/emoji/data.py` and `evaluate`.

A picture shows one emoji (the concept) on one flat background colour. The glyph is cropped to its visible part; the
longer side of that part is 80 to 95 % of the picture's side, at a random place wholly inside the frame. Or sizes and
places are multiples of a cell (`place_in_cells`): with cells as large as a latent's patch, a network that sees latents
finds the same numbers wherever the emoji lies, and learns it in far fewer steps.

The emoji are chosen by this rule, which has no randomness:
1. candidates are single characters that the font draws, fully qualified in the `emoji` package, whose English name has
   at most three words, none of them in `LEFT_OUT` (clock faces, buttons, arrows, letters, signs, flags, moons...);
2. the groups of `GROUPS` (food, animals, ...) are taken in order, shorter names (in words) first, then by code point,
   each group up to its share of the count;
3. a candidate nearer than `DUPLICATE_DISTANCE` to one already chosen is skipped as a near duplicate. The distance is
   the root mean square difference, 0..1, of the two glyphs as 24x24 pictures on mid grey, over the part where either is
   visible;
4. shares that a group cannot fill go to the last group (objects), then to the other groups in order.
"""

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from plainsd.errors import UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_VARIABLE = "PLAINSD_EMOJI_FONT"  # of the environment: another path
STRIKE = 109  # the only size of the font's bitmaps, in Pillow's units
SMALLEST_SCALE, LARGEST_SCALE = 0.80, 0.95  # longer side of the visible part, as a share of the picture's side
MOST_CELLS = 64  # of a picture's side
LEAST_SIDE, MOST_SIDE = 16, 4096  # of a picture, in pixels
SPARE_CELLS = 2  # in a picture of cells, rows and columns that the largest square leaves free, at most
DUPLICATE_DISTANCE = 0.13  # two glyphs nearer than this are near duplicates

# Any two are at least 97 apart in RGB, so the nearest name is unambiguous.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 235, 60),
    "green": (46, 160, 67),
    "cyan": (0, 200, 220),
    "blue": (30, 80, 220),
    "purple": (128, 40, 170),
    "pink": (255, 150, 200),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "brown": (104, 62, 26),
}

# {phrase}: the name with its article; {ground}: the colour with its article. The last one leaves the colour open.
TEMPLATES = (
    "{phrase} on {ground} background",
    "{name}, {background} background",
    "a picture of {phrase} on {background}",
    "{name} on {background}",
    "{ground} background with {phrase}",
    "an emoji of {phrase} on {ground} background",
    "{phrase}",
)

LEFT_OUT = frozenset(
    """
    button symbol sign arrow arrows square circle triangle flag flags o'clock one-thirty two-thirty three-thirty
    four-thirty five-thirty six-thirty seven-thirty eight-thirty nine-thirty ten-thirty eleven-thirty twelve-thirty
    moon aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus japanese
    mark asterisk input keycap no non-potable person people man woman men women boy girl child family couple pregnant
    index pointing backhand hand hands fist thumbs thumb finger deaf restroom closet oncoming mobile off
    departure arrival railway weary confounded quarter gibbous crescent cigarette poo nose mouth ear tongue
    bust busts bra briefs bikini breast-feeding low medium high muted slash speaker station pistol syringe
    front-facing middle volume claus wedding kiss showing without savoring done foggy cinema meridians
    locked unlocked star-struck
""".split()
)

GROUPS: tuple[tuple[str, float, str], ...] = (  # name, share of the count, code points in hexadecimal
    ("food", 0.24, "1f32d-1f330 1f336 1f33d 1f344-1f37f 1f950-1f96f 1f9c0-1f9cb 1fad0-1fadd"),
    ("plants", 0.05, "1f331-1f335 1f337-1f33c 1f33e-1f343 2618 1f490 1f940 1fab4-1fab7 1fabb"),
    ("animals", 0.24, "1f400-1f43f 1f54a 1f577 1f980-1f9ae 1fab0-1fab3 1fabc-1fabf 1facc-1facf"),
    ("vehicles", 0.07, "2708 26f4-26f5 1f680-1f6a4 1f6b2 1f6f0-1f6fc 1f3cd-1f3ce"),
    ("faces", 0.05, "1f600-1f644 1f47b-1f47e 1f480 1f910-1f92f 1f970-1f97a"),
    ("sky and places", 0.05, "2600-2604 26c4 2744 2b50 1f300-1f320 1f3d4 1f3e0 1f3f0 1f525 1f4a7 26fa 1fa90"),
    (
        "objects",
        0.30,
        "2328 260e 2693-2699 26bd-26be 2702 270f 2764 231a-231b 23f0-23f3 1f380-1f3c0 1f3c6-1f3d3"
        " 1f3ee-1f3fa 1f451-1f462 1f484-1f48e 1f493-1f49d 1f4a1-1f4a3 1f4b0-1f4ff 1f50b-1f516 1f526-1f52e 1f56f-1f579"
        " 1f5a4-1f5d1 1f5dd-1f5e1 1f6aa 1f6bd-1f6c1 1f6cb-1f6d2 1f941-1f94f 1f9e0-1f9ff 1fa70-1faa9",
    ),
)

# Uncountable nouns, and plurals that do not end in s: no "a".
UNCOUNTED = frozenset(
    """
    bread rice spaghetti oden sushi popcorn garlic bacon butter salt ice sake coral wood herb broccoli
    salad food tea milk yarn soap thread fire honey meat tennis bowling badminton lacrosse money fog liquid lightning
    camping corn shrimp dna mate foggy custard cooking luggage sparkles baseball volleyball softball bread
    arts racing hockey pong
""".split()
)
SINGULAR_S = ("ss", "us", "os")  # endings of singular words in s: compass, octopus
AN = ("a", "e", "i", "o", "u", "hour", "x-ray")
NOT_AN = ("uni", "ewe", "one-", "euro", "use", "uk")


@dataclass(frozen=True)
class Concept:
    """One emoji. `phrase` is its name as used in captions, with its article if any."""

    name: str
    character: str

    @property
    def phrase(self) -> str:
        last = self.name.split(" of ")[0].split(" ")[-1]  # "glass of milk" counts glasses
        plural = last.endswith("s") and not last.endswith(SINGULAR_S)
        return self.name if plural or last in UNCOUNTED else with_article(self.name)


@dataclass(frozen=True)
class GlyphBox:
    """The bounding box of a glyph's visible part in a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


def with_article(words: str) -> str:
    """`apple` -> `an apple`, `unicorn` -> `a unicorn`."""
    return ("an " if words.startswith(AN) and not words.startswith(NOT_AN) else "a ") + words


def caption(template: str, concept: Concept, background: str) -> str:
    return template.format(
        name=concept.name, phrase=concept.phrase, background=background, ground=with_article(background)
    )


def font_path(path: Path | str | None = None) -> Path:
    """The given path, or that in the environment, or Debian's."""
    return Path(path or os.environ.get(FONT_VARIABLE) or FONT)


def open_font(path: Path | str | None = None) -> ImageFont.FreeTypeFont:
    """The colour bitmap font; None: see `font_path`."""
    path = font_path(path)
    if not path.is_file():
        raise UserError(f"no emoji font at {path}; apt-get install fonts-noto-color-emoji, or give --font FILE")
    try:
        return ImageFont.truetype(str(path), STRIKE)
    except OSError as error:
        raise UserError(
            f"{path} is not the bitmap Noto Color Emoji font ({error}); give --font NotoColorEmoji.ttf,"
            f" Pillow with FreeType {features.version('freetype2')}"
        ) from None


def font_identity(path: Path | str | None = None) -> dict[str, str]:
    path = font_path(path)
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The emoji as RGBA, cropped to its visible part; None if the font has no bitmap for it."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    return canvas.crop(box) if box else None


def scaled_glyph(glyph: Image.Image, longer: int) -> Image.Image:
    """The glyph with its longer side at `longer` pixels (Lanczos, on premultiplied colours as Pillow does for RGBA)."""
    scale = longer / max(glyph.size)
    return glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)


def draw_picture(glyph: Image.Image, colour: tuple[int, int, int], size: int, place: GlyphBox) -> Image.Image:
    """The glyph over a flat background: RGB, `size` x `size`."""
    picture = Image.new("RGBA", (size, size), (*colour, 255))
    scaled = glyph.resize((place.width, place.height), Image.Resampling.LANCZOS)
    picture.alpha_composite(scaled, (place.left, place.top))
    return picture.convert("RGB")


def check_cells(cells: object) -> None:
    """UserError if these are no cells of a picture's side; None is any size and place."""
    if cells is not None and (type(cells) is not int or not 1 <= cells <= MOST_CELLS):
        raise UserError(f"cells {cells!r}: write a whole number from 1 to {MOST_CELLS}, or leave it out", field="cells")


def is_colour(value: object) -> bool:
    """Red, green and blue, from 0 to 255."""
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(type(n) is int and 0 <= n <= 255 for n in value)


def is_side(value: object) -> bool:
    """Of a picture, in pixels."""
    return type(value) is int and LEAST_SIDE <= value <= MOST_SIDE


def scale_range(cells: int | None = None) -> tuple[float, float]:
    """The least and the largest longer side of a glyph, as shares of the picture's side."""
    if not cells:
        return SMALLEST_SCALE, LARGEST_SCALE
    return (cells - spare_cells(cells) - 0.5) / cells, (cells - 0.5) / cells


def spare_cells(cells: int) -> int:
    return min(SPARE_CELLS, cells - 1)


def place_in_cells(draw: Callable[[], float], glyph_size: tuple[int, int], size: int, cells: int) -> GlyphBox:
    """A place in a picture of `cells` x `cells` cells: a square of all cells, or up to `SPARE_CELLS` fewer each way,
    less a quarter of a cell on each side, holds the glyph in its middle."""
    spare = int(draw() * (spare_cells(cells) + 1))
    cell = size / cells
    longer = (cells - spare - 0.5) * cell
    width, height = (max(1, round(side * longer / max(glyph_size))) for side in glyph_size)
    left, top = (round((int(draw() * (spare + 1)) + 0.25) * cell + (longer - side) / 2) for side in (width, height))
    return GlyphBox(left, top, width, height)


def random_place(key: str, glyph_size: tuple[int, int], size: int, cells: int | None = None) -> GlyphBox:
    """Size and place as a pure function of the key: `random.Random` keeps its stream for a text across versions."""
    draw = random.Random(key).random
    if cells:
        return place_in_cells(draw, glyph_size, size, cells)
    longer = size * (SMALLEST_SCALE + (LARGEST_SCALE - SMALLEST_SCALE) * draw())
    width, height = (max(1, round(side * longer / max(glyph_size))) for side in glyph_size)
    return GlyphBox(int(draw() * (size - width + 1)), int(draw() * (size - height + 1)), width, height)


def split_pairs(
    concepts: int, backgrounds: int, share: float = 0.1, seed: int = 0
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All (concept, background) index pairs as (seen, held out): every concept and background is among the seen ones,
    unless nearly all are held out.

    The held-out pairs cycle through shuffled concepts and backgrounds together, so both are covered evenly. Both lists
    are shuffled, so any slice of them is a fair sample.
    """
    count = round(concepts * backgrounds * share)
    order = sorted(range(concepts), key=lambda i: random.Random(f"{seed}:concept:{i}").random())
    held = {(order[k % concepts], (k % concepts + k // concepts) % backgrounds) for k in range(count)}
    pairs = [(i, j) for i in range(concepts) for j in range(backgrounds)]
    pairs.sort(key=lambda pair: random.Random(f"{seed}:pair:{pair[0]}:{pair[1]}").random())
    return [pair for pair in pairs if pair not in held], [pair for pair in pairs if pair in held]


# ---- choosing the emoji ----------------------------------------------------------------------------------------------


def candidates(font: ImageFont.FreeTypeFont) -> dict[int, Concept]:
    """Step 1 of the rule: code point -> Concept, for all that the font draws and whose name is allowed."""
    try:
        import emoji
    except ImportError:
        raise UserError("the emoji package, which gives the names, is missing; pip install 'plainsd[emoji]'") from None
    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        character = text.replace("\ufe0f", "")
        name = entry["en"].strip(":").replace("_", " ").replace("’", "'").lower()
        words = name.split(" ")
        if (
            len(character) == 1
            and entry["status"] == emoji.STATUS["fully_qualified"]
            and len(words) <= 3
            and not LEFT_OUT.intersection(words)
            and font.getmask(character).getbbox()
        ):
            found[ord(character)] = Concept(name, character)
    return found


def _code_points(text: str) -> tuple[int, ...]:
    ends = [[int(end, 16) for end in part.split("-")] for part in text.split()]
    return tuple(code for end in ends for code in range(end[0], end[-1] + 1))


def thumbnail_of(glyph: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """24x24 on mid grey in 0..1, and where it is visible."""
    small = scaled_glyph(glyph, 24)
    canvas = Image.new("RGBA", (24, 24))
    canvas.paste(small, ((24 - small.width) // 2, (24 - small.height) // 2))
    pixels = np.asarray(canvas, np.float32) / 255
    alpha = pixels[..., 3:]
    return pixels[..., :3] * alpha + 0.5 * (1 - alpha), alpha[..., 0] > 0.25


def distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Step 3's distance between two thumbnails."""
    where = one[1] | other[1]
    return float(np.sqrt(np.mean((one[0] - other[0])[where] ** 2)))


def choose(font: ImageFont.FreeTypeFont, count: int) -> list[Concept]:
    """The emoji of the set by the rule at the top of this file, in the order of that rule."""
    found = candidates(font)
    chosen: dict[int, Concept] = {}
    thumbnails: list[tuple[np.ndarray, np.ndarray]] = []
    names = set()

    def take(code_points: tuple[int, ...], limit: int) -> None:
        usable = [code for code in code_points if code in found and code not in chosen]
        for code in sorted(usable, key=lambda code: (len(found[code].name.split(" ")), code)):
            if limit <= 0 or len(chosen) >= count:
                return
            glyph = draw_glyph(font, found[code].character)
            if glyph is None or found[code].name in names:
                continue
            thumbnail = thumbnail_of(glyph)
            if all(distance(thumbnail, other) >= DUPLICATE_DISTANCE for other in thumbnails):
                chosen[code] = found[code]
                names.add(found[code].name)
                thumbnails.append(thumbnail)
                limit -= 1

    for _, share, codes in GROUPS:
        take(_code_points(codes), round(share * count))
    for _, _, codes in (GROUPS[-1], *GROUPS[:-1]):
        take(_code_points(codes), count)
    if len(chosen) < count:
        raise UserError(f"asked for {count} emoji, the rule finds {len(chosen)} in this font; ask for fewer")
    return list(chosen.values())
