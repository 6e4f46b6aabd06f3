"""A training run in a folder: log, curve, sample pictures, checkpoints; and stopping when told to.

    RUN/log.jsonl          one line every `log_every` steps, and one a validation
    RUN/curve.png          loss and validation over steps
    RUN/samples/           sample grids
    RUN/checkpoints/       the newest `keep` states
"""

import json
import resource
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from plainsd.images import written_whole
from plainsd.train.loop import FitOptions, Method, Report, Trainer, fit, save_checkpoint


class Rhythm(NamedTuple):
    log: int = 20
    validate: int = 500
    sample: int = 1000


def run(
    method: Method,
    count: int,
    options: FitOptions,
    folder: Path,
    rhythm: Rhythm = Rhythm(),
    validate: Callable[[], dict[str, float]] | None = None,
    sample: Callable[[Path], None] | None = None,
) -> Trainer | None:
    """Train to the end and return the Trainer; None when SIGTERM stopped the run early (its state is saved).

    `validate` and `sample` are called with the averaged weights in place.
    """
    trainer = Trainer(method, options)
    log, states = Log(folder / "log.jsonl"), folder / "checkpoints"
    window: list[Report] = []
    first = True
    with stopped_by_sigterm() as stop, tqdm(total=options.steps, unit="step", dynamic_ncols=True) as bar:
        for report in fit(method, count, options, states, trainer):
            if first:
                log.rewind(report.step - 1)
                bar.n = bar.initial = report.step - 1
                first = False
            bar.update()
            window.append(report)
            if report.step % rhythm.log == 0 or report.step == options.steps:
                line = summary(window)
                log.write(line)
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['samples_per_s']:.0f}/s, {peak_memory():.1f} GB")
                window.clear()
            due = report.step == options.steps or report.step % rhythm.validate == 0
            if validate and due:
                log.write({"step": report.step} | with_average(trainer, validate))
                draw_curve(log.path, folder / "curve.png")
            if sample and (report.step == options.steps or report.step % rhythm.sample == 0):
                (folder / "samples").mkdir(parents=True, exist_ok=True)
                with_average(trainer, lambda: sample(folder / "samples" / f"step-{report.step:08d}.png"))
            if stop():
                save_checkpoint(trainer, states)
                return None
    return trainer


def with_average(trainer: Trainer, task: Callable):
    """Do it with the averaged weights in place, and the networks in eval."""
    trainer.method.modules.eval()
    try:
        if trainer.ema is None:
            return task()
        with trainer.ema:
            return task()
    finally:
        trainer.method.modules.train()


@contextmanager
def stopped_by_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM (what a cluster sends before it takes the machine away) only sets what the yielded function tells."""
    asked = []
    old = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, old)


def summary(window: list[Report]) -> dict[str, float]:
    """One log line: honest means over the window's steps, each of as many pictures."""
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
        "peak_gb": peak_memory(),
    }


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Log:
    """JSON lines. After a resume, lines of steps that are done again are dropped first."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        lines = [line for line in read_log(self.path) if line["step"] <= step]
        with written_whole(self.path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """Every whole line; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def draw_curve(log: Path, path: Path) -> None:
    """Training loss and validation over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=110)
    for name in ("loss", "validation", "psnr"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if name == "psnr" or not points:
            continue
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png", bbox_inches="tight")
    pyplot.close(figure)
