"""Chapter 0: samples of its network, which is trained here by running the chapter, and guidance between two classes."""

import sys
from pathlib import Path

import style
from plane import dots
from style import BLUE, FAINT, GREEN, ORANGE, PURPLE

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from pages import blocks

SLOW = True
CHAPTER = Path(__file__).parents[1] / "0-two-dimensions.md"
PANELS = (("euler", 5, BLUE), ("euler", 20, BLUE), ("dpmpp_2m", 10, PURPLE), ("euler_a", 20, GREEN))
SCALES = (0, 1, 3, 10)


def chapter() -> dict:
    """The names of the chapter, its exercises apart."""
    names: dict = {}
    for code in blocks(CHAPTER.read_text("utf-8").split("## Exercises")[0], "python"):
        exec(compile(code, str(CHAPTER), "exec"), names)
    return names


def draw() -> str:
    made = chapter()
    figure, (above, below) = style.panels(2, 4, 3.9, left=0.01, right=0.99, bottom=0.01, top=0.94, wspace=0.04)
    for one, (name, steps, colour) in zip(above, PANELS, strict=True):
        dots(one, made["draw"](made["without"], name, steps), colour, 1.6)
        one.set(title=f"{name}, {steps} steps")
    for one, scale in zip(below, SCALES, strict=True):
        dots(one, made["draw"](made["outer_at"](scale)), ORANGE, 1.6)
        one.set(title="no class" if scale == 0 else f"outer class, scale {scale}")
    for one in (*above, *below):
        one.plot(*made["curve"].flatten(1)[::20].T, color=FAINT, linewidth=0.6)
        one.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))
    style.bare(*above, *below)
    return style.svg(
        figure, "Samples of the trained network by four samplers, and its outer class at four guidance scales"
    )


if __name__ == "__main__":
    style.write(__file__, draw())
