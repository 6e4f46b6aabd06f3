"""Write the training set of the embedded ControlNet: captioned pictures of emoji, and beside each its edges.

    python recipes/control/data.py runs/control/data

    OUT/000000.png, .txt, .cond.png    a picture of 128x128 pixels, its captions, its edges (`--preprocess canny`)
    OUT/heldout/                       likewise of (emoji, background) pairs that neither the model nor the net sees

Needs the font of recipes/emoji and `pip install '.[control]'`. Picture i is a pure function of its number. OUT must be
new or empty: pictures of another model or an earlier run would be trained on with these.
"""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageOps

from plainsd.cli import exit_code
from plainsd.disk import read_json
from plainsd.emoji import drawing
from plainsd.emoji.evaluate import draw_all, read_concepts
from plainsd.errors import UserError
from plainsd.files.hub import find
from plainsd.pictures.preprocess import canny

SIDE = 128  # the embedded model's own
SMALLEST, LARGEST = 0.5, 0.95  # longer side of an emoji, as a share of the picture's side
LARGE = 2 * SIDE  # pictures are drawn at this size, and scaled


def placed(key: str, glyph: Image.Image) -> tuple[Image.Image, drawing.GlyphBox]:
    """The glyph, mirrored or not, and its size and place: a pure function of the key. The embedded model has seen none
    smaller than 69 % of the picture, and none mirrored: that is the map's part."""
    draw = random.Random(key).random
    if draw() < 0.5:
        glyph = ImageOps.mirror(glyph)
    longer = LARGE * (SMALLEST + (LARGEST - SMALLEST) * draw())
    width, height = (max(1, round(side * longer / max(glyph.size))) for side in glyph.size)
    box = drawing.GlyphBox(int(draw() * (LARGE - width + 1)), int(draw() * (LARGE - height + 1)), width, height)
    return glyph, box


def write_pictures(folder: Path, kind: str, count: int, pairs: list[tuple], glyphs: dict, known: dict) -> None:
    """`count` pictures of the pairs, taken round and round."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        concept, background = pairs[i % len(pairs)]
        glyph, place = placed(f"control:{kind}:{i}", glyphs[concept])
        large = drawing.draw_picture(glyph, tuple(known["backgrounds"][background]), LARGE, place)
        picture = large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(folder / f"{i:06d}.png", compress_level=1)
        canny(picture).save(folder / f"{i:06d}.cond.png")
        lines = [drawing.caption(template, concept, background) + "\n" for template in known["templates"]]
        (folder / f"{i:06d}.txt").write_text("".join(lines), encoding="utf-8")


def build(options: argparse.Namespace) -> None:
    for name, least in (("count", 1), ("heldout", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} is out of range; give {least} or more")
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"{options.out} is not empty; remove it, or give another folder")
    canny(Image.new("RGB", (SIDE, SIDE)))  # says at the door if OpenCV is missing
    known = read_json(find(options.model) / "concepts.json")
    concepts = read_concepts(known)
    glyphs = dict(zip(concepts, draw_all(known, options.font), strict=True))
    held = {tuple(pair) for pair in known["heldout"]}
    pairs = [(concept, background) for concept in concepts for background in known["backgrounds"]]
    seen = [pair for pair in pairs if (pair[0].name, pair[1]) not in held]
    unseen = [pair for pair in pairs if (pair[0].name, pair[1]) in held]
    if not seen:
        raise UserError("the model has no pairs of emoji and background to train on; give another --model")
    if options.heldout and not unseen:
        raise UserError("the model has no held-out pairs of emoji and background; give --heldout 0")
    write_pictures(options.out, "picture", options.count, seen, glyphs, known)
    write_pictures(options.out / "heldout", "heldout", options.heldout, unseen, glyphs, known)
    print(f"{options.count} pictures in {options.out}, {options.heldout} in {options.out / 'heldout'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--heldout", type=int, default=162)
    parser.add_argument("--model", help="the model whose concepts are drawn; the embedded one if not given")
    parser.add_argument("--font", type=Path)
    options = parser.parse_args(argv)
    return exit_code(lambda: build(options), "data.py")


if __name__ == "__main__":
    sys.exit(main())
