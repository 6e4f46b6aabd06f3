"""Write captioned line drawings: the things that the embedded model knows in colour, from a black-and-white font.

    python recipes/finetune/data.py runs/finetune/data

    OUT/drawings/NAME-0.png, .txt    black on white, 128x128 pixels, with captions; each thing at a few sizes and places
    OUT/heldout/                     things that training never sees drawn: to measure with, and to ask for afterwards

Which things: those of the model's concepts.json that the font has. Sizes, places and what is held out are pure
functions of the names, so the same command with the same font writes the same files. In a folder that was written
before, they take the place of its drawings.
"""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from plainsd.cli import exit_code
from plainsd.disk import read_json, written_whole
from plainsd.emoji import drawing
from plainsd.errors import UserError
from plainsd.files.hub import find

FONT = Path("/usr/share/fonts/truetype/ancient-scripts/Symbola_hint.ttf")
DRAWN, SIDE = 400, 128  # pixels: the font's size, and a picture's side (training scales it)
NOWHERE = "\U0010ffff"  # no font has this, so it shows what a font draws for what it lacks
CAPTIONS = ("{phrase}, line drawing", "a line drawing of {phrase}")
WRITTEN = "written.txt"  # names what this has written, to be removed when it is run again
UNSEEN = ("octopus", "rocket", "guitar")  # in prompts.txt; held out in any case


def glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Black, as opaque as the font says, cropped to what is visible; None where the font lacks it."""
    mask, lacking = (Image.new("L", (3 * DRAWN, 3 * DRAWN)) for _ in range(2))
    for canvas, text in ((mask, character), (lacking, NOWHERE)):
        ImageDraw.Draw(canvas).text((DRAWN, DRAWN), text, font=font, fill=255)
    box = mask.getbbox()
    if box is None or mask.tobytes() == lacking.tobytes():
        return None
    picture = Image.new("RGBA", mask.size)
    picture.putalpha(mask)
    return picture.crop(box)


def names_of(concept: drawing.Concept, views: int) -> list[str]:
    return [f"{concept.name.replace(' ', '-')}-{view}.png" for view in range(views)]


def write_drawings(folder: Path, concept: drawing.Concept, glyph: Image.Image, views: int) -> None:
    """Size and place are drawn from the name."""
    for view, name in enumerate(names_of(concept, views)):
        place = drawing.random_place(f"line:{concept.name}:{view}", glyph.size, SIDE)
        path = folder / name
        drawing.draw_picture(glyph, (255, 255, 255), SIDE, place).save(path)
        lines = [caption.format(phrase=concept.phrase) + "\n" for caption in CAPTIONS]
        path.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")


def open_outlines(path: Path) -> ImageFont.FreeTypeFont:
    if not path.is_file():
        raise UserError(f"no font at {path}; apt-get install fonts-symbola, or give --font FILE")
    try:
        return ImageFont.truetype(str(path), DRAWN)
    except OSError as error:
        raise UserError(
            f"{path} is not a font of outlines ({error}); apt-get install fonts-symbola, or give another --font FILE"
        ) from None


def replace_written(folder: Path, wanted: list[str]) -> None:
    """Removes what an earlier run has written, and notes what this one is going to write. UserError where that would
    replace the pictures of others."""
    listing = folder / WRITTEN
    before = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    if others := [name for name in wanted if name not in set(before) and (folder / name).exists()]:
        raise UserError(f"{folder / others[0]} is not of this recipe; give another folder")
    for name in before:
        for path in (folder / name, (folder / name).with_suffix(".txt")):
            path.unlink(missing_ok=True)
    with written_whole(listing) as draft:
        draft.write_text("".join(f"{name}\n" for name in wanted), encoding="utf-8")


def build(options: argparse.Namespace) -> None:
    if options.views < 1:
        raise UserError(f"--views {options.views} is out of range; give 1 or more")
    if not 0 <= options.heldout_share < 1:  # NaN included
        raise UserError(f"--heldout-share {options.heldout_share:g} is out of range; give a share from 0 up to below 1")
    font = open_outlines(options.font)
    rows = read_json(find(options.model) / "concepts.json")["concepts"]
    concepts = [drawing.Concept(row["name"], row["character"]) for row in rows]
    drawings = {concept: drawn for concept in concepts if (drawn := glyph(font, concept.character))}
    by_chance = sorted(drawings, key=lambda concept: random.Random(f"held out:{concept.name}").random())
    count = round(options.heldout_share * len(drawings))
    heldout = {concept for concept in drawings if concept.name in UNSEEN} | set(by_chance[:count])
    if len(heldout) == len(drawings):
        raise UserError(
            f"--heldout-share {options.heldout_share:g} leaves nothing to train on; give a smaller one, or another font"
        )
    for name in ("drawings", "heldout"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    places = {concept: ("heldout", 1) if concept in heldout else ("drawings", options.views) for concept in drawings}
    wanted = [f"{place}/{name}" for concept, (place, views) in places.items() for name in names_of(concept, views)]
    replace_written(options.out, wanted)
    for concept, (place, views) in places.items():
        write_drawings(options.out / place, concept, drawings[concept], views)
    print(
        f"{options.out}: {len(drawings) - len(heldout)} things drawn {options.views} times, {len(heldout)} held out; "
        f"the font lacks {len(concepts) - len(drawings)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a model with concepts.json beside its weights; the embedded one if not given")
    parser.add_argument("--views", type=int, default=4, help="how often each thing is drawn")
    parser.add_argument("--heldout-share", type=float, default=0.1, help="share of the things that is held out")
    parser.add_argument("--font", type=Path, default=FONT)
    options = parser.parse_args(argv)
    return exit_code(lambda: build(options), "data.py")


if __name__ == "__main__":
    sys.exit(main())
