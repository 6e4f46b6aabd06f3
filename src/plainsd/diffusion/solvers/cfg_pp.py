"""CFG++: aim at the guided estimate, but renoise with the noise of the uncond one (Chung et al. 2024, arXiv:2406.08070,
algorithm 2).

Guidance then interpolates between two estimates instead of extrapolating, so its scale is small: 1 is about 12.5
elsewhere. Both estimates come from one call of `pair`: (x, sigma) -> x0 (guided, uncond). Without a pair they are the
same, and these are the samplers of the same name without CFG++.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise, Pair
from plainsd.diffusion.step import Noise, Sigmas, Step, Strides, ancestral, renamed, renoised


def both(denoise: Denoise) -> Pair:
    """The pair of a model without guidance."""

    def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        denoised = denoise(x, sigma)
        return denoised, denoised

    return pair


def euler_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 0.0,
    strides: Strides = (),
    pair: Pair | None = None,
) -> Iterator[Step]:
    """`ddim` with CFG++: Euler with eta 0, Euler a with eta 1. First order."""
    pair = pair or both(denoise)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, plain = pair(x, sigma)
        end = strides[index].below if strides else sigma_next
        sigma_down, sigma_up = ancestral(sigma, end, eta)
        x = renoised(denoised + (x - plain) * (sigma_down / sigma), noise, sigma_up)
        x = renamed(x, end, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def dpmpp_2m_cfg_pp(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, pair: Pair | None = None
) -> Iterator[Step]:
    """`dpmpp_2m` with CFG++, as in ComfyUI: the estimate's change is from the last uncond estimate."""
    pair, previous = pair or both(denoise), None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, plain = pair(x, sigma)
        end = denoised + (x - plain) * (sigma_next / sigma)
        if previous is not None and sigma_next > 0:
            stride, stride_before = math.log(sigma / sigma_next), math.log(sigmas[index - 1] / sigma)
            end = end + (denoised - previous) * ((1 - sigma_next / sigma) * stride / stride_before / 2)
        x, previous = end, plain
        yield Step(index, sigma_next, x, denoised)
