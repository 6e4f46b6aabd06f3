"""Writes LoRA files: in kohya's naming for A1111, ComfyUI and others, in PEFT's and diffusers' for diffusers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plainsd.adapters.layers import Adapter, Hadamard, Kronecker, LowRank
from plainsd.adapters.names import (
    ModuleNames,
    ModulePlace,
    adaptable_networks,
    dotted_name,
    kohya_name,
    modules_by_name,
    modules_of,
)
from plainsd.adapters.peft import METADATA_KEY
from plainsd.adapters.reading import FAMILY_BY_WIDTH
from plainsd.disk import written_whole
from plainsd.errors import UserError, unknown
from plainsd.files.tensorfile import stored, write_safetensors
from plainsd.listing import suffix_of
from plainsd.pictures.model import StableDiffusion

NAMINGS = {  # endings of down, up, magnitude
    "kohya": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "peft": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight", "lora_magnitude_vector.weight"),
}
ALGORITHMS = {LowRank: "lora", Hadamard: "loha", Kronecker: "lokr"}  # as LyCORIS calls them
KOHYA_VERSIONS = {"SD 1.x": "sd_v1", "SD 2.x": "sd_v2", "SDXL": "sdxl_base_v1-0"}
ARCHITECTURES = {
    "SD 1.x": "stable-diffusion-v1/lora",
    "SD 2.x": "stable-diffusion-v2-512/lora",
    "SDXL": "stable-diffusion-xl-v1-base/lora",
}


def check_lora_file(path: Path) -> None:
    if suffix_of(path) != ".safetensors":
        raise UserError(f"{path}: a LoRA is written as .safetensors; give it that ending")


def write_lora(
    sd: StableDiffusion,
    adapters: Mapping[ModulePlace, Adapter],
    path: Path,
    naming: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    """The file is written whole or not at all. Alphas are tensors in kohya's naming and settings in PEFT's; diffusers'
    has none, so alpha/r goes into B. `metadata` is added to our own; `dtype` None keeps each tensor's dtype."""
    if naming not in NAMINGS:
        raise unknown("LoRA naming", naming, NAMINGS)
    check_lora_file(path)
    if strange := [type(adapter).__name__ for adapter in adapters.values() if type(adapter) not in ALGORITHMS]:
        raise UserError(f"an adapter of the kind {strange[0]} is only read here; keep its own file, or bake it in")
    if naming != "kohya" and any(only_kohya(adapter) for adapter in adapters.values()):
        raise UserError(
            f"this LoRA has parts that the naming {naming!r} cannot tell (LoHa, LoKr, a middle convolution, lengths of "
            "columns, or biases); save it in kohya's"
        )
    known = {part: modules_by_name(network) for part, network in adaptable_networks(sd).items()}
    tensors: dict[str, Tensor] = {}
    for (part, module), adapter in adapters.items():
        tensors |= named_tensors(sd, part, known[part][module], adapter, naming)
    notes = {"kohya": kohya_notes, "peft": peft_notes}.get(naming, lambda *_: {})(sd, adapters)
    packed = {
        name: stored(tensor.detach() if tensor.ndim == 0 else tensor.detach().to(dtype or tensor.dtype))
        for name, tensor in tensors.items()
    }  # an alpha of 1.7 in bfloat16 would be 1.703
    with written_whole(path) as draft:
        write_safetensors(draft, packed, notes | dict(metadata))


def only_kohya(adapter: Adapter) -> bool:
    return not isinstance(adapter, LowRank) or any(
        (adapter.mid is not None, adapter.by_column, adapter.bias is not None)
    )


def low_rank_tensors(adapter: LowRank, part: str, naming: str, *, conv: bool) -> dict[str, Tensor]:
    """The tensors by the endings of their names."""
    down, up, _ = NAMINGS[naming]
    if naming == "diffusers" and part != "unet":
        down, up = down.replace("lora.", "lora_linear_layer."), up.replace("lora.", "lora_linear_layer.")
    factors = {down: adapter.down, up: adapter.up * adapter.scale if naming == "diffusers" else adapter.up}
    if adapter.mid is not None:
        factors["lora_mid.weight"] = adapter.mid
    return {end: factor[:, :, None, None] if conv and factor.ndim == 2 else factor for end, factor in factors.items()}


