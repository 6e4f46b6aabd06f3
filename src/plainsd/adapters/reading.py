"""Files of LoRAs, read: what dialect, for what model, which tensor for which module, and with what alpha."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plainsd.adapters.layers import Adapter, Hadamard, Kronecker, LowRank
from plainsd.adapters.names import Model, Place, known_names, networks, split
from plainsd.errors import UserError
from plainsd.files.detect import seems
from plainsd.files.stored import first
from plainsd.files.tensorfile import TensorFile, damaged, open_tensors

NOTE = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings, as JSON, in a file's metadata
SETTINGS = "adapter_config.json"  # where PEFT keeps them, in the folder of its adapter_model
IN_FOLDER = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
PLAIN = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")  # a pattern in PEFT's settings that is no more than a name

FOREIGN = (  # what in a tensor's name tells of another kind of adapter, or of another model
    (r"\.(oft|boft|glora|ia3)_|\.on_input$", "an adapter of an unsupported kind (OFT, GLoRA, IA3)"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|joint_transformer_blocks|lora_te3_", "Stable Diffusion 3"),
    (r"motion_modules|temporal_", "a video model"),
)
BESIDE = ("alpha", "dora_scale", "magnitude")  # parts that any kind of adapter may have
CONTEXTS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}  # by the width of the text
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
    widths = {
        stored.shape[1]
        for pair, stored in pairs
        if pair and pair[1] in ("down", "hada_w1_b") and CROSS.search(pair[0]) and len(stored.shape) >= 2
    }
    if len(widths) == 1:
        (width,) = widths
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
    if not any((pair := split(name)) and pair[1] not in BESIDE for name in file.tensors):
        raise UserError(f"{path} holds no LoRA: it seems to be {foreign(file) or seems(file.tensors)}")
    return file


def located(file: TensorFile, model: Model, *, partial: bool) -> dict[Place, dict[str, str]]:
    """For each module of the model the names of its tensors in the file, by part.

    UserError where a name has no place, or a module not all of its factors; with `partial`, they are left out.
    """
    known, found = known_names(model), {}
    for name in file.tensors:
        module, part = split(name) or (None, None)
        if module in known:
            found.setdefault(known[module], {}).setdefault(part, name)  # of two spellings the first counts
    found = {place: parts for place, parts in found.items() if kind_of(parts)}
    used = {name for parts in found.values() for name in parts.values()}
    lost = [name for name in file.tensors if name not in used]
    if lost and not (partial and found):
        remedy = "to use the rest of it, accept that (--lora-partial)" if found else "take a LoRA for this model"
        raise misfit(file, model, f"{len(lost)} of its {len(file.tensors)} names have no place ({first(lost)})", remedy)
    for place, parts in found.items():
        check_shapes(file, model, networks(model)[place[0]].get_submodule(place[1]).weight, parts)
    return found


def kind_of(parts: Collection[str]) -> type[Adapter] | None:
    """The kind of adapter whose factors are all there."""

    def whole(*names: str) -> bool:
        return all(name in parts for name in names)

    if whole("down", "up"):
        return LowRank
    if whole("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        return Hadamard
    if all(whole(f"lokr_w{n}") or whole(f"lokr_w{n}_a", f"lokr_w{n}_b") for n in (1, 2)):
        return Kronecker
    return None


def check_shapes(file: TensorFile, model: Model, weight: Tensor, parts: Mapping[str, str]) -> None:
    """A 1x1 convolution may be written with or without its two sides of 1."""
    shapes = {part: file.tensors[name].shape for part, name in parts.items()}
    (o, i), sides, r = weight.shape[:2], tuple(weight.shape[2:]), (*shapes.get("down", ()), 1)[0]
    wide = max(sides, default=1) > 1
    allowed = {
        "down": {(r, i, *sides)} if wide and "mid" not in parts else {(r, i), (r, i, 1, 1)},
        "mid": {(r, r, *sides)} if wide else (),
        "up": {(o, r), (o, r, 1, 1)},
        "alpha": {(), (1,)},
        "magnitude": {(o,), (o, 1, 1, 1), (1, o, 1, 1)},
        "dora_scale": {(o,), (o, 1), (o, 1, 1, 1), (1, i), (1, i, 1, 1)},
    }
    kind = kind_of(parts)
    others = [part for part in parts if part.startswith(PREFIXES[kind])] if kind is not LowRank else []
    for part, name in parts.items():
        if part not in others and (r == 0 or shapes[part] not in allowed.get(part, ())):
            raise misfit(
                file,
                model,
                f"{name!r} has shape {list(shapes[part])}, and the weight that it would change {list(weight.shape)}",
                "take a LoRA for this model",
            )
    try:
        if others:
            factors = {part: torch.empty(shapes[part], device="meta") for part in others}
            made_of(kind, factors, weight).product(torch.float32)
    except (RuntimeError, ValueError, ArithmeticError):
        raise misfit(
            file,
            model,
            f"{parts[others[0]]!r} and its like, of shapes "
            f"{', '.join(str(list(shapes[part])) for part in others)}, do not make a change of the weight "
            f"{list(weight.shape)}",
            "take a LoRA for this model",
        ) from None


PREFIXES = {Hadamard: "hada_", Kronecker: "lokr_"}


def made_of(kind: type[Adapter], tensors: Mapping[str, Tensor], weight: Tensor, strength: float = 1.0) -> Adapter:
    """With alpha 1."""
    if kind is LowRank:
        return LowRank(**tensors, alpha=1.0, strength=strength)
    factors = {part.removeprefix(PREFIXES[kind]): tensor for part, tensor in tensors.items() if part not in BESIDE}
    return kind(factors, 1.0, weight.shape, magnitude=tensors.get("magnitude"), strength=strength)


def peft_settings(file: TensorFile) -> dict[str, Any]:
    """Rank, alpha and exceptions from them, as PEFT keeps them; kohya keeps its alphas among the tensors."""
    beside = file.path.parent / SETTINGS
    if NOTE in file.metadata:
        text = file.metadata[NOTE]
    elif file.path.stem == "adapter_model" and beside.is_file():
        text = beside.read_text("utf-8-sig", errors="replace")
    else:
        return {}
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise damaged(file.path, f"PEFT's settings ({NOTE} or {SETTINGS}) are no table in JSON")
    return settings


def peft_table(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those for the network of the module that the file calls `name`."""
    return {key.removeprefix(f"{name.partition('.')[0]}."): value for key, value in settings.items()}


