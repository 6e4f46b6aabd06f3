"""A1111's request fields that are supported, and their translation to a JobRequest.

What a client leaves out takes the model's own defaults (there 512x512, 50 steps, Euler, scale 7). What would change the
picture and is not supported (scripts, face restoration, ...) is refused: a1111_table.py.
"""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plainsd.diffusion.samplers import SAMPLERS
from plainsd.errors import unknown
from plainsd.pictures.settings import AUTOMATIC, RANDOM, ratio_to
from plainsd.server.api.a1111_control import units_of
from plainsd.server.api.a1111_names import model_of, sampler_of, upscaler_of
from plainsd.server.api.a1111_table import EMPTY_VALUES, check_scripts, known_options, reject_unsupported
from plainsd.server.errors import APIError
from plainsd.server.pool import Models
from plainsd.server.schema import Name, Text
from plainsd.text.prompts import tagged_loras, without_comments

WITHOUT_ETA = ("dpm2", "dpmpp_2m")  # samplers that take eta, but not there
A1111_HIRES_STRENGTH = 0.75  # where a request says nothing
NOISE_SOURCES = {"GPU": "nv", "NV": "nv", "CPU": "cpu"}  # randn_source
FILLS = ("fill", "original", "noise", "nothing")  # inpainting_fill 0 to 3
EMPTY_RESPONSES: dict[str, Any] = {         # what clients ask for at their start; GET of each is answered so
    "sd-vae": [], "sd-modules": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [],
    "script-info": [],
    "scripts": {"txt2img": [], "img2img": []},
}  # fmt: skip


