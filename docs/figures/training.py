"""The training of chapter 7: its loss, and shapes drawn with the last weights and with their average."""

import numpy as np
import style
from chapters import names_of
from matplotlib.axes import Axes
from style import BLUE, FAINT
from torch import Tensor

SLOW = True
MEAN_OF = 20


def sheet(axes: Axes, title: str, pictures: Tensor) -> None:
    """Fifteen pictures, five rows of three."""
    side = pictures.shape[-1]
    tiles = pictures[:15].reshape(5, 3, side, side).permute(0, 2, 1, 3).reshape(5 * side, 3 * side)
    axes.imshow(tiles.numpy(), cmap="gray", vmin=-1.2, vmax=2.2, interpolation="nearest")
    axes.set_title(title, fontsize=8)


def draw() -> str:
    names = names_of("7-training-from-nothing.md", "drawn = draw(words)")
    figure, axes = style.panels(1, 4, 2.6, left=0.07, right=0.99, bottom=0.17, top=0.88, wspace=0.12)
    curve, *sheets = axes[0]
    for place, one in enumerate(sheets):
        one.set_position((0.5 + 0.167 * place, 0.03, 0.155, 0.85))
    curve.set_position((0.07, 0.17, 0.4, 0.71))
    losses = np.array(names["losses"])
    curve.plot(losses, ".", color=FAINT, markersize=2)
    curve.plot(
        np.arange(MEAN_OF - 1, len(losses)), np.convolve(losses, np.full(MEAN_OF, 1 / MEAN_OF), "valid"), color=BLUE
    )
    curve.set(xlabel="step", title="loss", ylim=(0, 1.1))
    style.bare(*sheets)
    sheet(sheets[0], "last weights", names["draw"](names["words"]))
    sheet(sheets[1], "their average", names["drawn"])
    sheet(sheets[2], "data", names["data"])
    return style.svg(figure, "Training from nothing: the loss by step, and drawn shapes beside those of the data")


if __name__ == "__main__":
    style.write(__file__, draw())
