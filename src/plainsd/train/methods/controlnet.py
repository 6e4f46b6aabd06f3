"""Method `controlnet`: the model stays, and a copy of its way down learns to read a map beside the latent (Zhang et al.
2023, arXiv:2302.05543). The convolutions through which it speaks begin at zero, so that the first step sees the model's
own loss."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from plainsd.errors import UserError
from plainsd.models.control import ControlNet, control_of, hint_widths
from plainsd.models.unet import UNet
from plainsd.pictures.control_checks import mismatch
from plainsd.pictures.model import StableDiffusion
from plainsd.train.data.captions import Reader
from plainsd.train.data.examples import Examples
from plainsd.train.data.pictures import PictureSet
from plainsd.train.methods.finetune import FineTune, frozen
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective


def controlnet(
    sd: StableDiffusion,
    examples: Examples,
    net: ControlNet | None = None,
    *,
    seed: int = 0,
    objective: Objective = PLAIN_OBJECTIVE,
    chunks: int = 1,
) -> FineTune:
    """`modules["net"]` is the net; `plainsd.save_control` writes it. `net`: one to go on from, changed in place; None:
    a new one."""
    check_maps(examples.pictures)
    frozen(sd)
    if net is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = control_of(sd.unet, hint_widths(sd.vae.config.factor)).float()
    else:
        check_start(net, sd)
    modules = nn.ModuleDict({"net": net}).to(sd.device).requires_grad_(True).train()
    reader = Reader(sd, chunks=chunks)
    examples = replace(examples, mapped=True)
    return FineTune(sd, examples, modules, reader, objective, network=partial(followed, sd.unet, net))


def check_start(net: ControlNet, sd: StableDiffusion) -> None:
    """A UserError where training cannot go on from a net."""
    if reason := mismatch(net, sd):
        raise UserError(f"the ControlNet to go on from does not fit the model: {reason}")
    if net.control.kinds:
        raise UserError("a union net is for several kinds of maps, and training knows those for one; give another")


def check_maps(pictures: PictureSet, kind: str = "pictures") -> None:
    """A UserError where some have no map. `kind`: what they are called there."""
    if bare := sum(not item.mapped for item in pictures.items):
        raise UserError(
            f"{bare} of {len(pictures.items)} {kind} have no map; put one beside each, cat.cond.png for cat.png, or "
            "name it in a column `cond`"
        )


def followed(unet: UNet, net: ControlNet, maps: Tensor | None) -> Callable[..., Tensor]:
    """The UNet with a net that reads these maps, (B, 3, H, W)."""
    assert maps is not None  # `controlnet` has seen to it

    def call(x: Tensor, timestep: Tensor, context: Tensor, vector: Tensor | None) -> Tensor:
        hint = net.read([maps.to(x)])
        return unet(x, timestep, context, vector, residuals=net(x, timestep, context, hint, vector))

    return call
