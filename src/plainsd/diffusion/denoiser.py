"""From a network's prediction to an estimate of the clean latent, and the wrappers around it.

Sampling code sees a model as one function, `Denoise`: noisy latent and noise level in, estimate of the clean latent
out. Its coordinates are variance-exploding, x = x0 + sigma * noise, so x0 always has its full size. The network was
trained in variance-preserving ones, x / sqrt(1 + sigma^2), where the sum has unit variance, and on integer timesteps.
`denoiser` hides both, and also what the network predicts:

    epsilon       the noise                                      Ho et al. 2020
    v_prediction  v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x0   Salimans and Ho 2022, arXiv:2202.00512
    sample        x0 itself
    edm           -v                                             Karras et al. 2022, F of equation 7

v and edm are in units of sigma_data, the standard deviation of the clean latents: 1 for all models but EDM's. With
alpha_bar = 1 / (1 + sigma^2) these are the only lines of plainsd that know the difference. Guidance in all its
forms, and inpainting, are small functions that wrap estimates and return a `Denoise`.

The last part is for training, in the network's own coordinates, with a timestep for each sample of the batch.

Shapes: x, x0, noise, network outputs (B, C, H, W); alpha_bar (B,); a mask broadcasts against x.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from plainsd.diffusion.schedule import EDMSchedule, Level, NoiseSchedule
from plainsd.errors import unknown

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> x0
Predict = Callable[[Tensor, float], Tensor]  # (x / sqrt(sigma_data^2 + sigma^2), timestep) -> epsilon, v or x0
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x, sigma) -> x0 (cond, uncond)
Triple = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]  # ... and a third

Estimator = TypeVar("Estimator", Denoise, Pair)

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # of models with a noise table
KNOWN = (*PREDICTIONS, "edm")


# What networks predict.


def x0_from(prediction: str, x: Tensor, output: Tensor, sigma: float, sigma_data: float = 1.0) -> Tensor:
    """The clean latent implied by a network's output for x at level sigma.

    The form for v never subtracts large numbers, so it stays exact at sigma 4096, where x is almost pure noise.
    """
    if prediction == "epsilon":
        return x - sigma * output
    if prediction == "v_prediction":
        level = sigma / sigma_data
        return x / (1 + level**2) - output * (sigma / math.sqrt(1 + level**2))
    if prediction == "sample":
        return output
    if prediction == "edm":
        return x0_from("v_prediction", x, -output, sigma, sigma_data)
    raise unknown("prediction", prediction, KNOWN)


def output_from(prediction: str, x: Tensor, x0: Tensor, sigma: float, sigma_data: float = 1.0) -> Tensor:
    """The network output that implies x0: the inverse of `x0_from`, for sigma above 0."""
    if prediction == "epsilon":
        return (x - x0) / sigma
    if prediction == "v_prediction":
        level = sigma / sigma_data
        return (x / (1 + level**2) - x0) * (math.sqrt(1 + level**2) / sigma)
    if prediction == "sample":
        return x0
    if prediction == "edm":
        return -output_from("v_prediction", x, x0, sigma, sigma_data)
    raise unknown("prediction", prediction, KNOWN)


def spread_of(schedule: NoiseSchedule | EDMSchedule) -> float:
    """sigma_data: the unit of v."""
    return schedule.sigma_data if isinstance(schedule, EDMSchedule) else 1.0


def with_timesteps(
    denoise: Callable[[Tensor, float], Any], timestep: Callable[[float], float]
) -> Callable[[Tensor, float], Any]:
    """The same, but the network gets the timestep that this function gives for each level."""
    return lambda x, sigma: denoise(x, Level(sigma, timestep(sigma)))


def denoiser(predict: Predict, schedule: NoiseSchedule | EDMSchedule, prediction: str) -> Denoise:
    """A network as a `Denoise`.

    The network gets the (fractional) timestep of sigma; for a `Level`, the timestep stored in it, since some published
    samplers round.
    """
    if prediction not in KNOWN:
        raise unknown("prediction", prediction, KNOWN)
    sigma_data = spread_of(schedule)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        timestep = sigma.timestep if isinstance(sigma, Level) else schedule.timestep(sigma)
        output = predict(x / math.sqrt(sigma_data**2 + sigma**2), timestep)
        return x0_from(prediction, x, output, sigma, sigma_data)

    return denoise


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """A clean latent at level sigma: where image to image begins."""
    return x0 + sigma * noise


# Guidance: two or three estimates combined into one. All are sums with weights that add to 1, and so are the same on
# x0 as on epsilon or v; only `rescaled` looks at the prediction itself.


def guided(pair: Pair, scale: float) -> Denoise:
    """Classifier-free guidance: from the uncond estimate past the cond one (Ho and Salimans 2022)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond = pair(x, sigma)
        return uncond + scale * (cond - uncond)

    return denoise


