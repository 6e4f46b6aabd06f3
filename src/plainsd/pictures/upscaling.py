"""Upscaling networks (ESRGAN, Wang et al. 2018, arXiv:1809.00219, and its kin), by the spandrel library.

A picture is processed in tiles, so that memory is bounded; overlapping tiles are blended away from their edges, so that
no seam shows. If a 4x network is used for 2x, its result is scaled down, as in A1111.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from plainsd.errors import UserError
from plainsd.files.pickles import unpickled
from plainsd.files.tensorfile import TensorFile, open_safetensors
from plainsd.listing import suffix_of
from plainsd.pictures.images import to_pil, to_tensor
from plainsd.pictures.settings import plain_number

TILE = 192  # pixels per side of a tile, overlap included
OVERLAP = 32  # pixels that two tiles share
EDGE = 8  # pixels of a tile that are not used: the network has seen too little around them
LARGEST_SIDE = 16_384  # pixels, of the result


@dataclass(frozen=True)
class Upscaler:
    """A network and its scale factor."""

    name: str
    scale: int
    model: Any  # spandrel's ImageModelDescriptor

    def __call__(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) in [-1, 1] -> (1, 3, H s, W s), s the scale, in float32 on the CPU."""
        weight = next(self.model.model.parameters())
        height, width = pixels.shape[2:]
        out = torch.zeros(1, 3, height * self.scale, width * self.scale)
        for (top, bottom, rows), (left, right, columns) in tiles_of(height, width):
            tile = (pixels[:, :, top:bottom, left:right] / 2 + 0.5).to(weight)
            enlarged = self.model(tile).float().cpu()
            share = torch.outer(scaled_up(rows, self.scale), scaled_up(columns, self.scale))
            place = out[:, :, top * self.scale : bottom * self.scale, left * self.scale : right * self.scale]
            place += enlarged * share
        return out * 2 - 1


def tiles_of(height: int, width: int) -> Iterator[tuple[tuple[int, int, Tensor], tuple[int, int, Tensor]]]:
    """Rows and columns of each tile: start, stop, and their weights for blending."""
    for rows in spans(height):
        for columns in spans(width):
            yield rows, columns


def spans(length: int) -> list[tuple[int, int, Tensor]]:
    """Intervals of at most TILE that overlap by OVERLAP, with weights that add to 1 everywhere: 0 within EDGE of
    another tile, rising from there to where that one's are 0."""
    step, ramp = TILE - OVERLAP, OVERLAP - 2 * EDGE
    starts = [0] if length <= TILE else [*range(0, length - TILE, step), length - TILE]
    found, total = [], torch.zeros(length)
    for start in starts:
        stop = min(start + TILE, length)
        distance = torch.arange(stop - start) + 0.5
        weight = torch.ones(stop - start)
        if start > 0:
            weight = torch.minimum(weight, (distance - EDGE) / ramp)
        if stop < length:
            weight = torch.minimum(weight, (stop - start - distance - EDGE) / ramp)
        weight = weight.clamp(min=0)
        total[start:stop] += weight
        found.append((start, stop, weight))
    return [(start, stop, weight / total[start:stop]) for start, stop, weight in found]


def scaled_up(weights: Tensor, scale: int) -> Tensor:
    return weights.repeat_interleave(scale)


def upscaled(image: Image.Image, upscaler: Upscaler, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture upscaled by the network, then resized to `size` (width, height) if given."""
    check_enlarged(image, upscaler, size)
    with torch.inference_mode():
        (large,) = to_pil(upscaler(to_tensor(image)))
    return large if size in (None, large.size) else large.resize(size, Image.Resampling.LANCZOS)


def check_enlarged(image: Image.Image, upscaler: Upscaler, size: tuple[int, int] | None = None) -> None:
    """UserError where the network's result, or the picture of that size, is too large."""
    for wide, high in ((image.width * upscaler.scale, image.height * upscaler.scale), size or (1, 1)):
        if max(wide, high) > LARGEST_SIDE:
            raise UserError(
                f"{image.width}x{image.height} enlarged to {wide}x{high} is larger than {LARGEST_SIDE} on a side; "
                "scale the picture down first, or enlarge it less",
                field="image",
            )


def enlarged_notes(times: float, name: str) -> tuple[tuple[str, str], ...]:
    """What was done to a picture, in A1111's words, behind its own settings."""
    return ("Postprocess upscale by", plain_number(float(times))), ("Postprocess upscaler", name)


# --- its file --------------------------------------------------------------------------------------------------------


def spandrel_classes() -> tuple[Any, Any]:
    """Spandrel's class of such networks, and its loader. UserError if it is not installed."""
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except ImportError as error:
        raise UserError(
            f"upscaling needs {error.name}, which is not installed; pip install 'plainsd[upscale]'"
        ) from None
    return ImageModelDescriptor, ModelLoader


def load_upscaler(path: str | Path, device: torch.device | str = "cpu") -> Upscaler:
    """A network of any architecture spandrel knows, from a .pth or .safetensors file, in float32. UserError if it is
    none, if it does not upscale RGB pictures, or if spandrel is not installed."""
    path = Path(path)
    ImageModelDescriptor, ModelLoader = spandrel_classes()
    if not path.is_file():
        raise UserError(f"there is no file {path}; give an upscaler's .pth or .safetensors", field="upscaler")
    try:
        model = ModelLoader().load_from_state_dict(weights_in(path))
    except UserError:
        raise
    except Exception as error:  # spandrel's own, and those of networks that do not fit
        raise UserError(
            f"{path} is not an upscaler that spandrel knows ({type(error).__name__}); give one of ESRGAN's kind",
            field="upscaler",
        ) from error
    if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise UserError(
            f"{path} is a network for another purpose; give one that enlarges RGB pictures", field="upscaler"
        )
    model.to(torch.device(device)).float().eval()
    return Upscaler(path.stem, model.scale, model)


def weights_in(path: Path) -> dict[str, Any]:
    """The whole file, nested state dicts included: spandrel knows their names."""
    if suffix_of(path) == ".safetensors":
        file: TensorFile = open_safetensors(path)
        return {name: stored.read(None) for name, stored in file.tensors.items()}
    content = unpickled(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no tensors by name; give an upscaler's .pth or .safetensors", field="upscaler")
    return content
