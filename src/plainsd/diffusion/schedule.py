"""The noise schedule: the noise level of each training timestep, and which levels a sampler visits.

Training (Ho et al. 2020, "Denoising Diffusion Probabilistic Models") mixes a clean latent with noise,

    x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * noise          t = 0 .. T-1, T = 1000

Divided by sqrt(alpha_bar_t) this is x0 + sigma_t * noise with sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t). All
sampling code works with that sigma, the noise level on a clean latent of unchanged scale. `NoiseSchedule` is the table
between the two; below it are the spacings, the ways to choose a few levels out of the thousand.

EDM models (Karras et al. 2022) have no table: `EDMSchedule` is a range of levels with a formula.

The table is float64, made once on the CPU. Levels and timesteps are plain Python floats, so samplers never synchronize
with the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from plainsd.diffusion import spacings
from plainsd.errors import UserError

TERMINAL_ALPHA_BAR = 2.0**-24  # instead of zero in zero-terminal-SNR tables, so that sigma is 4096, not infinite


@dataclass(frozen=True)
class NoiseSchedule:
    """The table of alpha_bar over the training timesteps, and the sigma of each.

    Shapes: (T,) float64, alpha_bar falling from almost 1, sigma rising from almost 0.
    """

    alphas_cumprod: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        """The table of a forward process that adds noise of variance beta_t at timestep t."""
        return cls((1 - betas.double()).cumprod(0))

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, count: int = 1000) -> "NoiseSchedule":
        """Stable Diffusion's: the square root of beta is linear in the timestep (Rombach et al. 2022)."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64) ** 2)

    @classmethod
    def linear(cls, beta_start: float = 0.0001, beta_end: float = 0.02, count: int = 1000) -> "NoiseSchedule":
        """Beta is linear in the timestep (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, count, dtype=torch.float64))

    @classmethod
    def cosine(cls, count: int = 1000) -> "NoiseSchedule":
        """alpha_bar is a squared cosine, beta is capped at 0.999 (Nichol and Dhariwal 2021, arXiv:2102.09672)."""
        time = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """The same table rescaled so that its last timestep is pure noise (Lin et al. 2023, algorithm 1).

        Shifts and scales sqrt(alpha_bar): the first entry stays, the last becomes zero, here 2**-24.
        """
        root = self.alphas_cumprod.sqrt()
        bent = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        bent[-1] = TERMINAL_ALPHA_BAR
        return NoiseSchedule(bent)

    @property
    def zero_snr(self) -> bool:
        """Whether it is a table of `zero_terminal_snr`."""
        return self.alphas_cumprod[-1].item() == TERMINAL_ALPHA_BAR

    def ending_at(self, alpha_bar: float) -> "NoiseSchedule":
        """The same table with another last entry."""
        table = self.alphas_cumprod.clone()
        table[-1] = alpha_bar
        return NoiseSchedule(table)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise level of each timestep, (T,) float64, rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def _log_sigmas(self) -> np.ndarray:
        return self.sigmas.log().numpy()

    def __len__(self) -> int:
        """The number of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def sigma_min(self) -> float:
        """The first and lowest level of the table, about 0.029 for Stable Diffusion."""
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        """The last and highest level of the table, about 14.6 for Stable Diffusion."""
        return self.sigmas[-1].item()

    def sigma(self, timestep: float) -> float:
        """Noise level at a timestep, which may be fractional: log sigma is linear between entries."""
        return math.exp(np.interp(timestep, np.arange(len(self)), self._log_sigmas))

    def timestep(self, sigma: float) -> float:
        """The fractional timestep of a noise level, clamped to the table: the inverse of `sigma`."""
        return float(np.interp(math.log(sigma), self._log_sigmas, np.arange(len(self))))

    def nearest(self, sigma: float) -> float:
        """The integer timestep with the nearest log sigma. Halfway between two, this processor's float32 decides, as
        elsewhere: sigma is exp of its logarithm, taken again; ties go to the lower entry."""
        timestep = self.timestep(sigma)
        low = math.floor(timestep)
        if abs(timestep - low - 0.5) > 1e-6:
            return float(round(timestep))
        around = self.sigmas[low : low + 2].log().float()
        level = (0.5 * around[0] + 0.5 * around[1]).exp().log()
        return float(low + (level - around).abs().argmin().item())


