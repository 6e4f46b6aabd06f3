"""What clients of AUTOMATIC1111's web UI say, and what it means here: fields, names, pictures and masks.

What a client leaves out takes the model's own defaults (there 512x512, 50 steps, Euler, scale 7). What would change the
picture and is not had here (scripts, face restoration, tiling, styles, ...) is refused, not passed over.
"""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plainsd.diffusion.samplers import SAMPLERS, shared_spacings
from plainsd.errors import unknown
from plainsd.generate import check_size
from plainsd.pictures.texts.labels import sampler_label, spacing_label
from plainsd.server.canvas import Base
from plainsd.server.errors import Refused, shown
from plainsd.server.limits import Limits
from plainsd.server.schema import Text
from plainsd.server.uploads import alpha_of, box_around, check_pixels, filled_hole, hole_of, picture, resized

WITH_ETA = ("ddim", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")  # there too
NONE_HERE: dict[str, Any] = {         # what clients ask for at their start; GET of each is answered so
    "sd-vae": [], "sd-modules": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [],
    "prompt-styles": [], "script-info": [],
    "scripts": {"txt2img": [], "img2img": []},
}  # fmt: skip
RESIZE = ("stretch", "crop", "fill")  # resize_mode 0, 1, 2
OPTIONS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers")
HARMLESS = ("save", "samples", "grid", "return", "do_not", "show", "live_preview", "outdir")  # options about files
NOTHING: tuple[Any, ...] = (None, "", "None", "none", "Automatic", 0, False, [], {})
NOT_HAD: dict[str, tuple] = {         # fields that would change the picture; those of their values that would not
    "restore_faces": (), "tiling": (), "styles": (), "script_name": (),
    "seed_resize_from_h": (-1,), "seed_resize_from_w": (-1,), "s_churn": (), "s_noise": (1,), "latent_mask": (),
    "initial_noise_multiplier": (1,),
}  # fmt: skip
NOT_HAD_OF_HR: dict[str, tuple] = {   # only where a second pass is asked for
    "hr_second_pass_steps": (), "hr_checkpoint_name": ("Use same checkpoint",), "hr_scheduler": ("Use same scheduler",),
    "hr_sampler_name": ("Use same sampler",), "hr_prompt": (), "hr_negative_prompt": (), "firstphase_width": (),
    "firstphase_height": (),
}  # fmt: skip
UPSCALERS = {"latent": "latent", "latent (bicubic)": "latent", "lanczos": "lanczos", "none": "lanczos"}


class Common(BaseModel):
    """What txt2img and img2img share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)  # extras: looked through for what is not had

    prompt: Text = ""
    negative_prompt: Text = ""
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
    eta: float | None = None
    denoising_strength: float | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    refiner_checkpoint: Text | None = None
    refiner_switch_at: float | None = None
    send_images: bool | None = True

    def wished(self, options: dict[str, Any]) -> dict[str, Any]:
        """As fields of a JobRequest."""
        options = options | known_options(self.override_settings or {})
        sampler, spacing = sampler_of(self.sampler_name or self.sampler_index, self.scheduler)
        fields = {
            "prompt": self.prompt, "negative": self.negative_prompt,
            "model": model_of(options.get("sd_model_checkpoint")),
            "count": (1 if self.batch_size is None else self.batch_size) * (1 if self.n_iter is None else self.n_iter),
            "steps": self.steps, "guidance": self.cfg_scale, "sampler": sampler, "spacing": spacing,
            "seed": None if self.seed in (None, -1) else self.seed,
            "clip_skip": options.get("CLIP_stop_at_last_layers"),
            "eta": self.eta if sampler in WITH_ETA else None,
            "like": "a1111" if self.cfg_scale == 0 else None,
        }  # fmt: skip
        if self.refiner_checkpoint not in NOTHING:
            refiner = model_of(self.refiner_checkpoint)
            if refiner != fields["model"]:  # there, too, a model does not refine itself
                fields |= {"refiner": refiner, "handover": self.refiner_switch_at}
        if self.subseed_strength:
            varied = secrets.randbelow(2**32) if self.subseed in (None, -1) else self.subseed
            fields |= {"variation_strength": self.subseed_strength, "variation_seed": varied}
        return fields

    def refuse_what_is_not_had(self, table: dict[str, tuple] = NOT_HAD) -> None:
        given = dict(self.model_extra or {})
        for name, value in (self.alwayson_scripts or {}).items():
            if value not in ({"args": []}, {"args": [False]}):
                given[name], table = value, {**table, name: ()}
        for name, harmless in table.items():
            if (value := given.get(name)) not in (*NOTHING, *harmless):
                raise Refused(422, f"{name} {shown(value)!r} is not had here; leave it out", name, value)


class Text2Image(Common):
    """POST /sdapi/v1/txt2img."""

    enable_hr: bool | None = False
    hr_scale: float | None = 2.0
    hr_resize_x: int | None = Field(0, description="the width wanted, in place of hr_scale")
    hr_resize_y: int | None = Field(0, description="the height wanted")
    hr_upscaler: Text | None = None

    def second_pass(self, size: tuple[int, int]) -> dict[str, Any]:
        """Its fields of a JobRequest; none where none is wanted."""
        if not self.enable_hr:
            return {}
        self.refuse_what_is_not_had(NOT_HAD_OF_HR)
        wanted = (self.hr_resize_x or 0, self.hr_resize_y or 0)
        scales = {large / small for large, small in zip(wanted, size, strict=True) if large and small}
        if len(scales) > 1:
            raise Refused(
                422,
                f"hr_resize {wanted[0]}x{wanted[1]} has another shape than {size[0]}x{size[1]}; leave "
                "one of the two out",
                "hr_resize_x",
                list(wanted),
            )
        scale = scales.pop() if scales else self.hr_scale or 2.0
        return {"hires": scale, "upscaler": upscaler_of(self.hr_upscaler), "strength": self.denoising_strength}


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
    image_cfg_scale: float | None = Field(None, description="of models that edit pictures; without effect on others")


class PNGInfo(BaseModel):
    image: Text


def known_options(given: dict[str, Any]) -> dict[str, Any]:
    """Of A1111's many options those that are had here. One that would change the picture and is not had is refused."""
    for name, value in given.items():
        if name not in OPTIONS and not name.startswith(HARMLESS) and value not in NOTHING:
            raise Refused(422, str(unknown("option", name, OPTIONS)), "override_settings", name)
    return {name: value for name, value in given.items() if name in OPTIONS and value is not None}


# --- names -----------------------------------------------------------------------------------------------------------


def folded(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum() or sign == "+")


def known_schedulers() -> dict[str, str]:
    """Our spacings, and A1111's labels."""
    return {name: spacing_label(name) for name in shared_spacings()}


def sampler_of(name: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """A1111's two names, or its older one ("DPM++ 2M Karras"), or ours -> ours."""
    spacings = {folded(word): ours for ours, label in known_schedulers().items() for word in (label, ours)}
    samplers = {folded(word): ours for ours in SAMPLERS for word in (sampler_label(ours), ours)}
    spacing = None
    if scheduler and folded(scheduler) != "automatic":
        if folded(scheduler) not in spacings:
            raise Refused(
                404, str(unknown("scheduler", scheduler, known_schedulers().values())), "scheduler", scheduler
            )
        spacing = spacings[folded(scheduler)]
    if not name:
        return None, spacing
    known = folded(name).removeprefix("k") if folded(name).startswith("keuler") else folded(name)
    for suffix in ("karras", "exponential"):
        if known.endswith(suffix) and known.removesuffix(suffix) in samplers:
            known, spacing = known.removesuffix(suffix), suffix
    if known not in samplers:
        raise Refused(404, str(unknown("sampler", name, map(sampler_label, SAMPLERS))), "sampler_name", name)
    return samplers[known], spacing


def model_of(title: Any) -> str | None:
    """A title may carry a hash: `name [abcdef]`."""
    if title is not None and not isinstance(title, str):
        message = f"sd_model_checkpoint {title!r} is no name; GET /sdapi/v1/sd-models lists them"
        raise Refused(422, message, "model", title)
    return title.partition(" [")[0] if title else None


# --- pictures in -----------------------------------------------------------------------------------------------------


def upscaler_of(name: str | None) -> str:
    known = UPSCALERS.get((name or "latent").lower())
    if known is None:
        raise Refused(422, str(unknown("upscaler", name, ("Latent", "Lanczos"))), "hr_upscaler", name)
    return known


def prepared(body: Image2Image, limits: Limits) -> Base:
    """The picture at the wanted size; with a mask, the part around it where inpaint_full_res asks for that."""
    if not body.init_images or len(body.init_images) > 1:
        count = len(body.init_images or [])
        raise Refused(404 if count == 0 else 422, f"init_images has {count} pictures; send one", "init_images", count)
    image = picture(body.init_images[0], "init_images", limits)
    size = check_size((body.width or image.width - image.width % 8, body.height or image.height - image.height % 8))
    check_pixels(size, limits)
    how = RESIZE[body.resize_mode or 0]
    if not body.mask:
        return Base(resized(image, size, how))
    if body.inpainting_fill in (2, 3):
        given = body.inpainting_fill
        raise Refused(422, f"inpainting_fill {given} is not had here; choose 0 or 1", "inpainting_fill", given)
    mask = picture(body.mask, "mask", limits, "black").resize(image.size)
    alpha = alpha_of(mask, body.mask_blur or 0, inverted=bool(body.inpainting_mask_invert))
    if alpha.getbbox() is None:
        raise Refused(422, "mask is dark everywhere, so nothing would be drawn; make it white where the picture is to "
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
    return Base(image, hole, whole, alpha, box)
