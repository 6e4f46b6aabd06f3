"""LoRAs and adapters of other kinds on a model: added from files, taken away, folded into the weights, trained, saved.

Hu et al. 2021 (arXiv:2106.09685); the arithmetic is in layers.py and kinds.py, the files in reading.py and writing.py.

    style = add_lora(sd, "style.safetensors", 0.8)           # several at once, each with its strength
    style.set_strength(0.5); style.remove()                  # or merge([style, other])

    lora = inject(sd.unet, rank=16, alpha=16)                # for training: lora.parameters()
    save_lora(sd, "mine.safetensors")

Wherever a `model` is asked for, a whole StableDiffusion will do, or its UNet or a text encoder alone.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from plainsd.adapters.embeddings import bundled, learn
from plainsd.adapters.layers import UNADAPTED, WITH, Adapted, Adapter, attach, detach
from plainsd.adapters.making import read_adapter
from plainsd.adapters.names import Adaptable, ModulePlace, adaptable_networks
from plainsd.adapters.new import NEW, TARGETS, new_adapter, targeted
from plainsd.adapters.peft import PeftSettings
from plainsd.adapters.reading import LORA_FILES, lora_name, lora_of_alias, open_lora, tensors_by_module
from plainsd.adapters.writing import write_lora
from plainsd.errors import UserError, unknown
from plainsd.listing import files_below, suffix_of
from plainsd.models.forms import make_plain
from plainsd.pictures.model import StableDiffusion

LORA_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")


# --- what is on a model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lora:
    """One LoRA on a model: its adapters, by network and module."""

    name: str  # among those on the model, and in the names of its modules
    model: Adaptable

    @property
    def called(self) -> str:
        """As its file or folder is, or as it was injected."""
        return next((adapter.lora for adapter in self.adapters.values() if adapter.lora is not None), self.name)

    @property
    def adapters(self) -> dict[ModulePlace, Adapter]:
        return {
            place: base.adapters[self.name] for place, base in bases(self.model).items() if self.name in base.adapters
        }

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def set_strength(self, strength: float, text_strength: float | None = None) -> None:
        """0 is the model without the LoRA (except for a DoRA's norms, as in PEFT), 1 the LoRA as trained. For text
        encoders the same, if not given."""
        text_strength = strength if text_strength is None else text_strength
        check_strengths(strength, text_strength)
        for (part, _), adapter in self.adapters.items():
            adapter.strength = strength if part == "unet" else text_strength

    def remove(self) -> None:
        """Removes the LoRA and restores the model."""
        for base in bases(self.model).values():
            if self.name in base.adapters:
                detach(base, self.name)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """In this context the model computes as if the LoRA had been removed, to the bit. Strength 0 would leave a
        DoRA's norms, and the work."""
        whole = [(base, base.adapters) for base in bases(self.model).values() if self.name in base.adapters]
        for base, adapters in whole:
            base.adapters = nn.ModuleDict({name: one for name, one in adapters.items() if name != self.name})
            if not base.adapters:
                base.__class__ = UNADAPTED[type(base)]
        try:
            yield
        finally:
            for base, adapters in whole:
                meanwhile = base.adapters if isinstance(base, Adapted) else nn.ModuleDict()
                base.__class__ = WITH.get(type(base), type(base))
                left = {name: one for name, one in adapters.items() if name == self.name or name in meanwhile}
                base.adapters = nn.ModuleDict(left | dict(meanwhile.items()))

    def merge(self) -> None:
        """Merges it into the weights at its current strength."""
        merge([self])


def bases(model: Adaptable) -> dict[ModulePlace, Adapted]:
    """The modules that carry adapters."""
    return {
        (part, name): module
        for part, network in adaptable_networks(model).items()
        for name, module in network.named_modules()
        if isinstance(module, Adapted)
    }


def attached(model: Adaptable) -> list[Lora]:
    """All LoRAs on a model, in the order in which they were added."""
    names = dict.fromkeys(name for base in bases(model).values() for name in base.adapters)
    return [Lora(name, model) for name in names]


def the_one(model: Adaptable, lora: Lora | None) -> Lora:
    found = attached(model) if lora is None else [lora]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} LoRAs are on the model{found and ': '}{', '.join(one.name for one in found)}; "
            f"{'say which one' if found else 'add or inject one first'}"
        )
    return found[0]


