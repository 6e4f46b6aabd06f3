"""Models of different sizes side by side: pictures at the same sizes, and how rough their latents are.

    python recipes/emoji/compare.py MODEL [MODEL ...] [--sides 64,128] [--prompts 256] [--guidance 4]

For each model and side the sharpness, FD and KID of `plainsd eval` (`plainsd.emoji.measures`), for drawn pictures and
for true ones behind the autoencoder, against true pictures of the model's own set; all are scaled to the side. For each
autoencoder the PSNR with noise on the latents, in their standard deviations, and the roughness of the latents: half
the mean squared difference of neighbours over the variance, which is 1 for noise.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

import plainsd
from plainsd.cli import exit_code
from plainsd.disk import read_json
from plainsd.emoji import evaluate
from plainsd.emoji.measures import compared
from plainsd.errors import UserError
from plainsd.models.vae import VAE
from plainsd.pictures.images import to_tensor
from plainsd.train.methods.vae import psnr

NOISES = (0.0, 0.1, 0.2, 0.3)


def at_side(pictures: list[Image.Image], side: int) -> list[Image.Image]:
    kind = lambda picture: Image.Resampling.BICUBIC if picture.width < side else Image.Resampling.LANCZOS  # noqa: E731
    return [one if one.width == side else one.resize((side, side), kind(one)) for one in pictures]


@torch.inference_mode()
def robustness(vae: VAE, pixels: torch.Tensor) -> tuple[list[float], float]:
    """PSNR in dB with each of NOISES on the latents, and their roughness."""
    latents = vae.encode(pixels).mean
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    ratios = [psnr(vae.decode(latents + share * latents.std() * noise), pixels).mean().item() for share in NOISES]
    return ratios, (latents.diff(dim=-1).square().mean() / (2 * latents.var())).item()


def report(folder: str, widths: list[int], count: int, guidance: float) -> None:
    sd = plainsd.load(folder, device="cpu", dtype="float32")
    concepts = read_json(Path(folder) / "concepts.json")
    exam = evaluate.exam_of(concepts, count, 0)
    true = [evaluate.to_side(picture, sd.variant.size) for picture in exam.real]
    ratios, rough = robustness(sd.vae, torch.cat([to_tensor(one) for one in at_side(true[:64], sd.variant.size)]))
    noisy = ", ".join(f"{ratio:.1f} at {share:g}" for share, ratio in zip(NOISES, ratios, strict=True))
    print(f"{folder}: PSNR in dB by the noise on latents {noisy}; roughness {rough:.2f}", flush=True)
    sets = {
        "autoencoder": list(evaluate.reconstructed(sd, true)),
        f"guidance {guidance:g}": list(evaluate.generated(sd, exam.asked, 0, guidance=guidance)),
    }
    for name, pictures in sets.items():
        for side in widths:
            found = compared(at_side(pictures, side), at_side(true, side))
            numbers = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"  {name}, {side} pixels: {numbers}", flush=True)


def sides(text: str) -> list[int]:
    found = [int(side) for side in text.split(",")]
    if any(side % 16 or side < 16 for side in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give multiples of 16, as in 64,128")
    return found


def compare(options: argparse.Namespace) -> None:
    if options.prompts < 2:
        raise UserError(f"--prompts {options.prompts} is out of range; give at least 2, as sets are compared")
    for folder in options.models:
        report(folder, options.sides, options.prompts, options.guidance)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model with its concepts.json")
    parser.add_argument("--sides", type=sides, default=[64, 128], help="sides in pixels, multiples of 16")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args(argv)
    return exit_code(lambda: compare(options), "compare.py")


if __name__ == "__main__":
    sys.exit(main())
