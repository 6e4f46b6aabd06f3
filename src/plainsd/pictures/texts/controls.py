"""Maps that a picture followed, as A1111's ControlNet extension writes them:

    ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 1.0, Resize Mode: Just Resize,
    Processor Res: -1, Threshold A: -1.0, Threshold B: -1.0, Guidance Start: 0.0, Guidance End: 1.0,
    Pixel Perfect: False, Control Mode: Balanced"

`Guess Mode`, `Union Kinds`, `Images` and `Masks` are words of our own, written only where they are needed; the
extension passes over them. Image prompts are units there too, of a module whose name begins with `ip-adapter`; here
they follow the ControlNets, as the module that lets the extension choose the image encoder by the adapter's name.
"""

import re
from collections.abc import Mapping

from plainsd.errors import UserError
from plainsd.pictures.settings import (
    CONTROL_MODES,
    MAP_RESIZES,
    PREPROCESSORS,
    THRESHOLDS,
    ControlNote,
    ImagePromptNote,
)

THRESHOLD_KEYS = ("Threshold A", "Threshold B")
UNIT_KEY = re.compile(r"ControlNet \d{1,3}")
MODES = {label: name for name, label in CONTROL_MODES.items()}
RESIZES = {label: name for name, label in MAP_RESIZES.items()} | {
    "Scale to Fit (Inner Fit)": "crop", "Envelope (Outer Fit)": "fill",  # of early 2023
}  # fmt: skip
IMAGE_MODULES = ("ip-adapter-auto", "ip-adapter_clip_sd15", "ip-adapter_clip_h", "ip-adapter_clip_sdxl",
                 "ip-adapter_clip_g", "ip-adapter_clip_sdxl_plus_vith")  # fmt: skip
INPAINT_MODULES = ("inpaint_only", "inpaint", "inpaint_global_harmonious")  # the first is written: ours, under a mask


def controls_written(
    controls: tuple[ControlNote, ...], image_prompts: tuple[ImagePromptNote, ...] = ()
) -> list[tuple[str, str]]:
    """Keys and texts of the units: of the ControlNets, then of the image prompts."""
    units = [unit_text(note) for note in controls] + [image_unit_text(note) for note in image_prompts]
    return [(f"ControlNet {number}", text) for number, text in enumerate(units)]


def unit_text(note: ControlNote) -> str:
    more: dict[str, object] = {"Guess Mode": True} if note.guess else {}
    more |= {"Union Kinds": " ".join(map(str, note.kinds))} if note.kinds else {}
    if note.thresholds:
        more |= dict(zip(THRESHOLD_KEYS, map(float, note.thresholds), strict=True))
    more |= {"Processor Res": note.resolution} if note.resolution else {}
    more |= {"Resize Mode": MAP_RESIZES[note.resize]}
    return pairs_text(INPAINT_MODULES[0] if note.module == INPAINT_MODULES[1] else note.module, note, note.mode, more)


def image_unit_text(note: ImagePromptNote) -> str:
    more = {"Images": note.images} if note.images != 1 else {}
    return pairs_text(IMAGE_MODULES[0], note, "balanced", more | ({"Masks": note.masks} if note.masks else {}))


def pairs_text(module: str, note: ControlNote | ImagePromptNote, mode: str, more: Mapping[str, object]) -> str:
    """The extension parts a unit at commas and colons, so that names have none."""
    pairs: dict[str, object] = {
        "Module": module,
        "Model": note.model,
        "Weight": note.weight,
        "Resize Mode": MAP_RESIZES["stretch"],
        "Processor Res": -1,
        **dict.fromkeys(THRESHOLD_KEYS, -1.0),
        "Guidance Start": note.start,
        "Guidance End": note.end,
        "Pixel Perfect": False,
        "Control Mode": CONTROL_MODES[mode],
    }
    return ", ".join(f"{key}: {re.sub('[:,]', '', str(value))}" for key, value in (pairs | dict(more)).items())


def controls_read(said: dict[str, str]) -> tuple[tuple[ControlNote, ...], tuple[ImagePromptNote, ...]]:
    """Takes the units out of what a text says. UserError for one that cannot be read."""
    keys = sorted(filter(UNIT_KEY.fullmatch, said), key=unit_number)
    units = [read_unit(key, said.pop(key)) for key in keys]
    controls = tuple(unit for unit in units if isinstance(unit, ControlNote))
    return controls, tuple(unit for unit in units if isinstance(unit, ImagePromptNote))


def unit_number(key: str) -> int:
    return int(key.split()[1])


def as_now(pairs: dict[str, str]) -> dict[str, str]:
    """A unit as the extension wrote it in the middle of 2023."""
    start, end = pairs["starting/ending"].strip("()").split(",")
    resolution, low, high = pairs.get("preprocessor params", "(-1, -1, -1)").strip("()").split(",")
    return {
        "Module": pairs["preprocessor"], "Model": pairs.get("model", "None"), "Weight": pairs.get("weight", "1"),
        "Guidance Start": start, "Guidance End": end, "Control Mode": pairs.get("control mode", "Balanced"),
        "Pixel Perfect": pairs.get("pixel perfect", "False"), "Processor Res": resolution,
        "Resize Mode": pairs.get("resize mode", ""),
        **dict(zip(THRESHOLD_KEYS, (low, high), strict=True)),
    }  # fmt: skip


def read_unit(key: str, text: str) -> ControlNote | ImagePromptNote:
    pairs = dict(entry.strip().partition(": ")[::2] for entry in re.split(r",(?![^(]*\))", text))
    try:
        pairs = as_now(pairs) if "preprocessor" in pairs else pairs
        module = pairs["Module"]
        if module in IMAGE_MODULES:
            return ImagePromptNote(
                pairs.get("Model", "None"),
                float(pairs.get("Weight", 1.0)),
                int(pairs.get("Images", 1)),
                int(pairs.get("Masks", 0)),
                float(pairs.get("Guidance Start", 0.0)),
                float(pairs.get("Guidance End", 1.0)),
            )
        acts = module in PREPROCESSORS and module != "none"
        low, high = (float(pairs.get(key, -1)) for key in THRESHOLD_KEYS)
        resolution = int(float(pairs.get("Processor Res", -1)))
        return ControlNote(
            module=INPAINT_MODULES[1] if module in INPAINT_MODULES else module,
            model=pairs.get("Model", "None"),
            weight=float(pairs.get("Weight", 1.0)),
            start=float(pairs.get("Guidance Start", 0.0)),
            end=float(pairs.get("Guidance End", 1.0)),
            mode=MODES[pairs.get("Control Mode", "Balanced")],
            guess=pairs.get("Guess Mode") == "True",
            kinds=tuple(map(int, pairs.get("Union Kinds", "").split())),
            thresholds=(low, high) if acts and min(low, high) >= 0 and (low, high) != THRESHOLDS else None,
            resolution=resolution if acts and resolution > 0 and pairs.get("Pixel Perfect") != "True" else None,
            resize=RESIZES.get(pairs.get("Resize Mode", ""), "stretch"),
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"settings text: {key!r} has a value that cannot be read ({error})") from None
