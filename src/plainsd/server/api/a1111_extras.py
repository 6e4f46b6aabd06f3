"""A1111's "Extras": upscales single pictures at once, outside the queue."""

import asyncio
import base64
from dataclasses import replace
from html import escape
from io import BytesIO
from typing import Any, Literal

from fastapi import APIRouter
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from plainsd.errors import UserError, unknown
from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings
from plainsd.pictures.upscaling import enlarged_notes, upscaled
from plainsd.server.api.a1111_table import EMPTY_VALUES
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.schema import Text
from plainsd.server.service import Service
from plainsd.server.uploads import NamedBytes, decoded, opened
from plainsd.server.upscalers import Upscalers

UNCHANGED, RESAMPLED = "None", {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
MOST_PASSES = 3  # through one network, until the picture is large enough
FACES = ("gfpgan_visibility", "codeformer_visibility")
IDLE_EXTRAS = ("show_extras_results", "codeformer_weight", "upscale_first")  # of the page, and of what is refused


class Enlarge(BaseModel):
    """POST /sdapi/v1/extra-single-image."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    image: Text
    resize_mode: Literal[0, 1] | None = Field(0, description="0: by upscaling_resize, 1: to width and height")
    upscaling_resize: float | None = Field(2, gt=0, le=16)
    upscaling_resize_w: int | None = Field(512, ge=8, le=16384)
    upscaling_resize_h: int | None = Field(512, ge=8, le=16384)
    upscaling_crop: bool | None = Field(True, description="to exactly that size; else the whole picture stays")
    upscaler_1: Text | None = UNCHANGED
    upscaler_2: Text | None = UNCHANGED
    extras_upscaler_2_visibility: float | None = Field(0, ge=0, le=1)

    def check(self, upscalers: Upscalers) -> None:
        """APIError for unsupported fields and unknown upscalers."""
        for name, value in (self.model_extra or {}).items():
            if name in FACES and value not in (0, *EMPTY_VALUES):
                raise APIError(422, f"{name} {value!r}: faces are not restored here; leave it out", name, value)
            if name not in (*FACES, *IDLE_EXTRAS):
                names = (*type(self).model_fields, *FACES, *IDLE_EXTRAS)
                raise APIError(422, f"{unknown('field', name, names).what}; see /docs for what it takes", name, value)
        known = (UNCHANGED, *RESAMPLED, *upscalers.known())
        for field in ("upscaler_1", "upscaler_2"):
            if (name := getattr(self, field)) not in (*known, *EMPTY_VALUES):
                raise APIError(422, str(unknown("upscaler", name, known)), field, name)

    def times(self, image: Image.Image) -> float:
        """The scale factor; with a target size, the one that fills both sides."""
        if self.resize_mode == 1:
            return max((self.upscaling_resize_w or 512) / image.width, (self.upscaling_resize_h or 512) / image.height)
        return self.upscaling_resize or 2


def add_extras(router: APIRouter, service: Service) -> None:
    upscalers, semaphore = service.models.upscalers, asyncio.Semaphore(1)

    @router.post("/extra-single-image")
    async def extra_single_image(body: Enlarge) -> dict:
        async with semaphore:  # one at a time; whoever waits holds no thread
            return await run_in_threadpool(extras_response, body, upscalers, service.limits)

    @router.get("/upscalers")
    def listed() -> list:
        rows: list[tuple[str, str | None, int]] = [(name, None, 4) for name in (UNCHANGED, *RESAMPLED)]
        rows += [(name, path.name, scale) for name, (path, scale) in upscalers.known().items()]
        return [
            {"name": name, "model_name": None, "model_path": file, "model_url": None, "scale": float(scale)}
            for name, file, scale in rows
        ]


def extras_response(body: Enlarge, upscalers: Upscalers, limits: Limits) -> dict[str, Any]:
    body.check(upscalers)
    content = decoded(body.image, "image")
    image = opened(content, "image", limits)
    if body.upscaler_1 in (UNCHANGED, *EMPTY_VALUES):  # there, too, it is then left as it is
        return {"html_info": "", "image": base64.b64encode(with_text(image, settings_of_file(content))).decode()}
    times = body.times(image)
    large = enlarged_by(image, str(body.upscaler_1), times, upscalers, limits)
    if body.extras_upscaler_2_visibility and body.upscaler_2 not in (UNCHANGED, *EMPTY_VALUES):
        other = enlarged_by(image, str(body.upscaler_2), times, upscalers, limits)
        large = Image.blend(large, other, body.extras_upscaler_2_visibility)
    if body.resize_mode == 1 and body.upscaling_crop:
        large = cropped_to(large, (body.upscaling_resize_w or 512, body.upscaling_resize_h or 512))
    done = enlarged_notes(times, str(body.upscaler_1))
    settings = settings_of_file(content)
    file = with_text(large, replace(settings, other=(*settings.other, *done)))
    info = ", ".join(f"{name}: {value}" for name, value in done)
    return {"html_info": f"<p>{escape(info)}</p>", "image": base64.b64encode(file).decode()}


def enlarged_by(image: Image.Image, name: str, times: float, upscalers: Upscalers, limits: Limits) -> Image.Image:
    """Upscales by a factor, both sides rounded down to multiples of 8, as in A1111; results of networks are resized."""
    size = max(8, int(image.width * times) // 8 * 8), max(8, int(image.height * times) // 8 * 8)
    check_upscaled_size(size, limits)
    if name in RESAMPLED:
        return image.resize(size, RESAMPLED[name])
    network = upscalers.network(name)
    for _ in range(MOST_PASSES):
        check_upscaled_size((image.width * network.scale, image.height * network.scale), limits)
        try:
            image = upscaled(image, network)
        except UserError as error:
            raise APIError.from_user_error(error) from None
        if network.scale == 1 or (image.width >= size[0] and image.height >= size[1]):
            break
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def check_upscaled_size(size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.upload_pixels:
        what = f"image would have {size[0]}x{size[1]} pixels on the way"
        raise APIError(422, f"{what}; the limit is {limits.upload_pixels}", "image", list(size))


def cropped_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre crop of exactly that size, as in A1111; padded with black where rounding made it smaller."""
    whole = Image.new("RGB", size)
    whole.paste(image, (size[0] // 2 - image.width // 2, size[1] // 2 - image.height // 2))
    return whole


def settings_of_file(content: bytes) -> Settings:
    """The settings embedded in a file, or the defaults."""
    try:
        return read_settings(NamedBytes(content, "image"))
    except UserError:
        return Settings()


def with_text(image: Image.Image, settings: Settings) -> bytes:
    """A PNG file with embedded settings."""
    buffer, info = BytesIO(), PngInfo()
    info.add_text("parameters", format_settings(settings))
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
