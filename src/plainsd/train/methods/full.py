"""Method `full`: trains every weight of the UNet, and optionally of the text encoders."""

from torch import nn

from plainsd.pictures.model import StableDiffusion
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
) -> FineTune:
    """The model is changed in place; `plainsd.save` writes it. Its weights should be float32: half precision loses most
    of a small step (train with FitOptions.bf16 for speed)."""
    modules = nn.ModuleDict({"unet": frozen(sd).unet})
    if text_encoder:
        modules.update({f"text_encoder_{i}": encoder for i, encoder in enumerate(sd.text_encoders)})
    modules.requires_grad_(True).train()
    reader = Reader(sd, learns=text_encoder, chunks=chunks)
    return FineTune(sd, examples, modules, reader, objective, prior, prior_weight)
