"""What a picture costs against steps, pixels and batch: a table, and a plot of it.

    python bench/scale.py [--model FOLDER] [--out bench/results/scale.png]

Each line varies one of the three and keeps the others; times are the least of `--rounds`, taken in turns. The dashed
lines are what it would be if cost grew exactly with the number.
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from plainsd.checkpoint import load
from plainsd.generate import final, text_to_image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/scale.png"))
    asked = parser.parse_args()
    sd = load(asked.model, dtype=asked.dtype)
    side = sd.variant.size
    usual = {"steps": 20, "size": side, "count": 1}
    axes = {"steps": (5, 10, 20, 40), "size": (side, 2 * side, 3 * side, 4 * side), "count": (1, 2, 4, 8, 16)}
    cases = [usual | {name: value} for name, values in axes.items() for value in values]
    least = dict.fromkeys(range(len(cases)), float("inf"))
    for turn in range(asked.rounds + 1):  # the first round does not count
        for i, case in enumerate(cases):
            began = time.perf_counter()
            final(text_to_image(sd, "a red apple on a blue background", **case))
            if turn:
                least[i] = min(least[i], time.perf_counter() - began)
    lines, i = {}, 0
    for name, values in axes.items():
        across = [value**2 if name == "size" else value for value in values]
        lines[{"size": "pixels", "count": "batch"}.get(name, name)] = (
            across,
            [least[i + j] for j in range(len(values))],
        )
        i += len(values)
    about = (
        f"{sd.variant.name}, {side} px, 20 steps, {asked.dtype}, {sd.device}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}"
    )
    print(about + "\n\n| varied | value | seconds | times the first |\n|---|---|---|---|")
    for name, (across, seconds) in lines.items():
        for value, second in zip(across, seconds, strict=True):
            print(f"| {name} | {value} | {second:.3f} | {second / seconds[0]:.2f} (x{value / across[0]:g}) |")
    plot(lines, about, asked.out)


def plot(lines: dict, about: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, len(lines), figsize=(11, 3.6), layout="constrained")
    for pane, (name, (across, seconds)) in zip(panes, lines.items(), strict=True):
        pane.plot(across, [seconds[0] * value / across[0] for value in across], "--", color="0.7")
        pane.plot(across, seconds, "o-", color="tab:red")
        pane.set(xlabel=name, ylabel="seconds", xlim=(0, None), ylim=(0, None))
    figure.suptitle(about, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
