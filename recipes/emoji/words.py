"""Begin the words of a model as what they name: a code of each emoji's look in the vectors of its names' tokens.

    python recipes/emoji/words.py MODEL OUT --set CONCEPTS.json

A text encoder that is trained with its UNet from random vectors of words must find out, emoji by emoji, what a name
stands for, and until then the UNet cannot learn how to draw it. Here an emoji's code is its latents, drawn large, in
their principal components, and the vectors of tokens begin so that those of a name add up to its code (`spelled`). What
the blocks of the text encoder add is cut to a tenth (`quieted`). No weights but the model's own take part.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from plainsd.checkpoint import load, save
from plainsd.cli import exit_code
from plainsd.emoji.painting import Painter
from plainsd.emoji.scenes import Scene, SceneObject, SceneSet, read_set
from plainsd.emoji.words import Noun
from plainsd.errors import UserError
from plainsd.models.clip import TextEncoder
from plainsd.models.vae import VAE
from plainsd.pictures.images import to_tensor
from plainsd.text.tokenizer import Tokenizer

GROUNDS = ("white", "black")  # a code is the mean over them
RIDGE = 0.05  # of the regression of codes on names, whose tokens are counted
LOUDER = 2  # standard deviation of what vectors gain, in that of all vectors before


@torch.no_grad()
def codes(vae: VAE, made_of: SceneSet, painter: Painter, width: int) -> Tensor:
    """(emoji, width): principal components of the emoji's latents, drawn over the whole picture. Each is divided by the
    square root of its standard deviation, so that fine differences count too; mean 0, variance 1 on average."""
    cell, count = made_of.size / (made_of.cells or 16), len(made_of.nouns)
    rows = []
    for concept in range(count):
        one = SceneObject(concept, round(cell / 4), round(cell / 4), round(made_of.size - cell / 2))
        scenes = [Scene("one", (one,), "plain", (ground,)) for ground in GROUNDS]
        latents = vae.encode(torch.cat([to_tensor(painter(scene)) for scene in scenes])).mean
        rows.append(vae.config.scaled(latents).mean(0).flatten())
    table = torch.stack(rows).double()
    table -= table.mean(0)
    u, s, _ = torch.linalg.svd(table, full_matrices=False)
    print(f"{width} components hold {(s[:width] ** 2).sum() / (s**2).sum():.1%} of the variance of {count} emoji")
    kept = u[:, :width] * s[:width].sqrt()
    return (kept / kept.std()).float()


@torch.no_grad()
def spelled(encoder: TextEncoder, tokenizer: Tokenizer, nouns: Sequence[Noun], wanted: Tensor) -> Tensor:
    """Changes the vectors of the names' tokens, as little as that takes, so that those of a name add up to its code
    turned into the vectors' space by a random rotation. Returns that rotation (width of a code, width of a vector)."""
    size = encoder.token.weight[: len(tokenizer)].std()
    turn = torch.linalg.qr(torch.randn(encoder.config.width, wanted.shape[1]))[0].T
    names = [(i, name) for i, noun in enumerate(nouns) for name in (noun.name, *noun.synonyms)]
    counts = torch.zeros(len(names), len(tokenizer), dtype=torch.float64)
    for row, (_, name) in enumerate(names):
        for piece in tokenizer.encode(name):
            counts[row, piece] += 1
    target = (wanted[[i for i, _ in names]] @ turn).double()
    # the least change D for which counts @ D is about the target: ridge regression in its dual form
    square = counts @ counts.T
    square += RIDGE * torch.eye(len(square), dtype=square.dtype)
    change = counts.T @ torch.linalg.solve(square, target)
    change *= LOUDER * size / change[counts.sum(0) > 0].std()
    encoder.token.weight += change.float()
    return turn


@torch.no_grad()
def quieted(encoder: TextEncoder, share: float = 0.1) -> None:
    """Leaves a share of what the blocks add, so that at first states are about the vectors of their tokens."""
    for block in encoder.blocks:
        for layer in (block.attn.out, block.fc2):
            layer.weight *= share
            layer.bias *= share


def begin_words(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    sd = load(options.model, device="cpu", dtype="float32")
    encoder, made_of = sd.text_encoders[0], read_set(options.set)
    most = min(encoder.config.width, len(made_of.nouns))
    if not 1 <= options.width <= most:
        raise UserError(f"--width {options.width}: give 1 to {most}")
    if missing := [ground for ground in GROUNDS if ground not in made_of.colours]:
        raise UserError(f"{options.set} has no colour {missing[0]}, which codes are drawn on; give a set that has it")
    spelled(encoder, sd.tokenizers[0], made_of.nouns, codes(sd.vae, made_of, Painter(made_of), options.width))
    quieted(encoder)
    save(sd, options.out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model whose text encoder begins anew")
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--set", type=Path, required=True, help="concepts.json of a set of scenes")
    parser.add_argument("--width", type=int, default=160, help="components of a code")
    options = parser.parse_args(argv)
    return exit_code(lambda: begin_words(options), "words.py")


if __name__ == "__main__":
    sys.exit(main())
