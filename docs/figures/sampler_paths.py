"""Paths of four samplers over the swiss roll, with the exact estimate: five steps each, beside the exact paths."""

import math

import style
import torch
from plane import best_estimate, run, swiss_roll, unit_noise
from style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE

STEPS, EXACT = 5, 160
SAMPLERS = {"euler": BLUE, "heun": GREEN, "dpmpp_2m": PURPLE, "euler_a": ORANGE}


def shown(steps) -> torch.Tensor:
    """(points, steps, 2), divided by sqrt(1 + sigma^2), so that all levels fit into one frame."""
    return torch.stack([step.x.flatten(1) / math.sqrt(1 + step.sigma**2) for step in steps], 1)


def draw() -> str:
    data = swiss_roll(400)
    denoise = best_estimate(data.flatten(1), spread=0.05)
    first = unit_noise(4, seed=4)()
    exact = shown(run(denoise, "heun", EXACT, first, unit_noise(4, seed=0)))
    figure, axes = style.panels(2, 2, 6.2, left=0.01, right=0.99, bottom=0.02, top=0.95, wspace=0.03, hspace=0.1)
    for one, (name, colour) in zip(axes.flat, SAMPLERS.items(), strict=True):
        paths = shown(run(denoise, name, STEPS, first, unit_noise(4, seed=2)))
        one.plot(*data[:200].flatten(1).T, ".", color=FAINT, markersize=1.5)
        for line, path in zip(exact, paths, strict=True):
            one.plot(*line[::4].T, color=INK, linewidth=0.7)
            one.plot(*path.T, ".-", color=colour, linewidth=1.1, markersize=3.5)
            one.plot(*path[-1:].T, "o", color=colour, markersize=4.5)
        one.set(title=name, xlim=(-2.2, 2.6), ylim=(-2.0, 2.2))
    style.bare(*axes.flat)
    return style.svg(figure, "Paths of Euler, Heun, DPM++ 2M and Euler ancestral in five steps, over the exact paths")


if __name__ == "__main__":
    style.write(__file__, draw())
