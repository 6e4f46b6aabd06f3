"""Guidance in two dimensions: the two estimates and the guided one as arrows, and where samples end at three scales."""

import style
import torch
from plane import best_estimate, run, unit_noise
from style import BLUE, FAINT, INK, ORANGE

from plainsd.diffusion.denoiser import guided

SPREAD, LEVEL, SCALE = 0.3, 1.2, 2.0
PROMPTED = torch.tensor([[-1.0, 0.8], [-0.2, 1.4]], dtype=torch.float64)  # centres of what the prompt names
OTHERS = torch.tensor([[0.9, 0.2], [0.2, -1.1], [1.3, -0.9]], dtype=torch.float64)


def draw() -> str:
    cond, uncond = best_estimate(PROMPTED, SPREAD), best_estimate(torch.cat([PROMPTED, OTHERS]), SPREAD)
    figure, axes = style.panels(1, 4, 2.2, left=0.01, right=0.99, bottom=0.02, top=0.86, wspace=0.05)
    arrows, *panels = axes.flat
    for x in torch.tensor([[1.6, 1.4], [-1.6, -0.8], [0.4, 0.1]], dtype=torch.float64).view(3, 1, 2, 1, 1):
        with_prompt, without = cond(x, LEVEL), uncond(x, LEVEL)
        for denoised, colour in (
            (without, FAINT),
            (with_prompt, BLUE),
            (without + SCALE * (with_prompt - without), ORANGE),
        ):
            (dx, dy), (x0, y0) = (denoised - x).flatten().tolist(), x.flatten().tolist()
            arrows.quiver(x0, y0, dx, dy, color=colour, angles="xy", scale_units="xy", scale=1, width=0.012)
        arrows.plot(*torch.stack([without, with_prompt]).flatten(1).T, ":", color=INK, linewidth=0.8)
        arrows.plot(*x.flatten(1).T, "o", color=INK, markersize=3)
    arrows.set(title="without, with, guided")
    for one, scale in zip(panels, (1.0, 3.0, 8.0), strict=True):
        denoise = guided(lambda x, sigma: (cond(x, sigma), uncond(x, sigma)), scale)
        ends = run(denoise, "heun", 30, unit_noise(250, seed=1)(), unit_noise(250, seed=2))[-1].x
        one.plot(*ends.flatten(1).T, ".", color=BLUE if scale == 1 else ORANGE, markersize=2)
        one.set(title=f"scale {scale:g}")
    for one in axes.flat:
        one.plot(*PROMPTED.T, "+", color=INK, markersize=7)
        one.plot(*OTHERS.T, "x", color=FAINT, markersize=5)
        one.set(xlim=(-2.6, 2.2), ylim=(-1.9, 2.9))
    style.bare(*axes.flat)
    return style.svg(figure, "The estimates with and without a prompt as arrows, and samples at guidance 1, 3 and 8")


if __name__ == "__main__":
    style.write(__file__, draw())
