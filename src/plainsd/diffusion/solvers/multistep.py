"""One call of the model a step, remembering the estimates of the calls before: their change comes free."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.noise import Path
from plainsd.diffusion.step import (
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
    """Second order: the estimate changes on as it did over the last step (DPM-Solver++(2M), Lu et al. 2022b).

    Its line is taken in the middle of the step, or with `heun` integrated over the step. With eta = 1 the stochastic
    form, SDE-DPM-Solver++(2M). With `heun` and the other split, `ancestral`, it is RES's second order (Zhang et al.
    2023, arXiv:2308.02157). The first step and one to level 0 are of first order.
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

    As published it counts the parabola's curvature by half, which makes its order 2 and not 3.
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


def unipc(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Third order: `dpmpp_2m`, and each step is taken once more when the estimate at its end is known, at the cost of
    no call (UniPC-2 with B(h) = exp(h) - 1, Zhao et al. 2023). The last step, to level 0, is of first order."""
    start = x  # where the step before began
    estimates: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        estimates = [denoised, *estimates[:2]]
        if index > 0:
            x = toward(start, _corrected(estimates, newest_first(sigmas, index, 3)), sigmas[index - 1], sigma)
            if sigma_next > 0:
                stride, stride_before = math.log(sigma / sigma_next), math.log(sigmas[index - 1] / sigma)
                aim = denoised + (denoised - estimates[1]) * (stride / stride_before / 2)
        start, x = x, toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def _parabola(estimates: Sequence[Tensor], sigmas: Sigmas) -> tuple[Tensor, Tensor | float]:
    """Slope and curvature, over -log sigma at the newest, of the line or parabola through two or three estimates."""
    near = (estimates[0] - estimates[1]) / math.log(sigmas[1] / sigmas[0])
    if len(estimates) == 2:
        return near, 0.0
    far = (estimates[1] - estimates[2]) / math.log(sigmas[2] / sigmas[1])
    curve = (near - far) / math.log(sigmas[2] / sigmas[0])
    return near + curve * math.log(sigmas[1] / sigmas[0]), curve


def _corrected(estimates: Sequence[Tensor], sigmas: Sigmas) -> Tensor:
    """The aim of UniC for the step from sigmas[1] to sigmas[0], from the estimates at its end, its start and before."""
    end, start, *earlier = estimates
    if not earlier:
        return (start + end) / 2
    h = -math.log(sigmas[1] / sigmas[0])
    place = math.log(sigmas[2] / sigmas[1]) / h  # of the earlier estimate, where the step goes from 0 to 1
    b_1 = (math.expm1(h) / h - 1) / math.expm1(h)
    b_2 = ((math.expm1(h) / h - 1) / h - 0.5) * 2 / math.expm1(h)
    weight = (b_1 - b_2) / (1 - place)
    return start + (earlier[0] - start) * (weight / place) + (end - start) * (b_1 - weight)
