"""How well pictures follow their maps, with a ControlNet and without: edges of what was drawn beside edges of the map.

    python recipes/control/measure.py runs/control/data/heldout --control runs/control/emoji-control/emoji-control

Draws a picture for each held-out map from its caption, twice with the same seed. An edge counts as met where the other
side has one within a pixel; the figure is F1 of precision (edges drawn that the map has) and recall (edges of the map
that were drawn), over all pictures. `--sheet FILE` shows some: the map, without the net, with it, and the picture that
the map was made of.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import plainsd
from plainsd.cli import exit_code
from plainsd.errors import UserError
from plainsd.generate import final, text_to_image
from plainsd.pictures.images import grid, write_png
from plainsd.pictures.preprocess import canny

SHOWN = 8


def edges(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("L")) >= 128)[None].float()  # (1, H, W)


def met(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """How many edges of one have an edge of the other within a pixel, and how many there are."""
    near = F.max_pool2d(other, 3, stride=1, padding=1)
    return (one * near).sum().item(), one.sum().item()


def f1(pairs: list[tuple[Image.Image, Image.Image]]) -> tuple[float, float, float]:
    """(F1, precision, recall) of pictures and maps."""
    drawn = [(edges(canny(picture)), edges(map)) for picture, map in pairs]
    precise, recalled = (
        torch.tensor([met(*pair) for pair in each]).sum(0) for each in (drawn, [p[::-1] for p in drawn])
    )
    precision, recall = (float(hits / count.clamp(min=1)) for hits, count in (precise, recalled))
    return 2 * precision * recall / max(precision + recall, 1e-9), precision, recall


def measure(options: argparse.Namespace) -> None:
    sd = plainsd.load(options.model, device="cpu", dtype="float32")
    net = plainsd.load_control(options.control, sd)
    files = sorted(options.data.glob("*.cond.png"))[: options.count]
    if not files:
        raise UserError(f"{options.data} has no maps; recipes/control/data.py makes some")
    maps = [Image.open(file).convert("RGB") for file in files]
    prompts = [Path(str(file).replace(".cond.png", ".txt")).read_text("utf-8").split("\n")[0] for file in files]
    drawn: dict[str, list[Image.Image]] = {"without": [], "with": []}
    for number, (prompt, map) in enumerate(zip(prompts, maps, strict=True)):
        for name, control in (("without", []), ("with", [plainsd.Control(net, map, options.strength)])):
            events = text_to_image(sd, prompt, seed=number, steps=options.steps, size=map.size, control=control)
            drawn[name] += final(events)
    for name, pictures in drawn.items():
        score, precision, recall = f1(list(zip(pictures, maps, strict=True)))
        print(
            f"{name:8} the net: F1 {score:.3f} (precision {precision:.3f}, recall {recall:.3f}), {len(maps)} pictures"
        )
    if options.sheet:
        originals = [Image.open(str(file).replace(".cond.png", ".png")).convert("RGB") for file in files]
        rows = [maps, drawn["without"], drawn["with"], originals]
        shown = [image for row in rows for image in row[:SHOWN]]
        write_png(grid(shown, min(SHOWN, len(maps)), down=("map", "without", "with", "original")), options.sheet)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--control", required=True)
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args(argv)
    return exit_code(lambda: measure(options), "measure.py")


if __name__ == "__main__":
    sys.exit(main())
