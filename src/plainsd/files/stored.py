"""The form between all file layouts: settings, and lazily read tensors by our names.

A tensor is read on demand, so that a model passes from file to network, or from file to file, one tensor at a time.
Names and shapes are checked strictly before any tensor is read.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from plainsd.errors import WITH_NAMES, UserError, shortened
from plainsd.files.detect import seems
from plainsd.files.names import SPELLINGS, TensorPlace, places, spelled
from plainsd.files.tensorfile import Stored, TensorFile
from plainsd.models.clip import TextEncoder
from plainsd.models.tiny_vae import vae_class
from plainsd.models.unet import UNet
from plainsd.models.variants import Variant, encoder_names

WIDER_THAN_HALF = (torch.float32, torch.float64, torch.bfloat16)
POSITION_IDS = "text_model.embeddings.position_ids"  # 0, 1, 2, ...: a buffer that older text encoders carry


@dataclass(frozen=True)
class StoredNetwork:
    """A network whose weights are still in their file."""

    kind: type[nn.Module]
    config: Any
    tensors: dict[str, Stored]  # by our names
    extras: dict[str, Stored] = field(default_factory=dict)  # other tensors of its file, by their names there

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network with its weights. Each tensor is cast while it is read."""
        network = _shelf.pop((self.kind, self.config), None) or empty(self.kind, self.config)
        weights = {name: cast(name, stored, dtype).to(device).contiguous() for name, stored in self.tensors.items()}
        network.load_state_dict(weights, assign=True)
        return network


@dataclass(frozen=True)
class Contents:
    """A whole model."""

    variant: Variant
    networks: dict[str, StoredNetwork]  # unet, vae, text_encoder, text_encoder_2
    texts: dict[str, str]  # settings and tokenizers, by path in a diffusers folder
    leftovers: dict[str, Stored] = field(default_factory=dict)  # tensors of a single file that no folder has
    spellings: tuple[str, ...] = ()  # names that are not the table's: "layout network fragment"
    notes: dict[str, str] = field(default_factory=dict)  # metadata of a single file, for other programs
    certain: bool = True  # whether the prediction type is known, not only assumed
    remarks: tuple[str, ...] = ()  # what the reader assumed, a line each


def parts(variant: Variant) -> dict[str, tuple[type[nn.Module], Any]]:
    """The networks of a model by their folders' names, with their configs."""
    texts = zip(encoder_names(variant), variant.text, strict=True)
    encoders = {name: (TextEncoder, text) for name, text in texts}
    return {"unet": (UNet, variant.unet), "vae": (vae_class(variant.vae), variant.vae), **encoders}


class Undrawn(TorchFunctionMode):
    """Skips weight initialisation: useless for meta tensors, and it would import PyTorch's compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RANDOM_INITS:
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


RANDOM_INITS = (nn.init.normal_, nn.init.kaiming_uniform_, torch.Tensor.uniform_, torch.Tensor.normal_)


def empty(kind: type[nn.Module], config: Any) -> nn.Module:
    """A network with its weights on the meta device."""
    with torch.device("meta"), Undrawn():
        return kind(config).eval()


def empties(variant: Variant) -> dict[str, nn.Module]:
    """All networks of a model, on the meta device."""
    return {name: empty(kind, config) for name, (kind, config) in parts(variant).items()}


_shelf: dict[tuple[type, Any], nn.Module] = {}


def blueprint(kind: type[nn.Module], config: Any) -> nn.Module:
    """A cached empty network, for names and shapes; `build` takes it out of the cache."""
    return _shelf.get((kind, config)) or _shelf.setdefault((kind, config), empty(kind, config))


# --- from a file's names to ours -------------------------------------------------------------------------------------


def places_of(
    network: nn.Module, layout: str, names: Collection[str], *, conv: bool, prefix: str = ""
) -> list[TensorPlace]:
    """The places of the network's tensors in a file with these names."""
    found = places(network, layout, conv=conv)
    return [place.called(spelled(prefix + place.name, names)) for place in found]


def respelled(name: str, fragments: Iterable[str]) -> str:
    """The table's name as spelled by a file with these alternative fragments."""
    for fragment in fragments:
        name = name.replace(fragment, dict(SPELLINGS)[fragment], 1)
    return name


