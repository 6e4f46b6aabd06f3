"""Drawings of networks: boxes with texts, and arrows between them, in units of a tenth of an inch."""

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import COLOURS, FAINT, INK

Point = tuple[float, float]


def canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of 70 x `height` units; y grows downwards."""
    figure = pyplot.figure(figsize=(7, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 70), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, centre: Point, size: Point, text: str = "", colour: str = "blue", fontsize: float = 7.5) -> None:
    """`colour`: a name in COLOURS that has a pale form."""
    (x, y), (width, height) = centre, size
    edge, face = COLOURS[colour][0], COLOURS[f"pale_{colour}"][0]
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=face, edgecolor=edge, lw=1))
    label(axes, centre, text, fontsize)


def label(axes: Axes, place: Point, text: str, fontsize: float = 7.5, colour: str = INK, align: str = "center") -> None:
    axes.text(*place, text, fontsize=fontsize, color=colour, ha=align, va="center", linespacing=1.4)


def arrow(axes: Axes, start: Point, end: Point, colour: str = FAINT, bend: float = 0.0, line: str = "-") -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=7,
            shrinkA=0,
            shrinkB=0,
            color=colour,
            lw=1,
            linestyle=line,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def path(axes: Axes, *points: Point, colour: str = FAINT, line: str = "-") -> None:
    """A line through points, with an arrow's head at its end."""
    axes.plot(*zip(*points[:-1], strict=True), color=colour, lw=1, linestyle=line)
    arrow(axes, points[-2], points[-1], colour, line=line)
