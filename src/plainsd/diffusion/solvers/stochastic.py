"""SDE samplers, and those that go back up to higher noise levels."""

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.schedule import Level, karras
from plainsd.diffusion.solvers.two_calls import heun_step
from plainsd.diffusion.step import Around, Noise, Sigmas, Step, renoised, reverse_sde, toward

RESTART_FROM, RESTART_AT = 2.0, 0.1  # sigmas, for latents of unit variance


def restart(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """`heun`; at a low level noise is added back up to a high one and the interval is sampled again, which contracts
    earlier errors (Xu et al. 2023, arXiv:2306.14878). The number of steps stays the same.

    As in A1111: below 20 steps no restart; from 20 steps 9 are repeated, from 36 a quarter, twice.
    """
    level = float(sigmas[0])
    for index, (sigma, sigma_next) in enumerate(restarted(sigmas)):
        if sigma > level:
            x = renoised(x, noise, math.sqrt(sigma**2 - level**2))
        x, denoised = heun_step(denoise, x, sigma, sigma_next)
        level = sigma_next
        yield Step(index, sigma_next, x, denoised)


def restarted(sigmas: Sigmas) -> list[tuple[float, float]]:
    """The steps of `restart` as (from, to); a step that begins above the end of the last one adds noise first."""
    steps, again, times = len(sigmas) - 1, 9, 1
    if steps >= 36:
        again, times = steps // 4, 2
    if steps < 20 or sigmas[0] <= RESTART_AT:
        return list(pairwise(sigmas))
    whole_row = isinstance(sigmas[-1], Level) and sigmas[-1].timestep == 0  # it may stop just above 0
    end = 0.0 if whole_row else sigmas[-1]
    first = [sigmas[0], *karras(sigmas[-2], sigmas[0], steps - again * times)[1:], end]
    low = min(range(1, len(first)), key=lambda i: abs(first[i] - RESTART_AT))
    high = min(range(low), key=lambda i: abs(first[i] - RESTART_FROM))
    back = list(pairwise(karras(first[low], first[high], again + 1)))
    whole = list(pairwise(first))
    return [*whole[:low], *back * times, *whole[low:]]


def er_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """The reverse SDE with noise scale phi(sigma) = sigma (exp(sigma^0.3) + 10), from the estimate and its first two
    derivatives in sigma (ER-SDE-Solver-3, Cui et al. 2023, arXiv:2309.06169).

    The last step, to level 0, is first order.
    """
    estimates: list[Tensor] = []  # newest first
    slope_before: Tensor | float = 0.0
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        estimates = [denoised, *estimates[:1]]
        ratio = _er_noise(sigma_next) / _er_noise(sigma)
        change: Tensor | float = 0.0
        if index > 0 and sigma_next > 0:
            first, second = _er_integrals(sigma, sigma_next)
            slope = (denoised - estimates[1]) / (sigma - sigmas[index - 1])
            change = first * slope
            if index > 1:
                change = change + second * (slope - slope_before) / ((sigma - sigmas[index - 2]) / 2)
            slope_before = slope
        sigma_up = math.sqrt(max(sigma_next**2 - (sigma * ratio) ** 2, 0.0))
        x = renoised(denoised + (x - denoised) * ratio + change, noise, sigma_up)
        yield Step(index, sigma_next, x, denoised)


def _er_noise(sigma: float) -> float:
    return sigma * (math.exp(sigma**0.3) + 10)


def _er_integrals(sigma: float, sigma_next: float, points: int = 200) -> tuple[float, float]:
    """Weights of the estimate's first and second derivatives in a step, as sums over `points`, as published."""
    width = (sigma - sigma_next) / points
    places = [sigma_next + i * width for i in range(points)]
    first = math.fsum(1 / _er_noise(place) for place in places) * width
    second = math.fsum((place - sigma) / _er_noise(place) for place in places) * width
    stride, end = sigma_next - sigma, _er_noise(sigma_next)
    return stride + first * end, stride**2 / 2 + second * end


NOISY = (200, 800)  # timesteps between which sa_solver adds noise


def sa_solver(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, around: Around = (0, 0)
) -> Iterator[Step]:
    """A stochastic Adams method: `dpmpp_2m`, with each step corrected, with the same noise, once the estimate at its
    end is known (SA-Solver, Xue et al. 2023, arXiv:2309.05019, orders 2 and 2, weights of its appendix D).

    eta is the paper's tau between timesteps 200 and 800, for levels with a timestep; 0 outside. The last step of a row
    is first order. Noise is drawn at each step, used or not, as in diffusers.
    """
    start, fresh, previous, before = x, x, None, (0.0, 0.0)  # of the previous step; `before` is its split
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        if previous is not None:
            reach = math.log(sigmas[index - 1] / before[0])
            corrected = previous + (denoised - previous) * (reach / 2 / -math.expm1(-reach))
            x = toward(start, corrected, sigmas[index - 1], before[0]) + before[1] * fresh
        tau = eta if not isinstance(sigma, Level) or NOISY[0] <= sigma.timestep <= NOISY[1] else 0.0
        split = sigma_down, sigma_up = reverse_sde(sigma, sigma_next, tau**2)
        if previous is not None and index < len(sigmas) - 2 + around[1]:
            stride, stride_before = math.log(sigma / sigma_next), math.log(sigmas[index - 1] / sigma)
            reach = math.log(sigma / sigma_down)
            aim = denoised + (denoised - previous) * (stride / stride_before * reach / 2 / -math.expm1(-reach))
        fresh = noise()
        start, x = x, toward(x, aim, sigma, sigma_down) + sigma_up * fresh
        previous, before = denoised, split
        yield Step(index, sigma_next, x, denoised)
