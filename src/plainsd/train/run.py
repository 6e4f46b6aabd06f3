"""A training run in a folder: log, curve, samples, checkpoints; and stopping on signals.

RUN/log.jsonl          one line every `log_every` steps, and one a validation
RUN/curve.png          loss and validation over steps
RUN/tensorboard/       the same numbers for TensorBoard, if asked for
RUN/samples/           sample grids
RUN/checkpoints/       the newest `keep` states
"""

import importlib.util
import os
import resource
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from plainsd.errors import UserError
from plainsd.train.checkpoints import checkpoints, save_checkpoint, saving
from plainsd.train.log import Log, draw_curve
from plainsd.train.loop import save_when_due, unsaved
from plainsd.train.options import FitOptions
from plainsd.train.processes import World
from plainsd.train.trainer import Method, Report, Trainer


class Rhythm(NamedTuple):
    log: int = 20
    validate: int = 500
    sample: int = 1000
    results: int | None = None  # steps
    results_epochs: int | None = None  # epochs
    epochs: Fraction = Fraction(1)  # in a step

    def due(self, what: str, step: int, last: int) -> bool:
        return step == last or step % getattr(self, what) == 0

    def marks(self, step: int, last: int) -> list[str]:
        """The marks of intermediate results due now, by steps and by epochs."""
        found = [f"step{step:08d}"] if self.results and step % self.results == 0 else []
        if self.results_epochs:
            over, before = (int(self.epochs * done) // self.results_epochs for done in (step, step - 1))
            found += [f"epoch{over * self.results_epochs:06d}"] if over > before else []
        return found if 0 < step < last else []


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved."""


def run_training(
    method: Method,
    pictures: int | Callable[[int], int],
    options: FitOptions,
    folder: Path,
    rhythm: Rhythm = Rhythm(),
    validate: Callable[[], dict[str, float]] | None = None,
    sample: Callable[[Path], None] | None = None,
    *,
    before: bool = False,
    tensorboard: bool = False,
    world: World = World(),
    save: Callable[[str], None] | None = None,
    claim: Callable[[], None] = lambda: None,
) -> Trainer | None:
    """Train to the end and return the Trainer; None when SIGTERM stopped the run early, and Interrupted when Ctrl-C did
    (its state is saved).

    `validate`, `sample` and `save` (of intermediate results, given their marks) are called with EMA weights, by the
    first process only unless weights are sharded; with `before`, the first two also at step 0. These are called after
    the step's state is saved, and `save` before, so that no resume lacks a result. A sample that fails is reported, and
    the run goes on. `claim` is called after all checks.
    """
    trainer = Trainer(method, options, world)
    diary = Diary(folder, rhythm, options.steps, tensorboard, world.device) if world.first else None
    look = Look(trainer, folder, rhythm, diary, validate, sample, save)
    claim()
    with stopped_by_signals() as stop, closing(diary) if diary else nullcontext():
        if before and not world.any(bool(checkpoints(folder / "checkpoints"))):
            if diary:
                diary.begin(0)
            look(0)
        for report in unsaved(method, pictures, options, folder / "checkpoints", trainer):
            if diary:
                diary.note(report)
            look.save_results(report.step)
            save_when_due(trainer, report, folder / "checkpoints")
            look(report.step)
            if world.any(bool(stop)):
                save_checkpoint(trainer, folder / "checkpoints")
                if signal.SIGINT in stop:
                    raise Interrupted
                return None
    return trainer


@dataclass
class Look:
    """Validates and samples when due: `look(step)`; writes intermediate results: `look.save_results(step)`."""

    trainer: Trainer
    folder: Path
    rhythm: Rhythm
    diary: "Diary | None"
    validate: Callable[[], dict[str, float]] | None
    sample: Callable[[Path], None] | None
    save: Callable[[str], None] | None = None

    @property
    def takes_part(self) -> bool:
        """Only with weights in parts does it take all processes."""
        return self.diary is not None or self.trainer.world.sharded

    def __call__(self, step: int) -> None:
        diary, trainer, last = self.diary, self.trainer, self.trainer.options.steps
        if not self.takes_part:
            return
        if self.validate and self.rhythm.due("validate", step, last):
            found = with_average(trainer, self.validate)
            if diary:
                diary.write({"step": step} | found)
        if diary and step and self.rhythm.due("validate", step, last):
            diary.draw()
        if self.sample and self.rhythm.due("sample", step, last):
            with_average(trainer, partial(self._draw, self.sample, step))

    def _draw(self, sample: Callable[[Path], None], step: int) -> None:
        place = self.folder / "samples" / f"step-{step:08d}.png"
        try:
            with saving("a sample grid"):
                place.parent.mkdir(exist_ok=True)
                sample(place)
        except (UserError, torch.OutOfMemoryError) as error:
            if self.trainer.world.sharded and not isinstance(error, UserError):  # the other processes wait for this one
                raise
            if self.diary:
                why = error.what if isinstance(error, UserError) else "out of memory"
                tqdm.write(f"no samples of step {step}: {why}; the training goes on")  # on a line without the bar

    def save_results(self, step: int) -> None:
        if self.save and self.takes_part:
            for mark in self.rhythm.marks(step, self.trainer.options.steps):
                with saving("a result on the way"):
                    with_average(self.trainer, partial(self.save, mark))


class Diary:
    """A run's output: progress bar, log, TensorBoard, curve."""

    def __init__(self, folder: Path, rhythm: Rhythm, steps: int, tensorboard: bool, device: torch.device):
        with saving("the log"):
            self.log = Log(folder / "log.jsonl")
        self.rhythm, self.steps, self.device = rhythm, steps, device
        self.board_folder = folder / "tensorboard" if tensorboard else None
        self.curve: Path | None = folder / "curve.png"
        self.board: Any = None  # a SummaryWriter
        self.window: list[Report] = []
        self.bar: tqdm | None = None
        if tensorboard:
            check_tensorboard()
        if not importlib.util.find_spec("matplotlib"):
            print(
                "matplotlib is not installed, so there will be no curve.png; pip install 'plainsd[train]'",
                file=sys.stderr,
            )
            self.curve = None

    def note(self, report: Report) -> None:
        if self.bar is None:
            self.bar = self.begin(report.step - 1, report.seconds)
        self.bar.update()
        self.window.append(report)
        if self.rhythm.due("log", report.step, self.steps):
            line = log_line(self.window, self.device)
            self.write(line)
            loss, speed, peak = line["loss"], line["samples_per_s"], line["peak_gb"]
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.3g}/s, {peak:.1f} GB")
            self.window.clear()

    def begin(self, done: int, spent: float = 0.0) -> tqdm:
        """On resume, drops log lines after the checkpoint. `spent`: seconds of the first step."""
        self.log.rewind(done)
        self.bar = bar = tqdm(total=self.steps, initial=done, unit="step", dynamic_ncols=True)
        bar.start_t, bar.last_print_t = bar.start_t - spent, bar.last_print_t - spent
        if self.board_folder:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.board_folder), purge_step=done + 1)
        return bar

    def write(self, line: dict[str, float]) -> None:
        with saving("the log"):
            self.log.write(line)
            if self.board:
                for name, value in line.items():
                    if name not in ("step", "samples"):
                        self.board.add_scalar(name, value, line["step"])
                self.board.flush()

    def close(self) -> None:
        """Ends the bar's line, so that later output starts on a new one."""
        if self.bar is not None:
            self.bar.close()
        if self.board:
            self.board.close()

    def draw(self) -> None:
        if self.curve:
            with saving("the curve"):
                draw_curve(self.log.path, self.curve)


