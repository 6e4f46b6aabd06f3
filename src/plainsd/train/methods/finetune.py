"""Fine-tuning a loaded model: the loss of the methods `full`, `lora`, `inversion`, `controlnet`. They differ in what
moves. With a teacher the loss is that of train/consistency.py instead.

The VAE is frozen and has encoded every picture once; text encoders are frozen, and in eval, unless they are what
learns. With a prior set (DreamBooth, Ruiz et al. 2022, arXiv:2208.12242, equation 2) each picture comes with one of the
prior's, which reminds the model of what it knew.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule
from plainsd.errors import UserError
from plainsd.pictures.model import StableDiffusion
from plainsd.train.consistency import Distill, Network, consistency_errors
from plainsd.train.data.captions import Reader
from plainsd.train.data.examples import ExampleBatch, Examples
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective, errors
from plainsd.train.order import Pick


@dataclass
class FineTune:
    """A method for `fit`: all parameters in `modules` that require gradients are trained."""

    sd: StableDiffusion
    examples: Examples
    modules: nn.ModuleDict
    reader: Reader
    objective: Objective = PLAIN_OBJECTIVE
    prior: Examples | None = None  # class pictures with class captions
    prior_weight: float = 1.0
    network: Callable[[Tensor | None], Callable[..., Tensor]] | None = (
        None  # from maps to what is called as the UNet is
    )
    distill: Distill | None = None  # consistency distillation; timesteps are then the steps of it
    teacher: Network | None = None  # of the distillation

    @property
    def timesteps(self) -> int:
        """How many there are to draw from."""
        return self.distill.steps if self.distill else len(self.sd.schedule)

    def loss(self, picks: list[Pick]) -> tuple[Tensor, dict[str, Tensor]]:
        steps = self.timesteps
        loss = self.errors(self.examples.draw(picks, steps, self.objective), self.objective).mean()
        if self.prior is None:
            return loss, {}
        drawn = [
            Pick(int(torch.randint(len(self.prior.pictures), (), generator=p.generator)), p.position, p.generator)
            for p in picks
        ]
        prior = self.errors(self.prior.draw(drawn, steps, self.objective), self.objective).mean()
        return loss + self.prior_weight * prior, {"own": loss.detach(), "prior": prior.detach()}

    def errors(self, batch: ExampleBatch, objective: Objective = PLAIN_OBJECTIVE) -> Tensor:
        """The error of each picture's prediction: (B,)."""
        assert isinstance(self.sd.schedule, NoiseSchedule)  # `frozen` takes no other
        context, vector = self.reader(batch.captions, batch.sizes)
        if self.distill and self.teacher:
            return consistency_errors(
                self.sd.unet,
                self.teacher,
                self.sd.schedule,
                self.sd.prediction,
                batch.x0,
                batch.noise.target,
                batch.timesteps,
                (context, vector),
                self.reader([""] * len(batch.captions), batch.sizes),
                distill=self.distill,
                mask=batch.mask,
            )
        return errors(
            self.network(batch.maps) if self.network else self.sd.unet,
            self.sd.schedule,
            self.sd.prediction,
            batch.x0,
            batch.noise,
            batch.timesteps,
            context,
            vector,
            objective=objective,
            mask=batch.mask,
        )

    @torch.no_grad()
    def validate(self, held_out: Examples, batch: int = 8) -> dict[str, float]:
        """The plain loss, or the distillation's, on held-out pictures, always with the same noise and the same
        timesteps, spread evenly."""
        half = self.sd.dtype == torch.bfloat16  # a frozen base in half precision
        held_out = replace(held_out, mapped=self.examples.mapped)
        with torch.autocast(self.sd.device.type, torch.bfloat16, enabled=half):
            found = [self.errors(fixed).cpu() for fixed in held_out.fixed(self.timesteps, batch)]
        return {"validation": torch.cat(found).mean().item()}


def frozen(sd: StableDiffusion) -> StableDiffusion:
    """Freezes the whole model; methods then turn on gradients of what they train."""
    if sd.unet.config.in_channels != sd.vae.config.latent_channels:
        raise UserError(
            "this model reads a mask or a picture beside the latents, which the training pictures do not have; "
            "fine-tune the model it was made from"
        )
    if isinstance(sd.schedule, EDMSchedule):
        raise UserError(
            "this model was trained at all noise levels (EDM), as its scheduler says, and fine-tuning knows those of a "
            "table only; choose a base that predicts epsilon or v"
        )
    network: nn.Module
    for network in (sd.unet, sd.vae, *sd.text_encoders):
        network.requires_grad_(False).eval()
    return sd
