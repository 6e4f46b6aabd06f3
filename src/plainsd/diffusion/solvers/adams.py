"""Multistep samplers with one model call per step: Adams-Bashforth and kin on dx / dsigma or the network's output."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise, output_from, x0_from
from plainsd.diffusion.step import Around, Noise, Sigmas, Step, Strides, newest_first, renamed, toward, weighted


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    noise: Noise,
    *,
    prediction: str = "epsilon",
    sigma_data: float = 1.0,
    strides: Strides = (),
) -> Iterator[Step]:
    """Adams-Bashforth on the network's output, with the weights for even steps of sigma: fourth order there, second on
    a table's timesteps (PNDM, Liu et al. 2022, arXiv:2202.09778, as the original Stable Diffusion uses it, without
    Runge-Kutta warm-up).

    The first step is taken twice: with the output at its start, then with the mean of the outputs at both ends; the
    second time it is one stride that ends where the next step begins (see `renamed`). A single step of a table's
    timesteps is taken once, as in diffusers.
    `prediction` says which output is extrapolated. The original always extrapolates epsilon; diffusers extrapolates v
    if the network predicts v, which is only first order.
    """
    outputs: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        outputs = [output_from(prediction, x, denoised, sigma, sigma_data), *outputs[:3]]
        start, end = sigma, strides[index].below if strides else sigma_next
        if index == 0 and (len(sigmas) > 2 or not strides):
            trial = renamed(toward(x, denoised, start, end), end, sigma_next)
            at_end = output_from(prediction, trial, denoise(trial, sigma_next), sigma_next, sigma_data)
            mean = (outputs[0] + at_end) / 2
            start, end = strides[1].above if len(strides) > 1 else sigma, sigma_next
            x = renamed(x, sigma, start)
        else:
            mean = weighted(outputs, ADAMS_BASHFORTH[len(outputs)])
        aim = x0_from(prediction, x, mean, start, sigma_data)
        x = renamed(toward(x, aim, start, end), end, sigma_next)
        yield Step(index, sigma_next, x, denoised)


ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {  # number of known outputs, newest first -> their weights
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lms(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Adams-Bashforth on the slope dx / dsigma, with weights integrated for the actual levels: fourth order once four
    slopes are known (k-diffusion's linear multistep sampler).

    The weights add to 1, so only differences of slopes matter: nothing cancels even at a huge sigma.
    """
    slopes: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        weights = _lagrange_means(newest_first(sigmas, index, 4), sigma, sigma_next)
        x = toward(x, _mixed(denoised, sigma, slopes, weights), sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def ipndm(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Adams-Bashforth on the slope with the weights for even steps, although those of sigma are not: second order at
    best (iPNDM, Zhang and Chen 2022, arXiv:2204.13902). `plms` without its second call. A step to level 0 is first
    order."""
    slopes: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        if index > 0 and sigma_next > 0:
            aim = _mixed(denoised, sigma, slopes, ADAMS_BASHFORTH[len(slopes)])
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def gradient_estimation(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, gamma: float = 2.0
) -> Iterator[Step]:
    """The slope plus gamma - 1 times its last change (Permenter and Yuan 2024, arXiv:2306.04848, algorithm 2).

    Euler with a correction of the estimate's errors: first order. A step to level 0 is plain Euler.
    """
    before = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        slope = (x - denoised) / sigma
        if before is not None and sigma_next > 0:
            aim = denoised - (gamma - 1) * sigma * (slope - before)
        before = slope
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


FEW_STEPS = 15  # below this DEIS ends with lower orders


def deis(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, most: int = 2, around: Around = (0, 0)
) -> Iterator[Step]:
    """Second order: a line in log sigma through the last two slopes, integrated over sigma (log-rho DEIS, Zhang and
    Chen 2022, arXiv:2204.13902); with `most` = 3 a parabola. The first steps, and of a row of few steps the last ones,
    are of lower order."""
    steps = len(sigmas) - 1 + around[1]  # to the end of the row
    slopes: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: most - 1]]
        order = min(len(slopes), steps - index if around[0] + steps < FEW_STEPS else most)
        if order > 1 and 0 < sigma_next < sigma:
            weights = _log_means(newest_first(sigmas, index, order), sigma, sigma_next)
            aim = _mixed(denoised, sigma, slopes[:order], weights)
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


# Targets and weights.


def _mixed(denoised: Tensor, sigma: float, slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The target of a step along a weighted mean of slopes, newest first; the weights add to 1."""
    return denoised + weighted([sigma * (slopes[0] - slope) for slope in slopes[1:]], weights[1:])


def _log_means(known: Sigmas, sigma: float, sigma_next: float) -> list[float]:
    """`_lagrange_means` for polynomials in log sigma through two or three values, the first at sigma.

    With u = log(level / sigma), from 0 to log r, the means of u and u^2 over the level are those of log q and log^2 q
    for q from 1 to r.
    """
    r, places = sigma_next / sigma, [math.log(level / sigma) for level in known]
    mean = -1 - r * math.log(r) / (1 - r)
    if len(places) == 2:
        return [1 - mean / places[1], mean / places[1]]
    square = -r * math.log(r) ** 2 / (1 - r) - 2 * mean
    _, a, b = places
    near, far = (square - b * mean) / (a * (a - b)), (square - a * mean) / (b * (b - a))
    return [1 - near - far, near, far]


def _lagrange_means(known: Sigmas, sigma: float, sigma_next: float) -> list[float]:
    """Weights that turn values at the known levels into the mean of their polynomial between sigma and sigma_next.

    Two-point Gauss quadrature is exact for the cubic through four values.
    """
    centre, reach = (sigma + sigma_next) / 2, (sigma - sigma_next) / 2 / math.sqrt(3)
    points = (centre - reach, centre + reach)

    def basis(own: float, point: float) -> float:
        return math.prod((point - other) / (own - other) for other in known if other != own)

    return [sum(basis(own, point) for point in points) / 2 for own in known]
