"""A1111's `infotext`: settings in text form, overridden by the request's own fields."""

import re
from collections.abc import Collection
from typing import Any, TypeVar

from plainsd.errors import UserError
from plainsd.pictures.settings import DEFAULTS, Settings, noise_of
from plainsd.pictures.texts.a1111 import parse_settings
from plainsd.pictures.texts.controls import controls_written
from plainsd.pictures.texts.fields import FIELDS
from plainsd.server.api.a1111_fields import FILLS, Common, Image2Image, Text2Image, takes_eta
from plainsd.server.api.a1111_names import model_of, sampler_of, scheduler_names
from plainsd.server.api.a1111_table import known_options
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.pool import Models
from plainsd.server.schema import JobRequest, clean

CommonT = TypeVar("CommonT", bound=Common)
WITHOUT_A1111_FIELD = (  # settings that requests have no field for there
    "rescale", "interval", "perturbed", "threshold", "apg", "apg_parallel", "apg_momentum", "cache", "batch_index",
    "batch_size",
)  # fmt: skip
OF_THE_OTHER_TASK = {  # settings that one of the two requests has no field for
    Text2Image: ("mask_blur", "masked_padding", "masked_content", "image_guidance"),
    Image2Image: ("hires", "upscaler", *(name for name in JobRequest.model_fields if name.startswith("hires_"))),
}
OTHER_NAMES = {"sampler_name": {"sampler_index"}, "mask_blur": {"mask_blur_x", "mask_blur_y"}}
BY_OPTION = {  # labels of options, whose value is checked as that of the option
    "Face restoration": "face_restoration", "Token merging ratio": "token_merging_ratio",
    "Token merging ratio hr": "token_merging_ratio_hr", "Conditional mask weight": "inpainting_mask_weight",
    "Noise multiplier": "initial_noise_multiplier", "Extra noise": "img2img_extra_noise",
    "Sigma churn": "s_churn", "Sigma noise": "s_noise", "Pad conds": "pad_cond_uncond",
    "Schedule rho": "rho", "Schedule max sigma": "sigma_max", "Schedule min sigma": "sigma_min",
    "Discard penultimate sigma": "always_discard_next_to_last_sigma", "Emphasis": "emphasis",
    "VAE Encoder": "sd_vae_encode_method", "VAE Decoder": "sd_vae_decode_method", "FP8 weight": "fp8_storage",
    "NGMS": "s_min_uncond", "Skip Early CFG": "skip_early_cond", "UniPC variant": "uni_pc_variant",
    "UniPC skip type": "uni_pc_skip_type", "UniPC order": "uni_pc_order",
}  # fmt: skip
PROMPT_FIELDS = {
    "prompt": "prompt", "negative_prompt": "negative", "hr_prompt": "hires_prompt",
    "hr_negative_prompt": "hires_negative",
}  # fmt: skip
BOOLEANS: dict[str, Any] = {"True": True, "False": False}
NOT_REPORTED = (
    "Batch size",
    "Batch pos",
    "Hashes",
    "User",
    "Schedule type",
    "Hires resize",
    "Hires checkpoint",
)  # said otherwise, or nothing


def with_infotext(body: CommonT, models: Models, limits: Limits) -> tuple[CommonT, dict[str, Any], list[str]]:
    """The request with what its infotext says, further fields of a JobRequest, and what has no effect here."""
    if not body.infotext:
        return body, {}, []
    if (length := len(body.infotext)) > limits.text:
        raise APIError(422, f"infotext has {length} characters; at most {limits.text} are read", "infotext", length)
    try:
        settings = parse_settings(clean(body.infotext))
    except (UserError, ValueError) as error:
        raise APIError(422, f"infotext: {error}", "infotext") from None
    other = dict(settings.other)
    known_options({BY_OPTION[key]: value_of(text) for key, text in other.items() if key in BY_OPTION}, "infotext")
    said, idle = read_infotext(settings, other, models)
    given = body.model_dump(exclude_unset=True, exclude_none=True)
    read = {} if "prompt" in given else {"enable_prompt_comments": False}  # a text has prompts as they were drawn
    options = said.pop("override_settings") | read | given.get("override_settings", {})
    known = {*type(body).model_fields, "hr_checkpoint_name"}  # which is refused where it would act
    taken = {*given, *(name for name, others in OTHER_NAMES.items() if others & given.keys())}
    said = {name: value for name, value in said.items() if name in known and name not in taken}
    body = body.model_copy(update={**said, "override_settings": options})
    more = {name: value for name in WITHOUT_A1111_FIELD if (value := getattr(settings, name)) != DEFAULTS[name]}
    more["like"] = settings.like or "diffusers"
    more["settled"] = [ours for theirs, ours in PROMPT_FIELDS.items() if theirs in said]
    sampler = sampler_of(body.sampler_name or body.sampler_index, None)[0]
    if "eta" in said and sampler == settings.sampler and takes_eta(sampler):
        more["eta"] = settings.eta
    if noise_of(settings) == "comfyui" and "randn_source" not in given.get("override_settings", {}):
        more["noise"] = "comfyui"
    without = next((names for kind, names in OF_THE_OTHER_TASK.items() if isinstance(body, kind)), ())
    unmasked = () if isinstance(body, Image2Image) and body.mask else ("masked",)
    idle += written(settings, ("outpaint", *without, *unmasked))
    return body, more, [f"infotext: {entry} has no effect here" for entry in idle]


