"""What all samplers share: what they are given, what they yield, and the one step they all take.

In the coordinates x = x0 + sigma * noise the noise-free path from one level to the next is the straight line through
x and the estimate, and one function takes it: `toward`. Song et al. 2020 call that step DDIM, Karras et al. 2022 Euler,
Lu et al. 2022 first-order DPM-Solver++. All others are this step with a better estimate to aim at, or with a lower
level to aim at and the difference filled up with fresh noise (`ancestral`), or both.

A sampler is a generator over (denoise, x, sigmas, noise): one `Step` after each step, the last one holds the result.
Progress bars, previews and cancelling live outside. Randomness comes in as `noise`, a function that returns unit noise
shaped like x; samplers of stochastic differential equations may be given a `path` instead, the noise between any two
levels.
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

    index: int  # type: ignore[assignment]  # 0 for the first step; hides the tuple's method, which nobody needs
    sigma: float  # noise level that x has now
    x: Tensor  # the latents, at that level; after the last step the result
    denoised: Tensor  # the model's estimate of the clean latent, made at the level before


class Stride(NamedTuple):
    """The levels that lie one stride of 1000 // steps timesteps above and below the one where a step begins: see
    `renamed`."""

    above: float
    below: float


Split = Callable[[float, float, float], tuple[float, float]]  # (sigma, sigma_next, eta) -> (sigma_down, sigma_up)
Strides = Sequence[Stride]  # one a step, or none at all


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Move x along the line to `denoised`: scale its noise part from level sigma down to sigma_next."""
    return denoised + (x - denoised) * (sigma_next / sigma)


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step in two: aim below sigma_next, then add noise up to it. Returns (level to aim at, noise to add).

    With eta = 1 the two together draw from the DDPM posterior of x at sigma_next, given x at sigma and x0; with eta = 0
    nothing is added. This is sigma_t(eta) of DDIM's equation 16 in these coordinates.
    """
    ratio = sigma_next / sigma
    sigma_down = sigma_next * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)
    sigma_up = eta * sigma_next * math.sqrt(1 - ratio**2)
    return sigma_down, sigma_up


def reverse_sde(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """The same split for the reverse SDE with sqrt(eta) times its noise, solved exactly: its mean shrinks by
    exp(-eta h), h = log(sigma / sigma_next), and its noise is sigma_next * sqrt(1 - exp(-2 eta h)) (SDE-DPM-Solver++,
    Lu et al. 2022b, for any eta as in k-diffusion). For eta 0 and 1 it is `ancestral`; between, it adds more noise.
    """
    ratio = sigma_next / sigma
    return sigma_next * ratio**eta, sigma_next * math.sqrt(1 - ratio ** (2 * eta))


def renoised(x: Tensor, noise: Noise, sigma_up: float) -> Tensor:
    """Add fresh noise; draw none where none is to be added."""
    return x + sigma_up * noise() if sigma_up > 0 else x


def along(path: Path | None, noise: Noise, sigma: float, sigma_next: float) -> Noise:
    """The noise of a step: that of the path between its levels where there is one, else fresh."""
    return noise if path is None else partial(path, sigma, sigma_next)


def renamed(x: Tensor, sigma: float, other: float) -> Tensor:
    """x at one level, said to be at another: what the network is shown, x / sqrt(1 + sigma^2), stays as it is.

    Only DDIM and PLMS need it, to follow diffusers. There all their steps are 1000 // steps timesteps long. With
    leading spacing each ends where the next begins; with linspace, and with trailing where steps does not divide 1000,
    it ends a little above, and x is simply taken for one at the next level. `strides` says where such steps end.
    """
    return x * math.sqrt((1 + other**2) / (1 + sigma**2))


def slope_share(reach: float) -> float:
    """How far along an even change of the estimate a step of this length in -log sigma should aim: 1/2 for short steps,
    more for long ones, whose end counts most. phi_2 / phi_1 of exponential integrators (Hochbruck, Ostermann 2010)."""
    return 1 / -math.expm1(-reach) - 1 / reach if reach > 1e-4 else 0.5 + reach / 12


def newest_first(sigmas: Sigmas, index: int, most: int) -> Sigmas:
    """The levels of the current and the last steps, `most` of them where there are as many."""
    return sigmas[max(0, index + 1 - most) : index + 1][::-1]


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