@torch.no_grad()
def merge(loras: Sequence[Lora]) -> None:
    """Merges LoRAs into a model's weights, in the order in which they were added. Others stay, and act on the merged
    weights."""
    for model in {id(lora.model): lora.model for lora in loras}.values():
        names = [lora.name for lora in loras if lora.model is model]
        for base in bases(model).values():
            if own := [name for name in names if name in base.adapters]:
                fold(base, own)


@torch.no_grad()
def fold(base: Adapted, names: Sequence[str]) -> None:
    """Merges adapters of one module into its weights."""
    weight, bias = base.adapted(names)
    base.weight.copy_(weight)
    if bias is not None:
        base.bias.copy_(bias)
    for name in names:
        detach(base, name)


# --- from files ------------------------------------------------------------------------------------------------------


def add_lora(
    sd: StableDiffusion,
    path: str | Path,
    strength: float = 1.0,
    text_strength: float | None = None,
    *,
    partial: bool = False,
) -> Lora:
    """Adds a file's LoRA to a model, on top of others. Names that fit no module are an error, or, if `partial`,
    ignored, with a warning. Adapters have the device and dtype of the weights. Words in the file are added to the
    model, and stay when the LoRA is removed. Networks that `faster` has packed are unpacked, with a warning."""
    file = open_lora(Path(path))
    text_strength = strength if text_strength is None else text_strength
    check_strengths(strength, text_strength)
    unpacked = [make_plain(network) for network in adaptable_networks(sd).values()]  # all of them
    if any(unpacked):
        warnings.warn("the model was packed, and LoRAs need plain layers: call faster again after them", stacklevel=2)
    found, settings, parts = tensors_by_module(file, sd, partial=partial), PeftSettings(file), adaptable_networks(sd)
    made, words = {}, bundled(sd, file, partial=partial)
    for place, names in found.items():
        base = parts[place[0]].get_submodule(place[1])
        made[place] = read_adapter(file, names, settings, base, strength if place[0] == "unet" else text_strength)
    learn(sd, words)
    return put(sd, lora_name(Path(path)), made)


def put(model: Adaptable, name: str, adapters: Mapping[ModulePlace, Adapter]) -> Lora:
    """Attaches all adapters after every one has been built: on an error the model is unchanged."""
    taken, safe = {lora.name for lora in attached(model)}, "lora_" + re.sub(r"\W", "_", name)
    own = next(new for new in (safe, *(f"{safe}_{n}" for n in range(2, len(taken) + 3))) if new not in taken)
    parts = adaptable_networks(model)
    for (part, module), adapter in adapters.items():
        adapter.lora = name
        attach(parts[part].get_submodule(module), own, adapter)
    return Lora(own, model)


def check_strengths(*strengths: float) -> None:
    for strength in strengths:
        if not abs(strength) < 1e4:  # infinity and NaN included
            raise UserError(f"LoRA strength {strength:g} is out of bounds; most are between 0 and 1.5")


def find_lora(folder: str | Path, name: str, given: Iterable[Path] = ()) -> Path:
    """A LoRA by its name, or by its path within the folder, as in `<lora:styles/ink:0.8>`; where there is none, by what
    its trainer called it, among those in `given` too."""
    folder = Path(folder)
    places = loras_below(folder)
    fitting = [path for path in places if places[path] == name] or [path for path in places if lora_name(path) == name]
    if len(fitting) > 1:
        apart = len({places[path] for path in fitting}) > 1
        raise UserError(
            f"the LoRA {name!r} is there {len(fitting)} times: {', '.join(map(str, fitting))}; "
            f"{f'name its folder too, as {places[fitting[0]]!r}' if apart else 'remove or rename one of them'}"
        )
    found = fitting[0] if fitting else lora_of_alias([*given, *places], name)
    if found is None and not places:
        raise UserError(f"there is no LoRA {name!r}: {folder} holds no files of LoRAs ({', '.join(LORA_SUFFIXES)})")
    if found is None:
        raise unknown("LoRA", name, map(lora_name, places))
    return found


def loras_below(folder: Path) -> dict[Path, str]:
    """The LoRAs in a folder, each with its path there, without the ending; also the folders that diffusers and PEFT
    save. Where a .safetensors has the same path as others, they are left out."""
    files = [path for path in files_below(folder) if suffix_of(path) in LORA_SUFFIXES and path.is_file()]
    saved = dict.fromkeys(path.parent for path in files if path.name in LORA_FILES and path.parent != folder)
    places = {path: (path.parent / lora_name(path)).relative_to(folder).as_posix() for path in (*saved, *files)}
    safe = {place for path, place in places.items() if suffix_of(path) == ".safetensors"}
    return {path: at for path, at in places.items() if suffix_of(path) == ".safetensors" or at not in safe}


