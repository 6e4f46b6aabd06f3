"""The diffusion training loss: the error of one prediction for each picture, each at its own timestep.

    plain          squared error of epsilon or v       Ho et al. 2020; Salimans and Ho 2022
    min_snr        weights over timesteps              Hang et al. 2023 (arXiv:2303.09556)
    offset_noise   noise that is the same all over a   Guttenberg 2023, "Diffusion with offset noise": lets a model
                   channel, on top of the ordinary     learn pictures much darker or lighter than the mean
    perturbation   more noise in the input than in     Ning et al. 2023 (arXiv:2301.11706): training inputs as imperfect
                   the target                          as those that sampling makes
    huber          large errors count by their size,   Huber 1964: outliers, such as broken pictures, pull less
                   not their square
    mask           parts of a picture that do not count

Shapes: x0, noise (B, L, h, w); timesteps (B,); mask (B, 1, h, w). Randomness comes from the picks' generators, and an
option that is off draws nothing, so that turning it on does not change the other random numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plainsd.diffusion.denoiser import min_snr_weight, network_input, train_target
from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.errors import UserError
from plainsd.train.order import Pick


@dataclass(frozen=True)
class Objective:
    """Options of the loss. The default is the plain squared error."""

    min_snr: float | None = None  # gamma; 5 in the paper
    offset_noise: float = 0.0  # standard deviation of the offset; 0.05 to 0.1 are usual
    perturbation: float = 0.0  # standard deviation of the extra noise; 0.1 in the paper
    huber: float | None = None  # beyond this size an error counts linearly; below it as in the plain loss

    def __post_init__(self):
        for name in ("min_snr", "huber"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name.replace('_', '-')} {value} is out of range; give a number above 0")
        for name in ("offset_noise", "perturbation"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{name.replace('_', '-')} {value} is out of range; choose 0 to 1")


PLAIN_OBJECTIVE = Objective()


class NoisyLatents(NamedTuple):
    target: Tensor  # (B, L, h, w): the noise to predict
    shown: Tensor  # (B, L, h, w): the noise in the input; the same unless perturbed


def draw_timesteps(picks: Sequence[Pick], count: int, power: float = 1.0) -> Tensor:
    """A timestep of `count` for each pick, (B,): count * u ** power, u uniform. A power below 1 favours noisy ones."""
    chances = [float(torch.rand((), generator=p.generator)) for p in picks]
    return torch.tensor([int(count * chance**power) for chance in chances])


def draw_noise(picks: Sequence[Pick], shape: Sequence[int], objective: Objective = PLAIN_OBJECTIVE) -> NoisyLatents:
    """Noise of the shape (L, h, w) for each pick."""

    def normal(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=p.generator) for p in picks])

    noise = normal(*shape)
    if objective.offset_noise:
        noise = noise + objective.offset_noise * normal(shape[0], 1, 1)
    if not objective.perturbation:
        return NoisyLatents(noise, noise)
    return NoisyLatents(noise, noise + objective.perturbation * normal(*shape))


def errors(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    x0: Tensor,
    noise: NoisyLatents,
    timesteps: Tensor,
    context: Tensor,
    vector: Tensor | None = None,
    *,
    objective: Objective = PLAIN_OBJECTIVE,
    mask: Tensor | None = None,
) -> Tensor:
    """The error of each picture's prediction, (B,): the mean over its positions, weighted by the mask."""
    device = context.device
    alpha_bar = schedule.alphas_cumprod[timesteps]
    x = network_input(x0, noise.shown, alpha_bar.to(x0.dtype)).to(device).contiguous(memory_format=torch.channels_last)
    target = train_target(prediction, x0, noise.target, alpha_bar.to(x0.dtype)).to(device)
    output = unet(x, timesteps.to(device), context, vector).to(target.dtype)
    if objective.huber is None:
        each = F.mse_loss(output, target, reduction="none")
    else:
        each = 2 * F.huber_loss(output, target, reduction="none", delta=objective.huber)
    if mask is not None:
        each = each * mask.to(device)
    means = each.flatten(1).mean(1)
    if objective.min_snr is not None:
        means = means * min_snr_weight(prediction, alpha_bar, objective.min_snr).to(means)
    return means


def stratified_timesteps(numbers: Sequence[int], count: int, steps: int) -> Tensor:
    """For pictures `numbers` out of `count`: timesteps spread evenly over the table, always the same."""
    return torch.tensor([(2 * number + 1) * steps // (2 * count) for number in numbers])
