"""What exactness buys: time, distance from the exact picture, and scores of `plainsd eval`, on the embedded model.

    python bench/tradeoffs.py [--prompts 128] [--steps 20] [--batch 16] [--dtype float32] [--model FOLDER]

All rows draw the same prompts from the same noise in one process, a batch of each in turn, so that what else the
machine does hits all of them. PSNR is the mean over pictures against the plain row; the share of its time is the median
over batches. Scores are those of held-out pairs, in per cent.
"""

import argparse
import platform
import statistics
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from plainsd.checkpoint import load
from plainsd.disk import read_json
from plainsd.emoji.evaluate import draw_all, questions, summary
from plainsd.emoji.scorer import Scorer
from plainsd.generate import final, text_to_image
from plainsd.pictures.model import StableDiffusion
from plainsd.speed.int8 import int8


@dataclass
class Row:
    """One way of drawing, and what came of it."""

    name: str
    sd: StableDiffusion
    choices: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    pictures: list = field(default_factory=list)

    def draw(self, prompts: list[str], seed: int, steps: int) -> None:
        began = time.perf_counter()
        self.pictures += final(text_to_image(self.sd, prompts, seed=seed, **{"steps": steps} | self.choices))
        self.seconds.append(time.perf_counter() - began)


def rows(sd: StableDiffusion, steps: int) -> list[Row]:
    """Everything that trades exactness, alone; and what fewer steps would give in its place."""
    ways = [Row("plain", sd)]
    ways += [Row(f"cache {n}", sd, {"cache": n}) for n in (2, 3, 5)]
    ways += [Row(f"interval {low:g} to {high:g}", sd, {"interval": (low, high)}) for low, high in ((0.3, 5), (0.3, 15))]
    ways += [
        Row("int8 weights", int8(deepcopy(sd))),
        Row("int8 weights and inputs", int8(deepcopy(sd), activations=True)),
    ]
    return ways + [Row("half the steps", sd, {"steps": steps // 2})]


def psnr(a, b) -> float:
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-10))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("prompts", 128), ("steps", 20), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    sd = load(asked.model, device="cpu", dtype=asked.dtype)
    concepts = read_json(sd.path / "concepts.json")
    wanted = questions(concepts, asked.prompts)
    ways = rows(sd, asked.steps)
    for way in ways:  # a first call, which does not count
        final(text_to_image(way.sd, wanted[0].prompt, steps=2))
    for start in range(0, len(wanted), asked.batch):
        prompts = [question.prompt for question in wanted[start : start + asked.batch]]
        for way in ways:
            way.draw(prompts, start, asked.steps)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {asked.dtype}, "
        f"{asked.prompts} prompts of {asked.steps} steps, batches of {asked.batch}\n"
    )
    print("| | time | PSNR | background | object, top 1 | object, top 5 |\n|---|---|---|---|---|---|")
    scorer = Scorer(draw_all(concepts, None), concepts["backgrounds"], concepts["size"], concepts.get("cells"))
    exact = ways[0]
    for way in ways:
        share = statistics.median(a / b for a, b in zip(way.seconds, exact.seconds, strict=True))
        near = statistics.mean(psnr(a, b) for a, b in zip(way.pictures, exact.pictures, strict=True))
        scores = summary(wanted, [scorer(picture) for picture in way.pictures])["heldout"]
        cells = [f"{100 * scores[key]:.1f}" for key in ("background", "top1", "top5")]
        distance = "same" if way is exact else f"{near:.1f} dB"
        print(f"| {way.name} | {share:.2f} | {distance} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
