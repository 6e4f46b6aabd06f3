"""The API of AUTOMATIC1111's web UI, compatible with its clients."""

import base64
import json
import time
from collections import defaultdict
from io import BytesIO
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Request
from PIL import Image
from starlette.concurrency import run_in_threadpool

from plainsd.diffusion.samplers import SAMPLERS
from plainsd.models.variants import edits
from plainsd.pictures.settings import LATENT_MODES
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.pictures.texts.embedded import texts_in
from plainsd.pictures.texts.entries import entries
from plainsd.pictures.texts.labels import UPSCALER_LABELS, sampler_label, spacing_label
from plainsd.server.api.a1111_extras import add_extras
from plainsd.server.api.a1111_fields import EMPTY_RESPONSES, Common, Image2Image, PNGInfo, Text2Image
from plainsd.server.api.a1111_infotext import CommonT, with_infotext
from plainsd.server.api.a1111_names import known_schedulers, model_of
from plainsd.server.api.a1111_pictures import prepare_init_images
from plainsd.server.api.a1111_table import known_options
from plainsd.server.canvas import InitImages
from plainsd.server.embeddings import Embedding, incompatibility
from plainsd.server.errors import APIError, printable
from plainsd.server.jobs.job import CANCELLED, Job
from plainsd.server.jobs.pictures import json_seed, with_lora_tags
from plainsd.server.pool import Models
from plainsd.server.requests import check_numbers, job_request
from plainsd.server.schema import JobRequest, clean
from plainsd.server.service import CurrentUser, Service, client_of, failure_of, user_of
from plainsd.server.uploads import decoded, opened

NOT_ECHOED = ("override_settings", "alwayson_scripts")  # fields that `parameters` of the response leave out
INPUT_IMAGES = ("init_images", "mask")  # likewise, unless include_init_images is set


