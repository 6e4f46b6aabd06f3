"""What all comparisons share: a small model of ours, a picture's settings drawn by plainsd, one number for both."""

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import plainsd
from plainsd.errors import UserError
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import DEFAULTS, Settings

TESTS = Path(__file__).parents[2] / "tests"
NOT_DRAWN = ("prompt", "negative", "model", "hashes", "embeddings", "other", "refiner", "vae")  # of a text


@dataclass(frozen=True)
class Cell:
    """One comparison: a row and a column of a table, and the largest difference, or why there is none."""

    table: str
    row: str
    column: str
    error: float | None
    why: str = ""


def tests_module() -> Any:
    """The tests' tiny models and pictures."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.import_module("conftest")


def small_model() -> StableDiffusion:
    """A tiny SD 1.x with random weights, and latents of unit size: a tenth of what its UNet says is added to the noise
    that stands in x if clean latents are unit noise themselves. Its text states have a mean, as those of CLIP, which
    weights in prompts restore."""
    sd = tests_module().tiny_sd()
    sd.text_encoders[0].norm.bias.data += 0.5
    sd.unet.register_forward_hook(lambda network, given, out: 0.1 * out + noise_share(sd, given[1]) * given[0])
    return sd


def noise_share(sd: StableDiffusion, timestep: Tensor | float) -> float:
    """How much of x, as the network sees it, is noise."""
    sigma = sd.schedule.sigma(float(torch.as_tensor(timestep).flatten()[0]))
    return sigma / (1 + sigma**2) ** 0.5


def drawn(sd: StableDiffusion, settings: Settings, image: Image.Image | None = None, count: int = 1) -> Tensor:
    """Latents (B, L, h, w) of what a picture's text says."""
    said = {name: value for name, value in vars(settings).items() if value != DEFAULTS[name] and name not in NOT_DRAWN}
    if image is None:
        events = plainsd.text_to_image(sd, settings.prompt, settings.negative, count=count, **said)
    else:
        strength = said.pop("strength")
        events = plainsd.image_to_image(sd, settings.prompt, image, strength, settings.negative, count=count, **said)
    for event in events:
        last = event
    return last.latents


def compared(cell: tuple[str, str, str], theirs: Callable[[], Tensor], ours: Callable[[], Tensor]) -> Cell:
    """Both draw; what cannot be drawn says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs()
            return Cell(*cell, (ours() - expected).abs().max().item())
    except UserError as error:
        return Cell(*cell, None, str(error))
    except Exception as error:  # of the program's own code, or ours: the table says it
        return Cell(*cell, None, f"{type(error).__name__}: {error}")
