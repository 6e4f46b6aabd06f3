"""Reads LoRA files: their dialect, their kind of model, and which tensor belongs to which module, with which alpha."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from plainsd.adapters.layers import LowRank, reshaped
from plainsd.adapters.making import SIDE_PARTS, adapter_kind, made_of
from plainsd.adapters.names import BUNDLE, UNUSED, Adaptable, ModulePlace, adaptable_networks, known_names, split_name
from plainsd.adapters.peft import REMEDY, PeftSettings
from plainsd.errors import WITH_NAMES, UserError, shortened
from plainsd.files.detect import LORA, seems
from plainsd.files.stored import first
from plainsd.files.tensorfile import TensorFile, open_tensors, read_header
from plainsd.listing import suffix_of

LORA_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
FOREIGN = (  # patterns in tensor names of other models
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|joint_transformer_blocks|lora_te3_", "Stable Diffusion 3"),
    (r"motion_modules|temporal_", "a video model"),
)
UNSUPPORTED = (  # patterns in tensor names of unsupported kinds of adapters
    (r"\.lora_E\b|\.ranknum$", "AdaLoRA"),
    (r"\.(?:pvera|vera)_lambda_|\bvera_[AB]\b", "VeRA"),
    (r"\brandlora_", "RandLoRA"),
    (r"\bdelora_", "DeLoRA"),
    (r"\bvblora_", "VB-LoRA"),
    (r"\bhra_u\b", "HRA"),
    (r"\b(?:miss|bone)_", "MiSS"),
    (r"\bfourierft_", "FourierFT"),
    (r"\blora_diag\b", "KaSA"),
    (r"\.lambda_layer$|\.[qp]_layer\.weight$", "T-LoRA"),
    (r"\bglora_[A-E]\b", "PEFT's GLoRA"),
    (r"\.oft_[rs]\b", "OFT as PEFT wrote it before 0.16"),
    (r"\.oft_diag\b|\.bm\.weight$|\.lokr_t1$", "LyCORIS as no known version of it writes it"),
    (r"\b(adamss|beft|c3a|deft|frod|gralora|hira|lily|ln_tuning|osf|peanut|poly|psoft|road)_", "{}"),
    (r"\b(shira|supertuning|tinylora|unilora|waveft|trainable_tokens|oft_embedding|lora_embedding)_", "{}"),
)
FAMILY_BY_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}  # by the width of the text
CROSS = re.compile(r"attn2[._]to_[kv]$")
XL_ONLY = re.compile(r"lora_te2_|text_encoder_2\.|transformer_blocks[._][1-9]|(input|output)_blocks[._]\d")


# --- what a LoRA is called --------------------------------------------------------------------------------------------


def lora_name(path: Path) -> str:
    """What prompts call a LoRA: a file by its name without the ending, a folder by its own, such as `v1.5`."""
    return path.name if path.is_dir() else path.stem


def lora_alias(path: Path) -> str | None:
    """What its trainer called a LoRA, and A1111's prompts do by default (extensions-builtin/Lora/network.py, 1.10.1).
    Reads no weights; None where the file does not say."""
    try:
        file = lora_file(path)
        notes = read_header(file)[0].get("__metadata__") if suffix_of(file) == ".safetensors" else None
    except UserError:  # no LoRA at all
        return None
    name = notes.get("ss_output_name") if isinstance(notes, dict) else None
    return name if isinstance(name, str) and name else None


def lora_of_alias(paths: Iterable[Path], alias: str) -> Path | None:
    """The LoRA that its trainer called so; None if none was. UserError for several."""
    found: dict[Path, Path] = {}
    for path in paths:
        if lora_alias(path) == alias:
            found.setdefault(lora_file(path).resolve(), path)
    if len(found) > 1:
        first_one, *_ = found.values()
        raise UserError(
            f"{len(found)} LoRAs were called {alias!r} by their trainers: {', '.join(map(str, found.values()))}; name "
            f"one by its file, as {lora_name(first_one)!r}",
            field="loras",
            value=alias,
        )
    return next(iter(found.values()), None)


# --- what a file is --------------------------------------------------------------------------------------------------


def names_beside_words(file: TensorFile) -> list[str]:
    """The names of a file's tensors without those of words that it brings along, which may be any text."""
    return [name for name in file.tensors if not name.startswith(BUNDLE)]


