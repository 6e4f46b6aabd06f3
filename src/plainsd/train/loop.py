"""The one training loop: accumulate, clip, step, average, save.

`fit` is a generator that yields a Report a step; progress bars, sample pictures and stopping live outside it. All it needs
of a method is `modules` (whose parameters move) and `loss(picks)`. Every random number is a function of (seed, position),
so a run that was killed goes on from its last checkpoint as if nothing had happened, bit for bit.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plainsd.errors import UserError
from plainsd.train.data import Order, random


@dataclass(frozen=True)
class FitOptions:
    steps: int
    batch: int = 64                  # pictures a micro-batch
    accumulate: int = 1              # micro-batches a step
    lr: float = 1e-4
    warmup: int = 200                # steps of linear warm-up
    cosine: bool = True              # then down to 1 % of lr along a cosine; else constant
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0                # largest norm of the whole gradient
    ema: float = 0.999               # 0: no average
    bf16: bool = False               # autocast; the weights and their update stay float32
    seed: int = 0
    save_every: int = 1000
    keep: int = 2                    # checkpoints kept
    max_skipped: int = 20            # non-finite steps in a row before giving up


class Pick(NamedTuple):
    """One picture of a batch, with the random numbers that are its own."""

    index: int                       # of the picture in the data
    position: int                    # in the run: 0, 1, 2, ...
    generator: torch.Generator


class Report(NamedTuple):
    step: int                        # steps done
    loss: float                      # mean over the pictures of this step
    metrics: dict[str, float]
    lr: float
    grad_norm: float
    skipped: int                     # steps not taken, since the loss or gradient was not finite
    samples: int                     # pictures seen, this step included
    seconds: float                   # this step's


class Method(Protocol):
    """What is trained."""

    modules: nn.ModuleDict           # all their parameters that require a gradient move

    def loss(self, picks: list[Pick]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the picks, and numbers to log. Uses no randomness but the picks' own."""


class Ema:
    """Exponential moving average of parameters: the weights that are sampled with and shipped.

    Early on the average is short, (1 + step) / (10 + step), so that it forgets the random start.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.decay = decay
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def __enter__(self) -> "Ema":
        """Within `with ema:` the parameters hold their averages."""
        self._kept = [p.data for p in self.parameters]
        for p, value in zip(self.parameters, self.values, strict=True):
            p.data = value
        return self

    def __exit__(self, *_) -> None:
        for p, kept in zip(self.parameters, self._kept, strict=True):
            p.data = kept
        del self._kept


def learning_rate(options: FitOptions, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then a cosine down to 1 % (Loshchilov and Hutter 2016, arXiv:1608.03983)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if not options.cosine:
        return options.lr
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Trainer:
    """The state of a run: parameters, their average, the optimizer, the step."""

    def __init__(self, method: Method, options: FitOptions):
        self.method, self.options = method, options
        self.parameters = [p for p in method.modules.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]         # norms and biases are not pulled to zero
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=options.lr, betas=options.betas, eps=options.eps,
        )
        self.ema = Ema(self.parameters, options.ema) if options.ema else None
        self.step = self.skipped = 0

    def state(self) -> dict:
        return {
            "step": self.step,
            "skipped": self.skipped,
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema.values if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict) -> None:
        shapes = [tuple(p.shape) for p in self.parameters]
        if [tuple(p.shape) for p in state["parameters"]] != shapes:
            raise UserError("the checkpoint to resume is of another model; give a fresh --out or the same options")
        with torch.no_grad():
            for p, value in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(value)
            if self.ema:
                for p, value in zip(self.ema.values, state["ema"], strict=True):
                    p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped = state["step"], state["skipped"]

    def update(self, picks: list[Pick]) -> tuple[float, dict[str, float], float] | None:
        """One optimizer step over all picks, micro-batch by micro-batch. None if the numbers were not finite."""
        options, total, metrics = self.options, 0.0, {}
        for start in range(0, len(picks), options.batch):
            part = picks[start : start + options.batch]
            share = len(part) / len(picks)
            with autocast(self.parameters[0].device.type, options.bf16):
                loss, numbers = self.method.loss(part)
                (loss * share).backward()
            total += loss.item() * share
            for name, value in numbers.items():
                metrics[name] = metrics.get(name, 0.0) + float(value) * share
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip).item()
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(options, self.step)
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        return (total, metrics, norm) if finite else None


def autocast(device: str, bf16: bool) -> ExitStack:
    """bf16 arithmetic where asked for. On a CPU attention is written out: the flash kernel's backward pass is slower."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=bf16))
    if device == "cpu":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def fit(method: Method, count: int, options: FitOptions, folder: Path | None = None,
        trainer: Trainer | None = None) -> Iterator[Report]:
    """Train `method` on pictures 0 .. count - 1 until `options.steps`. Resumes from, and saves to, `folder`."""
    trainer = trainer or Trainer(method, options)
    if folder and (latest := checkpoints(folder)):
        trainer.restore(torch.load(latest[-1] / "state.pt", map_location="cpu", weights_only=True))
    order, size, in_a_row = Order(count, options.seed), options.batch * options.accumulate, 0
    while trainer.step < options.steps:
        began = time.perf_counter()
        positions = range(trainer.step * size, (trainer.step + 1) * size)
        done = trainer.update([Pick(order(p), p, random(options.seed, 2, p)) for p in positions])
        trainer.step += 1
        trainer.skipped += done is None
        in_a_row = in_a_row + 1 if done is None else 0
        if in_a_row >= options.max_skipped:
            raise UserError(f"the loss was not finite {in_a_row} steps in a row, up to step {trainer.step}; lower the "
                            f"learning rate (now {options.lr:g}); the last good checkpoint is kept")
        total, metrics, norm = done or (math.nan, {}, math.nan)
        last = trainer.step == options.steps
        if folder and not in_a_row and (last or trainer.step % options.save_every == 0):
            save_checkpoint(trainer, folder)
        yield Report(trainer.step, total, metrics, learning_rate(options, trainer.step - 1), norm, trainer.skipped,
                     trainer.step * size, time.perf_counter() - began)


# ---- checkpoints: a folder each, whole or absent


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. A folder gets its name only after all its bytes are on the disk."""
    return sorted(folder.glob("step-*[0-9]"))


def save_checkpoint(trainer: Trainer, folder: Path) -> Path:
    place = folder / f"step-{trainer.step:08d}"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".saving-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        with open(unfinished / "state.pt", "wb") as file:
            torch.save(trainer.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(folder)[: -trainer.options.keep]:
        shutil.rmtree(old)
    return place
