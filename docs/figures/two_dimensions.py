"""Chapter 0: the swiss roll at three noise levels, and the best estimates of noisy points as arrows."""

import style
import torch
from plane import best_estimate, dots, swiss_roll, unit_noise
from style import BLUE, FAINT, INK, ORANGE

LEVELS = (0.15, 0.6, 2.5)


def draw() -> str:
    data, noise = swiss_roll(600), unit_noise(600, seed=1)()
    denoise = best_estimate(data.flatten(1))
    inner = torch.rand(600, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) < 0.5  # as in the roll
    figure, axes = style.panels(2, 3, 4.9, left=0.01, right=0.99, bottom=0.01, top=0.95, wspace=0.04, hspace=0.08)
    for sigma, above, below in zip(LEVELS, *axes, strict=True):
        reach = 2.3 + 1.4 * sigma
        x = data + sigma * noise
        for part, colour in ((inner, BLUE), (~inner, ORANGE)):
            dots(above, x[part], colour, 1.8)
        above.set(title=f"σ = {sigma:g}", xlim=(-reach, reach), ylim=(-reach, reach))
        dots(below, data, FAINT, 1.2)
        some = x[:45]
        start, step = some.flatten(1), (denoise(some, sigma) - some).flatten(1)
        below.quiver(*start.T, *step.T, color=ORANGE, angles="xy", scale_units="xy", scale=1, width=0.006)
        dots(below, start, INK, 2.2)
        below.set(xlim=(-reach, reach), ylim=(-reach, reach))
    style.bare(*axes.flat)
    return style.svg(figure, "A swiss roll at three noise levels, and arrows from noisy points to their best estimates")


if __name__ == "__main__":
    style.write(__file__, draw())