def foreign(file: TensorFile) -> str:
    names = names_beside_words(file)
    return next((what for pattern, what in FOREIGN if any(re.search(pattern, name) for name in names)), "")


def unsupported(file: TensorFile) -> str:
    """The kind of adapter in a file, if it is not supported."""
    names = names_beside_words(file)
    for pattern, what in UNSUPPORTED:
        for name in names:
            if match := re.search(pattern, name):
                return what.format(*match.groups())
    return ""


def made_for(file: TensorFile) -> str:
    """The kind of model that a LoRA was made for, by its names, shapes and metadata. Empty: unknown."""
    if found := foreign(file):
        return found
    pairs = [(split_name(name), file.tensors[name]) for name in names_beside_words(file)]
    widths = {
        stored.shape[1]
        for pair, stored in pairs
        if pair and pair[1] in ("down", "hada_w1_b", "diff", "b2") and CROSS.search(pair[0]) and len(stored.shape) >= 2
    }
    if len(widths) == 1:
        (width,) = widths
        return FAMILY_BY_WIDTH.get(width, f"a model whose text is {width} wide")
    if any(XL_ONLY.search(name) for name in names_beside_words(file)):
        return "SDXL"
    return file.metadata.get("ss_base_model_version", "")


def misfit(file: TensorFile, model: Adaptable, what: str, remedy: str) -> UserError:
    name = "this network" if isinstance(model, nn.Module) else f"this model ({model.variant.name})"
    made = made_for(file)
    made = shortened(made, 60)
    return UserError(f"{file.path} does not fit {name}: {what}{made and f'; it seems to be made for {made}'}; {remedy}",
                     most=WITH_NAMES)  # fmt: skip


# --- reading ---------------------------------------------------------------------------------------------------------


def lora_file(path: Path) -> Path:
    """The file itself, or that of a folder saved by diffusers or PEFT."""
    if not path.is_dir():
        return path
    inside = [path / name for name in LORA_FILES if (path / name).is_file()]
    if not inside:
        raise UserError(f"{path} is a folder without {LORA_FILES[0]} or {LORA_FILES[1]}; give the LoRA's own file")
    return inside[0]


def open_lora(path: Path) -> TensorFile:
    """A LoRA file, or a folder saved by diffusers or PEFT."""
    path = lora_file(path)
    file = open_tensors(path)
    if kind := unsupported(file):
        raise UserError(f"{path} is an adapter of a kind that is not supported, {kind}; {REMEDY}")
    if not holds_adapter(file):
        what = foreign(file) or seems(file.tensors)
        raise UserError(
            f"{path} is not an adapter of a known kind: its names, such as {first(list(file.tensors)[:2])}, "
            f"{'are those of no dialect' if what.startswith(LORA) else f'tell of {what}'}; take a LoRA",
            most=WITH_NAMES,
        )
    return file


def holds_adapter(file: TensorFile) -> bool:
    pairs = [pair for name in names_beside_words(file) if (pair := split_name(name))]
    return any(part not in (*SIDE_PARTS, "gain") for _, part in pairs) or any(
        adapter_kind(found) for found in by_module(pairs)
    )


