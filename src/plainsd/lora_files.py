"""Files of LoRAs, read: what dialect, for what model, which tensor for which module, and with what alpha."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plainsd.contents import first
from plainsd.detect import seems
from plainsd.errors import UserError
from plainsd.lora_layers import LowRank
from plainsd.lora_names import Model, Place, known_names, networks, split
from plainsd.tensorfile import TensorFile, damaged, open_tensors

NOTE = "lora_adapter_metadata"        # where diffusers keeps PEFT's settings, as JSON, in a file's metadata
SETTINGS = "adapter_config.json"      # where PEFT keeps them, in the folder of its adapter_model
IN_FOLDER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors",
             "pytorch_lora_weights.bin", "adapter_model.bin")
PLAIN = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")              # a pattern in PEFT's settings that is no more than a name

FOREIGN = (                           # what in a tensor's name tells of another kind of adapter, or of another model
    (r"\.(hada|lokr|oft|boft|glora|ia3)_|\.on_input$", "an adapter of an unsupported kind (LoHa, LoKr, OFT, IA3)"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|joint_transformer_blocks|lora_te3_", "Stable Diffusion 3"),
    (r"motion_modules|temporal_", "a video model"),
)
CONTEXTS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}     # by the width of the text
CROSS = re.compile(r"attn2[._]to_[kv]$")
XL_ONLY = re.compile(r"lora_te2_|text_encoder_2\.|transformer_blocks[._][1-9]|(input|output)_blocks[._]\d")


# --- what a file is --------------------------------------------------------------------------------------------------

def foreign(file: TensorFile) -> str:
    return next((what for pattern, what in FOREIGN if any(re.search(pattern, name) for name in file.tensors)), "")


def made_for(file: TensorFile) -> str:
    """The kind of model that a LoRA was made for: by its names, its shapes, its trainer's notes. Empty: not told."""
    if found := foreign(file):
        return found
    pairs = [(split(name), stored) for name, stored in file.tensors.items()]
    widths = {stored.shape[1] for pair, stored in pairs
              if pair and pair[1] == "down" and CROSS.search(pair[0]) and len(stored.shape) >= 2}
    if len(widths) == 1:
        width, = widths
        return CONTEXTS.get(width, f"a model whose text is {width} wide")
    if any(XL_ONLY.search(name) for name in file.tensors):
        return "SDXL"
    return file.metadata.get("ss_base_model_version", "")


def misfit(file: TensorFile, model: Model, what: str, remedy: str) -> UserError:
    name = "this network" if isinstance(model, nn.Module) else f"this model ({model.variant.name})"
    made = made_for(file)
    return UserError(f"{file.path} does not fit {name}: {what}{made and f'; it seems to be made for {made}'}; {remedy}")


# --- reading ---------------------------------------------------------------------------------------------------------

def open_lora(path: Path) -> TensorFile:
    """A LoRA's file, or the folder in which diffusers or PEFT saved it."""
    if path.is_dir():
        inside = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not inside:
            raise UserError(f"{path} is a folder without {IN_FOLDER[0]} or {IN_FOLDER[1]}; give the LoRA's own file")
        path = inside[0]
    file = open_tensors(path)
    if not any((pair := split(name)) and pair[1] in ("down", "up") for name in file.tensors):
        raise UserError(f"{path} holds no LoRA: it seems to be {foreign(file) or seems(file.tensors)}")
    return file


def located(file: TensorFile, model: Model, *, partial: bool) -> dict[Place, dict[str, str]]:
    """For each module of the model the names of its tensors in the file, by part.

    UserError where a name has no place, or a module not both of its factors; with `partial`, they are left out.
    """
    known, found = known_names(model), {}
    for name in file.tensors:
        module, part = split(name) or (None, None)
        if module in known:
            found.setdefault(known[module], {}).setdefault(part, name)           # of two spellings the first counts
    found = {place: parts for place, parts in found.items() if {"down", "up"} <= parts.keys()}
    used = {name for parts in found.values() for name in parts.values()}
    lost = [name for name in file.tensors if name not in used]
    if lost and not (partial and found):
        remedy = "to use the rest of it, accept that (--lora-partial)" if found else "take a LoRA for this model"
        raise misfit(file, model, f"{len(lost)} of its {len(file.tensors)} names have no place ({first(lost)})", remedy)
    for place, parts in found.items():
        check_shapes(file, model, networks(model)[place[0]].get_submodule(place[1]).weight, parts)
    return found


