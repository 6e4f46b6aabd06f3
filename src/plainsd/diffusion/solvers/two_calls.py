"""Single-step samplers with two or three model calls per step."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.noise import Path
from plainsd.diffusion.step import Noise, Sigmas, Step, along, ancestral, renoised, toward


def heun_step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """Returns x at sigma_next, and the estimate at sigma.

    A step from x along the slope at the end aims at denoised + (second - denoised) * sigma / sigma_next, so the mean of
    both slopes is one step toward the mean of both targets.
    """
    denoised = aim = denoise(x, sigma)
    if sigma_next > 0:
        second = denoise(toward(x, denoised, sigma, sigma_next), sigma_next)
        aim = denoised + (second - denoised) * (sigma / sigma_next / 2)
    return toward(x, aim, sigma, sigma_next), denoised


def heun(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Second order: the mean of the slopes at both ends of the step (Karras et al. 2022, algorithm 1)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, denoised = heun_step(denoise, x, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def heunpp2(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Heun++, as in ComfyUI: the slopes after one and two Euler steps, weighted by level / (3 sigmas[0]), and the
    current slope for the rest. Three calls per step, two in the last but one, one in the last.

    The weights do not depend on the length of the step, so its order is 1.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        ahead = min(len(sigmas) - 2 - index, 2)  # extra calls, at the following levels
        share = sigma / sigmas[0] / (ahead + 1)
        if ahead > 0:
            end = toward(x, denoised, sigma, sigma_next)
            second = denoise(end, sigma_next)
            aim = denoised + (second - denoised) * share
        if ahead > 1:
            after = sigmas[index + 2]
            third = denoise(toward(end, second, sigma_next, after), after)
            aim = denoised + (third - denoised + (second - denoised) * (after / sigma_next)) * share
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def halfway(sigma: float, sigma_down: float) -> float:
    """The midpoint in log sigma. Not a `Level`: the network gets its exact timestep, even where it happens to be
    sigma_next (eta = 1), whose own may be rounded."""
    return math.sqrt(sigma * sigma_down)


def halfway_in_float32(sigma: float, sigma_next: float) -> float:
    """The midpoint with k-diffusion's rounding, which a Brownian path depends on."""
    t, t_next = (-torch.tensor(level, dtype=torch.float32).log() for level in (sigma, sigma_next))
    return (-(t + (t_next - t) / 2)).exp().item()


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """Second order: the slope at the midpoint in log sigma (DPM-Solver-2, Lu et al. 2022a)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = halfway(sigma, sigma_down)
            second = denoise(toward(x, denoised, sigma, middle), middle)
            aim = denoised + (second - denoised) * (sigma / middle)
        x = renoised(toward(x, aim, sigma, sigma_down), noise, sigma_up)
        yield Step(index, sigma_next, x, denoised)


def dpmpp_2s_a(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> Iterator[Step]:
    """Second order: the estimate at the midpoint in log sigma (DPM-Solver++(2S), Lu et al. 2022b, algorithm 1)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = halfway(sigma, sigma_down)
            aim = denoise(toward(x, denoised, sigma, middle), middle)
        x = renoised(toward(x, aim, sigma, sigma_down), noise, sigma_up)
        yield Step(index, sigma_next, x, denoised)


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, path: Path | None = None
) -> Iterator[Step]:
    """`dpmpp_2s_a` with noise on the way to the midpoint too, from one Brownian path over sigma.

    The noise of the whole step is that of its two parts, weighted by their lengths.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0:
            middle = halfway(sigma, sigma_next) if path is None else halfway_in_float32(sigma, sigma_next)
            share = (sigma - middle) / (sigma - sigma_next)
            first, rest = along(path, noise, sigma, middle)(), along(path, noise, middle, sigma_next)()
            sigma_down, sigma_up = ancestral(sigma, middle, eta)
            aim = denoise(toward(x, denoised, sigma, sigma_down) + sigma_up * first, middle)
            sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
            whole = math.sqrt(share) * first + math.sqrt(1 - share) * rest
            x = toward(x, aim, sigma, sigma_down) + sigma_up * whole
        else:
            x = denoised
        yield Step(index, sigma_next, x, denoised)