@dataclass(frozen=True)
class EDMSchedule:
    """No table: trained on all levels between two ends (Karras et al. 2022, arXiv:2206.00364, table 1).

    Latents have the standard deviation `sigma_data`; the paper's preconditioning, for the network F and the
    level sigma,

        x0 = c_skip x + c_out F(c_in x, c_noise)          c_in = 1 / sqrt(sigma^2 + sigma_data^2)
        c_skip = (sigma_data c_in)^2                      c_out = sigma sigma_data c_in

    is v-prediction in units of sigma_data, up to the sign of F: see denoiser.py.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0  # of the karras spacing
    count: int = 1000  # the most steps

    def build(self) -> "EDMSchedule":
        """Returns itself: there is no table to make."""
        return self

    def __len__(self) -> int:
        return self.count

    def sigma(self, timestep: float) -> float:
        """The inverse of `timestep`."""
        return math.exp(4 * timestep)

    def timestep(self, sigma: float) -> float:
        """The network's input for a level: c_noise, a quarter of its logarithm."""
        return math.log(sigma) / 4


def same_schedule(a: NoiseSchedule | EDMSchedule, b: NoiseSchedule | EDMSchedule) -> bool:
    if isinstance(a, EDMSchedule) or isinstance(b, EDMSchedule):
        return a == b
    return torch.equal(a.alphas_cumprod, b.alphas_cumprod)


# Spacings: rules that choose timesteps, named as in table 2 of Lin et al. 2023, and rules that choose levels.


def leading(count: int, steps: int, offset: int = 1) -> list[float]:
    """Multiples of count // steps, counted from the clean end: Stable Diffusion's own, with its offset of 1.

    The highest timesteps are never visited: 50 steps of 1000 start at 981.
    """
    stride = count // steps
    offset = min(offset, count - 1 - (steps - 1) * stride)
    return [float(index * stride + offset) for index in reversed(range(steps))]


def trailing(count: int, steps: int) -> list[float]:
    """Equal strides counted from the noisy end: starts at the last timestep, as zero-terminal-SNR models need."""
    return (np.arange(count, 0, -count / steps).round()[:steps] - 1).tolist()


def linspace(count: int, steps: int) -> list[float]:
    """Both ends of the table, with equal and usually fractional strides; a single step is at the noisy end."""
    return np.linspace(0, count - 1, steps)[::-1].tolist() if steps > 1 else [count - 1.0]


