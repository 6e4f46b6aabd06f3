"""What all samplers share: their inputs, what they yield, and the one step they all take.

In the coordinates x = x0 + sigma * noise the noise-free path from one level to the next is the straight line through
x and the estimate, and one function takes it: `toward`. Song et al. 2020 call that step DDIM, Karras et al. 2022 Euler,
Lu et al. 2022 first-order DPM-Solver++. All others are this step with a better estimate to aim at, or with a lower
target level and fresh noise added back (`ancestral`), or both.

A sampler is a generator over (denoise, x, sigmas, noise) that yields a `Step` after each step; the last one holds the
result. Progress bars, previews and cancelling live outside. Randomness comes in as `noise`, a function that returns
unit noise shaped like x; SDE samplers may be given a `path` instead, the noise between any two levels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from plainsd.diffusion.noise import Path

Noise = Callable[[], Tensor]  # unit noise, shaped like x
Sigmas = Sequence[float]  # noise levels, falling


class Step(NamedTuple):
    """What a sampler yields after each step."""

    index: int  # type: ignore[assignment]  # 0 for the first step; hides tuple.index
    sigma: float  # noise level of x
    x: Tensor  # the latents at that level; after the last step the result
    denoised: Tensor  # the model's estimate of the clean latent, from the start of the step


class Stride(NamedTuple):
    """The levels one stride of 1000 // steps timesteps above and below the start of a step: see `renamed`."""

    above: float
    below: float


Split = Callable[[float, float, float], tuple[float, float]]  # (sigma, sigma_next, eta) -> (sigma_down, sigma_up)
Strides = Sequence[Stride]  # one per step, or empty
Around = tuple[int, int]  # steps of the row before and after those of a run on a part of it


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Move x along the line to `denoised`: scale its noise part from level sigma down to sigma_next."""
    return denoised + (x - denoised) * (sigma_next / sigma)


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step in two: go below sigma_next, then add noise back up to it. Returns (sigma_down, sigma_up).

    With eta = 1 together they sample the DDPM posterior of x at sigma_next, given x at sigma and x0; with eta = 0 no
    noise is added. This is sigma_t(eta) of DDIM's equation 16 in these coordinates.
    """
    ratio = sigma_next / sigma
    sigma_down = sigma_next * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)
    sigma_up = eta * sigma_next * math.sqrt(1 - ratio**2)
    return sigma_down, sigma_up


def reverse_sde(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """The same split for the exact solution of the reverse SDE with its noise scaled by sqrt(eta): the mean shrinks by
    exp(-eta h), h = log(sigma / sigma_next), and the noise is sigma_next * sqrt(1 - exp(-2 eta h)) (SDE-DPM-Solver++,
    Lu et al. 2022b, for any eta as in k-diffusion). For eta 0 and 1 it is `ancestral`; between, it adds more noise.
    """
    ratio = sigma_next / sigma
    return sigma_next * ratio**eta, sigma_next * math.sqrt(1 - ratio ** (2 * eta))


def renoised(x: Tensor, noise: Noise, sigma_up: float) -> Tensor:
    """Add fresh noise; draw none if sigma_up is 0."""
    return x + sigma_up * noise() if sigma_up > 0 else x


def along(path: Path | None, noise: Noise, sigma: float, sigma_next: float) -> Noise:
    """The noise of a step: from the path if there is one, else fresh."""
    return noise if path is None else partial(path, sigma, sigma_next)


def renamed(x: Tensor, sigma: float, other: float) -> Tensor:
    """x relabelled from one level to another: the network's input, x / sqrt(1 + sigma^2), stays the same.

    Only DDIM and PLMS need it, to follow diffusers, where all their steps are 1000 // steps timesteps long. With
    leading spacing each ends where the next begins; with linspace, and with trailing if steps does not divide 1000, it
    ends a little above, and x is simply treated as at the next level. `strides` says where such steps end.
    """
    return x * math.sqrt((1 + other**2) / (1 + sigma**2))


def slope_share(reach: float) -> float:
    """Where along a linearly changing estimate a step of this length in -log sigma should aim: 1/2 for short steps,
    more for long ones. phi_2 / phi_1 of exponential integrators (Hochbruck, Ostermann 2010)."""
    return 1 / -math.expm1(-reach) - 1 / reach if reach > 1e-4 else 0.5 + reach / 12


def newest_first(sigmas: Sigmas, index: int, most: int) -> Sigmas:
    """The levels of the current and previous steps, newest first, at most `most`."""
    return sigmas[max(0, index + 1 - most) : index + 1][::-1]


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
