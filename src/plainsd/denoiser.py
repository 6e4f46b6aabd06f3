"""From what a network predicts to an estimate of the clean latent, and everything that can be wrapped around that.

Sampling code sees a model as one function, `Denoise`: noisy latent and noise level in, estimate of the clean latent
out. Its coordinates are variance-exploding, x = x0 + sigma * noise, so x0 always has its full size. The network was
trained in variance-preserving ones, x / sqrt(1 + sigma^2), where the sum has unit variance, and on integer timesteps.
`denoiser` hides both, and also what the network predicts:

    epsilon       the noise                                      Ho et al. 2020
    v_prediction  v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x0   Salimans and Ho 2022
    sample        x0 itself

With alpha_bar = 1 / (1 + sigma^2) these are the only lines of plainsd that know the difference. Guidance in all its
forms, and inpainting, are small functions that take such functions and return a `Denoise`.

The last part is for training, in the network's own coordinates, with a timestep for each sample of the batch.

Shapes: x, x0, noise, network outputs (B, C, H, W); alpha_bar (B,); a mask broadcasts against x.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from plainsd.errors import unknown
from plainsd.schedule import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> x0
Predict = Callable[[Tensor, float], Tensor]  # (x / sqrt(1 + sigma^2), timestep) -> epsilon, v or x0
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x, sigma) -> x0 (with the prompt, without it)
Triple = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]  # ... and with the prompt, attention perturbed

PREDICTIONS = ("epsilon", "v_prediction", "sample")


# What networks predict.


def x0_from(prediction: str, x: Tensor, output: Tensor, sigma: float) -> Tensor:
    """The clean latent that a network's output means for x at level sigma.

    The form for v never subtracts large numbers, so it stays exact where sigma is 4096 and x is almost pure noise.
    """
    if prediction == "epsilon":
        return x - sigma * output
    if prediction == "v_prediction":
        return x / (1 + sigma**2) - output * (sigma / math.sqrt(1 + sigma**2))
    if prediction == "sample":
        return output
    raise unknown("prediction", prediction, PREDICTIONS)


def output_from(prediction: str, x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """The network output that would have meant x0: the inverse of `x0_from`, for sigma above 0."""
    if prediction == "epsilon":
        return (x - x0) / sigma
    if prediction == "v_prediction":
        return (x / (1 + sigma**2) - x0) * (math.sqrt(1 + sigma**2) / sigma)
    if prediction == "sample":
        return x0
    raise unknown("prediction", prediction, PREDICTIONS)


def denoiser(
    predict: Predict, schedule: NoiseSchedule, prediction: str, timesteps: Mapping[float, float] | None = None
) -> Denoise:
    """A network as a `Denoise`.

    The network is told the (fractional) timestep whose level is sigma. `timesteps` overrides this for single levels:
    some published samplers round, and `samplers.sampler_timesteps` says where.
    """
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    known = timesteps or {}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        timestep = known[sigma] if sigma in known else schedule.timestep(sigma)
        return x0_from(prediction, x, predict(x / math.sqrt(1 + sigma**2), timestep), sigma)

    return denoise


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """A clean latent at level sigma: where image to image begins."""
    return x0 + sigma * noise
