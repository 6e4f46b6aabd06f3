#!/usr/bin/env bash
# Expected: VaeImageProcessor's `resample`, Lanczos by default, says how pictures are resized, as its
# docstring has it of images, whatever they come as.
# What happens: it counts for PIL pictures alone. Arrays and tensors are resized by nearest neighbour,
# whatever `resample` says, without a warning: a fine checkerboard at half the size is grey as a PIL
# picture and white as a tensor, and a slanted edge, enlarged twice, has as many grey values as before.
# Who meets it: whoever hands image-to-image, inpainting or ControlNet pipelines tensors or arrays of
# another size than height and width, such as from a data loader or a video reader, and gets other
# latents than from the same picture as a PIL image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 pillow==13.0.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "pillow")), sep=", ")


def resized(pixels, side, form, resample):
    """Pixels (H, W, 3) in [0, 1], resized to side x side as a PIL picture, an array or a tensor."""
    processor = VaeImageProcessor(resample=resample, vae_scale_factor=1, do_normalize=False)
    picture = {
        "PIL": lambda: Image.fromarray((pixels * 255).astype(np.uint8)),
        "array": lambda: pixels[None],
        "tensor": lambda: torch.from_numpy(pixels).permute(2, 0, 1)[None],
    }[form]()
    return processor.preprocess(picture, height=side, width=side)[0, 0]


rows, columns = np.mgrid[:64, :64]
board = np.repeat(((rows + columns) % 2 == 0)[..., None], 3, axis=2).astype(np.float32)
edge = np.repeat(np.clip((columns - rows / 3 - 20) / 2, 0, 1)[..., None], 3, axis=2).astype(np.float32)
for form in ("PIL", "array", "tensor"):
    for resample in ("lanczos", "bilinear"):
        half, twice = resized(board, 32, form, resample), resized(edge, 128, form, resample)
        values = twice.mul(255).round().unique().numel()
        print(f"{form:6} {resample:8} checkerboard at half the size {half.mean():.2f}, grey values of the edge {values}")
        if form == "PIL":
            assert abs(half.mean() - 0.5) < 0.02 and values > 20
        else:
            assert half.mean() == 1.0 and values <= 7
assert not torch.equal(resized(edge, 128, "PIL", "lanczos"), resized(edge, 128, "PIL", "bilinear"))
assert torch.equal(resized(edge, 128, "tensor", "lanczos"), resized(edge, 128, "tensor", "bilinear"))
EOF
