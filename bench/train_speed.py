"""Training a small UNet from nothing: our network and loop's arithmetic, and diffusers' network driven plainly.

    python bench/train_speed.py [--steps 12] [--batch 64]

64-128-160 channels on latents of 4x16x16 with one ResBlock a level, and 24 text states of 256, in bfloat16 (autocast
over float32 weights). Both sides begin with the same weights and take the same steps on the same numbers: squared
error, backward, the gradient's norm clipped at 1, AdamW at 1e-3. They take turns, step by step, in one process. Printed
are pictures a second by the least and the median step, and what both losses came to.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import plainsd
from plainsd.models.unet import UNet, UNetConfig
from plainsd.reports.bench import processor
from plainsd.speed.training import autocast, trained_faster
from plainsd.train.optimizer import make_optimizer
from plainsd.train.options import FitOptions

SMALL = UNetConfig(channels=(64, 128, 160), depth=(1, 1, 1), heads=(2, 4, 5), layers=1, context=256, groups=16)
LR = 1e-3


def networks() -> tuple[UNet, nn.Module]:
    """The same weights twice: ours, and as diffusers reads them from our files."""
    torch.manual_seed(0)
    sd = plainsd.load(device="cpu", dtype="float32")
    sd.unet = UNet(SMALL)
    sd.variant = replace(sd.variant, unet=SMALL)
    with tempfile.TemporaryDirectory() as folder:
        plainsd.save(sd, Path(folder) / "model")
        theirs = UNet2DConditionModel.from_pretrained(Path(folder) / "model" / "unet")
    return sd.unet, theirs


def stepper(unet: nn.Module, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> Callable[..., float]:
    def step(*numbers: Tensor) -> float:
        value = loss(*numbers)
        value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def sides() -> dict[str, Callable[..., float]]:
    ours, theirs = (unet.train().to(memory_format=torch.channels_last) for unet in networks())

    def our_loss(x: Tensor, timesteps: Tensor, context: Tensor, target: Tensor) -> Tensor:
        with autocast("cpu", True), trained_faster(ours):
            return F.mse_loss(ours(x, timesteps, context).float(), target)

    def their_loss(x: Tensor, timesteps: Tensor, context: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(theirs(x, timesteps, context, return_dict=False)[0].float(), target)

    plain = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.01)
    own = make_optimizer(list(ours.parameters()), FitOptions(steps=1, lr=LR))
    return {"diffusers": stepper(theirs, their_loss, plain), "plainsd": stepper(ours, our_loss, own)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12, help="of each side, after two that do not count")
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()
    seconds, losses, steps = {}, {}, sides()
    for number in range(asked.steps + 2):
        x, target = torch.randn(2, asked.batch, SMALL.in_channels, 16, 16)
        numbers = (
            x.contiguous(memory_format=torch.channels_last),
            torch.randint(1000, (asked.batch,)),
            torch.randn(asked.batch, 24, SMALL.context),
            target,
        )
        for side, step in steps.items():
            began = time.perf_counter()
            losses.setdefault(side, []).append(step(*numbers))
            if number >= 2:
                seconds.setdefault(side, []).append(time.perf_counter() - began)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16, batch {asked.batch}")
    for side, times in seconds.items():
        print(
            f"{side:<12}{asked.batch / min(times):7.1f} pictures a second "
            f"({asked.batch / statistics.median(times):.1f} "
            f"by the median step); loss {losses[side][0]:.4f}, after {len(losses[side])} steps {losses[side][-1]:.4f}"
        )
    print(f"plainsd / diffusers: {min(seconds['diffusers']) / min(seconds['plainsd']):.2f}")


if __name__ == "__main__":
    main()
