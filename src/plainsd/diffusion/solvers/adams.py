"""One call of the model a step, remembering slopes: Adams-Bashforth on the network's output, or on dx / dsigma."""

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise, output_from, x0_from
from plainsd.diffusion.step import Noise, Sigmas, Step, Strides, newest_first, renamed, toward, weighted


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
    a table's timesteps (PNDM, Liu et al. 2022, as Stable Diffusion's original uses it, without the Runge-Kutta start).

    The first step is taken twice: with the output at its start, then from there with the mean of both ends; the second
    time it is one stride that ends where the next step begins (see `renamed`).
    `prediction` says which output is extrapolated. The original always takes epsilon; diffusers takes v where the
    network predicts v, which is only of first order.
    """
    outputs: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        outputs = [output_from(prediction, x, denoised, sigma, sigma_data), *outputs[:3]]
        start, end = sigma, strides[index].below if strides else sigma_next
        if index == 0:
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


ADAMS_BASHFORTH = {  # number of known outputs, newest first -> their weights
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lms(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Adams-Bashforth on the slope dx / dsigma, its weights integrated for the levels at hand: fourth order once four
    slopes are known (the linear multistep sampler of k-diffusion).

    The weights add to 1, so only differences of slopes enter the aim: where sigma is huge nothing cancels.
    """
    slopes: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        weights = _lagrange_means(newest_first(sigmas, index, 4), sigma, sigma_next)
        aim = denoised + weighted([sigma * (slopes[0] - slope) for slope in slopes], weights)
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def _lagrange_means(known: Sigmas, sigma: float, sigma_next: float) -> list[float]:
    """Weights that turn values at the known levels into the mean of their polynomial between sigma and sigma_next.

    Gauss's rule with two points is exact for the cubics that four values make.
    """
    centre, reach = (sigma + sigma_next) / 2, (sigma - sigma_next) / 2 / math.sqrt(3)
    points = (centre - reach, centre + reach)

    def basis(own: float, point: float) -> float:
        return math.prod((point - other) / (own - other) for other in known if other != own)

    return [sum(basis(own, point) for point in points) / 2 for own in known]
