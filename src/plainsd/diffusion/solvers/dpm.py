"""DPM-Solvers that choose their own steps (Lu et al. 2022a, arXiv:2206.00927), by number of calls or by error.

Both go from sigmas[0] to sigmas[-1] at levels of their own, and treat the result there as clean, as k-diffusion does,
unless the row goes on.
They still yield one step for each of `sigmas`, so that progress means the same as elsewhere.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.step import Around, Noise, Sigmas, Step, ancestral, renoised, slope_share, toward

RTOL, ATOL, FIRST_STEP, SAFETY = 0.05, 0.0078, 0.05, 0.81  # of dpm_adaptive, as in k-diffusion
END_TOLERANCE = 1e-5  # in log sigma: closer than this the end is reached


def dpm_solver(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, order: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """One step of DPM-Solver-1, 2 or 3, call by call: yields the level it leads to, the target of the line from x to
    there, and the estimate at the start. Each later call is made where the one before led.
    """
    h = math.log(sigma / sigma_next)
    levels = [*(sigma * math.exp(-h * part / order) for part in range(1, order)), sigma_next]
    denoised = aim = denoise(x, sigma)
    yield levels[0], aim, denoised
    if order > 1:
        change = (denoise(toward(x, aim, sigma, levels[0]), levels[0]) - denoised) * (sigma / levels[0])
        aim = denoised + change * (1 if order == 2 else 2 * (1 - slope_share(2 / 3 * h)))
        yield levels[1], aim, denoised
    if order > 2:
        third = denoise(toward(x, aim, sigma, levels[1]), levels[1])
        change = (third - aim) * (sigma / levels[1]) + aim - denoised
        yield levels[2], denoised + change * (3 / 2 * (1 - slope_share(h))), denoised


def with_floor(sigma: float, sigma_next: float, eta: float, floor: float) -> tuple[float, float]:
    """`ancestral`, never aiming below the last level."""
    sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
    if sigma_down < floor:
        sigma_down, sigma_up = floor, math.sqrt(sigma_next**2 - floor**2)
    return sigma_down, sigma_up


def dpm_fast(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0, around: Around = (0, 0)
) -> Iterator[Step]:
    """One call for each step of `sigmas`: DPM-Solver-3, three calls to a step, evenly spaced in log sigma.

    Yields after each call; in the middle of a step x is the input of the next call.
    """
    calls, low, index = len(sigmas) - 1, float(sigmas[-1]), 0
    orders = [3] * (calls // 3 - 1) + [2, 1] if calls % 3 == 0 else [3] * (calls // 3) + [calls % 3]
    ratio = (low / sigmas[0]) ** (1 / len(orders))
    ends = [sigmas[0], *(sigmas[0] * ratio**part for part in range(1, len(orders))), low]
    for order, (sigma, sigma_next) in zip(orders, pairwise(ends), strict=True):
        sigma_down, sigma_up = with_floor(sigma, sigma_next, eta, low)
        for call, (level, aim, denoised) in enumerate(dpm_solver(denoise, x, sigma, sigma_down, order), 1):
            there = toward(x, aim, sigma, level)
            if call == order:
                level, there = sigma_next, renoised(there, noise, sigma_up)
            yield Step(index, level if index + 1 < calls or around[1] else 0.0, there, denoised)
            index += 1
        x = there


def dpm_adaptive(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0, around: Around = (0, 0)
) -> Iterator[Step]:
    """DPM-Solver-3 with adaptive steps of three calls each, as long as its difference to DPM-Solver-2 allows.

    Only the ends of `sigmas` affect the result. Each of its steps is yielded once its level is passed, with the current
    x. The error is that of the whole batch: pictures of a batch depend on each other.
    """
    sigma, low, h, index = float(sigmas[0]), float(sigmas[-1]), FIRST_STEP, 0
    denoised = low_before = x
    while math.log(sigma / low) > END_TOLERANCE:
        sigma_next = max(sigma * math.exp(-h), low)
        sigma_down, sigma_up = with_floor(sigma, sigma_next, eta, low)
        (_, _, denoised), (_, aim, _), (_, aim_3, _) = dpm_solver(denoise, x, sigma, sigma_down, 3)
        aim_2 = denoised + (aim - denoised) * (3 / 4 / (1 - slope_share(2 / 3 * math.log(sigma / sigma_down))))
        x_2, x_3 = (toward(x, one, sigma, sigma_down) for one in (aim_2, aim_3))
        allowed = (RTOL * torch.maximum(x_2.abs(), low_before.abs())).clamp(min=ATOL)
        error = ((x_2 - x_3) / allowed).square().mean().sqrt().item()
        error = error if math.isfinite(error) else 0.0  # go on: non-finite results are caught at the end
        factor = 1 + math.atan((error + 1e-8) ** (-1 / (1.5 if eta else 3)) - 1)
        h *= factor
        if factor < SAFETY:
            continue
        x, low_before, sigma = renoised(x_3, noise, sigma_up), x_2, sigma_next
        while index < len(sigmas) - 2 and sigma <= sigmas[index + 1]:
            yield Step(index, sigma, x, denoised)
            index += 1
    for place in range(index, len(sigmas) - 1):
        yield Step(place, low if around[1] else 0.0, x, denoised)
