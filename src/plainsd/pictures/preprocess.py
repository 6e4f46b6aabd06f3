"""Preprocessors: from a picture to a control map.

"inpaint" is one by name: its map is made of the picture and the mask that are drawn over, see pictures/control.py.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from plainsd.errors import UserError, unknown
from plainsd.pictures.images import to_rgb
from plainsd.pictures.settings import INPAINT, PREPROCESSORS, THRESHOLDS


def preprocessed(
    image: Image.Image, name: str, thresholds: tuple[float, float] = THRESHOLDS, resolution: int | None = None
) -> Image.Image:
    """A preprocessor's map of a picture, whose shorter side is first scaled to `resolution` pixels."""
    if name == INPAINT:
        raise UserError("the inpainting map is made of the picture that is drawn over and its mask; give no map for it",
                        field="control")  # fmt: skip
    if name not in PREPROCESSORS:
        raise unknown("preprocessor", name, PREPROCESSORS, field="control")
    image = to_rgb(image)
    if resolution:
        scale = resolution / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image if name == "none" else canny(image, *thresholds)


def canny(image: Image.Image, low: float = THRESHOLDS[0], high: float = THRESHOLDS[1]) -> Image.Image:
    """White edges on black (Canny 1986), by OpenCV: an edge starts where the gradient of the 8-bit pixels is above
    `high`, and continues while it is above `low`."""
    if not 0 <= low <= high:
        raise UserError(
            f"canny thresholds {low} and {high}: give two numbers from 0 up, the lower one first", field="control"
        )
    try:
        import cv2
    except ImportError:
        raise UserError(
            "canny edges need OpenCV; pip install 'plainsd[control]' (60 MB), or give a finished map", field="control"
        ) from None
    return Image.fromarray(cv2.Canny(np.asarray(to_rgb(image)), low, high)).convert("RGB")
