"""Latent consistency distillation: a student learns to jump to the end of its teacher's guided trajectories.

Luo et al. 2023 (arXiv:2310.04378), algorithm 1; as a LoRA, Luo et al. 2023 (arXiv:2311.05556). The table is cut into
`steps` of k timesteps, 50 of 20: those that the lcm sampler visits. For a picture noised to timestep t + k

    z         = one DDIM step of the teacher from t + k down to t, guided: uncond + W (cond - uncond)
    loss      = d(f(z_t+k, t + k), f(z, t))          f: diffusion/consistency.py; no gradients through f(z, t)
    d(a, b)   = mean of sqrt((a - b)^2 + c^2) - c    pseudo-Huber (Song and Dhariwal 2023, arXiv:2310.14189)

W is our guidance scale, the paper's w + 1, and one number, so that the student needs no embedding of it. The lowest
step ends at noise level 0, where f is the identity: its target is the teacher's estimate itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plainsd.diffusion.consistency import clean_estimate, jump
from plainsd.diffusion.schedule import TERMINAL_ALPHA_BAR, NoiseSchedule
from plainsd.errors import UserError
from plainsd.models.variants import LCM
from plainsd.pictures.model import StableDiffusion
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective

Network = Callable[..., Tensor]  # called as the UNet is
CaptionStates = tuple[Tensor, Tensor | None]  # context (B, M, D) and SDXL's vector (B, V)

STUDENT = LCM | {"guidance": 1.0, "spacing": None}  # how a student is drawn: lcm, 4 steps, no unconditional pass


@dataclass(frozen=True)
class Distill:
    """Options of the distillation."""

    guidance: float  # W, the teacher's
    steps: int = 50  # DDIM steps that the table is cut into
    huber: float = 0.001  # c of the distance

    def __post_init__(self):
        if not 1 <= self.guidance < math.inf:
            raise UserError(
                f"distill {self.guidance:g} is out of range; give the teacher's guidance scale, 1 or more, such as 7.5",
                field="distill",
                value=self.guidance,
            )
        if not 0 < self.huber < math.inf:
            raise UserError(f"huber {self.huber} is out of range; give a number above 0")


def to_student(sd: StableDiffusion, distill: Distill, objective: Objective, *, text_encoder: bool) -> None:
    """Gives the model the settings that its student is drawn with. UserError where it cannot be a teacher."""
    if objective != PLAIN_OBJECTIVE or text_encoder:
        raise UserError("distillation has a loss of its own, for the UNet; leave the objective and text_encoder out")
    check_teacher(sd, distill)
    sd.variant = replace(sd.variant, **STUDENT)


def check_teacher(sd: StableDiffusion, distill: Distill) -> None:
    """A UserError where a model cannot be a teacher."""
    schedule = sd.schedule
    assert isinstance(schedule, NoiseSchedule)  # `frozen` takes no other
    if sd.unet.config.guidance_dim is not None:
        raise UserError(
            "this model is a distilled one, which reads the guidance scale; distill the model it was made of"
        )
    if sd.prediction == "epsilon" and schedule.alphas_cumprod[-1] <= TERMINAL_ALPHA_BAR:
        raise UserError(
            "this model predicts epsilon, and its table ends at zero SNR, where epsilon says nothing of the picture; "
            "distill a model that predicts v, or give --zero-snr off"
        )
    if distill.steps < 1 or len(schedule) % distill.steps:
        raise UserError(
            f"distill_steps {distill.steps} does not divide the {len(schedule)} timesteps of the model's table; "
            "give 50, which the lcm sampler knows",
            field="distill_steps",
            value=distill.steps,
        )


def consistency_errors(
    student: Network,
    teacher: Network,
    schedule: NoiseSchedule,
    prediction: str,
    x0: Tensor,
    noise: Tensor,
    numbers: Tensor,
    cond: CaptionStates,
    uncond: CaptionStates,
    *,
    distill: Distill,
    mask: Tensor | None = None,
) -> Tensor:
    """The distance for each picture, (B,): the mean over its positions, weighted by the mask.

    numbers: (B,) the step that each picture is at, counted from 0, the clean end. x0, noise: (B, L, h, w).
    """
    device, stride = cond[0].device, len(schedule) // distill.steps
    start = (numbers + 1) * stride - 1
    end = (start - stride).clamp(min=0)
    sigma_end = torch.where(numbers > 0, schedule.sigmas[end], 0.0)

    def per_sample(values: Tensor) -> Tensor:
        return values.to(device, x0.dtype).view(-1, 1, 1, 1)

    def output(network: Network, x: Tensor, sigma: Tensor, timesteps: Tensor, text: CaptionStates) -> Tensor:
        z = (x / (1 + sigma**2).sqrt()).contiguous(memory_format=torch.channels_last)
        return network(z, timesteps.to(device), *text).to(x.dtype)

    sigma, sigma_next = per_sample(schedule.sigmas[start]), per_sample(sigma_end)
    x = x0.to(device) + sigma * noise.to(device)
    found = jump(prediction, x, output(student, x, sigma, start, cond), sigma, per_sample(start))
    with torch.no_grad():
        guided = output(teacher, x, sigma, start, cond)
        if distill.guidance != 1:
            without = output(teacher, x, sigma, start, uncond)
            guided = without + distill.guidance * (guided - without)
        clean = clean_estimate(prediction, x, guided, sigma)
        x = clean + (x - clean) * (sigma_next / sigma)
        target = jump(prediction, x, output(student, x, sigma_next, end, cond), sigma_next, per_sample(end))
    each = ((found - target) ** 2 + distill.huber**2).sqrt() - distill.huber
    if mask is not None:
        each = each * mask.to(device)
    return each.flatten(1).mean(1)
