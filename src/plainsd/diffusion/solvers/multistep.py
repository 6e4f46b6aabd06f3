"""Multistep samplers: one model call per step, with the estimates of previous steps reused."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.noise import Path
from plainsd.diffusion.step import (
    Around,
    Noise,
    Sigmas,
    Split,
    Step,
    along,
    newest_first,
    renoised,
    reverse_sde,
    slope_share,
    toward,
)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 0.0,
    heun: bool = False,
    split: Split = reverse_sde,
    path: Path | None = None,
) -> Iterator[Step]:
    """Second order: the estimate extrapolated from its change over the last step (DPM-Solver++(2M), Lu et al. 2022b,
    arXiv:2211.01095).

    The extrapolation is taken at the middle of the step, or with `heun` integrated over it. With eta = 1 it is
    SDE-DPM-Solver++(2M); with `heun` and the split `ancestral`, second-order RES (Zhang et al. 2023,
    arXiv:2308.02157). The first step and one to level 0 are first order.
    """
    previous, reach_before = None, 0.0
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        sigma_down, sigma_up = split(sigma, sigma_next, eta)
        if sigma_down > 0:
            reach = math.log(sigma / sigma_down)
            if previous is not None:
                middle = slope_share(reach) if heun else 0.5
                aim = denoised + (denoised - previous) * (reach / reach_before * middle)
            reach_before = reach
        x = renoised(toward(x, aim, sigma, sigma_down), along(path, noise, sigma, sigma_next), sigma_up)
        previous = denoised
        yield Step(index, sigma_next, x, denoised)


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, path: Path | None = None
) -> Iterator[Step]:
    """A parabola through the last three estimates, integrated over the step (SDE-DPM-Solver++(3M) of k-diffusion).

    As published it halves the parabola's curvature, which makes it second order, not third.
    """
    estimates: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        estimates = [denoised, *estimates[:2]]
        sigma_down, sigma_up = reverse_sde(sigma, sigma_next, eta)
        if index > 0 and sigma_next > 0:
            slope, curve = _parabola(estimates, newest_first(sigmas, index, 3))
            stride, reach = math.log(sigma / sigma_next), math.log(sigma / sigma_down)
            phi_1 = -math.expm1(-reach)
            phi_2 = 1 - phi_1 / reach
            phi_3 = phi_2 / reach - 0.5
            aim = denoised + (phi_2 * stride * slope - phi_3 * stride**2 * curve) / phi_1
        x = renoised(toward(x, aim, sigma, sigma_down), along(path, noise, sigma, sigma_next), sigma_up)
        yield Step(index, sigma_next, x, denoised)


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    noise: Noise,
    *,
    order: int = 2,
    bh1: bool = False,
    around: Around = (0, 0),
) -> Iterator[Step]:
    """A predictor through the last `order` estimates, and a corrector that repeats each step once the estimate at its
    end is known, without another call (UniPC with B(h) = exp(h) - 1, or with `bh1` B(h) = h, Zhao et al. 2023,
    arXiv:2302.04867): one order above the predictor. The first steps use fewer estimates. So do the last ones of
    a row, down to one, for order 3, as published, and for every order before level 0."""
    falling, steps = order > 2 or sigmas[-1] == 0, len(sigmas) - 1 + around[1]
    start = x  # of the previous step
    estimates: list[Tensor] = []  # newest first
    used = 0  # number of estimates in the previous step
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        estimates = [denoised, *estimates[:order]]
        known = newest_first(sigmas, index, order + 1)
        if index > 0:
            aim = _united(estimates[1 : used + 1], known[1 : used + 1], sigma, bh1, end=denoised)
            x = toward(start, aim, sigmas[index - 1], sigma)
        used = min(order, index + 1, steps - index if falling else order)
        aim = _united(estimates[:used], known[:used], sigma_next, bh1)
        start, x = x, toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def _united(
    estimates: Sequence[Tensor], sigmas: Sigmas, sigma_next: float, bh1: bool, end: Tensor | None = None
) -> Tensor:
    """The target of a UniPC step from sigmas[0] to sigma_next: from the estimates at `sigmas`, newest first, and in the
    corrector from that at its end (equations 5 and 9; theorem 3.1 has the weights)."""
    here, *earlier = estimates
    if end is None and not earlier:
        return here
    h = -math.log(sigma_next / sigmas[0])  # positive, and -h in the paper's data prediction
    places = [-math.log(sigma / sigmas[0]) / h for sigma in sigmas[1:]]  # with the step from 0 to 1
    changes = [(estimate - here) / place for estimate, place in zip(earlier, places, strict=True)]
    if end is not None:
        changes, places = [*changes, end - here], [*places, 1.0]
    scale = -h if bh1 else math.expm1(-h)
    weights = [0.5] if len(changes) == 1 else _united_weights(places, h, scale)
    ratio = scale / math.expm1(-h)
    return here + sum(ratio * weight * change for weight, change in zip(weights, changes, strict=True))


def _united_weights(places: Sequence[float], h: float, scale: float) -> list[float]:
    """The weights that integrate powers of `places` exactly, one equation per power."""
    phi, factorial, wanted = math.expm1(-h) / -h - 1, 1, []
    for power in range(1, len(places) + 1):
        wanted.append(phi * factorial / scale)
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    powers = [[place**power for place in places] for power in range(len(places))]
    return np.linalg.solve(np.array(powers), np.array(wanted)).tolist()


def _parabola(estimates: Sequence[Tensor], sigmas: Sigmas) -> tuple[Tensor, Tensor | float]:
    """Slope and curvature in -log sigma, at the newest, of the line or parabola through two or three estimates."""
    near = (estimates[0] - estimates[1]) / math.log(sigmas[1] / sigmas[0])
    if len(estimates) == 2:
        return near, 0.0
    far = (estimates[1] - estimates[2]) / math.log(sigmas[2] / sigmas[1])
    curve = (near - far) / math.log(sigmas[2] / sigmas[0])
    return near + curve * math.log(sigmas[1] / sigmas[0]), curve
