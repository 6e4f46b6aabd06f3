"""The one training loop: accumulate, clip, step, average, save.

`fit` is a generator that yields a Report a step; progress bars, sample pictures and stopping live outside it. All it
needs of a method is `modules` (whose parameters move) and `loss(picks)`. Every random number is a function of (seed,
position), so a run that was killed goes on from its last checkpoint as if nothing had happened, bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from plainsd.errors import UserError
from plainsd.train.checkpoints import checkpoints, restore, save_checkpoint, sweep
from plainsd.train.options import FitOptions
from plainsd.train.order import Order, Pick, random
from plainsd.train.trainer import Method, Report, Trainer, learning_rate


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