# --- for training ----------------------------------------------------------------------------------------------------


def inject(
    model: Adaptable,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = "attention",
    *,
    conv: bool = False,
    dora: bool = False,
    text: bool = False,
    kind: str = "lora",
    factor: int | None = None,
    name: str = "trained",
    generator: torch.Generator | None = None,
) -> Lora:
    """Adds a new LoRA to a model, for training. One factor is random and another zero (new.py), so that the model's
    output is unchanged at first.

    targets: a name in TARGETS, or patterns such as "*.cross_attn.?" of our modules' names. `conv` adds the convolutions
    of ResBlocks and between levels. `text`: on the text encoders too. `kind`: "lora", "loha" or "lokr"; `factor`, for
    "lokr", is the largest side of its smaller matrix. alpha None is the rank. Parameters are at least float32. Freezing
    the model's other parameters is up to the caller.
    """
    alpha, made = float(rank if alpha is None else alpha), {}
    for part, module in to_adapt(model, rank, alpha, targets, conv=conv, text=text, kind=kind, factor=factor):
        base = adaptable_networks(model)[part].get_submodule(module)
        made[part, module] = new_adapter(kind, base, rank, alpha, factor, dora=dora, generator=generator)
    return put(model, name, made)


def to_adapt(
    model: Adaptable,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    *,
    conv: bool = False,
    text: bool = False,
    kind: str = "lora",
    factor: int | None = None,
) -> list[ModulePlace]:
    """The modules that get a LoRA by `inject`, which has the options; a UserError where they do not fit the model."""
    if rank < 1 or not 0 < alpha < math.inf:
        raise UserError(f"LoRA rank {rank} and alpha {alpha:g}: the rank must be 1 or more, and alpha above 0")
    if kind not in NEW:
        raise unknown("kind of LoRA", kind, NEW)
    if factor is not None and (factor < 1 or kind != "lokr"):
        raise UserError(f"factor {factor} for a {kind}: it is for lokr alone, and 1 or more; leave it out, or give 8")
    networks = adaptable_networks(model)
    found = {
        part: targeted(network, targets, conv=conv)
        for part, network in networks.items()
        if part == "unet" or text or network is model
    }
    of_text = [names for part, names in found.items() if part != "unet"]
    for what, fitting in (("model", [*found.values()]), ("text encoders", of_text)):
        if fitting and not any(fitting):
            raise UserError(
                f"no module of the {what} fits the LoRA targets {targets!r}; choose from {', '.join(TARGETS)}, "
                "or give patterns such as '*attn.*'"
            )
    return [(part, name) for part, names in found.items() for name in names]


def lora_state(model: Adaptable, lora: Lora | None = None) -> dict[str, Tensor]:
    """A LoRA's parameters by our names, such as `unet.mid.attn.proj_in.down`. `lora`: which one of several."""
    return {
        f"{part}.{module}.{name}": parameter.detach()
        for (part, module), adapter in the_one(model, lora).adapters.items()
        for name, parameter in adapter.named_parameters()
    }


@torch.no_grad()
def load_lora_state(model: Adaptable, state: Mapping[str, Tensor], lora: Lora | None = None) -> None:
    """Copies values into a LoRA of the same names and shapes."""
    own = lora_state(model, lora)
    different = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if different:
        raise UserError(
            f"these values are of another LoRA: {len(different)} names or shapes differ, {different[0]!r} "
            "for one; resume with the rank and targets of that run"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def save_lora(
    sd: StableDiffusion,
    path: str | Path,
    naming: str = "kohya",
    metadata: Mapping[str, str] | None = None,
    *,
    lora: Lora | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a LoRA in "kohya" naming (A1111, ComfyUI, diffusers), "peft" or "diffusers". `metadata`: texts to add to
    the notes on rank, alpha and base model, such as {"ss_output_name": "ink"}. `dtype` None keeps that of the LoRA.

    Where alphas differ from module to module, diffusers 0.42 reads kohya's naming wrongly; give it one of the others.
    """
    write_lora(sd, the_one(sd, lora).adapters, Path(path), naming, metadata or {}, dtype)
