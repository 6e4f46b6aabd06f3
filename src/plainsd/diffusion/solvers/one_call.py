"""Single-step samplers with one model call per step."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.schedule import Level
from plainsd.diffusion.step import Around, Noise, Sigmas, Step, Strides, ancestral, renamed, renoised, toward


def euler(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """First order, deterministic (Karras et al. 2022, algorithm 1 without churn)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = toward(x, denoised, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def ddim(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0, strides: Strides = ()
) -> Iterator[Step]:
    """Song et al. 2020, "Denoising Diffusion Implicit Models", arXiv:2010.02502, equation 12: from Euler (eta 0) to
    DDPM (eta 1)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        end = strides[index].below if strides else sigma_next
        sigma_down, sigma_up = ancestral(sigma, end, eta)
        x = renoised(toward(x, denoised, sigma, sigma_down), noise, sigma_up)
        x = renamed(x, end, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def lcm(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Jump to the estimate and renoise, for latent consistency models (Luo et al. 2023).

    Their c_skip (diffusion/consistency.py), 7e-6 at the lowest timestep they are trained on and less above, is omitted.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = renoised(denoised, noise, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 0.3,
    sigma_at: Callable[[float], float] | None = None,
    around: Around = (0, 0),
) -> Iterator[Step]:
    """Trajectory consistency (Zheng et al. 2024, arXiv:2402.19159, algorithm 4): go to timestep (1 - eta) t' and add
    noise back up to t', where the next step begins. For models distilled so; eta is the paper's gamma.

    `sigma_at`: timestep -> level. Without it time is sigma itself.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if eta == 0 or index == len(sigmas) - 2 + around[1]:  # no noise is added in the last step of a row
            sigma_down = float(sigma_next)
        elif sigma_at is not None and isinstance(sigma_next, Level):
            sigma_down = sigma_at(math.floor((1 - eta) * sigma_next.timestep))
        else:
            sigma_down = (1 - eta) * sigma_next
        x = toward(x, denoised, sigma, sigma_down)
        x = renoised(x, noise, math.sqrt(max(sigma_next**2 - sigma_down**2, 0.0)))
        yield Step(index, sigma_next, x, denoised)
