"""Draw the prompts before and after fine-tuning, one labelled picture; print the validation loss of each run likewise,
if it has any.

    python recipes/finetune/picture.py docs/finetune.png runs/finetune/full runs/finetune/lora

A run is a folder of `plainsd train` that holds its result, a model or a LoRA of its name. The pictures of a column
begin with the same noise.
"""

import argparse
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import plainsd
from plainsd.adapters.lora import add_lora
from plainsd.cli import exit_code
from plainsd.errors import UserError
from plainsd.listing import read_prompts
from plainsd.pictures.images import write_png
from plainsd.train.log import read_log

PROMPTS = Path(__file__).with_name("prompts.txt")
SHOWN, GAP = 128, 8  # pixels: side of a shown picture, gaps
LABEL, LEFT = 44, 70  # pixels: height of the prompts, width of the rows' names
LETTERS = 18  # of a prompt, on a line
BEFORE = "before"  # the name of the first row


def trained(run: Path, base: str | None) -> plainsd.StableDiffusion:
    """The model that a run has made."""
    result = run / run.resolve().name
    if result.is_dir():
        return plainsd.load(result, device="cpu", dtype="float32")
    sd = plainsd.load(base, device="cpu", dtype="float32")
    add_lora(sd, f"{result}.safetensors")
    return sd


def drawn(sd: plainsd.StableDiffusion, prompts: list[str], guidance: float | None) -> list[Image.Image]:
    """Picture i has seed i."""
    return [
        plainsd.final(plainsd.text_to_image(sd, prompt, seed=seed, guidance=guidance))[0]
        for seed, prompt in enumerate(prompts)
    ]


def labelled(rows: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """A row for each entry, with its name on the left; prompts above."""
    font, step = ImageFont.load_default(13), SHOWN + GAP
    picture = Image.new("RGB", (LEFT + len(prompts) * step, LABEL + len(rows) * step), "white")
    pen = ImageDraw.Draw(picture)
    for column, prompt in enumerate(prompts):
        pen.text((LEFT + column * step, GAP // 2), textwrap.fill(prompt, LETTERS), "black", font)
    for row, (name, images) in enumerate(rows.items()):
        top = LABEL + row * step
        pen.text((GAP, top + SHOWN // 2 - 8), name, "black", font)
        for column, image in enumerate(images):
            picture.paste(image.resize((SHOWN, SHOWN), Image.Resampling.NEAREST), (LEFT + column * step, top))
    return picture


def check_rows(runs: list[Path]) -> None:
    """UserError for a row that would take another one's place."""
    names = [BEFORE, *(run.name for run in runs)]
    for i, run in enumerate(runs, 1):
        if run.name in names[:i]:
            raise UserError(f"two rows would have the name {run.name!r}; rename {run}, and the result in it")


def draw(options: argparse.Namespace) -> None:
    check_rows(options.runs)
    prompts = read_prompts(options.prompts)
    base = plainsd.load(options.base, device="cpu", dtype="float32")
    rows = {BEFORE: drawn(base, prompts, options.guidance)}
    for run in options.runs:
        rows[run.name] = drawn(trained(run, options.base), prompts, options.guidance)
        found = [line for line in read_log(run / "log.jsonl") if line.get("validation") is not None]
        if found:  # a run without --heldout has none
            print(
                f"{run.name}: validation loss {found[0]['validation']:.4f} at step {found[0]['step']}, "
                f"{found[-1]['validation']:.4f} at step {found[-1]['step']}"
            )
    write_png(labelled(rows, prompts), options.out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of plainsd train")
    parser.add_argument("--base", help="the model that was fine-tuned; the embedded one if not given")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--guidance", type=float, help="the model's own if not given")
    options = parser.parse_args(argv)
    return exit_code(lambda: draw(options), "picture.py")


if __name__ == "__main__":
    sys.exit(main())