def by_module(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    """The parts of each module."""
    found: dict[str, set[str]] = {}
    for module, part in pairs:
        found.setdefault(module, set()).add(part)
    return list(found.values())


def tensors_by_module(file: TensorFile, model: Adaptable, *, partial: bool) -> dict[ModulePlace, dict[str, str]]:
    """For each module of the model, the names of its tensors in the file, by part.

    UserError for a name that fits no module, incomplete factors, or factors that do not fit the weight; with `partial`,
    they are ignored, with a warning.
    """
    known = known_names(model)
    found: dict[ModulePlace, dict[str, str]] = {}
    names = [name for name in names_beside_words(file) if not UNUSED.match(name)]
    for name in names:
        module, part = split_name(name) or ("", "")
        if module in known:
            found.setdefault(known[module], {}).setdefault(part, name)  # of two spellings the first counts
    found = {place: parts for place, parts in found.items() if adapter_kind(parts)}
    used = {name for parts in found.values() for name in parts.values()}
    lost = [name for name in names if name not in used]
    if lost and not (partial and found):
        remedy = "to use the rest of it, accept that (--lora-partial)" if found else "take a LoRA for this model"
        raise misfit(file, model, f"{len(lost)} of its {len(names)} names have no place ({first(lost)})", remedy)
    fitting, problem = {}, None
    for place, parts in found.items():
        try:
            check_shapes(file, model, adaptable_networks(model)[place[0]].get_submodule(place[1]), parts)
            fitting[place] = parts
        except UserError as error:
            problem = problem or error
    if problem and not (partial and fitting):
        raise problem
    if ignored := lost + [name for place, parts in found.items() if place not in fitting for name in parts.values()]:
        what = f"{len(ignored)} of its {len(names)} names are ignored"
        warnings.warn(f"{file.path}: {what}: {first(ignored)}", stacklevel=3)
    return fitting


def check_shapes(file: TensorFile, model: Adaptable, base: nn.Module, parts: Mapping[str, str]) -> None:
    """The factors must fit the weight. A 1x1 convolution may be stored with or without its two dimensions of 1."""
    shapes, weight = {part: file.tensors[name].shape for part, name in parts.items()}, base.weight
    weight = weight[: rows_of(shapes)] if isinstance(base, nn.Embedding) else weight  # it may have learned words since
    (o, i), sides, r = (*weight.shape, 0)[:2], tuple(weight.shape[2:]), (*shapes.get("down", ()), 1)[0]
    wide = max(sides, default=1) > 1
    allowed = {
        "down": {(r, i, *sides)} if wide and "mid" not in parts else {(r, i), (r, i, 1, 1)},
        "mid": {(r, r, *sides)} if wide else (),
        "up": {(o, r), (o, r, 1, 1)},
        "alpha": {(), (1,)},
        "magnitude": {(o,), (o, 1, 1, 1), (1, o, 1, 1)},
        "dora_scale": {(o,), (o, 1), (o, 1, 1, 1), (1, i), (1, i, 1, 1)},
        "diff": {tuple(weight.shape)} | ({(o, i, 1, 1)} if weight.ndim == 2 else set()),
        "diff_b": {(o,)} if getattr(base, "bias", None) is not None else (),
        "rescale": {(o,), (o, 1), (o, 1, 1, 1)},
        "on_input": {()},
        "gain": {(o,), (i,), (1, o, 1, 1), (1, i, 1, 1)},
        "ia3_l": {(o, 1), (1, i), (1, o, 1, 1), (1, i, 1, 1)},
        "boft_s": {(o, 1), (1, o)},
    }
    kind = adapter_kind(parts)
    others = [part for part in parts if part not in allowed] if kind is not LowRank else []
    for part, name in parts.items():
        if part not in others and (r == 0 or shapes[part] not in allowed.get(part, ())):
            raise misfit(
                file,
                model,
                f"{name!r} has shape {list(shapes[part])}, and the weight that it would change {list(weight.shape)}",
                "take a LoRA for this model",
            )
    try:
        if others and kind:
            factors = {part: torch.empty(shapes[part], device="meta") for part in parts}
            made = made_of(kind, factors, weight, PeftSettings(file), parts[others[0]])
            reshaped(made.change(torch.empty(weight.shape, device="meta")), weight.shape)
    except (RuntimeError, ValueError, ArithmeticError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise misfit(
            file,
            model,
            f"{parts[others[0]]!r} and its like, of shapes "
            f"{', '.join(str(list(shapes[part])) for part in others)}, do not make a change of the weight "
            f"{list(weight.shape)}",
            "take a LoRA for this model",
        ) from None


def rows_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of rows of an adapter of a token table."""
    return next((shapes[part][0] for part in ("up", "diff") if shapes.get(part)), None)