def check_tensorboard() -> None:
    if not importlib.util.find_spec("tensorboard"):
        raise UserError("TensorBoard is not installed; pip install 'plainsd[train]', or leave --tensorboard out")


def with_average(trainer: Trainer, task: Callable):
    """Calls it with EMA weights in place and the networks in eval mode."""
    trainer.method.modules.eval()
    try:
        if trainer.ema is None:
            return task()
        with trainer.ema:
            return task()
    finally:
        trainer.method.modules.train()


@contextmanager
def stopped_by_signals() -> Iterator[list[int]]:
    """Collects SIGTERM (sent by a cluster before preemption) and Ctrl-C in the yielded list. A second Ctrl-C ends the
    process at once."""
    asked: list[int] = []

    def stop(number: int, _) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstopping after this step; once more ends it at once, unsaved\n")  # print may be under way

    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in old.items():
        if handler is not signal.SIG_IGN:  # as it is for background jobs
            signal.signal(number, stop)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def log_line(window: list[Report], device: torch.device) -> dict[str, float]:
    """One log line: means over the window's steps, which have equally many pictures."""
    last, good = window[-1], [r for r in window if r.loss == r.loss]
    names = good[-1].metrics if good else {}
    seconds = sum(r.seconds for r in window)
    before = window[0].samples - window[0].samples // window[0].step
    return {
        "step": last.step,
        "loss": statistics.fmean(r.loss for r in good) if good else float("nan"),
        **{name: statistics.fmean(r.metrics[name] for r in good) for name in names},
        "lr": last.lr,
        "grad_norm": good[-1].grad_norm if good else float("nan"),
        "skipped": last.skipped,
        "samples": last.samples,
        "samples_per_s": (last.samples - before) / seconds,
        "peak_gb": peak_memory(device),
    }


def peak_memory(device: torch.device = torch.device("cpu")) -> float:
    """Peak memory so far in GB (10^9 bytes): of the GPU, or the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
