"""A picture of the embedded model beside its latent, channel by channel."""

import numpy as np
import style

import plainsd

PROMPT, SEED = "a red apple on a blue background", 7


def draw() -> str:
    sd = plainsd.load(device="cpu", dtype="float32")
    *_, (pictures, _, latents) = plainsd.text_to_image(sd, PROMPT, seed=SEED)
    channels = latents[0].numpy()
    rows = -(-len(channels) // 4)
    figure, axes = style.panels(rows, 5, 1.55 * rows, left=0.01, right=0.99, bottom=0.02, top=0.9, wspace=0.08)
    style.bare(*axes.flat)
    axes[0, 0].imshow(np.asarray(pictures[0]), interpolation="nearest")
    axes[0, 0].set_title(f"{pictures[0].width} × {pictures[0].height} × 3", fontsize=8)
    for index, channel in enumerate(channels):
        one = axes[index // 4, 1 + index % 4]
        one.imshow(channel, cmap="gray", vmin=-3, vmax=3, interpolation="nearest")
        one.set_title(f"channel {index}: {channel.shape[1]} × {channel.shape[0]}", fontsize=8)
    return style.svg(figure, f"{PROMPT}, drawn by the embedded model, and the channels of its latent")


if __name__ == "__main__":
    style.write(__file__, draw())
