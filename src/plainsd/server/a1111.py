"""The API of AUTOMATIC1111's web UI, with its names and meanings, so that its clients draw here unchanged.

What a client leaves out takes the model's own defaults (there 512x512, 50 steps, Euler, scale 7). What would change the
picture and is not had here (scripts, face restoration, tiling, styles, a refiner) is refused, not passed over.
"""

import base64
import json
import time
from io import BytesIO
from typing import Any, Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from plainsd.errors import unknown
from plainsd.generate import check_size
from plainsd.server.jobs import CANCELLED, Job
from plainsd.server.refusals import Refused, printable
from plainsd.server.requests import Base, JobRequest, Text, clean, job_request
from plainsd.server.service import Service, client_of, why_not
from plainsd.server.store import tagged
from plainsd.server.uploads import alpha_of, box_around, decoded, exact, filled, hole_of, opened, picture, resized
from plainsd.settings import ENTRY, SAMPLERS, SPACINGS, format_settings, parse_settings, unquote

WITH_ETA = ("ddim", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")      # there too
SCHEDULERS = {name: label for name, label in SPACINGS.items() if name != "distilled"}
RESIZE = ("stretch", "crop", "fill")                     # resize_mode 0, 1, 2
OPTIONS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers")
HARMLESS = ("save", "samples", "grid", "return", "do_not", "show", "live_preview", "outdir")       # options about files
NOTHING = (None, "", "None", "Automatic", 0, False)
UPSCALERS = {"latent": "latent", "latent (bicubic)": "latent", "lanczos": "lanczos", "none": "lanczos"}


class Common(BaseModel):
    """What txt2img and img2img share."""

    model_config = ConfigDict(extra="ignore")

    prompt: Text = ""
    negative_prompt: Text = ""
    styles: list[Text] | None = None
    seed: int | None = Field(-1, description="-1: a random one")
    subseed: int | None = -1
    subseed_strength: float | None = 0.0
    sampler_name: Text | None = None
    sampler_index: Text | None = Field(None, description="older name of sampler_name")
    scheduler: Text | None = None
    batch_size: int | None = 1
    n_iter: int | None = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = False
    tiling: bool | None = False
    eta: float | None = None
    denoising_strength: float | None = None
    override_settings: dict[str, Any] | None = None
    script_name: Text | None = None
    alwayson_scripts: dict[str, Any] | None = None
    refiner_checkpoint: Text | None = None
    send_images: bool | None = True

    def wished(self, options: dict[str, Any]) -> dict[str, Any]:
        """As fields of a JobRequest."""
        options = options | known_options(self.override_settings or {})
        sampler, spacing = sampler_of(self.sampler_name or self.sampler_index, self.scheduler)
        fields = {
            "prompt": self.prompt, "negative": self.negative_prompt, "model": model_of(options.get("sd_model_checkpoint")),
            "count": (1 if self.batch_size is None else self.batch_size) * (1 if self.n_iter is None else self.n_iter),
            "steps": self.steps, "guidance": self.cfg_scale, "sampler": sampler, "spacing": spacing,
            "seed": None if self.seed in (None, -1) else self.seed,
            "clip_skip": options.get("CLIP_stop_at_last_layers"),
            "eta": self.eta if sampler in WITH_ETA else None,
        }  # fmt: skip
        if self.subseed_strength:
            varied = int(time.time() * 1000) % 2**32 if self.subseed in (None, -1) else self.subseed
            fields |= {"variation_strength": self.subseed_strength, "variation_seed": varied}
        return fields

    def refuse_what_is_not_had(self) -> None:
        scripts = {name: value for name, value in (self.alwayson_scripts or {}).items() if value and value != {"args": []}
                   and value != {"args": [False]}}  # fmt: skip
        for name, given in (("restore_faces", self.restore_faces), ("tiling", self.tiling), ("script_name", self.script_name),
                            ("styles", self.styles), ("refiner_checkpoint", self.refiner_checkpoint),
                            ("alwayson_scripts", ", ".join(scripts))):  # fmt: skip
            if given and given != "None":
                raise Refused(422, f"{name} {given!r} is not had here; leave it out", name, given)


class Text2Image(Common):
    """POST /sdapi/v1/txt2img."""

    enable_hr: bool | None = False
    hr_scale: float | None = 2.0
    hr_upscaler: Text | None = None
    hr_second_pass_steps: int | None = 0


class Image2Image(Common):
    """POST /sdapi/v1/img2img."""

    init_images: list[Text] | None = None
    mask: Text | None = None
    mask_blur: float | None = Field(4, ge=0, le=64)
    inpainting_fill: Literal[0, 1, 2, 3] | None = Field(0, description="0: the colours around, 1: what was there")
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=4096)
    inpainting_mask_invert: int | None = 0
    resize_mode: Literal[0, 1, 2] | None = Field(0, description="stretched, cut, filled")
    include_init_images: bool | None = False


