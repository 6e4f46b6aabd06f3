"""The training loop: accumulate gradients, clip, step, update the EMA, save.

`fit` is a generator that yields a Report after each step; progress bars, samples and stopping live outside it. A method
provides `modules` (with the trainable parameters) and `loss(picks)`. Every random number is a function of (seed,
position), so a killed run resumes from its last checkpoint bit for bit.
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

    `pictures`: their number (shuffled anew every epoch), or an order, a function from position to picture. The
    checkpoint of a step is saved after its report was consumed.
    """
    trainer = trainer or Trainer(method, options)
    folder = Path(folder) if folder else None
    for report in unsaved(method, pictures, options, folder, trainer):
        yield report
        if folder:
            save_when_due(trainer, report, folder)  # after the report, so that the log has every saved step


def save_when_due(trainer: Trainer, report: Report, folder: Path) -> None:
    """Saves the state after a step, every `save_every` steps and after the last; not after one that was skipped."""
    last = report.step == trainer.options.steps
    if not math.isnan(report.loss) and (last or report.step % trainer.options.save_every == 0):
        save_checkpoint(trainer, folder)


def check_same_step(trainer: Trainer) -> None:
    """UserError where the processes found different states."""
    world, step = trainer.world, float(trainer.step)
    if world.any(world.total([step])[0] != step * world.size):
        raise UserError("the processes resume from different states; give them one --out, on a disk that all share")


def unsaved(
    method: Method,
    pictures: int | Callable[[int], int],
    options: FitOptions,
    folder: Path | None,
    trainer: Trainer,
) -> Iterator[Report]:
    """The steps of `fit`, for a caller who saves their states."""
    if folder:
        if trainer.world.first:
            sweep(folder)
        restore(trainer, folder)
        check_same_step(trainer)
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
