"""Method `lora`: trains an adapter for frozen weights: LoRA (Hu et al. 2021, arXiv:2106.09685), or LyCORIS' LoHa and
LoKr; adapters/layers.py has the formulas."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plainsd.adapters.lora import inject
from plainsd.pictures.model import StableDiffusion
from plainsd.train.consistency import Distill, to_student
from plainsd.train.data.captions import Reader
from plainsd.train.data.examples import Examples
from plainsd.train.methods.finetune import FineTune, frozen
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective


def lora(
    sd: StableDiffusion,
    examples: Examples,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = "attention",
    conv: bool = False,
    dora: bool = False,
    kind: str = "lora",
    factor: int | None = None,
    text_encoder: bool = False,
    seed: int = 0,
    objective: Objective = PLAIN_OBJECTIVE,
    chunks: int = 1,
    prior: Examples | None = None,
    prior_weight: float = 1.0,
    distill: Distill | None = None,
) -> FineTune:
    """The model gets a new LoRA, "trained"; `plainsd.adapters.lora.save_lora` writes it. The model may be bfloat16.
    With `distill` it becomes an LCM-LoRA: the teacher is the model without it."""
    frozen(sd)
    if distill:
        to_student(sd, distill, objective, text_encoder=text_encoder)
    added = inject(
        sd,
        rank,
        alpha,
        targets,
        conv=conv,
        dora=dora,
        text=text_encoder,
        kind=kind,
        factor=factor,
        generator=torch.Generator().manual_seed(seed),
    )
    modules = nn.ModuleDict({"lora": nn.ModuleList(added.adapters.values())})
    reader = Reader(sd, learns=text_encoder, chunks=chunks)

    def teacher(*inputs: Any) -> Tensor:
        with added.switched_off():
            return sd.unet(*inputs)

    method = FineTune(sd, examples, modules, reader, objective, prior, prior_weight)
    return replace(method, distill=distill, teacher=teacher) if distill else method
