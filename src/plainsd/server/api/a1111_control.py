"""The units of A1111's ControlNet extension, `alwayson_scripts.controlnet.args`: ControlNets, and IP-Adapters as image
prompts."""

from typing import Any

from plainsd.pictures.preprocess import INPAINT
from plainsd.pictures.settings import CONTROL_MODES, PREPROCESSORS
from plainsd.pictures.texts.controls import IMAGE_MODULES, INPAINT_MODULES
from plainsd.server.errors import APIError
from plainsd.server.schema import ControlRequest, ImagePromptRequest

FIELD = "alwayson_scripts"
RESOLUTION = 512  # of preprocessors, where a unit names none
OLDER_NAMES = {"input_image": "image", "guidance": "guidance_end", "lowvram": "low_vram"}  # older names
UNIT_MODES = {label: name for name, label in CONTROL_MODES.items()} | dict(enumerate(CONTROL_MODES))
ACTING = ("image", "module", "model", "weight", "processor_res", "threshold_a", "threshold_b", "guidance_start",
          "guidance_end", "control_mode")  # fmt: skip
REGION = "effective_region_mask"  # of an IP-Adapter: where it acts
STRETCHED = ("Just Resize", 0)  # resize_mode; otherwise a map of another shape is cropped, as there
IDLE: dict[str, tuple[Any, ...]] = {  # what would change the picture, and the values by which it does not
    "enabled": (True, 1), "mask": (None, ""), "mask_image": (None, ""), REGION: (None, ""),
    "advanced_weighting": (None, []), "hr_option": ("Both", 0, None), "ipadapter_input": (None, []),
    "resize_mode": (*STRETCHED, "Crop and Resize", 1, "Scale to Fit (Inner Fit)", "Inner Fit (Scale to Fit)", None),
    "pixel_perfect": (False, True), "union_control_type": ("Unknown", None), "pulid_mode": ("Fidelity", None),
}  # fmt: skip
IDLE_FIELDS = ("low_vram", "save_detected_map", "is_ui", "input_mode", "batch_images", "output_dir", "loopback",
                  "inpaint_crop_input_image", "animatediff_batch", "batch_modifiers", "batch_image_files",
                  "batch_keyframe_idx", "batch_mask_dir")  # fmt: skip
INSTEAD = {  # modules that are not supported: how their names begin, why, and what to do
    "inpaint_only+lama": "fills the masked part by LaMa, which is not supported; choose inpaint_only",
    "ip-adapter_face_id": "reads a face recognition network (InsightFace), which is not supported; choose "
    "ip-adapter-auto with ip-adapter-plus-face",
    "ip-adapter_pulid": "reads a face recognition network (InsightFace), which is not supported; choose "
    "ip-adapter-auto with ip-adapter-plus-face",
}  # fmt: skip


def units_of(scripts: dict[str, Any], init_images: list[str] | None = None) -> dict[str, list]:
    """As `controls` and `image_prompts` of a JobRequest. A unit without an image reads that of img2img.
    APIError for fields that are active and not supported."""
    named = [name for name in scripts if name.lower() == "controlnet"]
    if len(named) > 1:
        raise APIError(422, f"scripts {' and '.join(map(repr, named))} are the same one; send all units in one", FIELD)
    given = named[0] if named else ""
    script = scripts.get(given)
    args = script.get("args", []) if isinstance(script, dict) else script or []
    if not isinstance(args, list):
        raise APIError(422, f"script {given!r}: args is not a list of units", FIELD)
    found: dict[str, list] = {"controls": [], "image_prompts": []}
    for number, one in enumerate(args):
        if one is not None and not isinstance(one, dict):
            raise APIError(422, f"script {given!r}, unit {number}: {str(one)[:40]!r} is not an object of fields", FIELD)
    units = [(number, one) for number, one in enumerate(args) if one]
    units = [(number, one) for number, one in units if one.get("enabled", True) not in (False, 0)]
    for number, one in units:
        label = f"script {given!r}, unit {number}" if len(args) > 1 else f"script {given!r}"
        try:
            unit = unit_of(one, init_images).labelled(label)
        except APIError as error:
            raise APIError(error.status, f"{label}: {error.message}", FIELD, given) from None
        found["controls" if isinstance(unit, ControlRequest) else "image_prompts"].append(unit)
    return found