# --- routes ----------------------------------------------------------------------------------------------------------


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    defaults: dict[str, Any] = {
        "sd_model_checkpoint": service.models.default,
        "CLIP_stop_at_last_layers": 1,
        "tiling": False, "randn_source": "GPU",
        "eta_noise_seed_delta": 0, "enable_prompt_comments": True,
    }  # fmt: skip
    options_by_owner: dict[str, dict[str, Any]] = defaultdict(defaults.copy)

    def options_of(user: CurrentUser) -> dict[str, Any]:
        """What this user's `POST /options` has set."""
        return options_by_owner[user.owner]

    Options = Annotated[dict[str, Any], Depends(options_of)]

    @router.post("/txt2img")
    async def txt2img(body: Text2Image, request: Request, options: Options) -> dict:
        def wanted() -> ParsedRequest:
            asked, fields, notes = parse_request(body, options, service)
            native = service.models[fields["model"]].bare.variant.size
            size = (asked.width or native, asked.height or native)
            again = asked.second_pass(size, options, service.models)
            notes += asked.idle_loras() if again else []
            return ParsedRequest(asked, job_request(**fields | {"size": size} | again), notes)

        return await submit_and_wait(service, await run_in_threadpool(wanted), request, options)

    @router.post("/img2img")
    async def img2img(body: Image2Image, request: Request, options: Options) -> dict:
        def wanted() -> ParsedRequest:
            asked, fields, notes = parse_request(body, options, service)
            fields["strength"] = 0.75 if asked.denoising_strength is None else asked.denoising_strength
            bare = service.models[fields["model"]].bare
            if edits(bare.unet.config, bare.vae.config):
                fields["image_guidance"] = asked.image_cfg_scale
            fields |= asked.mask_fields()
            init = prepare_init_images(asked, service.limits, fields["like"])
            return ParsedRequest(asked, job_request(**fields), notes, init)

        return await submit_and_wait(service, await run_in_threadpool(wanted), request, options)

    @router.get("/progress")
    def progress(request: Request, skip_current_image: bool = False) -> dict:
        return progress_as_json(service, running(service, request), not skip_current_image)

    @router.post("/interrupt")
    @router.post("/skip")
    def interrupt(request: Request) -> dict:
        """Cancels this client's current job of this API."""
        if (job := running(service, request)) is not None:
            service.abandon(job)
        return {}

    @router.post("/png-info")
    def png_info(body: PNGInfo) -> dict:
        return png_info_as_json(decoded(body.image, "image"), service)

    @router.get("/options")
    def get_options(options: Options) -> dict:
        return options | {"samples_format": "png", "sd_checkpoint_hash": None}

    @router.post("/options")
    def set_options(body: dict[str, Any], options: Options) -> dict:
        """Applies to requests of this API until the server ends."""
        given = known_options(body, "options")
        asked = Common.model_validate({"override_settings": given}).job_fields({}, service.models)
        check_numbers(job_request(**{name: asked.get(name) for name in ("clip_skip", "tiling", "noise", "ensd")}))
        options.update(with_model_name(given, service.models))
        return {}

    @router.get("/samplers")
    def samplers() -> list:
        return [{"name": sampler_label(name), "aliases": [name], "options": {}} for name in SAMPLERS]

    @router.get("/schedulers")
    def schedulers() -> list:
        rows = [("automatic", "Automatic"), *known_schedulers().items()]
        return [
            {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
            for name, label in rows
        ]

    @router.get("/sd-models")
    def sd_models() -> list:
        return [
            {"title": name, "model_name": name, "hash": model.hash, "sha256": None, "filename": name, "config": None}
            for name, model in service.models.known.items()
        ]

    @router.get("/loras")
    def loras() -> list:
        aliases = service.models.loras.aliases()
        return [
            {"name": name, "alias": aliases.get(name, name), "path": path.name, "metadata": {}}
            for name, path in service.models.loras.known().items()
        ]

    @router.get("/prompt-styles")
    def prompt_styles() -> list:
        return [
            {"name": name, "prompt": style.prompt, "negative_prompt": style.negative}
            for name, style in service.models.templates.known_styles().items()
        ]

    @router.get("/latent-upscale-modes")
    def latent_upscale_modes() -> list:
        return [{"name": UPSCALER_LABELS[name]} for name in LATENT_MODES]

    @router.get("/embeddings")
    def embeddings(options: Options) -> dict:
        """Those that fit the current model, and those that do not."""
        known, bare = service.models.embeddings.known(), service.models[options["sd_model_checkpoint"]].bare
        checked = [(incompatibility(bare, embedding) is None, embedding) for embedding in known]
        return {
            "loaded": {embedding.text: embedding_as_json(embedding) for fits, embedding in checked if fits},
            "skipped": {embedding.text: embedding_as_json(embedding) for fits, embedding in checked if not fits},
        }

    def nothing(request: Request) -> Any:
        """An empty list: not supported."""
        return EMPTY_RESPONSES[request.url.path.rpartition("/")[2]]

    add_extras(router, service)
    for name in EMPTY_RESPONSES:
        router.add_api_route(f"/{name}", nothing, name=name)

    @router.post("/refresh-checkpoints")
    @router.post("/refresh-loras")
    @router.post("/refresh-embeddings")
    def refresh() -> None:
        """No effect: models are given at startup, LoRAs and embeddings are scanned at each access."""

    return router


# --- answers ---------------------------------------------------------------------------------------------------------


class ParsedRequest(NamedTuple):
    """A request, parsed."""

    asked: Common
    job: JobRequest
    notes: list[str]
    init: InitImages | None = None


def parse_request(
    body: CommonT, options: dict[str, Any], service: Service
) -> tuple[CommonT, dict[str, Any], list[str]]:
    """The request with its infotext applied, and the fields of a JobRequest. APIError for unsupported fields."""
    asked, more, notes = with_infotext(body, service.models, service.limits)
    asked.reject_unsupported()
    return asked, asked.job_fields(options, service.models) | more, notes


def with_model_name(options: dict[str, Any], models: Models) -> dict[str, Any]:
    """The options with the served name of their model, which may be said in other ways."""
    title = options.get("sd_model_checkpoint")
    return options if title is None else options | {"sd_model_checkpoint": models[model_of(title, models)].name}


async def submit_and_wait(service: Service, wanted: ParsedRequest, request: Request, options: dict[str, Any]) -> dict:
    job = await service.submit(wanted.job, client_of(request), "a1111", wanted.init, owner=user_of(request).owner)
    job.notes += wanted.notes
    if wanted.asked.override_settings_restore_afterwards is False:
        options.update(with_model_name(known_options(wanted.asked.override_settings or {}), service.models))
    await service.wait_for_end(job, request)
    if job.state != CANCELLED and (refused := failure_of(job)) is not None:
        raise refused
    return await run_in_threadpool(response_of, service, wanted.asked, job)


def response_of(service: Service, asked: Common, job: Job) -> dict:
    """The pictures; after an interrupt the finished ones, and the last preview of the current one."""
    files = [content for _, content in service.files(job)]
    if job.state == CANCELLED and len(files) < len(job.settings):
        files += [enlarged(rough, job.settings[index].size) for index, rough in sorted(job.previews.items())]
    shown = NOT_ECHOED if getattr(asked, "include_init_images", False) else (*NOT_ECHOED, *INPUT_IMAGES)
    given = {name: getattr(asked, name) for name in type(asked).model_fields if name not in shown}
    images = [base64.b64encode(content).decode() for content in files] if asked.send_images is not False else []
    info = info_of(job) | {"styles": asked.styles or []}
    return {"images": images, "parameters": given, "info": json.dumps(info)}


def embedding_as_json(embedding: Embedding) -> dict:
    vectors = embedding.vectors()
    return {
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "shape": max(one.shape[1] for one in vectors),
        "vectors": max(one.shape[0] for one in vectors),
    }


def info_of(job: Job) -> dict:
    shown = [with_lora_tags(settings, job.loras) for settings in job.settings]
    one = shown[0]
    return {
        "prompt": one.prompt, "all_prompts": [s.prompt for s in shown], "negative_prompt": one.negative,
        "all_negative_prompts": [s.negative for s in shown], "seed": json_seed(one.seed),
        "all_seeds": [json_seed(s.seed) for s in job.settings], "subseed": json_seed(getattr(one, one.counted)),
        "subseed_strength": one.variation_strength,
        "all_subseeds": [json_seed(getattr(s, s.counted)) for s in job.settings],
        "width": one.size[0], "height": one.size[1], "sampler_name": sampler_label(one.sampler),
        "cfg_scale": one.guidance, "steps": one.steps, "batch_size": len(job.settings), "restore_faces": False,
        "sd_model_name": job.model,
        "sd_model_hash": None, "denoising_strength": one.strength,
        "extra_generation_params": {"Schedule type": spacing_label(one.spacing)} | (
            {"Refiner": one.refiner, "Refiner switch at": one.handover} if one.refiner else {}),
        "notes": job.notes, "index_of_first_image": 0, "infotexts": [format_settings(s) for s in shown],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": one.clip_skip or 1, "is_using_inpainting_conditioning": False,
    }  # fmt: skip


def enlarged(png: bytes, size: tuple[int, int]) -> bytes:
    buffer = BytesIO()
    with Image.open(BytesIO(png)) as image:
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def running(service: Service, request: Request) -> Job | None:
    """This client's running job of this API, else its first waiting one."""
    client, owner = client_of(request), user_of(request).owner
    with service.queue.changed:
        jobs = [job for job in service.queue.jobs.values() if job.api == "a1111" and job.owner == owner]
    mine = [job for job in jobs if job.client == client]
    return min(mine, key=lambda job: (job.state != "running", job.number), default=None)


def progress_as_json(service: Service, job: Job | None, with_image: bool) -> dict:
    image = None
    if job is not None and with_image and job.previews:
        index, rough = min(job.previews.items())
        image = base64.b64encode(enlarged(rough, job.settings[index].size)).decode()
    state = {
        "skipped": False, "interrupted": False, "stopping_generation": False, "job": job.id if job else "",
        "job_count": len(job.indices) if job else 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created if job else 0)),
        "job_no": len(job.done) if job else 0, "sampling_step": job.step if job else 0,
        "sampling_steps": job.steps if job else 0,
    }  # fmt: skip
    left = job.seconds_left() if job else None
    return {
        "progress": job.progress() if job else 0.0,
        "eta_relative": left or 0.0,
        "state": state,
        "current_image": image,
        "textinfo": None,
    }


def png_info_as_json(content: bytes, service: Service) -> dict:
    """The settings text of a picture file, its text chunks, and the fields: none, not an error, if it is not read."""
    opened(content, "image", service.limits)
    with Image.open(BytesIO(content)) as image:
        image.load()
        items = {str(name): printable(value) for name, value in image.info.items() if isinstance(value, str)}
        text = texts_in(image).get("parameters", "")
    if len(text) > service.limits.text:
        raise APIError(422, f"image carries {len(text)} characters of settings; at most {service.limits.text} are read",
                      "image", len(text))  # fmt: skip
    items |= {"parameters": text} if text else {}
    try:
        settings = parse_settings(clean(text))
    except ValueError:
        return {"info": text, "items": items, "parameters": {}}
    said = dict(entries(text.rstrip("\n").rpartition("\n")[2]))
    width, height = settings.size or (0, 0)
    prompts = {"Prompt": settings.prompt, "Negative prompt": settings.negative, "Size-1": width, "Size-2": height}
    return {"info": text, "items": items, "parameters": prompts | said}
