"""Do the words act where they should? Attention of the embedded model's words, on its glyphs and off them.

    python bench/explain.py [--prompts 200] [--skip 0] [--steps 20] [--seed 0] [--model FOLDER] [--font FILE]

Each prompt of `plainsd.emoji.evaluate.questions` names an object and the colour of the background. The picture is drawn
under `plainsd.explain`; the object's glyph, drawn as for training, is laid where it differs least from the picture, at
every size and place that the data has. A word counts as lying more on the glyph than off it where the mean of its heat
map over the glyph is above the mean over the rest: once for the glyph's box, once for its shape (alpha). Pictures that
the scorer takes for another object are counted apart, since there the true glyph is not in the picture. `--skip`: leave
the first of the prompts out, to go on where a run stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from plainsd.checkpoint import load
from plainsd.disk import read_json
from plainsd.emoji import drawing
from plainsd.emoji.evaluate import Question, draw_all, questions, read_concepts
from plainsd.emoji.scorer import Scorer, border_colour
from plainsd.reports.explain import Explanation, explain

COLUMNS = ("object, box", "object, shape", "background, box", "background, shape")


def laid(glyph, picture, scales) -> tuple[np.ndarray, np.ndarray]:
    """Box and alpha of the glyph where it differs least from the picture: (H, W) of 0 to 1 each."""
    pixels, side = np.asarray(picture.convert("RGB"), np.float32) / 255, picture.width
    ground, best = border_colour(pixels), (np.inf, None, None)
    for longer in range(round(scales[0] * side), round(scales[1] * side) + 1):
        drawn = np.asarray(drawing.scaled_glyph(glyph, longer), np.float32) / 255
        height, width = drawn.shape[:2]
        alpha = drawn[..., 3:]
        change = alpha * (drawn[..., :3] - ground)  # of the flat background
        rest = pixels - ground
        windows = np.lib.stride_tricks.sliding_window_view(rest, (height, width, 3))[:, :, 0]
        errors = (change**2).sum() - 2 * np.einsum("yxhwc,hwc->yx", windows, change)  # but for a constant
        top, left = np.unravel_index(errors.argmin(), errors.shape)
        if errors.min() < best[0]:
            box, shape = np.zeros((2, side, side), np.float32)
            box[top : top + height, left : left + width] = 1
            shape[top : top + height, left : left + width] = alpha[..., 0]
            best = errors.min(), box, shape
    return best[1], best[2]


def contrast(heat: np.ndarray, weight: np.ndarray) -> float:
    """Mean heat on the glyph over the mean off it."""
    on, off = (heat * weight).sum() / weight.sum(), (heat * (1 - weight)).sum() / max((1 - weight).sum(), 1e-6)
    return float(on / off)


def places(seen: Explanation, name: str) -> list[int]:
    """The tokens of the name, which may be several words, or parted at hyphens."""
    count = range(len(seen.words) + 1)
    ends = ((i, j) for i in count for j in count[i + 1 :] if "".join(seen.words[i:j]) == name.replace(" ", ""))
    start, stop = next(ends)
    return [at for at, token in enumerate(seen.tokens) if token.word is not None and start <= token.word < stop]


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag, value in (("prompts", 200), ("skip", 0), ("steps", 20), ("seed", 0)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--font", type=Path)
    asked = parser.parse_args()
    sd = load(asked.model, device="cpu", dtype="float32")
    concepts = read_json(sd.path / "concepts.json")
    glyphs, names = draw_all(concepts, asked.font), read_concepts(concepts)
    scorer = Scorer(glyphs, concepts["backgrounds"], concepts["size"], concepts.get("cells"))
    scales = drawing.scale_range(concepts.get("cells"))
    found, right = [], []
    for k, question in list(enumerate(questions(concepts, asked.prompts, asked.seed)))[asked.skip :]:
        name = names[question.concept].name
        found.append(measured(sd, question, name, glyphs, scales, asked.seed + k, asked.steps))
        right.append(scorer(found[-1][1]).objects[0] == question.concept)
    ratios, right = np.array([ratio for ratio, _ in found]), np.array(right)
    print(f"{len(right)} prompts, {asked.steps} steps; the scorer sees the right object in {right.sum()}")
    print("word, region: more on the glyph than off it, of all / of those; median of mean on over mean off")
    for column, ratio in zip(COLUMNS, ratios.T, strict=True):
        on = ratio > 1
        print(f"{column:20}{100 * on.mean():6.1f} % /{100 * on[right].mean():6.1f} %   {np.median(ratio):.2f}")


def measured(sd, question: Question, name: str, glyphs, scales, seed: int, steps: int):
    seen = explain(sd, question.prompt, seed=seed, steps=steps, decoded=False)
    size = seen.image.height, seen.image.width
    regions = laid(glyphs[question.concept], seen.image, scales)
    heats = [seen.heat(places(seen, words), size).numpy() for words in (name, question.background)]
    return [contrast(heat, region) for heat in heats for region in regions], seen.image


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
