"""The log of a run, as JSON lines, and its plot."""

import json
import math
import sys
from pathlib import Path

from plainsd.disk import written_whole
from plainsd.json_reader import BadJSON, parsed_json


class Log:
    """JSON lines. On resume, lines of steps after the checkpoint are dropped, and so is what cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: dict) -> None:
        """JSON has no NaN or infinity; they become null."""
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """To the state of a step; before the first, 0, there is none."""
        lines = [line for line in read_log(self.path, warn=True) if line["step"] <= step and step]
        with written_whole(self.path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_log(path: Path, *, warn: bool = False) -> list[dict]:
    """Every line of a log; a truncated last one, and what is none, is left out, and counted on stderr with `warn`."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8", errors="replace").split("\n")
    found = [one for line in lines if (one := read_line(line)) is not None]
    if warn and (strange := sum(bool(line.strip()) for line in lines[:-1]) - len(found)) > 0:
        print(f"{path}: {strange} lines cannot be read; they are left out", file=sys.stderr)
    return found


def read_line(line: str) -> dict | None:
    """A step with its numbers, or None."""
    try:
        read = parsed_json(line)
    except BadJSON:
        return None
    numbers = isinstance(read, dict) and all(value is None or type(value) in (int, float) for value in read.values())
    return read if numbers and type(read.get("step")) is int else None


def draw_curve(log: Path, path: Path) -> None:
    """Training loss and validation over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=110)
    for name in ("loss", "validation"):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png", bbox_inches="tight")
    pyplot.close(figure)
