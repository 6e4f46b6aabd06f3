"""LoRAs baked into a checkpoint, a layer at a time: `plainsd convert SRC DST --lora FILE:0.8`."""

import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plainsd.adapters.layers import attach
from plainsd.adapters.lora import check_strengths, fold
from plainsd.adapters.making import read_adapter
from plainsd.adapters.names import BUNDLE, ModulePlace
from plainsd.adapters.peft import PeftSettings
from plainsd.adapters.reading import lora_name, open_lora, tensors_by_module
from plainsd.errors import UserError
from plainsd.files.hashes import file_hash
from plainsd.files.recipe import narrowed, with_recipe
from plainsd.files.stored import Contents, StoredNetwork, at_least_single, empties, empty
from plainsd.files.tensorfile import Stored, TensorFile
from plainsd.pictures.model import StableDiffusion, assemble


class FoundLora(NamedTuple):
    """One LoRA's tensors for one module, read on demand."""

    file: TensorFile
    names: dict[str, str]
    settings: PeftSettings
    strength: float


def baked(contents: Contents, loras: Iterable[tuple[str | Path, float]], *, partial_fit: bool = False) -> Contents:
    """The contents with LoRAs merged in, in the order given, as by `add_lora` and `merge`. `partial_fit`: ignore names
    that fit no module, and words, with a warning."""
    bare, names, used = without_weights(contents), {}, []
    found: dict[ModulePlace, list[FoundLora]] = {}
    for path, strength in loras:
        check_strengths(strength)
        file = open_lora(Path(path))
        settings = PeftSettings(file)
        used.append(f"{lora_name(Path(path))}:{strength:g}")
        names[file_hash(file.path)] = used[-1]
        if any(name.startswith(BUNDLE) for name in file.tensors):
            what = f"{path} brings words along, which a checkpoint cannot hold"
            if not partial_fit:
                raise UserError(f"{what}; to bake in the rest of it, accept that (--lora-partial)")
            warnings.warn(f"{what}: they are ignored", stacklevel=2)
        for place, tensors in tensors_by_module(file, bare, partial=partial_fit).items():
            found.setdefault(place, []).append(FoundLora(file, tensors, settings, strength))
    networks = dict(contents.networks)
    for part, network in networks.items():
        own = {module: entries for (at, module), entries in found.items() if at == part}
        if own:
            networks[part] = with_adapters(network, part, own)
    recipe = {"type": "plainsd", "loras": used}
    return with_recipe(replace(contents, networks=networks), recipe, names)


def without_weights(contents: Contents) -> StableDiffusion:
    """The model's networks without weights, for names and shapes."""
    return assemble(contents.variant, empties(contents.variant))


def with_adapters(network: StoredNetwork, part: str, found: dict[str, list[FoundLora]]) -> StoredNetwork:
    """The network with its layers merged as they are read."""
    bare, tensors = empty(network.kind, network.config), dict(network.tensors)
    kept: dict[str, dict[str, Tensor]] = {}  # the layer that was made last: its bias is read after its weight

    def read(module: str, leaf: str, own: torch.dtype, dtype: torch.dtype | None = None) -> Tensor:
        if module not in kept:
            kept.clear()
            kept[module] = changed(bare.get_submodule(module), module, network.tensors, found[module])
        return narrowed(kept[module][leaf], dtype or own, f"{part}.{module}.{leaf}")

    for module in found:
        for leaf in bare.get_submodule(module).state_dict():
            stored = network.tensors[f"{module}.{leaf}"]
            tensors[f"{module}.{leaf}"] = replace(stored, read=partial(read, module, leaf, stored.dtype))
    return replace(network, tensors=tensors)


@torch.no_grad()
def changed(bare: nn.Module, name: str, tensors: dict[str, Stored], found: Sequence[FoundLora]) -> dict[str, Tensor]:
    """A layer's merged weights, in at least float32."""
    layer, state = deepcopy(bare).requires_grad_(False), {}
    for leaf in layer.state_dict():
        stored = tensors[f"{name}.{leaf}"]
        state[leaf] = stored.read(at_least_single(stored.dtype))
    layer.load_state_dict(state, assign=True)
    for number, (file, names, settings, strength) in enumerate(found):
        attach(layer, f"lora_{number}", read_adapter(file, names, settings, layer, strength))
    fold(layer, list(layer.adapters))
    return layer.state_dict()
