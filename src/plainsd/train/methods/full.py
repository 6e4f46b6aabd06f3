"""Method `full`: trains every weight of the UNet, and optionally of the text encoders."""

from copy import deepcopy
from dataclasses import replace

from torch import nn

from plainsd.pictures.model import StableDiffusion
from plainsd.train.consistency import Distill, to_student
from plainsd.train.data.captions import Reader
from plainsd.train.data.examples import Examples
from plainsd.train.methods.finetune import FineTune, frozen
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective


def full(
    sd: StableDiffusion,
    examples: Examples,
    *,
    text_encoder: bool = False,
    objective: Objective = PLAIN_OBJECTIVE,
    chunks: int = 1,
    prior: Examples | None = None,
    prior_weight: float = 1.0,
    distill: Distill | None = None,
) -> FineTune:
    """The model is changed in place; `plainsd.save` writes it. Its weights should be float32: half precision loses most
    of a small step (train with FitOptions.bf16 for speed). With `distill` it becomes a latent consistency model: the
    teacher is a copy of the UNet as it is now."""
    modules, teacher = nn.ModuleDict({"unet": frozen(sd).unet}), None
    if distill:
        to_student(sd, distill, objective, text_encoder=text_encoder)
        teacher = deepcopy(sd.unet)
    if text_encoder:
        modules.update({f"text_encoder_{i}": encoder for i, encoder in enumerate(sd.text_encoders)})
    modules.requires_grad_(True).train()
    reader = Reader(sd, learns=text_encoder, chunks=chunks)
    method = FineTune(sd, examples, modules, reader, objective, prior, prior_weight)
    return replace(method, distill=distill, teacher=teacher)