def distilled(count: int, steps: int, taught: int = 50) -> list[float]:
    """A subset of the 50 timesteps that latent consistency models are trained on (Luo et al. 2023)."""
    if steps > taught:
        raise UserError(
            f"steps {steps} is more than the {taught} that lcm models know; choose 1 to {taught}",
            field="steps",
            value=steps,
        )
    known = [float((index + 1) * (count // taught) - 1) for index in reversed(range(taught))]
    return [known[int(index)] for index in np.linspace(0, taught, steps, endpoint=False)]


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> list[float]:
    """Levels linear in sigma^(1/rho): dense near the clean end (Karras et al. 2022, equation 5)."""
    return (np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho).tolist()


def exponential(sigma_min: float, sigma_max: float, steps: int) -> list[float]:
    """Levels linear in log sigma: a geometric sequence."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps)).tolist()


@dataclass(frozen=True)
class Spacing:
    """A rule that gives `steps` falling points: timesteps from (count, steps), or levels from (sigma_min, sigma_max,
    steps)."""

    points: Callable[..., list[float]]
    of_levels: bool = False
    own: bool = False  # only for samplers whose default it is
    log: bool = False  # between timesteps log sigma is linear, as in k-diffusion; else sigma, as in diffusers
    least: bool = False  # the last point is the lowest level: a sampler that ends there drops it
    closed: bool = False  # steps + 1 points: the last is where the run ends


SPACINGS: dict[str, Spacing] = {
    "leading": Spacing(leading),
    "trailing": Spacing(trailing),
    "linspace": Spacing(linspace),
    "karras": Spacing(karras, of_levels=True, least=True),
    "exponential": Spacing(exponential, of_levels=True, least=True),
    "polyexponential": Spacing(spacings.polyexponential, of_levels=True, least=True),
    "uniform": Spacing(spacings.uniform, log=True, least=True),
    "sgm_uniform": Spacing(spacings.sgm_uniform, log=True),
    "simple": Spacing(spacings.simple, log=True),
    "ddim_uniform": Spacing(spacings.ddim_uniform, log=True),
    "beta": Spacing(spacings.beta, log=True),
    "beta_a1111": Spacing(spacings.beta_a1111, of_levels=True, least=True),
    "kl_optimal": Spacing(spacings.kl_optimal, of_levels=True, least=True),
    "kl_optimal_a1111": Spacing(spacings.kl_optimal_a1111, of_levels=True, closed=True),
    "align_your_steps": Spacing(spacings.align_your_steps, of_levels=True, least=True),
    "align_your_steps_xl": Spacing(spacings.align_your_steps_xl, of_levels=True, least=True),
    "distilled": Spacing(distilled, own=True),
}


class Level(float):
    """A noise level that a sampler visits: sigma, with the timestep that the network gets there. Numbers computed from
    it, such as a level between two visited ones, are plain floats, whose timestep is looked up in the table."""

    timestep: float

    def __new__(cls, sigma: float, timestep: float) -> "Level":
        level = super().__new__(cls, sigma)
        level.timestep = timestep
        return level


def spaced(
    schedule: NoiseSchedule | EDMSchedule,
    spacing: str,
    steps: int,
    spare: int = 0,
    rounded: Callable[[float], float] = float,
) -> list[Level]:
    """The falling levels at which a sampler's steps begin; for a closed spacing also where the last one ends.

    steps + spare points are spaced and the spare ones dropped at the clean end; a few spacings give another number of
    points. `rounded` is applied to timesteps before their level is looked up; of a spacing of levels only the timestep
    is rounded.
    """
    count, points = len(schedule), steps + spare
    if not 1 <= steps <= count - spare:
        raise UserError(f"steps {steps} is out of range; choose 1 to {count - spare}", field="steps", value=steps)
    rule = SPACINGS[spacing]
    if isinstance(schedule, EDMSchedule):
        return _without(spaced_freely(schedule, spacing, points), spare)
    if rule.of_levels:
        sigmas = _without(rule.points(schedule.sigma_min, schedule.sigma_max, points), spare)
        timesteps = [float(rounded(schedule.timestep(sigma))) for sigma in sigmas]
    else:
        timesteps = [float(rounded(timestep)) for timestep in _without(rule.points(count, points), spare)]
        if rule.log:
            sigmas = [schedule.sigma(timestep) for timestep in timesteps]
        else:
            sigmas = np.interp(timesteps, np.arange(count), schedule.sigmas.numpy()).tolist()
    return [Level(sigma, timestep) for sigma, timestep in zip(sigmas, timesteps, strict=True)]


def _without(points: list, spare: int) -> list:
    return points[: len(points) - spare]


def spaced_freely(schedule: EDMSchedule, spacing: str, points: int) -> list[Level]:
    """Levels for an EDM schedule: none is rounded."""
    rule, ends = SPACINGS[spacing], (schedule.sigma_min, schedule.sigma_max, points)
    if not rule.of_levels:
        names = " or ".join(name for name, other in SPACINGS.items() if other.of_levels)
        raise UserError(
            f"spacing {spacing!r} chooses among trained timesteps, and this model was trained at all noise levels "
            f"(EDM); choose {names}",
            field="spacing",
            value=spacing,
        )
    sigmas = karras(*ends, schedule.rho) if spacing == "karras" else rule.points(*ends)
    return [Level(sigma, schedule.timestep(sigma)) for sigma in sigmas]