class PNGInfo(BaseModel):
    image: Text


def known_options(given: dict[str, Any]) -> dict[str, Any]:
    """Of A1111's many options those that are had here. One that would change the picture, and is not had, is refused."""
    for name, value in given.items():
        if name not in OPTIONS and not name.startswith(HARMLESS) and value not in NOTHING:
            raise Refused(422, str(unknown("option", name, OPTIONS)), "override_settings", name)
    return {name: value for name, value in given.items() if name in OPTIONS and value is not None}


# --- names -----------------------------------------------------------------------------------------------------------


def folded(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum() or sign == "+")


def sampler_of(name: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """A1111's two names, or its older one ("DPM++ 2M Karras"), or ours -> ours."""
    spacings = {folded(word): ours for ours, label in SCHEDULERS.items() for word in (label, ours)}
    samplers = {folded(word): ours for ours, label in SAMPLERS.items() for word in (label, ours)}
    spacing = None
    if scheduler and folded(scheduler) != "automatic":
        if folded(scheduler) not in spacings:
            raise Refused(404, str(unknown("scheduler", scheduler, SCHEDULERS.values())), "scheduler", scheduler)
        spacing = spacings[folded(scheduler)]
    if not name:
        return None, spacing
    known = folded(name).removeprefix("k") if folded(name).startswith("keuler") else folded(name)
    for suffix in ("karras", "exponential"):
        if known.endswith(suffix) and known.removesuffix(suffix) in samplers:
            known, spacing = known.removesuffix(suffix), suffix
    if known not in samplers:
        raise Refused(404, str(unknown("sampler", name, SAMPLERS.values())), "sampler_name", name)
    return samplers[known], spacing


def model_of(title: Any) -> str | None:
    """A title may carry a hash: `name [abcdef]`."""
    if title is not None and not isinstance(title, str):
        raise Refused(422, f"sd_model_checkpoint {title!r} is no name; GET /sdapi/v1/sd-models lists them", "model", title)
    return title.partition(" [")[0] if title else None


# --- routes ----------------------------------------------------------------------------------------------------------


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    options: dict[str, Any] = {"sd_model_checkpoint": service.models.default, "CLIP_stop_at_last_layers": 1}

    @router.post("/txt2img")
    async def txt2img(body: Text2Image, request: Request) -> dict:
        body.refuse_what_is_not_had()
        fields = body.wished(options)
        if body.width or body.height:
            native = service.models[fields["model"]].bare.variant.size
            fields["size"] = (body.width or native, body.height or native)
        if body.enable_hr:
            fields |= {"hires": body.hr_scale, "upscaler": upscaler_of(body.hr_upscaler), "strength": body.denoising_strength}
        return await drawn(service, body, job_request(**fields), None, request)

    @router.post("/img2img")
    async def img2img(body: Image2Image, request: Request) -> dict:
        body.refuse_what_is_not_had()
        fields = body.wished(options) | {"strength": 0.75 if body.denoising_strength is None else body.denoising_strength}
        base = await run_in_threadpool(prepared, body, service)
        return await drawn(service, body, job_request(**fields), base, request)

    @router.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict:
        job = running(service, request)
        return await run_in_threadpool(progress_told, service, job, not skip_current_image)

    @router.post("/interrupt")
    @router.post("/skip")
    def interrupt(request: Request) -> dict:
        """Ends what is drawn for this client through this API."""
        if (job := running(service, request)) is not None:
            service.abandon(job)
        return {}

    @router.post("/png-info")
    def png_info(body: PNGInfo) -> dict:
        return info_told(decoded(body.image, "image"), service)

    @router.get("/options")
    def get_options() -> dict:
        return options | {"samples_format": "png", "sd_checkpoint_hash": None, "eta_noise_seed_delta": 0}

    @router.post("/options")
    def set_options(body: dict[str, Any]) -> dict:
        """For requests through this API, until the server ends."""
        given = known_options(body)
        job_request(clip_skip=given.get("CLIP_stop_at_last_layers"))
        if "sd_model_checkpoint" in given:
            given["sd_model_checkpoint"] = service.models[model_of(given["sd_model_checkpoint"])].name
        options.update(given)
        return {}

    @router.get("/samplers")
    def samplers() -> list:
        return [{"name": label, "aliases": [name], "options": {}} for name, label in SAMPLERS.items()]

    @router.get("/schedulers")
    def schedulers() -> list:
        rows = [("automatic", "Automatic"), *SCHEDULERS.items()]
        return [{"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False} for name, label in rows]

    @router.get("/sd-models")
    def sd_models() -> list:
        return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
                for name in service.models.known]  # fmt: skip

    @router.get("/loras")
    def loras() -> list:
        return [{"name": name, "alias": name, "path": path.name, "metadata": {}} for name, path in service.models.loras().items()]

    @router.get("/upscalers")
    def upscalers() -> list:
        return [{"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0} for name in ("None", "Lanczos")]

    @router.get("/latent-upscale-modes")
    def latent_upscale_modes() -> list:
        return [{"name": "Latent"}]

    @router.get("/scripts")
    def scripts() -> dict:
        return {"txt2img": [], "img2img": []}

    @router.post("/refresh-checkpoints")
    @router.post("/refresh-loras")
    def refresh() -> None:
        """Models are named at the start; LoRAs are looked for anew each time."""

    return router


# --- pictures in -----------------------------------------------------------------------------------------------------


def upscaler_of(name: str | None) -> str:
    known = UPSCALERS.get((name or "latent").lower())
    if known is None:
        raise Refused(422, str(unknown("upscaler", name, ("Latent", "Lanczos"))), "hr_upscaler", name)
    return known


def prepared(body: Image2Image, service: Service) -> Base:
    """The picture at the wanted size; with a mask, the part around it where inpaint_full_res asks for that."""
    if not body.init_images or len(body.init_images) > 1:
        count = len(body.init_images or [])
        raise Refused(404 if count == 0 else 422, f"init_images has {count} pictures; send one", "init_images", count)
    image = picture(body.init_images[0], "init_images", service.limits)
    size = check_size((body.width or image.width - image.width % 8, body.height or image.height - image.height % 8))
    if size[0] * size[1] > service.limits.pixels:
        raise Refused(422, f"size {size[0]}x{size[1]} is out of range; this server draws up to {service.limits.pixels} pixels a "
                      "picture", "width", list(size))
    how = RESIZE[body.resize_mode or 0]
    if not body.mask:
        return Base(resized(image, size, how))
    if body.inpainting_fill in (2, 3):
        raise Refused(422, f"inpainting_fill {body.inpainting_fill} is not had here; choose 0 or 1", "inpainting_fill", body.inpainting_fill)
    mask = picture(body.mask, "mask", service.limits, "black").resize(image.size)
    alpha = alpha_of(mask, body.mask_blur or 0, inverted=bool(body.inpainting_mask_invert))
    if alpha.getbbox() is None:
        raise Refused(422, "mask is dark everywhere, so nothing would be drawn; make it white where the picture is to change", "mask")
    whole, box = image, None
    if body.inpaint_full_res:
        box = box_around(alpha, body.inpaint_full_res_padding or 0, size)
        image, hole = resized(image.crop(box), size), hole_of(resized(alpha.crop(box), size))
    else:
        image = whole = resized(image, size, how)
        alpha = resized(alpha, size, how)
        hole = hole_of(alpha)
    if body.inpainting_fill in (0, None):
        image = filled(image, hole)
    return Base(image, hole, whole, alpha, box)


# --- answers ---------------------------------------------------------------------------------------------------------


async def drawn(service: Service, body: Common, wanted: JobRequest, base: Base | None, request: Request) -> dict:
    job = await service.submit(wanted, client_of(request), "a1111", base)
    await service.outcome(job, request)
    if job.state != CANCELLED and (refused := why_not(job)) is not None:
        raise refused
    return await run_in_threadpool(answer, service, body, job)


def answer(service: Service, body: Common, job: Job) -> dict:
    """The pictures; after an interrupt those that were finished, and the one under way as far as it had come."""
    files = [content for _, content in service.files(job)]
    if job.state == CANCELLED and len(files) < len(job.each):
        files += [enlarged(rough, job.each[place].size) for place, rough in sorted(job.previews.items())]
    given = body.model_dump(exclude={"init_images", "mask"})
    images = [base64.b64encode(content).decode() for content in files] if body.send_images is not False else []
    return {"images": images, "parameters": given, "info": json.dumps(info_of(job))}


def info_of(job: Job) -> dict:
    shown = [tagged(settings, job.loras) for settings in job.each]
    one = shown[0]
    varied = one.variation_seed if one.variation_strength else one.seed
    return {
        "prompt": one.prompt, "all_prompts": [s.prompt for s in shown], "negative_prompt": one.negative,
        "all_negative_prompts": [s.negative for s in shown], "seed": exact(one.seed),
        "all_seeds": [exact(s.seed) for s in job.each], "subseed": exact(varied), "subseed_strength": one.variation_strength,
        "all_subseeds": [exact(s.variation_seed if s.variation_strength else s.seed) for s in job.each],
        "width": one.size[0], "height": one.size[1], "sampler_name": SAMPLERS[one.sampler], "cfg_scale": one.guidance,
        "steps": one.steps, "batch_size": len(job.each), "restore_faces": False, "sd_model_name": job.model,
        "sd_model_hash": None, "denoising_strength": one.strength, "extra_generation_params": {"Schedule type": SPACINGS[one.spacing]},
        "index_of_first_image": 0, "infotexts": [format_settings(s) for s in shown], "styles": [], "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": one.clip_skip or 1, "is_using_inpainting_conditioning": False,
    }  # fmt: skip


def enlarged(png: bytes, size: tuple[int, int]) -> bytes:
    buffer = BytesIO()
    with Image.open(BytesIO(png)) as image:
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def running(service: Service, request: Request) -> Job | None:
    """What is drawn for this client through this API; else the first of its jobs that waits."""
    with service.queue.changed:
        mine = [job for job in service.queue.jobs.values() if job.api == "a1111" and job.client == client_of(request)]
    return min(mine, key=lambda job: (job.state != "running", job.number), default=None)


def progress_told(service: Service, job: Job | None, with_image: bool) -> dict:
    image = None
    if job is not None and with_image and job.previews:
        place, rough = min(job.previews.items())
        image = base64.b64encode(enlarged(rough, job.each[place].size)).decode()
    state = {
        "skipped": False, "interrupted": False, "stopping_generation": False, "job": job.id if job else "",
        "job_count": len(job.places) if job else 0, "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created if job else 0)),
        "job_no": len(job.done) if job else 0, "sampling_step": job.step if job else 0, "sampling_steps": job.steps if job else 0,
    }  # fmt: skip
    left = job.seconds_left() if job else None
    return {"progress": job.progress() if job else 0.0, "eta_relative": left or 0.0, "state": state, "current_image": image, "textinfo": None}


def info_told(content: bytes, service: Service) -> dict:
    """The text in a PNG file, and what it says. Empty, not an error, where there is none."""
    opened(content, "image", service.limits)
    with Image.open(BytesIO(content)) as image:
        image.load()
        items = {str(name): printable(value) if name != "parameters" else value for name, value in image.info.items()
                 if isinstance(value, str)}  # fmt: skip
    text = items.get("parameters", "")
    try:
        settings = parse_settings(clean(text))
    except ValueError:
        return {"info": "", "items": {}, "parameters": {}}
    said = {key: unquote(value.strip()) for key, value in ENTRY.findall(text.rstrip("\n").rpartition("\n")[2])}
    width, height = settings.size or (0, 0)
    prompts = {"Prompt": settings.prompt, "Negative prompt": settings.negative, "Size-1": width, "Size-2": height}
    return {"info": text, "items": items, "parameters": prompts | said}
