"""Spacings of k-diffusion, A1111 and ComfyUI, by their formulas: which points of the noise schedule are visited.

Two kinds. Of timesteps: (count, steps) -> falling points of a table of `count` entries. Of levels: (sigma_min,
sigma_max, steps) -> falling noise levels. diffusers' own are in schedule.py, with the registry of all.
"""

import math

import numpy as np

from plainsd.errors import UserError

# Sabour et al. 2024 (arXiv:2404.14507), "Align Your Steps": the published levels of ten steps, and the end
ALIGNED_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGNED_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


# Of timesteps.


def uniform(count: int, steps: int) -> list[float]:
    """Evenly spaced, both ends of the table included: k-diffusion's `get_sigmas`, "normal" in ComfyUI."""
    return np.linspace(count - 1, 0, steps).tolist()


def sgm_uniform(count: int, steps: int) -> list[float]:
    """`uniform` with one step more, the last point dropped: the last step is as long as the others."""
    return np.linspace(count - 1, 0, steps + 1)[:-1].tolist()


def simple(count: int, steps: int) -> list[float]:
    """Every (count / steps)-th entry from the noisy end, rounded towards it."""
    return [float(count - 1 - int(index * (count / steps))) for index in range(steps)]


def ddim_uniform(count: int, steps: int) -> list[float]:
    """Every (count // steps)-th entry up from the second: more than `steps` points if it does not divide."""
    return [float(timestep) for timestep in reversed(range(1, count, max(count // steps, 1)))]


def beta(count: int, steps: int, a: float = 0.6, b: float = 0.6) -> list[float]:
    """Quantiles of the beta distribution, dense at both ends (Lee et al. 2024, arXiv:2407.12173), as ComfyUI rounds
    them to entries of the table; duplicates are visited once."""
    quantiles = beta_quantiles(1 - np.linspace(0, 1, steps, endpoint=False), a, b)
    return list(dict.fromkeys(np.rint(quantiles * (count - 1)).tolist()))


# Of levels.


def polyexponential(sigma_min: float, sigma_max: float, steps: int, rho: float = 1.0) -> list[float]:
    """log sigma falls as the rho-th power of the fraction of steps left; linear with k-diffusion's rho of 1."""
    low, high = math.log(sigma_min), math.log(sigma_max)
    return np.exp(low + (high - low) * np.linspace(1, 0, steps) ** rho).tolist()


def kl_optimal(sigma_min: float, sigma_max: float, steps: int) -> list[float]:
    """Levels linear in arctan sigma (Sabour et al. 2024, "Align Your Steps", theorem 3.1)."""
    return np.tan(np.linspace(math.atan(sigma_max), math.atan(sigma_min), steps)).tolist()


def kl_optimal_a1111(sigma_min: float, sigma_max: float, steps: int) -> list[float]:
    """`kl_optimal` with one level more: the last step ends at sigma_min, and that little noise stays."""
    return kl_optimal(sigma_min, sigma_max, steps + 1)


def beta_a1111(sigma_min: float, sigma_max: float, steps: int, a: float = 0.6, b: float = 0.6) -> list[float]:
    """Quantiles of the beta distribution over sigma itself, both ends included: A1111's "Beta"."""
    return (sigma_min + beta_quantiles(1 - np.linspace(0, 1, steps), a, b) * (sigma_max - sigma_min)).tolist()


def align_your_steps(sigma_min: float, sigma_max: float, steps: int) -> list[float]:
    """Levels optimized for Stable Diffusion 1.5, interpolated linearly in log sigma; as in A1111 the last step begins
    at the published end, 0.029."""
    return _aligned(ALIGNED_SD1, sigma_min, sigma_max, steps)


def align_your_steps_xl(sigma_min: float, sigma_max: float, steps: int) -> list[float]:
    """`align_your_steps` for SDXL."""
    return _aligned(ALIGNED_XL, sigma_min, sigma_max, steps)


def _aligned(known: tuple[float, ...], sigma_min: float, sigma_max: float, steps: int) -> list[float]:
    if known[-1] < 0.2 * sigma_min or known[0] > 1.01 * sigma_max:
        raise UserError(
            f"align_your_steps is made for noise levels {known[-1]} to {known[0]}, and this model's are "
            f"{sigma_min:.3g} to {sigma_max:.3g}; choose another spacing, such as karras",
            field="spacing",
        )
    places = np.linspace(0, 1, steps) * (len(known) - 1)
    return np.exp(np.interp(places, np.arange(len(known)), np.log(known))).tolist()


# The beta distribution.


def beta_quantiles(shares: np.ndarray, a: float, b: float) -> np.ndarray:
    """The beta distribution's quantile function, exact to 1e-14."""
    low, high = np.zeros_like(shares), np.ones_like(shares)
    for _ in range(54):
        middle = (low + high) / 2
        below = beta_share(middle, a, b) < shares
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0, 0.0, np.where(shares >= 1, 1.0, (low + high) / 2))


def beta_share(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """The beta distribution's CDF, the regularized incomplete beta function, by its power series around the nearer end
    (DLMF 8.17.7 with 8.17.4)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    mirrored = x > 0.5
    x, first, second = np.where(mirrored, 1 - x, x), np.where(mirrored, b, a), np.where(mirrored, a, b)
    term, total = np.ones_like(x), 1 / first
    for n in range(1, 60):  # x is at most 1/2
        term = term * x * (n - second) / n
        total = total + term / (first + n)
    share = x**first * total / math.exp(log_beta)
    return np.where(mirrored, 1 - share, share)