def check_shapes(file: TensorFile, model: Model, weight: Tensor, parts: Mapping[str, str]) -> None:
    """A 1x1 convolution may be written with or without its two sides of 1."""
    shapes = {part: file.tensors[name].shape for part, name in parts.items()}
    (o, i), sides, r = weight.shape[:2], tuple(weight.shape[2:]), (*shapes["down"], 0)[0]
    wide = max(sides, default=1) > 1
    allowed = {
        "down": {(r, i, *sides)} if wide and "mid" not in parts else {(r, i), (r, i, 1, 1)},
        "mid": {(r, r, *sides)} if wide else (),
        "up": {(o, r), (o, r, 1, 1)},
        "alpha": {(), (1,)},
        "magnitude": {(o,), (o, 1, 1, 1), (1, o, 1, 1)},
        "dora_scale": {(o,), (o, 1), (o, 1, 1, 1), (1, i), (1, i, 1, 1)},
    }
    for part, name in parts.items():
        if r == 0 or shapes[part] not in allowed[part]:
            raise misfit(file, model, f"{name!r} has shape {list(shapes[part])}, and the weight that it would change "
                         f"{list(weight.shape)}", "take a LoRA for this model")


def peft_settings(file: TensorFile) -> dict[str, Any]:
    """Rank, alpha and exceptions from them, as PEFT keeps them; kohya keeps its alphas among the tensors."""
    beside = file.path.parent / SETTINGS
    if NOTE in file.metadata:
        text = file.metadata[NOTE]
    elif file.path.stem == "adapter_model" and beside.is_file():
        text = beside.read_text("utf-8", errors="replace")
    else:
        return {}
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise damaged(file.path, f"PEFT's settings ({NOTE} or {SETTINGS}) are no table in JSON")
    return settings


def peft_alpha(file: TensorFile, settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Of the module that the file calls `name`. An exception's pattern must be a name, or the end of one."""
    part, _, inner = name.partition(".")
    table = {key.removeprefix(f"{part}."): value for key, value in settings.items()}
    alpha = table.get("lora_alpha")
    if alpha is None:
        return float(rank)
    for pattern, value in (table.get("alpha_pattern") or {}).items():
        plain = PLAIN.fullmatch(pattern)
        if plain is None:
            raise UserError(f"{file.path}: PEFT's settings give an alpha to {pattern!r}, which is no name of a module; "
                            "write the names out there, or save the LoRA in kohya's naming")
        ending = plain[1].replace("\\", "").removeprefix("text_model.")
        if f".{name}".endswith(f".{ending}"):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise damaged(file.path, f"PEFT's settings give {alpha!r} as an alpha")
    return float(alpha) * (rank**0.5 if table.get("use_rslora") else 1.0)        # rank-stabilised: alpha / sqrt(r)


def read_adapter(file: TensorFile, parts: Mapping[str, str], settings: Mapping[str, Any], base: nn.Linear | nn.Conv2d,
                 strength: float) -> LowRank:
    """One module's adapter, where the module is and as precise."""
    sides = (1, 1) if isinstance(base, nn.Conv2d) else ()
    tensors = {part: file.tensors[name].read() for part, name in parts.items()}
    rank = len(tensors["down"])
    if "alpha" in tensors:
        alpha = float(tensors.pop("alpha"))
    else:
        alpha = peft_alpha(file, settings, split(parts["down"])[0], rank)
    for part in ("down", "up"):
        if tensors[part].ndim == 2 or not sides:
            tensors[part] = tensors[part].flatten(1).unflatten(1, (-1, *sides))
    if (rows := tensors.pop("magnitude", None)) is not None:             # PEFT has lengths of rows alone
        tensors["magnitude"] = rows.reshape(-1, 1, *sides)
    if (lengths := tensors.pop("dora_scale", None)) is not None:
        by_column = lengths.ndim > 1 and len(lengths) == 1
        tensors["magnitude"] = lengths.reshape((1, -1, *sides) if by_column else (-1, 1, *sides))
    placed = {part: tensor.to(base.weight.device, base.weight.dtype).contiguous() for part, tensor in tensors.items()}
    if not (math.isfinite(alpha) and all(tensor.isfinite().all() for tensor in placed.values())):
        raise damaged(file.path, f"{parts['down']!r} or what belongs to it has values that are not finite numbers")
    return LowRank(**placed, alpha=alpha, strength=strength)
