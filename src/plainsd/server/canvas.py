"""The input images of a request: picture, mask and outpainting margins, decoded, checked and resized."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from PIL import Image

from plainsd.pictures.images import continued
from plainsd.pictures.masks import Box, MaskOptions, canvas_of, in_shape_of, part_in_box, resized
from plainsd.pictures.settings import DEFAULTS, MASK_OPTIONS
from plainsd.server.errors import APIError
from plainsd.server.jobs.job import Source
from plainsd.server.limits import Limits
from plainsd.server.schema import JobRequest
from plainsd.server.uploads import check_pixels, picture, png, size_mismatch


@dataclass(frozen=True)
class InitImages:
    """Decoded input images, see `Source`."""

    image: Image.Image
    hole: Image.Image | None = None
    base: Image.Image | None = None
    alpha: Image.Image | None = None
    box: Box | None = None

    def part_of(self, picture: Image.Image, resize: str = "stretch") -> Image.Image:
        """Of a picture that covers the whole one, what is drawn; all of it where that is the whole. See `Canvas`."""
        if self.base is None or self.box is None:
            return picture
        return part_in_box(in_shape_of(picture, self.base.size, resize), self.base.size, self.box, self.image.size)

    def as_source(self) -> tuple[Source, dict[str, bytes]]:
        """Their file names among the inputs, and the contents of the files."""
        files = {name: png(image) for name in ("image", "hole", "base", "alpha") if (image := getattr(self, name))}
        names: dict[str, Any] = {
            name: f"{hashlib.sha256(content).hexdigest()[:32]}.png" for name, content in files.items()
        }
        return Source(**names, box=self.box), {names[name]: content for name, content in files.items()}


def init_images_of(request: JobRequest, limits: Limits) -> InitImages | None:
    """Decodes and resizes the input images of a request; None if it has none."""
    if request.image is None:
        if request.mask is not None:
            raise APIError(422, "mask without an image; send the picture that it belongs to", "mask")
        if request.outpaint is not None:
            raise APIError(422, "outpaint without an image; send the picture that is continued", "outpaint")
        refuse_mask_options(request)
        return None
    image, mask = picture(request.image, "image", limits), None
    if request.outpaint is not None:
        image, mask = outpainted(request, request.outpaint, image, limits)
    size = request.size or image.size
    check_pixels(size, limits, "size" if request.size else "image")
    if request.mask is not None:
        mask = picture(request.mask, "mask", limits, "black")
    if mask is None:
        refuse_mask_options(request)
        return InitImages(resized(image, size))
    if mask.size != image.size:
        raise size_mismatch(mask, image)
    how = MaskOptions(
        request.mask_blur,
        request.mask_grow or 0,
        request.masked_padding,
        request.masked_content or "original",
        request.soft_mask,
        request.like,
    )
    canvas = canvas_of(image, mask, size, how)
    return InitImages(canvas.image, canvas.hole, canvas.whole, canvas.alpha, canvas.box)


def refuse_mask_options(request: JobRequest) -> None:
    """APIError if a mask option is set without a mask."""
    for name in MASK_OPTIONS:
        if (value := getattr(request, name)) not in (None, DEFAULTS[name]):
            raise APIError(422, f"{name} {value} without a mask; send one, or leave {name} out", name, value)


def outpainted(request: JobRequest, sides: Box, image: Image.Image, limits: Limits) -> tuple[Image.Image, Image.Image]:
    """The picture on its enlarged canvas, and the mask of the new area."""
    left, top, right, bottom = sides
    if request.mask is not None:
        raise APIError(422, "outpaint and a mask do not go together; leave one of them out", "outpaint", list(sides))
    if not any(sides):
        raise APIError(422, "outpaint adds nothing; give pixels for one side at least", "outpaint", list(sides))
    check_pixels((left + image.width + right, top + image.height + bottom), limits, "outpaint")
    return continued(image, sides)
