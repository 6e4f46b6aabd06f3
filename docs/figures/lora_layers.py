"""What the LoRA of chapter 8 changes: the relative size of each layer's change, and pictures at three strengths."""

import numpy as np
import style
import torch
from chapters import names_of
from style import BLUE, GREEN, ORANGE, PURPLE

import plainsd
from plainsd.adapters.lora import attached

SLOW = True
KINDS = {
    "self_attn": ("self-attention", BLUE),
    "cross_attn": ("cross-attention", PURPLE),
    ".ff.": ("feed-forward", GREEN),
}
PROMPT, STRENGTHS = "a red apple, line drawing", (0.0, 0.5, 1.0)


def kind_of(name: str) -> tuple[str, str]:
    return next((kind for part, kind in KINDS.items() if part in name), ("others: in and out, time", ORANGE))


def draw() -> str:
    sd = names_of("8-fine-tuning-and-lora.md", "save_lora", steps="40", batch="4")["sd"]
    (lora,) = attached(sd)
    order = [name for name, _ in sd.unet.named_modules()]
    found = sorted(lora.adapters.items(), key=lambda item: order.index(item[0][1]))
    figure, axes = style.panels(1, 1, 4.4, left=0.1, right=0.98, bottom=0.56, top=0.95)
    bars = axes[0, 0]
    for number, ((_, name), adapter) in enumerate(found):
        weight = sd.unet.get_submodule(name).weight.detach()
        label, colour = kind_of(name)
        size = float(adapter.product(torch.float32).detach().norm() / weight.norm())
        known = bars.get_legend_handles_labels()[1]
        bars.bar(number, size, width=0.85, color=colour, label=None if label in known else label)
    bars.set(
        ylabel="change / weight",
        xlim=(-1, len(found)),
        xticks=[],
        yticks=(0, 0.05, 0.1),
        title="linear layers of the UNet, in their order",
    )
    bars.grid(axis="x", visible=False)
    bars.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.03))
    for place, strength in enumerate(STRENGTHS):
        lora.set_strength(strength)
        (picture,) = plainsd.final(plainsd.text_to_image(sd, PROMPT, seed=3))
        one = figure.add_axes((0.14 + 0.27 * place, 0.02, 0.2, 0.2 * 7 / 4.4))
        style.bare(one)
        one.imshow(np.asarray(picture), interpolation="nearest")
        one.set_title(f"strength {strength:g}", fontsize=8)
    return style.svg(
        figure, "The relative size of a LoRA's change in each layer, and pictures at strength 0, 0.5 and 1"
    )


if __name__ == "__main__":
    style.write(__file__, draw())