def fragments(network: nn.Module, layout: str, names: Collection[str], prefix: str = "") -> list[str]:
    """The fragments of the table's names that the file spells differently."""
    wanted = [prefix + place.name for place in places(network, layout)]
    other = [name for name in wanted if name not in names and spelled(name, names) in names]
    return [
        ours
        for ours, theirs in SPELLINGS
        if any(ours in name and name.replace(ours, theirs, 1) in names for name in other)
    ]


def unpack(file: TensorFile, wanted: list[TensorPlace], shapes: Mapping[str, torch.Size]) -> dict[str, Stored]:
    """The file's tensors under our names, not read yet."""
    found = {}
    for place in wanted:
        stored, expected = file.tensors[place.name], place_shape(place, shapes)
        if stored.foreign:
            stored.read(torch.float32)  # raises: it cannot be read
        linear = shapes[place.ours[0]]
        either = {tuple(linear), (*linear, 1, 1)} if place.mark.endswith("conv") else {tuple(expected)}
        if stored.shape not in either:
            raise UserError(
                f"{file.path}: {place.name!r} has shape {list(stored.shape)} where the settings call for "
                f"{list(expected)}; the file and its settings belong to different models"
            )
        for index, ours in enumerate(place.ours):
            read = partial(part_of, place, stored, index)
            found[ours] = Stored(stored.dtype, tuple(shapes[ours]), read)
    return found


def part_of(place: TensorPlace, stored: Stored, index: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One of our tensors from a tensor of the file; a third is copied, so that the whole is freed."""
    part = place.to_ours(stored.read(dtype))[index]
    return part.clone() if len(place.ours) > 1 else part


def packed_tensors(
    network: StoredNetwork,
    layout: str,
    *,
    conv: bool,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    spelling: Collection[str] = (),
) -> dict[str, Stored]:
    """Our tensors under the file's names. `dtype` of the file; None keeps each tensor's own."""
    bare, packed = blueprint(network.kind, network.config), {}
    shapes = {name: tensor.shape for name, tensor in bare.state_dict().items()}
    for place in places(bare, layout, conv=conv):
        place = place.called(respelled(prefix + place.name, spelling))
        sources = [network.tensors[name] for name in place.ours]
        kind = dtype or sources[0].dtype
        read = partial(whole_of, place, sources, kind)
        packed[place.name] = Stored(kind, tuple(place_shape(place, shapes)), read)
    return packed


def whole_of(place: TensorPlace, sources: list[Stored], kind: torch.dtype) -> torch.Tensor:
    """A tensor of the file from ours."""
    return place.to_theirs([cast(place.name, stored, kind) for stored in sources])


def cast(name: str, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as `dtype`. UserError where its numbers overflow float16, which ends at 65,504."""
    tensor = stored.read(dtype)
    if dtype == torch.float16 and stored.dtype in WIDER_THAN_HALF and not tensor.isfinite().all():
        raise UserError(f"{name} has numbers that float16 cannot hold, or none at all; take float32 (--dtype float32)")
    return tensor


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a file are computed with: float32, or float64 where they are that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def place_shape(place: TensorPlace, shapes: Mapping[str, torch.Size]) -> torch.Size:
    """The shape of a tensor in the file."""
    return place.to_theirs([torch.empty(shapes[name], device="meta") for name in place.ours]).shape


def check_tensor_names(wanted: Collection[str], file: TensorFile) -> None:
    """UserError for missing and unexpected names."""
    missing = [name for name in wanted if name not in file.tensors]
    unexpected = sorted(set(file.tensors) - set(wanted))
    if missing or unexpected:
        raise UserError(
            f"{file.path} does not fit its settings: {len(missing)} names missing ({first(missing)}), "
            f"{len(unexpected)} unexpected ({first(unexpected)}); it seems to be {seems(file.tensors)}",
            most=WITH_NAMES,
        )


def first(names: list[str]) -> str:
    return ", ".join(shortened(name, 90) for name in names[:5]) + (", ..." if len(names) > 5 else "") or "none"