def read_infotext(settings: Settings, other: dict[str, str], models: Models) -> tuple[dict[str, Any], list[str]]:
    """The settings as A1111's fields, and the entries without effect."""
    width, height = settings.size or (None, None)
    fields = {
        "prompt": settings.prompt, "negative_prompt": settings.negative, "seed": settings.seed, "width": width,
        "height": height, "steps": settings.steps, "cfg_scale": settings.guidance, "sampler_name": settings.sampler,
        "scheduler": scheduler_said(settings.spacing) or other.get("Schedule type"),
        "eta": settings.eta,
        "denoising_strength": settings.strength,
        "subseed": settings.variation_seed, "subseed_strength": settings.variation_strength,
        "refiner_checkpoint": settings.refiner, "refiner_switch_at": settings.handover,
        "mask_blur": settings.mask_blur if settings.masked else None,
        "inpaint_full_res": settings.masked_padding is not None if settings.masked else None,
        "inpaint_full_res_padding": settings.masked_padding,
        "inpainting_fill": FILLS.index(settings.masked_content) if settings.masked else None,
        "image_cfg_scale": settings.image_guidance, "tiling": settings.tiling or None,
        "batch_size": int(size) if (size := other.get("Batch size", "")).isdecimal() and len(size) < 9 else None,
    }  # fmt: skip
    if settings.hires:
        fields |= {"enable_hr": True, "hr_scale": settings.hires, "hr_upscaler": settings.upscaler}
    elif "Hires resize" in other:  # of another shape
        fields |= {"enable_hr": True, "hr_upscaler": settings.upscaler} | sides_of(other["Hires resize"])
    fields |= {
        "hr_second_pass_steps": settings.hires_steps, "hr_sampler_name": settings.hires_sampler,
        "hr_scheduler": scheduler_said(settings.hires_spacing),
        "hr_prompt": settings.hires_prompt,
        "hr_negative_prompt": settings.hires_negative, "hr_cfg": settings.hires_guidance,
        "hr_checkpoint_name": other.get("Hires checkpoint"),
    }  # fmt: skip
    options: dict[str, Any] = {
        "CLIP_stop_at_last_layers": settings.clip_skip,
        "randn_source": "CPU" if noise_of(settings) == "cpu" else "NV",
        "eta_noise_seed_delta": settings.ensd or 0,
    }
    if settings.seed_resize:
        fields["seed_resize_from_w"], fields["seed_resize_from_h"] = settings.seed_resize
    idle = [f"{key}: {text}" for key, text in other.items() if key not in (*BY_OPTION, *NOT_REPORTED)]
    model = model_of(settings.model, models) or model_of(dict(settings.hashes).get("model"), models)
    if model in models.known:
        options["sd_model_checkpoint"] = model
    idle += written(settings, ({*DEFAULTS} - JobRequest.model_fields.keys() - {"masked"}) | {"mask_grow", "soft_mask"})
    words = {embedding.text.lower() for embedding in models.embeddings.known()}
    idle += [f"Embeddings: {word}" for word in settings.embeddings if word.lower() not in words]
    unread = controls_written(settings.control, settings.image_prompt)
    unread += [("Model", settings.model)] if settings.model and model not in models.known else []
    idle += [f"{key}: {text}" for key, text in unread]
    return {name: value for name, value in fields.items() if value is not None} | {"override_settings": options}, idle


def scheduler_said(spacing: str | None) -> str | None:
    """None for that which samplers of distilled models have of themselves, and no others."""
    return None if spacing in (None, "distilled") else scheduler_names(spacing)[0]


def written(settings: Settings, names: Collection[str]) -> list[str]:
    """Those that are set, as the text has them."""
    return [
        f"{key}: {show(value)}"
        for key, name, _, show in FIELDS
        if name in names and (value := getattr(settings, name)) != DEFAULTS[name]
    ]


def sides_of(text: str) -> dict[str, int]:
    """ "512x768" -> the fields for it."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if found is None:
        raise APIError(422, f"infotext: 'Hires resize' {text[:40]!r} cannot be read; write it as 512x768", "infotext")
    return {"hr_resize_x": int(found[1]), "hr_resize_y": int(found[2])}


def value_of(text: str) -> Any:
    """The value of an option: a number, a boolean or a string."""
    try:
        return BOOLEANS[text] if text in BOOLEANS else float(text)
    except ValueError:
        return text
