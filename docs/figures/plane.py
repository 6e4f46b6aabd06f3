"""Pictures of two numbers: a swiss roll, clusters of points, and their best estimates, exactly."""

import math
from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from torch import Tensor

from plainsd.diffusion.denoiser import Denoise
from plainsd.diffusion.samplers import SAMPLERS, Step, sampler_levels
from plainsd.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()


def swiss_roll(count: int, seed: int = 0) -> Tensor:
    """Points (count, 2, 1, 1) of mean 0 and standard deviation 1: "latents" of two channels and one position."""
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angle = 1.5 * math.pi * (1 + 2 * u)
    roll = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    return ((roll - roll.mean(0)) / roll.std()).view(-1, 2, 1, 1)


def best_estimate(centres: Tensor, spread: float = 0.0) -> Denoise:
    """The posterior mean of x0 where the data is a Gaussian of this spread around each of the centres (K, 2)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        variance = spread**2 + sigma**2
        near = torch.cdist(x.flatten(1), centres).square()
        centre = (-near / (2 * variance)).softmax(1) @ centres
        return ((spread**2 * x.flatten(1) + sigma**2 * centre) / variance).view_as(x)

    return denoise


def run(denoise: Denoise, name: str, steps: int, x: Tensor, noise: Callable[[], Tensor]) -> list[Step]:
    """All steps of a sampler from x, which is unit noise, with Karras spacing."""
    levels = sampler_levels(SCHEDULE, name, steps, "karras")
    start = Step(-1, levels.sigmas[0], levels.from_noise(x), x)
    return [start, *SAMPLERS[name].run(denoise, start.x, levels.sigmas, noise)]


def unit_noise(count: int, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)


def dots(axes: Axes, points: Tensor, colour: str, size: float) -> None:
    """Points (N, 2, 1, 1) or (N, 2) as one path, a fifth of the bytes of markers."""
    twice = points.flatten(1)[:, None].expand(-1, 2, -1)  # a line of no length, with round ends
    apart = torch.full_like(twice[:, :1], math.nan)
    axes.plot(*torch.cat([twice, apart], 1).flatten(0, 1).T, color=colour, linewidth=size, solid_capstyle="round")
