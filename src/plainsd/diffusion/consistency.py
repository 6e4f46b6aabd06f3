"""Latent consistency models: one call of the network jumps from any noise level to the clean latent.

The consistency function is the same all along a solution of the probability-flow ODE, and the identity at its clean end
(Song et al. 2023, arXiv:2303.01469, equation 5; of latents Luo et al. 2023, arXiv:2310.04378, section 4.1):

    f(z, t) = c_skip(t) z + c_out(t) x0(z, t)         c_skip(0) = 1, c_out(0) = 0

z is the network's input, and x0 the estimate that its output implies, whatever it predicts.

Shapes: x, output (B, L, h, w); sigma, timestep (B, 1, 1, 1).
"""

import torch
from torch import Tensor

from plainsd.diffusion.denoiser import x0_from

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out: s^2 / (u^2 + s^2) and u / sqrt(u^2 + s^2), with u ten times the timestep and s = 0.5. From
    timestep 19 on c_skip is below 7e-6: the lcm sampler leaves it out."""
    scaled = TIMESTEP_SCALING * timestep
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / square.sqrt()


def jump(prediction: str, x: Tensor, output: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
    """f, of x = x0 + sigma * noise and the network's output for it."""
    c_skip, c_out = boundary_scalings(timestep)
    return c_skip * (x / (1 + sigma**2).sqrt()) + c_out * clean_estimate(prediction, x, output, sigma)


def clean_estimate(prediction: str, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
    """`x0_from`, each sample at its own level."""
    samples = zip(x.split(1), output.split(1), sigma.flatten().tolist(), strict=True)
    return torch.cat([x0_from(prediction, *sample) for sample in samples])