def rescaled(pair: Pair, scale: float, phi: float, prediction: str = "epsilon", sigma_data: float = 1.0) -> Denoise:
    """Guidance rescaled to the cond prediction's standard deviation, by a factor phi (Lin et al. 2023, section 3.4).

    Standard deviations are per sample, of what the network predicts.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond = (output_from(prediction, x, x0, sigma, sigma_data) for x0 in pair(x, sigma))
        output = uncond + scale * (cond - uncond)
        sample = tuple(range(1, x.ndim))
        spread = cond.std(sample, keepdim=True) / output.std(sample, keepdim=True)
        return x0_from(prediction, x, output * (phi * spread + 1 - phi), sigma, sigma_data)

    return denoise


def thresholded(pair: Pair, scale: float, percentile: float = 0.995, limit: float | None = None) -> Denoise:
    """Guidance with dynamic thresholding (Saharia et al. 2022, "Imagen", section 2.3).

    Each sample is clipped at its percentile of magnitude, and scaled to bring this percentile down to `limit` if it was
    above. The paper's limit is 1, the range of pixels. Latents have no such range: the default is the same percentile
    of the cond estimate, its range without guidance.
    """

    def reach(x0: Tensor) -> Tensor:
        sample = x0.abs().flatten(1).quantile(percentile, dim=1)
        return sample.view(-1, *[1] * (x0.ndim - 1))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond = pair(x, sigma)
        x0 = uncond + scale * (cond - uncond)
        most = reach(cond) if limit is None else torch.full_like(reach(x0), limit)
        edge = reach(x0).maximum(most).clamp(min=torch.finfo(x0.dtype).tiny)
        return x0.clamp(-edge, edge) * (most / edge)

    return denoise


def projected(pair: Pair, scale: float, limit: float, parallel: float = 0.0, momentum: float = 0.0) -> Denoise:
    """Guidance that turns the cond estimate rather than stretching it, which oversaturates at high scales (Sadat et al.
    2024, "adaptive projected guidance", arXiv:2410.02416, algorithm 1).

    The difference of the estimates, plus `momentum` times the running sum, is clipped per sample to the norm `limit`;
    its component parallel to the cond estimate is multiplied by `parallel` (the paper's beta, r and eta). The sum is
    kept between calls: make one of these for each run.
    """
    total: Tensor | float = 0.0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal total
        cond, uncond = pair(x, sigma)
        total = cond - uncond + momentum * total
        one = tuple(range(1, x.ndim))
        length = torch.linalg.vector_norm(total, dim=one, keepdim=True)
        update = total * (limit / length).clamp(max=1)
        square = cond.square().sum(one, keepdim=True).clamp(min=torch.finfo(cond.dtype).tiny)
        along = cond * ((update * cond).sum(one, keepdim=True) / square)
        return cond + (scale - 1) * (update - (1 - parallel) * along)

    return denoise


def interval(inside: Estimator, outside: Estimator, low: float, high: float) -> Estimator:
    """One estimator at levels in (low, high], another elsewhere: guidance only where it helps (Kynkäänniemi et al.
    2024). Outside, the cond estimate alone costs one pass instead of two."""
    return lambda x, sigma: (inside if low < sigma <= high else outside)(x, sigma)


def perturbed(triple: Triple, scale: float, perturbed_scale: float) -> Denoise:
    """Guidance by the prompt, and away from an estimate whose self-attention maps are identities (Ahn et al. 2024,
    "perturbed-attention guidance")."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond, blurred = triple(x, sigma)
        return uncond + scale * (cond - uncond) + perturbed_scale * (cond - blurred)

    return denoise


def edited(triple: Triple, scale: float, image_scale: float) -> Denoise:
    """Guidance by the prompt and by the input picture (Brooks et al. 2023, arXiv:2211.09800, eq. 3).

    `triple`: with prompt and picture, with the picture only, with neither.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        prompted, pictured, plain = triple(x, sigma)
        return plain + image_scale * (pictured - plain) + scale * (prompted - pictured)

    return denoise


def inpainting(denoise: Estimator, known: Tensor, mask: Tensor, noise: Tensor, start: float = math.inf) -> Estimator:
    """Repaint a picture where the mask is 1, with a model that takes no mask (Lugmayr et al. 2022,
    arXiv:2201.09865).

    Elsewhere the model sees the known latents with the same `noise` at each level, and they replace its estimate. At
    `start` and above it sees x unchanged: diffusers begins a full repaint from pure noise, so pass sigmas[0] to follow
    it. A sampler that stops above level 0 leaves a little noise on the known part: paste the original over it.
    Of a pair of estimates both are replaced.
    """

    def repaint(x: Tensor, sigma: float) -> Any:
        if sigma < start:
            x = mask * x + (1 - mask) * add_noise(known, noise, sigma)
        found = denoise(x, sigma)
        both = [mask * x0 + (1 - mask) * known for x0 in (found if isinstance(found, tuple) else (found,))]
        return tuple(both) if isinstance(found, tuple) else both[0]

    return repaint


def inpainting_clean(denoise: Estimator, known: Tensor, mask: Tensor) -> Estimator:
    """The same as A1111 has it for its samplers of timesteps (`mask_before_denoising` in sd_samplers_cfg_denoiser.py,
    1.10.1): outside the mask the network sees the known latents without noise, and the noise that it finds is taken for
    that of x. The known latents are to be put back at the end."""

    def repaint(x: Tensor, sigma: float) -> Any:
        seen = mask * x + (1 - mask) * known * math.sqrt(1 + sigma**2)  # clean in the network's coordinates
        found = denoise(seen, sigma)
        return tuple(x0 + x - seen for x0 in found) if isinstance(found, tuple) else found + x - seen

    return repaint


def differential(denoise: Estimator, known: Tensor, change: Tensor, sigmas: Sequence[float]) -> Estimator:
    """Repaint each position from its own step on: with `change` 1 from the first, with 0.3 in the last 30% of the steps
    and one before, with 0 never (Levin and Fried 2023, "Differential Diffusion", algorithm 1).

    `change` (1, 1, h, w); `sigmas` are the levels of the run, which begins with the noised known latents.
    """
    rising, steps = [-sigma for sigma in sigmas], len(sigmas) - 1

    def repaint(x: Tensor, sigma: float) -> Any:
        step = min(max(bisect_right(rising, -sigma) - 1, 0), steps - 1)
        begun = ((change > 0) & (1 - change <= (step + 1) / steps)).to(x)  # here by the end of the step
        found = denoise(x, sigma)
        both = [begun * x0 + (1 - begun) * known for x0 in (found if isinstance(found, tuple) else (found,))]
        return tuple(both) if isinstance(found, tuple) else both[0]

    return repaint


# Training, in the network's coordinates. alpha_bar is (B,), one timestep for each sample.


def _per_sample(alpha_bar: Tensor, like: Tensor) -> Tensor:
    """alpha_bar (B,) -> (B, 1, 1, 1), on the device of `like`, still in float64."""
    return alpha_bar.to(like.device).view(-1, *[1] * (like.ndim - 1))


def network_input(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The network's input in training: sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise."""
    alpha_bar = _per_sample(alpha_bar, x0)
    return alpha_bar.sqrt().to(x0) * x0 + (1 - alpha_bar).sqrt().to(x0) * noise


def train_target(prediction: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The training target: epsilon, v or x0."""
    alpha_bar = _per_sample(alpha_bar, x0)
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return alpha_bar.sqrt().to(x0) * noise - (1 - alpha_bar).sqrt().to(x0) * x0
    if prediction == "sample":
        return x0
    raise unknown("prediction", prediction, PREDICTIONS)


def min_snr_weight(prediction: str, alpha_bar: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight (B,) of each sample's squared error: levels with little noise count no more than those at SNR = gamma
    (Hang et al. 2023, "Min-SNR weighting"), SNR being alpha_bar / (1 - alpha_bar).

    epsilon  min(1, gamma / SNR)
    v        min(1, gamma / (SNR + 1)): for large SNR the paper's min(SNR, gamma) / (SNR + 1), which goes to 0 with SNR
             and would leave the last timestep of a zero-terminal-SNR table, the first of sampling, untrained
    sample   min(SNR, gamma)
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction == "v_prediction":
        return (gamma / (snr + 1)).clamp(max=1)
    if prediction == "sample":
        return snr.clamp(max=gamma)
    raise unknown("prediction", prediction, PREDICTIONS)