def unit_of(unit: dict[str, Any], init_images: list[str] | None = None) -> ControlRequest | ImagePromptRequest:
    unit = {OLDER_NAMES.get(name, name): value for name, value in unit.items()}
    module = str(unit.get("module") or "none").lower()
    for name, why in INSTEAD.items():
        if module.startswith(name):
            raise APIError(422, f"module {module!r} {why}", FIELD)
    for name, value in unit.items():
        if name in ACTING or name in IDLE_FIELDS or (name == REGION and module in IMAGE_MODULES):
            continue
        if name not in IDLE or value not in IDLE[name]:
            raise APIError(422, f"{name} {str(value)[:40]!r} is not supported; leave it out", FIELD, name)
    mode = unit.get("control_mode", "Balanced")
    if not isinstance(mode, str | int) or mode not in UNIT_MODES:
        raise APIError(422, f"unknown control_mode {mode!r}; choose one of {', '.join(CONTROL_MODES.values())}", FIELD)
    fields: dict[str, Any] = {
        "name": str(unit.get("model") or ""), "strength": unit.get("weight"), "start": unit.get("guidance_start"),
        "end": unit.get("guidance_end"),
    }  # fmt: skip
    kind: type[ControlRequest | ImagePromptRequest]
    if module in IMAGE_MODULES:
        kind, more = ImagePromptRequest, image_fields(unit, UNIT_MODES[mode], init_images)
    else:
        kind, more = ControlRequest, map_fields(unit, module, UNIT_MODES[mode], init_images)
    try:
        made = kind(**{name: value for name, value in (fields | more).items() if value is not None})
    except ValueError as error:
        raise APIError(422, f"{' '.join(str(error).split())[:200]}", FIELD) from None
    if isinstance(made, ControlRequest):
        made.resize = "stretch" if unit.get("resize_mode") in STRETCHED else "crop"
        made.pixel_perfect = module != "none" and bool(unit.get("pixel_perfect"))
    return made


def map_fields(unit: dict[str, Any], module: str, mode: str, init_images: list[str] | None) -> dict[str, Any]:
    if module in INPAINT_MODULES:
        if init_images is None:
            raise APIError(422, f"module {module!r} reads the image of img2img and its mask; send both there", FIELD)
        if unit.get("image"):
            raise APIError(422, f"module {module!r} reads the image of img2img and its mask; leave image out", FIELD)
        return {"preprocess": INPAINT, "mode": mode}
    if module not in PREPROCESSORS:
        raise APIError(422, f"module {module!r} is not supported; send the control map itself, or choose canny", FIELD)
    return {
        "image": image_of(unit.get("image"), init_images), "preprocess": module, "mode": mode,
        "low": positive(unit, "threshold_a"), "high": positive(unit, "threshold_b"),
        "resolution": resolution_of(unit) if module != "none" else None,
    }  # fmt: skip


def image_fields(unit: dict[str, Any], mode: str, init_images: list[str] | None) -> dict[str, Any]:
    """The image encoder is the one that the adapter was trained with, whichever module names it."""
    if mode != "balanced":
        what = f"control_mode {CONTROL_MODES[mode]!r} of an IP-Adapter"
        raise APIError(422, f"{what} is not supported; choose {CONTROL_MODES['balanced']}", FIELD)
    given = unit.get("image")
    images = [image_of(one, init_images) for one in (given if isinstance(given, list) else [given])]
    masks = [unit[REGION]] if unit.get(REGION) else []
    return {"images": [image or (init_images or [""])[0] for image in images], "masks": masks}


def resolution_of(unit: dict[str, Any]) -> Any:
    """Of a pixel-perfect unit it follows from the picture that is drawn, see `filling_resolution`."""
    given = None if unit.get("pixel_perfect") else positive(unit, "processor_res")
    return RESOLUTION if given is None else given


def positive(unit: dict[str, Any], name: str) -> Any:
    """None, the preprocessor's default, for the negative values that clients send."""
    value = unit.get(name)
    return None if isinstance(value, int | float) and value < 0 else value


def image_of(value: Any, init_images: list[str] | None) -> str | None:
    """A picture in base64, alone or beside a mask that there is none of; None: that of img2img."""
    if isinstance(value, dict):
        if value.get("mask"):
            raise APIError(422, "a mask beside the image is not supported; leave it out", FIELD)
        value = value.get("image")
    if not value and init_images:
        return None
    if not isinstance(value, str) or not value:
        raise APIError(422, "a unit has no image; send one in base64 as image, or input_image", FIELD)
    return value