class Common(BaseModel):
    """Fields of both txt2img and img2img."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)  # extras: checked by reject_unsupported

    prompt: Text | None = ""
    negative_prompt: Text | None = ""
    styles: list[Name] | None = None
    seed: int | None = Field(-1, description="-1: a random one")
    subseed: int | None = Field(-1, ge=-1, lt=2**64)
    subseed_strength: float | None = Field(0.0, ge=0, le=1)
    seed_resize_from_w: int | None = Field(-1, ge=-1, le=65536, description="the first noise is of this width ...")
    seed_resize_from_h: int | None = Field(-1, ge=-1, le=65536, description="... and this height, both given")
    sampler_name: Name | None = None
    sampler_index: Name | None = Field(None, description="older name of sampler_name")
    scheduler: Name | None = None
    batch_size: int | None = Field(1, ge=1, le=10_000)
    n_iter: int | None = Field(1, ge=1, le=10_000)
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = Field(None, ge=0, le=1)
    tiling: bool | None = Field(None, description="none: as the option of this name")
    denoising_strength: float | None = Field(None, ge=0, le=1)
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = Field(True, description="false: they stay as options")
    alwayson_scripts: dict[str, Any] | None = None
    refiner_checkpoint: Name | None = None
    refiner_switch_at: float | None = Field(None, ge=0, le=1)
    disable_extra_networks: bool | None = Field(False, description="LoRAs in the prompt do not act")
    infotext: Text | None = Field(None, description="settings as a picture has them; the other fields go before it")
    send_images: bool | None = True

    def job_fields(self, options: dict[str, Any], models: Models) -> dict[str, Any]:
        """As fields of a JobRequest."""
        options = self.options_over(options)
        sampler, spacing = sampler_of(self.sampler_name or self.sampler_index, self.scheduler)
        prompt, negative = self.drawn_texts(self.prompt, self.negative_prompt, options, models)
        if self.disable_extra_networks:  # those of styles too
            prompt, negative = (tagged_loras(text)[0] for text in (prompt, negative))
        fields = {
            "prompt": prompt, "negative": negative,
            "model": model_of(options.get("sd_model_checkpoint"), models),
            "count": (self.batch_size or 1) * (self.n_iter or 1),
            "steps": self.steps, "guidance": self.cfg_scale, "sampler": sampler, "spacing": spacing,
            "seed": RANDOM if self.seed is None else self.seed,
            "clip_skip": options.get("CLIP_stop_at_last_layers"),
            "eta": self.eta if takes_eta(sampler) and sampler not in WITHOUT_ETA else None,
            "tiling": (options.get("tiling") if self.tiling is None else self.tiling) or None,
            "like": "a1111",
        } | self.noise_fields(options)  # fmt: skip
        fields |= units_of(self.alwayson_scripts or {}, getattr(self, "init_images", None))
        if self.refiner_checkpoint not in (*EMPTY_VALUES, "None", "none"):
            refiner = model_of(self.refiner_checkpoint, models)
            if refiner != fields["model"]:  # there, too, a model does not refine itself
                fields |= {"refiner": refiner, "handover": self.refiner_switch_at}
        if self.subseed_strength:
            varied = secrets.randbelow(2**32) if self.subseed in (None, -1) else self.subseed
            fields |= {"variation_strength": self.subseed_strength, "variation_seed": varied}
        return fields

    def options_over(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, and over them those of this request."""
        return options | known_options(self.override_settings or {})

    def drawn_texts(
        self, prompt: str | None, negative: str | None, options: dict[str, Any], models: Models
    ) -> tuple[str, str]:
        """A pair of prompts in the request's styles, and after that without comments: there, too, one at the end of a
        prompt takes a style behind it along."""
        prompt, negative = models.templates.styled(prompt or "", negative or "", self.styles or [])
        if options.get("enable_prompt_comments", True):
            prompt, negative = without_comments(prompt), without_comments(negative)
        return prompt, negative

    def noise_fields(self, options: dict[str, Any]) -> dict[str, Any]:
        """What is said of the random numbers; where nothing is, they are a GPU's, as there."""
        fields: dict[str, Any] = {}
        if source := options.get("randn_source"):
            if not isinstance(source, str) or source not in NOISE_SOURCES:
                raise APIError(422, str(unknown("randn_source", source, NOISE_SOURCES)), "override_settings", source)
            fields["noise"] = NOISE_SOURCES[source]
        if ensd := options.get("eta_noise_seed_delta"):
            fields["ensd"] = ensd
        sides = (self.seed_resize_from_w or 0, self.seed_resize_from_h or 0)
        if min(sides) > 0:
            fields["seed_resize"] = sides
        return fields

    def reject_unsupported(self) -> None:
        """By a1111_table.py."""
        asked = {name: getattr(self, name) for name in type(self).model_fields} | (self.model_extra or {})
        asked["sampler"] = sampler_of(self.sampler_name or self.sampler_index, None)[0]
        reject_unsupported(self.model_extra or {}, asked, type(self).model_fields)
        check_scripts(self.alwayson_scripts or {})


def takes_eta(sampler: str | None) -> bool:
    return sampler is not None and "eta" in SAMPLERS[sampler].takes


