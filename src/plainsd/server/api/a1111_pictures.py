"""Input images and masks of A1111's img2img."""

from PIL import Image

from plainsd.generate import check_size
from plainsd.pictures.masks import alpha_of, box_around, filled_hole, hole_of, resized
from plainsd.server.api.a1111_fields import Image2Image
from plainsd.server.canvas import InitImages
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.uploads import check_pixels, decoded, opened, picture

RESIZE = ("stretch", "crop", "fill")  # resize_mode 0, 1, 2


def prepare_init_images(body: Image2Image, limits: Limits) -> InitImages:
    """The picture at the wanted size; with a mask, the part around it where inpaint_full_res asks for that."""
    if not body.init_images or len(body.init_images) > 1:
        count = len(body.init_images or [])
        raise APIError(404 if count == 0 else 422, f"init_images has {count} pictures; send one", "init_images", count)
    image = picture(body.init_images[0], "init_images", limits)
    size = check_size((body.width or image.width - image.width % 8, body.height or image.height - image.height % 8))
    check_pixels(size, limits)
    if body.resize_mode == 3:
        raise APIError(422, "resize_mode 3 is not supported; choose 0, 1 or 2", "resize_mode", 3)
    how = RESIZE[body.resize_mode or 0]
    if not body.mask:
        return InitImages(resized(image, size, how))
    mask = painted_area(body.mask, limits).resize(image.size)
    alpha = alpha_of(mask, body.blur(), inverted=bool(body.inpainting_mask_invert))
    if alpha.getbbox() is None:
        raise APIError(422, "mask is dark everywhere, so nothing would be drawn; make it white where the picture is to "
                      "change", "mask")  # fmt: skip
    whole, box = image, None
    if body.inpaint_full_res:
        box = box_around(alpha, body.inpaint_full_res_padding or 0, size)
        image, hole = resized(image.crop(box), size), hole_of(resized(alpha.crop(box), size))
    else:
        image = whole = resized(image, size, how)
        alpha = resized(alpha, size, how)
        hole = hole_of(alpha)
    if body.inpainting_fill in (0, None):
        image = filled_hole(image, hole)
    return InitImages(image, hole, whole, alpha, box)


def painted_area(mask: str, limits: Limits) -> Image.Image:
    """The mask: its alpha channel, or the grey levels if it is fully opaque."""
    image = opened(decoded(mask, "mask"), "mask", limits, None)
    alpha = image.getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else image.convert("L")
