"""The one training loop: accumulate, clip, step, average, save.

`fit` is a generator that yields a Report a step; progress bars, sample pictures and stopping live outside it. All it
needs of a method is `modules` (whose parameters move) and `loss(picks)`. Every random number is a function of (seed,
position), so a run that was killed goes on from its last checkpoint as if nothing had happened, bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from plainsd.errors import UserError
from plainsd.train.checkpoints import checkpoints, restore, save_checkpoint, sweep
from plainsd.train.optimizer import make_optimizer, set_rate
from plainsd.train.order import Order, random
from plainsd.train.shard import whole
from plainsd.train.processes import World


@dataclass(frozen=True)
class FitOptions:
    steps: int
    batch: int = 64  # pictures a micro-batch
    accumulate: int = 1  # micro-batches a step, over all processes
    lr: float = 1e-4
    warmup: int = 200  # steps of linear warm-up
    cosine: bool = True  # then down to 1 % of lr along a cosine; else constant
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the whole gradient
    ema: float = 0.999  # 0: no average
    bf16: bool = False  # autocast; the weights and their update stay float32
    adam8bit: bool = False  # AdamW's moments in 8 bits, by torchao
    long_attention: bool = False  # on a CPU: attention maps that are never whole in memory, for large pictures
    seed: int = 0
    save_every: int = 1000
    keep: int = 2  # checkpoints kept
    max_skipped: int = 20  # non-finite steps in a row before giving up


class Pick(NamedTuple):
    """One picture of a batch, with the random numbers that are its own."""

    index: int  # of the picture in the data
    position: int  # in the run: 0, 1, 2, ...
    generator: torch.Generator


class Report(NamedTuple):
    step: int  # steps done
    loss: float  # mean over the pictures of this step
    metrics: dict[str, float]
    lr: float
    grad_norm: float
    skipped: int  # steps not taken, since the loss or gradient was not finite
    samples: int  # pictures seen, this step included
    seconds: float  # this step's


class Method(Protocol):
    """What is trained."""

    modules: nn.ModuleDict  # all their parameters that require a gradient move

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
        self._exchange()
        return self

    def __exit__(self, *_) -> None:
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for p, value in zip(self.parameters, self.values, strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)


def learning_rate(options: FitOptions, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then a cosine down to 1 % (Loshchilov and Hutter 2016, arXiv:1608.03983)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if not options.cosine:
        return options.lr
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Loss(nn.Module):
    """A method's loss as a module, whose parameters are those that move."""

    def __init__(self, method: Method):
        super().__init__()
        self.modules_that_move, self.loss = method.modules, method.loss

    def forward(self, picks: list[Pick]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(picks)


class Trainer:
    """The state of a run: parameters, their average, the optimizer, the step."""

    def __init__(self, method: Method, options: FitOptions, world: World = World()):
        world.check(options.batch, options.accumulate)
        self.method, self.options, self.world = method, options, world
        self.parameters = [p for p in method.modules.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, options)
        self.loss = world.replicated(Loss(method))
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
        averaged = state["ema"] is not None
        if [tuple(p.shape) for p in state["parameters"]] != shapes or averaged != (self.ema is not None):
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
        options, sums = self.options, {"": 0.0}
        parts = [picks[start : start + options.batch] for start in range(0, len(picks), options.batch)]
        parts = self.world.share(parts)
        for number, part in enumerate(parts, 1):
            share = len(part) / len(picks)
            with self.world.silent(self.loss, number == len(parts)), self._arithmetic():
                loss, numbers = self.loss(part)
                (loss * (share * self.world.size)).backward()
            for name, value in {"": loss, **numbers}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        total, *others = self.world.total(list(sums.values()))
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, options.clip)).item()
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            set_rate(self.optimizer, learning_rate(options, self.step))
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        return (total, dict(zip([*sums][1:], others, strict=True)), norm) if finite else None

    def _arithmetic(self) -> ExitStack:
        options = self.options
        return autocast(self.parameters[0].device.type, options.bf16, long_attention=options.long_attention)


def autocast(device: str, bf16: bool, *, long_attention: bool = False) -> ExitStack:
    """bf16 arithmetic where asked for. On a CPU attention is written out: the flash kernel's backward pass is slower,
    and is worth it only where attention maps of N x N positions would fill the memory."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=bf16))
    if device == "cpu" and not long_attention:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(WrittenOut())
    return stack


class WrittenOut(TorchFunctionMode):
    """Attention without a causal mask as softmax(q k^T / sqrt(d)) v, without the care that PyTorch's own takes for rows
    that are masked as a whole: a UNet's training step of 64 pictures took 0.62 s with it, and 0.81 s without."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v = args
        maps = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)  # (B, heads, N, M)
        return maps.to(v.dtype) @ v


def fit(
    method: Method,
    pictures: int | Callable[[int], int],
    options: FitOptions,
    folder: Path | None = None,
    trainer: Trainer | None = None,
) -> Iterator[Report]:
    """Train `method` until `options.steps`. Resumes from, and saves to, `folder`.

    `pictures`: how many there are, which are then shown in a new order every epoch; or an order, a function from
    position to picture. A step's state is saved after its report has been taken.
    """
    trainer = trainer or Trainer(method, options)
    folder = Path(folder) if folder else None
    if folder:
        if trainer.world.first:
            sweep(folder)
        restore(trainer, folder)
    order = pictures if callable(pictures) else Order(pictures, options.seed)
    size, in_a_row = options.batch * options.accumulate, 0
    while trainer.step < options.steps:
        began = time.perf_counter()
        positions = range(trainer.step * size, (trainer.step + 1) * size)
        done = trainer.update([Pick(order(p), p, random(options.seed, 2, p)) for p in positions])
        trainer.step += 1
        trainer.skipped += done is None
        in_a_row = in_a_row + 1 if done is None else 0
        if in_a_row >= options.max_skipped:
            kept = "; the last good state is kept" if folder and checkpoints(folder) else ""
            raise UserError(
                f"the loss was not finite {in_a_row} steps in a row, up to step {trainer.step}; lower the "
                f"learning rate (now {options.lr:g}){kept}"
            )
        total, metrics, norm = done or (math.nan, {}, math.nan)
        yield Report(
            trainer.step,
            total,
            metrics,
            learning_rate(options, trainer.step - 1),
            norm,
            trainer.skipped,
            trainer.step * size,
            time.perf_counter() - began,
        )
        last = trainer.step == options.steps
        if folder and not in_a_row and (last or trainer.step % options.save_every == 0):
            save_checkpoint(trainer, folder)  # after the report: no log lacks a step that is saved