def lycoris_tensors(adapter: Hadamard | Kronecker, *, conv: bool) -> dict[str, Tensor]:
    """Factors are matrices for convolutions too; LoKr's whole second one has the kernel's sides. Where both of LoKr's
    are whole no reader takes its alpha, and the first one has the scale, which PEFT's files may set."""
    prefix = {Hadamard: "hada_", Kronecker: "lokr_"}[type(adapter)]
    factors = {name: factor for name, factor in adapter.named_parameters() if name not in ("magnitude", "bias")}
    if {"w1", "w2"} <= factors.keys() and adapter.scale != 1:
        factors["w1"] = factors["w1"] * adapter.scale
    if conv and "w2" in factors and factors["w2"].ndim == 2:
        factors["w2"] = factors["w2"][:, :, None, None]
    return {prefix + name: factor for name, factor in factors.items()}


def named_tensors(
    sd: StableDiffusion, part: str, named: ModuleNames, adapter: Adapter, naming: str
) -> dict[str, Tensor]:
    """One adapter's tensors under their names in the file, and in the shapes that the public networks have."""
    magnitude = NAMINGS[naming][2]
    conv = named.mark == "conv" or (named.mark == "maybe-conv" and sd.variant.conv_projections)
    if isinstance(adapter, LowRank):
        tensors = low_rank_tensors(adapter, part, naming, conv=conv)
    else:
        tensors = lycoris_tensors(adapter, conv=conv)
    if naming == "kohya":
        tensors["alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
        if adapter.bias is not None:
            tensors["diff_b"] = adapter.bias
    if adapter.magnitude is not None:
        sides = [1, 1] if conv or adapter.magnitude.ndim == 4 else []
        shape = {"kohya": [*adapter.magnitude.shape[:2], *sides]}.get(naming, [1, -1, 1, 1] if sides else [-1])
        tensors[magnitude] = adapter.magnitude.reshape(shape)
    xl = sd.unet.config.vector is not None
    name = kohya_name(part, named, xl=xl) if naming == "kohya" else dotted_name(part, named)
    return {f"{name}.{end}": tensor for end, tensor in tensors.items()}


def kohya_notes(sd: StableDiffusion, adapters: Mapping[ModulePlace, Adapter]) -> dict[str, str]:
    """The metadata that programs read in files of kohya's trainer."""
    algorithms = sorted({ALGORITHMS[type(adapter)] for adapter in adapters.values()})
    ranks, alphas = ({get(adapter) for adapter in adapters.values()} for get in (lambda a: a.rank, lambda a: a.alpha))
    family = FAMILY_BY_WIDTH.get(sd.unet.config.context, "")
    notes = {
        "ss_network_module": "networks.lora" if algorithms == ["lora"] else "lycoris.kohya",
        "ss_network_dim": f"{ranks.pop()}" if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_v2": str(family == "SD 2.x"),
        "ss_base_model_version": KOHYA_VERSIONS.get(family, sd.variant.name),
    }
    if algorithms != ["lora"]:
        notes["ss_network_args"] = json.dumps({"algo": ", ".join(algorithms)})
    if family in ARCHITECTURES:
        notes |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": ARCHITECTURES[family]}
    return notes


def peft_notes(sd: StableDiffusion, adapters: Mapping[ModulePlace, LowRank]) -> dict[str, str]:
    """PEFT's settings for each network, as diffusers stores them. Names omit `text_model.`, which not all versions of
    transformers have; PEFT matches the end of a name."""
    settings: dict[str, Any] = {}
    for part, network in adaptable_networks(sd).items():
        known = modules_of(network)
        own = {
            known[module].diffusers.removeprefix("text_model."): adapter
            for (at, module), adapter in adapters.items()
            if at == part
        }
        if not own:
            continue
        rank, alpha = (
            Counter(values).most_common(1)[0][0]
            for values in ([a.rank for a in own.values()], [a.alpha for a in own.values()])
        )
        table = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(own),
            "rank_pattern": {name: a.rank for name, a in own.items() if a.rank != rank},
            "alpha_pattern": {name: a.alpha for name, a in own.items() if a.alpha != alpha},
            "use_dora": any(a.magnitude is not None for a in own.values()),
        }
        settings |= {f"{part}.{key}": value for key, value in table.items()}
    return {METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
