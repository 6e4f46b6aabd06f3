"""The state of a run, and one step of it: parameters, their moving average, the optimizer."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from plainsd.errors import UserError
from plainsd.speed.training import autocast
from plainsd.train.optimizer import in_groups, make_optimizer, set_rate
from plainsd.train.options import FitOptions
from plainsd.train.order import Pick
from plainsd.train.processes import World
from plainsd.train.shard import whole_tensor


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
    """A training method."""

    modules: nn.ModuleDict  # all parameters that require gradients are trained

    def loss(self, picks: list[Pick]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the picks, and metrics to log. All randomness comes from the picks."""


class Ema:
    """Exponential moving average of parameters: the weights used for samples and saved.

    Early on the decay is (1 + step) / (10 + step), so that the average forgets the initialisation.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.decay = decay
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def __enter__(self) -> Ema:
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
    """At step 0, 1, ...: linear warm-up, then cosine decay to 1 % (Loshchilov and Hutter 2016, arXiv:1608.03983)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if not options.cosine:
        return options.lr
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Loss(nn.Module):
    """A method's loss as a module with the trainable parameters, for DDP."""

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
        self.optimizer = make_optimizer(method.modules, options)
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

    def load_state(self, state: dict) -> None:
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
        self.optimizer.load_state_dict(in_groups(state["optimizer"], self.optimizer, self.method.modules))
        self.step, self.skipped = state["step"], state["skipped"]

    def update(self, picks: list[Pick]) -> tuple[float, dict[str, float], float] | None:
        """One optimizer step over all picks, micro-batch by micro-batch. None if loss or gradient was not finite."""
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
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, options.clip)).item()
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
