"""The VAE of SD 1.x: its parts and the shapes of the feature maps between them, measured by a pass without numbers."""

import style
import torch
from boxes import arrow, box, canvas, label
from style import FAINT

from plainsd.files.stored import empty
from plainsd.models.vae import VAE, VAEConfig

SIDE = 512
GAP, HEIGHT = 10.3, 7.0


def shapes(vae: VAE) -> dict[str, str]:
    """The output of each part, as "channels x height x width"."""
    names = {module: name for name, module in vae.named_modules()}
    found: dict[str, str] = {}

    def seen(module, args, output):
        found[names[module]] = " × ".join(map(str, output.shape[1:]))

    for module in vae.modules():
        module.register_forward_hook(seen)
    vae.decode(vae.encode(torch.empty(1, 3, SIDE, SIDE, device="meta")).mean)
    return found


def draw() -> str:
    config = VAEConfig()
    found, blocks = shapes(empty(VAE, config)), config.layers
    figure, axes = canvas(34)
    encoder = [("conv in", "encoder.conv_in", "yellow")]
    encoder += [(f"{blocks} ResBlocks\n↓ 2", f"encoder.levels.{i}", "blue") for i in range(len(config.channels) - 1)]
    encoder += [(f"{blocks} ResBlocks", f"encoder.levels.{len(config.channels) - 1}", "blue")]
    encoder += [
        ("ResBlock\nattention\nResBlock", "encoder.mid", "purple"),
        ("norm, SiLU\nconv out", "encoder.conv_out", "yellow"),
    ]
    decoder = [("conv in", "decoder.conv_in", "yellow"), ("ResBlock\nattention\nResBlock", "decoder.mid", "purple")]
    decoder += [
        (f"{blocks + 1} ResBlocks\n↑ 2", f"decoder.levels.{i}", "green") for i in range(len(config.channels) - 1)
    ]
    decoder += [(f"{blocks + 1} ResBlocks", f"decoder.levels.{len(config.channels) - 1}", "green")]
    decoder += [("norm, SiLU\nconv out", "decoder.conv_out", "yellow")]
    for row, (title, begin, parts) in enumerate(
        (
            ("encoder", f"pixels\n3 × {SIDE} × {SIDE}", encoder),
            ("decoder", f"latent\n{found['post_quant']}", decoder),
        )
    ):
        y = 8.0 + 17 * row
        label(axes, (2, y - 6), title, 9, align="left")
        label(axes, (35, y - 6), begin.replace("\n", " "), 7.5, FAINT)
        for place, (text, name, colour) in enumerate(parts):
            x = 4.8 + (GAP - 0.2) * place
            side = int(found[name].split(" × ")[-1])
            height = 3.4 + 1.6 * (side // 64).bit_length() if colour != "purple" else 5.4
            box(axes, (x, y), (7.6, height if colour != "yellow" else 4), text, colour, 6.5)
            label(axes, (x, y + 6.0), found[name], 6, FAINT)
            if place:
                arrow(axes, (x - GAP + 4.0, y), (x - 3.9, y))
    label(axes, (35, 16.9), "quant, a 1 × 1 convolution → mean and log variance; latent = mean + std · noise", 7.5)
    return style.svg(figure, "The VAE: encoder and decoder in a row of parts each, with the shape after each part")


if __name__ == "__main__":
    style.write(__file__, draw())
