"""The UNet of SD 1.x: its flat list of blocks as a U, with the shapes that a pass without numbers meets."""

import style
import torch
from boxes import arrow, box, canvas, label
from matplotlib.axes import Axes
from style import FAINT, ORANGE

from plainsd.files.stored import empty
from plainsd.models.unet import Block, UNet, UNetConfig

SIDE = 64
LEFT, RIGHT, GAP, ROW = 9.0, 44.0, 7.6, 10.0


def shapes(unet: UNet) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Input and output of conv_in, of each block, and of the middle."""
    found: dict[str, tuple[torch.Size, torch.Size]] = {}
    names = {module: name for name, module in unet.named_modules()}
    for module in (unet.conv_in, *unet.down, unet.mid, *unet.up, unet.conv_out):
        module.register_forward_hook(lambda m, args, output: found.update({names[m]: (args[0].shape, output.shape)}))
    c = unet.config
    x, context = (torch.empty(1, *shape, device="meta") for shape in ((c.in_channels, SIDE, SIDE), (77, c.context)))
    unet(x, torch.empty(1, device="meta"), context)
    return found


def one(axes: Axes, place: tuple[float, float], block: Block, text: str) -> None:
    parts = ["R"] * (block.res is not None) + ["T"] * (block.attn is not None)
    colour = "purple" if block.attn is not None else "blue"
    if not parts:
        parts, colour = ["↓"], "yellow"
    elif block.resample is not None:
        parts += ["↑"]
    box(axes, place, (6, 3.2), " ".join(parts), colour, 8)
    label(axes, (place[0], place[1] + 2.5), text, 6, FAINT)


def draw() -> str:
    unet = empty(UNet, UNetConfig())
    found, levels = shapes(unet), len(unet.config.channels)
    figure, axes = canvas(56)
    each = unet.config.layers + 1
    label(axes, (LEFT, 2), f"noisy latent {' × '.join(map(str, found['conv_in'][0][1:]))}", 7.5)
    label(axes, (RIGHT + GAP * 2, 2), f"noise, or v: {' × '.join(map(str, found['conv_out'][1][1:]))}", 7.5)
    arrow(axes, (LEFT, 3), (LEFT, 6.3))
    arrow(axes, (RIGHT + GAP * 2, 6.3), (RIGHT + GAP * 2, 3))
    down = [None, *unet.down]
    for level in range(levels):
        y = 8.0 + ROW * level
        for k in range(each):
            place, number = (LEFT + GAP * k, y), each * level + k
            if number == 0:
                box(axes, place, (6, 3.2), "conv in", "yellow", 7)
                label(axes, (place[0], y + 2.5), str(found["conv_in"][1][1]), 6, FAINT)
            else:
                one(axes, place, down[number], str(found[f"down.{number - 1}"][1][1]))
            up = each * (levels - 1 - level) + k
            into, out = found[f"up.{up}"]
            one(axes, (RIGHT + GAP * k, y), unet.up[up], f"{into[1]} → {out[1]}")
            if k:
                arrow(axes, (place[0] - GAP + 3, y), (place[0] - 3, y))
                arrow(axes, (RIGHT + GAP * k - GAP + 3, y), (RIGHT + GAP * k - 3, y))
            partner = RIGHT + GAP * (each - 1 - k)
            arrow(axes, (place[0], y - 1.6), (partner, y - 1.6), ORANGE, bend=-0.05 - 0.01 * (each - 1 - k), line=":")
        if level:
            arrow(axes, (LEFT + GAP * 2, y - ROW + 3.3), (LEFT, y - 1.7))
            arrow(axes, (RIGHT + GAP * 2, y - 1.7), (RIGHT, y - ROW + 3.4))
        side = SIDE // 2**level
        label(axes, (2.8, y), f"{side} × {side}", 7.5)
    y = 8.0 + ROW * levels - 1
    box(axes, (35, y), (9, 3.2), "R T R", "purple", 8)
    label(axes, (35, y + 2.5), f"middle: {found['mid'][1][1]}", 6, FAINT)
    arrow(axes, (LEFT + GAP * 2, y - ROW + 4.2), (30.4, y))
    arrow(axes, (39.6, y), (RIGHT, y - ROW + 4.2))
    label(
        axes,
        (35, 51.5),
        "R residual block, with the time · T transformer, with the text · ↓ ↑ convolution to half, to double",
        7.5,
    )
    label(
        axes, (35, 53.6), "below a block: its channels; dotted: skip connections, side by side with what comes up", 7.5
    )
    return style.svg(figure, "The UNet as a U: blocks going down on the left, the middle, blocks going up on the right")


if __name__ == "__main__":
    style.write(__file__, draw())
