"""Input images and masks of A1111's img2img."""

from PIL import Image, ImageChops

from plainsd.generate import check_size
from plainsd.pictures.masks import MaskOptions, canvas_of, resized
from plainsd.server.api.a1111_fields import Image2Image
from plainsd.server.canvas import InitImages
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.uploads import check_pixels, decoded, opened, picture

RESIZE = ("stretch", "crop", "fill")  # resize_mode 0, 1, 2


def prepare_init_images(body: Image2Image, limits: Limits, like: str) -> InitImages:
    """The picture at the wanted size; with a mask, the part around it where inpaint_full_res asks for that. `like`: the
    program that masks are those of."""
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
    if body.inpainting_mask_invert:
        mask = ImageChops.invert(mask)
    told = body.mask_fields()
    options = MaskOptions(body.blur(), 0, told["masked_padding"], told["masked_content"], like=like, resize=how)
    canvas = canvas_of(image, mask, size, options)
    return InitImages(canvas.image, canvas.hole, canvas.whole, canvas.alpha, canvas.box)


def painted_area(mask: str, limits: Limits) -> Image.Image:
    """The mask: its alpha channel, above 128 or not, or the grey levels if it is fully opaque."""
    image = opened(decoded(mask, "mask"), "mask", limits, None)
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("L")
    return alpha.point(lambda level: 255 if level > 128 else 0)
