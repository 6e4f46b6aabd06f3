"""OpenAI's images API, compatible with its clients.

https://platform.openai.com/docs/api-reference/images. Beside OpenAI's fields the settings of POST /api/jobs are taken
(in Python's client: `extra_body={"steps": 30, "seed": 7}`).
"""

import base64
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any, Literal

from anyio import CancelScope
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from plainsd.pictures.images import JPEG_EXIF
from plainsd.pictures.masks import resized
from plainsd.pictures.texts.embedded import exif_of
from plainsd.server.canvas import InitImages
from plainsd.server.errors import APIError
from plainsd.server.jobs.job import Job
from plainsd.server.jobs.pictures import Picture, json_seed
from plainsd.server.limits import Limits
from plainsd.server.pool import Models, ServedModel
from plainsd.server.requests import job_request
from plainsd.server.schema import JobRequest, Name, Text
from plainsd.server.service import Service, client_of, failure_of, now, user_of
from plainsd.server.uploads import check_pixels, opened, size_mismatch

ALIASES = ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "chatgpt-image-latest", "dall-e-2", "dall-e-3")
OPENAI_PREFIXES = ("gpt-image-", "chatgpt-image-", "dall-e-")  # how the names begin that programs hard-code
EXTRA_FIELDS = ("negative", "steps", "guidance", "sampler", "spacing", "seed", "strength")  # beside OpenAI's


class ImagesRequest(BaseModel):
    """POST /v1/images/generations."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"prompt": "a red apple", "n": 1}]})

    prompt: Text = Field(min_length=1)
    model: Name | None = None
    n: int | None = 1
    size: Name | None = Field(None, description="such as 512x512; auto: the model's own")
    response_format: Literal["url", "b64_json"] | None = Field(None, description="none: both")
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=3)
    quality: Name | None = Field(None, description="accepted without effect; use steps")
    style: Name | None = Field(None, description="accepted without effect; use the prompt")
    moderation: Name | None = Field(None, description="accepted without effect")
    input_fidelity: Name | None = Field(None, description="of edits; accepted without effect; use strength")
    user: Text | None = Field(None, max_length=256, description="client name for fair scheduling")
    negative: Text | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: Name | None = None
    spacing: Name | None = None
    seed: int | None = None
    strength: float | None = Field(None, description="of edits without a mask, 0 to 1")

    def job(self, models: Models, limits: Limits) -> JobRequest:
        model, count = served_model(self.model, models).name, 1 if self.n is None else self.n
        if not 1 <= count <= limits.count:
            raise APIError(422, f"n {count} is out of range; choose 1 to {limits.count}", "n", count)
        given = {name: value for name in EXTRA_FIELDS if (value := getattr(self, name)) is not None}
        return job_request(prompt=self.prompt, model=model, count=count, size=self.pixels(), **given)

    def pixels(self) -> tuple[int, int] | None:
        if self.size in (None, "auto"):
            return None
        width, cross, height = self.size.partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and len(self.size) < 12):
            raise APIError(422, f"size {self.size!r} cannot be read; write it as 512x512, or auto", "size", self.size)
        return int(width), int(height)


FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["prompt", "image"],
    "properties": {name: {key: value for key, value in field.items() if key != "title"}
                   for name, field in ImagesRequest.model_json_schema()["properties"].items()}
    | {"image": {"type": "string", "format": "binary"}, "mask": {"type": "string", "format": "binary"}},
}}}}}  # fmt: skip
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post("/images/generations", responses=STREAM, response_model=None)
    async def generations(body: ImagesRequest, request: Request) -> JSONResponse | EventSourceResponse:
        wanted = body.job(service.models, service.limits)
        job = await service.submit(wanted, client_of(request, body.user), "openai", owner=user_of(request).owner)
        return await images_response(service, job, body, request, "image_generation")

    @router.post("/images/edits", responses=STREAM, response_model=None, openapi_extra=FORM)
    async def edits(request: Request) -> JSONResponse | EventSourceResponse:
        """Image to image, or inpainting of the transparent part of the mask (or of the picture)."""
        async with request.form(max_files=4, max_fields=40) as form:
            body, content, mask = await edit_of(form)
        wanted = body.job(service.models, service.limits)
        init = await run_in_threadpool(edit_canvas, wanted, content, mask, service)
        job = await service.submit(wanted, client_of(request, body.user), "openai", init, owner=user_of(request).owner)
        return await images_response(service, job, body, request, "image_edit")

    @router.get("/models")
    def models() -> dict:
        """The served models, and OpenAI's names as aliases of the default."""
        known = service.models.known
        names = (*known, *(alias for alias in ALIASES if alias not in known))
        return {"object": "list", "data": [openai_model(name, service.models) for name in names]}

    @router.get("/models/{name}")
    def model(name: Text) -> dict:
        return openai_model(name, service.models)

    return router


def served_model(name: str | None, models: Models) -> ServedModel:
    """By name; OpenAI's names, which many programs hard-code, select the default."""
    return models[None if name and name.startswith(OPENAI_PREFIXES) and name not in models.known else name]


def openai_model(name: str, models: Models) -> dict:
    model = served_model(name, models)
    data = {"id": name, "object": "model", "created": 0, "owned_by": "plainsd"}
    return data if model.name == name else data | {"alias_of": model.name}


# --- edits -----------------------------------------------------------------------------------------------------------


