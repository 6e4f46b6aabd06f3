"""The units of A1111's ControlNet extension, `alwayson_scripts.controlnet.args`, as maps to follow."""

from typing import Any

from plainsd.pictures.preprocess import PREPROCESSORS
from plainsd.pictures.settings import CONTROL_MODES
from plainsd.server.errors import APIError
from plainsd.server.schema import ControlRequest

FIELD = "alwayson_scripts"
OLDER_NAMES = {"input_image": "image", "guidance": "guidance_end", "lowvram": "low_vram"}  # older names
UNIT_MODES = {label: name for name, label in CONTROL_MODES.items()} | dict(enumerate(CONTROL_MODES))
ACTING = ("image", "module", "model", "weight", "processor_res", "threshold_a", "threshold_b", "guidance_start",
          "guidance_end", "control_mode")  # fmt: skip
IDLE: dict[str, tuple[Any, ...]] = {  # what would change the picture, and the values by which it does not
    "enabled": (True, 1), "mask": (None, ""), "mask_image": (None, ""), "effective_region_mask": (None, ""),
    "advanced_weighting": (None, []), "hr_option": ("Both", 0, None), "ipadapter_input": (None, []),
    "resize_mode": ("Just Resize", 0, "Crop and Resize", 1, "Scale to Fit (Inner Fit)", None),
    "pixel_perfect": (False, True), "union_control_type": ("Unknown", None), "pulid_mode": ("Fidelity", None),
}  # fmt: skip
IDLE_FIELDS = ("low_vram", "save_detected_map", "is_ui", "input_mode", "batch_images", "output_dir", "loopback",
                  "inpaint_crop_input_image", "animatediff_batch", "batch_modifiers", "batch_image_files",
                  "batch_keyframe_idx", "batch_mask_dir")  # fmt: skip


def units_of(scripts: dict[str, Any]) -> list[ControlRequest]:
    """APIError, by name, for what would act and is not had here."""
    given = next((name for name in scripts if name.lower() == "controlnet"), "")
    script = scripts.get(given)
    args = script.get("args", []) if isinstance(script, dict) else script or []
    if not isinstance(args, list):
        raise APIError(422, f"script {given!r}: args is no list of units", FIELD)
    units = [one for one in args if isinstance(one, dict) and one and one.get("enabled", True) not in (False, 0)]
    try:
        return [unit_of(unit) for unit in units]
    except APIError as error:
        raise APIError(error.status, f"script {given!r}: {error.message}", FIELD, given) from None


def unit_of(unit: dict[str, Any]) -> ControlRequest:
    unit = {OLDER_NAMES.get(name, name): value for name, value in unit.items()}
    for name, value in unit.items():
        if name in ACTING or name in IDLE_FIELDS:
            continue
        if name not in IDLE or value not in IDLE[name]:
            raise APIError(422, f"{name} {str(value)[:40]!r} is not had here; leave it out", FIELD, name)
    module = str(unit.get("module") or "none").lower()
    if module not in PREPROCESSORS:
        raise APIError(422, f"module {module!r} is not had here; send the finished map, or choose canny", FIELD)
    mode = unit.get("control_mode", "Balanced")
    if mode not in UNIT_MODES:
        raise APIError(422, f"control_mode {mode!r} is none; choose one of {', '.join(CONTROL_MODES.values())}", FIELD)
    fields = {
        "name": str(unit.get("model") or ""), "image": image_of(unit.get("image")), "preprocess": module,
        "mode": UNIT_MODES[mode], "strength": unit.get("weight"), "start": unit.get("guidance_start"),
        "end": unit.get("guidance_end"), "low": positive(unit, "threshold_a"), "high": positive(unit, "threshold_b"),
        "resolution": positive(unit, "processor_res") if module != "none" else None,
    }  # fmt: skip
    try:
        return ControlRequest(**{name: value for name, value in fields.items() if value is not None})
    except ValueError as error:
        raise APIError(422, f"{' '.join(str(error).split())[:200]}", FIELD) from None


def positive(unit: dict[str, Any], name: str) -> Any:
    """Below 0, as clients send it: the preprocessor's own."""
    value = unit.get(name)
    return None if isinstance(value, int | float) and value < 0 else value


def image_of(value: Any) -> str:
    """A picture in base64, alone or beside a mask that there is none of."""
    if isinstance(value, dict):
        if value.get("mask"):
            raise APIError(422, "a mask beside the image is not had here; leave it out", FIELD)
        value = value.get("image")
    if not isinstance(value, str) or not value:
        raise APIError(422, "a unit has no image; send one in base64 as image, or input_image", FIELD)
    return value
