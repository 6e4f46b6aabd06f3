"""The log of a run, as JSON lines, and its plot."""

import json
import math
from pathlib import Path

from plainsd.disk import written_whole
from plainsd.json_reader import parsed_json


class Log:
    """JSON lines. On resume, lines of steps after the checkpoint are dropped."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: dict) -> None:
        """JSON has no NaN or infinity; they become null."""
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        lines = [line for line in read_log(self.path) if line["step"] <= step]
        with written_whole(self.path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """Every complete line; a truncated last one is ignored."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [parsed_json(line) for line in lines if line.startswith("{") and line.endswith("}")]


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