async def edit_of(form: Any) -> tuple[ImagesRequest, bytes, bytes | None]:
    """The form's fields, the picture's bytes and the mask's."""
    images = [part for name in ("image", "image[]") for part in form.getlist(name)]
    masks = form.getlist("mask")
    if len(images) != 1 or len(masks) > 1 or not all(isinstance(part, UploadFile) for part in images + masks):
        message = f"image: {len(images)} files were sent; send one as 'image', and at most one as 'mask'"
        raise APIError(422, message, "image", len(images))
    try:
        text = {name: value for name, value in form.items() if name not in ("image", "image[]", "mask")}
        body = ImagesRequest.model_validate(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise APIError(
            422, f"{field}: {first['msg']}; see /docs for what it takes", field, first.get("input")
        ) from None
    return body, await images[0].read(), await masks[0].read() if masks else None


def edit_canvas(wanted: JobRequest, content: bytes, mask: bytes | None, service: Service) -> InitImages:
    """Inpaints the transparent part of the mask or else of the picture; without any, image to image."""
    image = opened(content, "image", service.limits, None)
    window = opened(mask, "mask", service.limits, None) if mask is not None else image
    if window.size != image.size:
        raise size_mismatch(window, image)
    size = wanted.size or image.size
    check_pixels(size, service.limits)
    hole = ImageChops.invert(window.getchannel("A")).point(lambda level: 255 if level >= 128 else 0)
    whole = resized(image.convert("RGB"), size, "crop")  # clients send one of a few sizes, whatever the picture's
    if hole.getbbox() is None:
        if mask is not None:
            raise APIError(422, "mask has no transparent part, so nothing would be drawn; make it transparent where "
                          "the picture is to change", "mask")  # fmt: skip
        return InitImages(whole)
    wanted.strength = 1.0 if wanted.strength is None else wanted.strength
    return InitImages(whole, resized(hole, size, "crop"))


# --- answers ---------------------------------------------------------------------------------------------------------


async def images_response(
    service: Service, job: Job, body: ImagesRequest, request: Request, kind: str
) -> JSONResponse | EventSourceResponse:
    if body.stream:
        return EventSourceResponse(sse_stream(service, job, body, kind))
    await service.wait_for_end(job, request)
    if (refused := failure_of(job)) is not None:
        raise refused
    url = str(request.base_url).rstrip("/")

    def data() -> list[dict]:
        return [image_as_json(row, content, body, url) for row, content in service.files(job)]

    notes = {"notes": job.notes} if job.notes else {}
    answer = {"created": now(), "data": await run_in_threadpool(data), "output_format": body.output_format or "png"}
    return JSONResponse(answer | notes)


def image_as_json(row: Picture, content: bytes, body: ImagesRequest, url: str) -> dict:
    data: dict[str, Any] = {"seed": json_seed(row.settings.seed)}
    if body.response_format != "b64_json":
        data["url"] = f"{url}/api/images/{row.id}.png"
    if body.response_format != "url":
        data["b64_json"] = base64.b64encode(recoded(content, body)).decode()
    return data


def recoded(png: bytes, body: ImagesRequest) -> bytes:
    """In the requested format, with the settings embedded if they fit."""
    if body.output_format in (None, "png"):
        return png
    buffer = BytesIO()
    with Image.open(BytesIO(png)) as image:
        quality = 100 if body.output_compression is None else body.output_compression
        exif = exif_of(image.info.get("parameters", ""))
        more = {"exif": exif} if len(exif) <= JPEG_EXIF else {}
        image.save(buffer, format=body.output_format.upper(), quality=quality, **more)
    return buffer.getvalue()


def partial_image(preview: str, body: ImagesRequest) -> tuple[str, str]:
    """A preview, a PNG in base64, in the requested format; and its size."""
    content = base64.b64decode(preview)
    with Image.open(BytesIO(content)) as image:
        width, height = image.size
    return base64.b64encode(recoded(content, body)).decode(), f"{width}x{height}"


async def sse_stream(service: Service, job: Job, body: ImagesRequest, kind: str) -> AsyncIterator[bytes]:
    """Partial pictures, then the final ones."""
    wanted, sent, rough = body.partial_images or 0, 0, None
    try:
        async for name, data in service.events(job):
            if name == "beat":
                yield KEEPALIVE_COMMENT
            if name != "progress":
                continue
            for preview in data["previews"].values():  # the newest, however long ago it was made
                rough = preview.partition(",")[2]
            if rough is not None and sent < wanted and data["progress"] * (wanted + 1) >= sent + 1:
                shown, size = await run_in_threadpool(partial_image, rough, body)
                yield event(f"{kind}.partial_image", body, shown, size=size, partial_image_index=sent)
                sent += 1
        if (refused := failure_of(job)) is not None:
            yield sse("error", refused.body("/v1/") | {"type": "error"})
            return
        for row, content in await run_in_threadpool(service.files, job):
            whole = base64.b64encode(await run_in_threadpool(recoded, content, body)).decode()
            yield event(
                f"{kind}.completed", body, whole, size=f"{row.width}x{row.height}", seed=json_seed(row.settings.seed)
            )
    finally:
        if job.active:  # the client hung up, so that this task is being cancelled
            with CancelScope(shield=True):
                await run_in_threadpool(service.abandon, job)


def event(name: str, body: ImagesRequest, picture: str, **more: Any) -> bytes:
    data = {
        "type": name, "b64_json": picture, "created_at": now(), "size": body.size or "auto",
        "quality": body.quality or "auto",
        "background": "opaque", "output_format": body.output_format or "png", **more,
    }  # fmt: skip
    return sse(name, data)


def sse(name: str, data: dict) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))