class Text2Image(Common):
    """POST /sdapi/v1/txt2img."""

    enable_hr: bool | None = False
    hr_scale: float | None = Field(2.0, ge=0, le=64)
    hr_resize_x: int | None = Field(0, ge=0, le=65536, description="the width wanted, in place of hr_scale")
    hr_resize_y: int | None = Field(0, ge=0, le=65536, description="the height wanted")
    hr_upscaler: Name | None = None
    hr_second_pass_steps: int | None = Field(0, description="all of which run; 0: as many as of the first pass")
    hr_sampler_name: Name | None = Field(None, description="of the second pass, where it is another; likewise:")
    hr_scheduler: Name | None = None
    hr_prompt: Text | None = Field("", description="its LoRAs are those of prompt")
    hr_negative_prompt: Text | None = ""
    hr_cfg: float | None = Field(None, description="Forge's")

    def second_pass(self, size: tuple[int, int], options: dict[str, Any], models: Models) -> dict[str, Any]:
        """Its fields of a JobRequest; none where none is wanted."""
        if not self.enable_hr:
            return {}
        wanted = (self.hr_resize_x or 0, self.hr_resize_y or 0)
        times = ratio_to(wanted, size) if any(wanted) else self.hr_scale or 2.0
        if times is None:
            raise APIError(
                422,
                f"hr_resize {wanted[0]}x{wanted[1]} has another shape than {size[0]}x{size[1]}; leave "
                "one of the two out",
                "hr_resize_x",
                list(wanted),
            )
        fields = {
            "hires": times,
            "strength": A1111_HIRES_STRENGTH if self.denoising_strength is None else self.denoising_strength,
            "upscaler": upscaler_of(self.hr_upscaler, models.upscalers.known()),
        }  # fmt: skip
        return fields | self.hires_overrides(self.options_over(options), models)

    def idle_loras(self) -> list[str]:
        """Notes on LoRAs that only a prompt of the second pass has."""
        wanted = tagged_loras(self.prompt or "")[1]
        return [
            f"{field}: {lora} has no effect; the second pass has the LoRAs of prompt"
            for field in ("hr_prompt", "hr_negative_prompt")
            for lora in tagged_loras(getattr(self, field) or "")[1]
            if lora not in wanted
        ]

    def hires_overrides(self, options: dict[str, Any], models: Models) -> dict[str, Any]:
        """What the second pass draws with, where that is not what the first does."""
        sampler = None if self.hr_sampler_name == "Use same sampler" else self.hr_sampler_name
        schedule = None if self.hr_scheduler == "Use same scheduler" else self.hr_scheduler
        sampler, spacing = sampler_of(sampler, schedule)
        spacing = spacing or (AUTOMATIC if schedule else None)  # the first pass's is None, or "Use same scheduler"
        own = {"hires_prompt": self.hr_prompt, "hires_negative": self.hr_negative_prompt}  # the prompt's where empty
        styled = self.drawn_texts(self.hr_prompt, self.hr_negative_prompt, options, models)
        texts = {name: tagged_loras(text)[0] for name, text in zip(own, styled, strict=True) if own[name]}
        fields = texts | {
            "hires_steps": self.hr_second_pass_steps, "hires_sampler": sampler, "hires_spacing": spacing,
            "hires_guidance": self.hr_cfg,
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value}


class Image2Image(Common):
    """POST /sdapi/v1/img2img."""

    init_images: list[Text] | None = None
    mask: Text | None = None
    mask_blur: float | None = Field(None, ge=0, le=64, description="in place of the two")
    mask_blur_x: float | None = Field(4, ge=0, le=64)
    mask_blur_y: float | None = Field(4, ge=0, le=64)
    inpainting_fill: Literal[0, 1, 2, 3] | None = Field(
        0, description="0: the colours around, 1: what was there, 2: noise, 3: nothing"
    )
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=4096)
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1)
    resize_mode: Literal[0, 1, 2, 3] | None = Field(0, description="stretched, cut, filled")
    include_init_images: bool | None = Field(False, description="in the answer's parameters")
    image_cfg_scale: float | None = Field(
        None, ge=0, le=100, description="of models that edit pictures; without effect on others"
    )

    def mask_fields(self) -> dict[str, Any]:
        """What is told of it: fields of a JobRequest."""
        if not self.mask:
            return {}
        across, down = self.blur()
        return {
            "masked_padding": (self.inpaint_full_res_padding or 0) if self.inpaint_full_res else None,
            "masked_content": FILLS[self.inpainting_fill or 0], "mask_blur": across if across == down else 0,
        }  # fmt: skip

    def blur(self) -> tuple[float, float]:
        """Of the mask's edge, across and down."""
        if self.mask_blur is not None:
            return self.mask_blur, self.mask_blur
        return self.mask_blur_x or 0, self.mask_blur_y or 0


class PNGInfo(BaseModel):
    image: Text