def peft_alpha(file: TensorFile, settings: Mapping[str, Any], name: str, rank: int | None) -> float:
    """Of the module that the file calls `name`. An exception's pattern must be a name, or the end of one."""
    table = peft_table(settings, name)
    alpha = table.get("lora_alpha", table.get("alpha"))  # the second for LoHa and LoKr
    if alpha is None:
        return float(rank or 1)
    for pattern, value in (table.get("alpha_pattern") or {}).items():
        plain = PLAIN.fullmatch(pattern)
        if plain is None:
            raise UserError(
                f"{file.path}: PEFT's settings give an alpha to {pattern!r}, which is no name of a module; "
                "write the names out there, or save the LoRA in kohya's naming"
            )
        ending = plain[1].replace("\\", "").removeprefix("text_model.")
        if f".{name}".endswith(f".{ending}"):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise damaged(file.path, f"PEFT's settings give {alpha!r} as an alpha")
    return float(alpha) * (rank**0.5 if table.get("use_rslora") else 1.0)  # rank-stabilised: alpha / sqrt(r)


def read_adapter(
    file: TensorFile,
    parts: Mapping[str, str],
    settings: Mapping[str, Any],
    base: nn.Linear | nn.Conv2d,
    strength: float,
) -> Adapter:
    """One module's adapter, where the module is and as precise."""
    sides = (1, 1) if isinstance(base, nn.Conv2d) else ()
    kind, tensors = kind_of(parts), {part: file.tensors[name].read() for part, name in parts.items()}
    alpha = tensors.pop("alpha", None)
    for part in ("down", "up") if kind is LowRank else ():
        if tensors[part].ndim == 2 or not sides:
            tensors[part] = tensors[part].flatten(1).unflatten(1, (-1, *sides))
    if (rows := tensors.pop("magnitude", None)) is not None:  # PEFT has lengths of rows alone
        tensors["magnitude"] = rows.reshape(-1, 1, *sides)
    if (lengths := tensors.pop("dora_scale", None)) is not None:
        by_column = lengths.ndim > 1 and len(lengths) == 1
        tensors["magnitude"] = lengths.reshape((1, -1, *sides) if by_column else (-1, 1, *sides))
    placed = {part: tensor.to(base.weight.device, base.weight.dtype).contiguous() for part, tensor in tensors.items()}
    adapter = made_of(kind, placed, base.weight, strength)
    name = split(next(iter(parts.values())))[0]
    if kind is Kronecker and alpha is None:
        adapter.rank_if_whole = rank = peft_table(settings, name).get("r")
        if not (rank is None or isinstance(rank, int) and rank > 0):
            raise damaged(file.path, f"PEFT's settings give {rank!r} as a rank")
    adapter.alpha = peft_alpha(file, settings, name, adapter.rank) if alpha is None else float(alpha)
    if not (math.isfinite(adapter.alpha) and all(tensor.isfinite().all() for tensor in placed.values())):
        raise damaged(
            file.path, f"{next(iter(parts.values()))!r} or what belongs to it has values that are not finite numbers"
        )
    return adapter
