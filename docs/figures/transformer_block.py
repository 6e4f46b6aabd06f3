"""The transformer block of the text encoder beside that of the UNet, with SD 1.x's numbers from their configs."""

import style
from boxes import arrow, box, canvas, label, path
from matplotlib.axes import Axes
from style import INK, ORANGE

from plainsd.models.clip import TextConfig
from plainsd.models.unet import UNetConfig

STEP, WIDTH = 5.2, 16.0


def block(axes: Axes, x: float, title: str, shape: str, parts: list[tuple[str, str, str]], notes: list[str]) -> float:
    """Parts (norm, text, colour) from top to bottom, each with its residual connection; the place of the end."""
    label(axes, (x, 2), title, 9)
    label(axes, (x, 4), shape, 7.5, style.FAINT)
    y = 5.0
    for (norm, text, colour), note in zip(parts, notes, strict=True):
        path(axes, (x, y + 0.7), (x - 12, y + 0.7), (x - 12, y + 8.8), (x - 1.2, y + 8.8))
        arrow(axes, (x, y), (x, y + 2))
        box(axes, (x, y + 3), (WIDTH, 2), norm, "yellow")
        arrow(axes, (x, y + 4), (x, y + 5))
        box(axes, (x, y + 6.2), (WIDTH, 2.4), text, colour)
        arrow(axes, (x, y + 7.4), (x, y + 8.1))
        label(axes, (x, y + 8.8), "⊕", 12)
        label(axes, (x + 9, y + 6.2), note, 6.5, style.FAINT, "left")
        y += 9.5
    arrow(axes, (x, y), (x, y + 1.8))
    return y + 1.8


def draw() -> str:
    text, unet = TextConfig(), UNetConfig()
    figure, axes = canvas(39)
    c, heads = unet.channels[0], unet.heads[0]
    end = block(
        axes,
        15,
        "text encoder",
        f"{text.positions} tokens × {text.width}",
        [
            ("LayerNorm", "causal self-attention", "blue"),
            ("LayerNorm", f"linear {text.width} → {text.mlp} → {text.width}", "green"),
        ],
        [f"{text.heads} heads\nof {text.width // text.heads}", "quick GELU\nbetween"],
    )
    label(axes, (15, end + 1), f"{text.layers} such blocks, then a LayerNorm", 7.5)
    end = block(
        axes,
        49,
        "UNet",
        f"{64 * 64} positions × {c}: a map of 64 × 64",
        [
            ("LayerNorm", "self-attention", "blue"),
            ("LayerNorm", "cross-attention", "purple"),
            ("LayerNorm", f"GEGLU {c} → {4 * c} → {c}", "green"),
        ],
        [f"{heads} heads\nof {c // heads}", "", f"2 × {4 * c}: one half\ngates the other"],
    )
    path(axes, (66, 17.5), (66, 20.7), (57.2, 20.7), colour=ORANGE)
    label(axes, (64, 15.6), f"text\n{text.positions} × {unet.context}", 7.5, INK)
    label(axes, (62, 19.2), "keys, values", 6.5, style.FAINT)
    label(axes, (49, end + 1), f"{sum(unet.depth)} levels have such blocks", 7.5)
    return style.svg(figure, "Two transformer blocks: norm, attention or MLP, and a residual connection around each")


if __name__ == "__main__":
    style.write(__file__, draw())
