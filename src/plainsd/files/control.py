"""ControlNets in files: a diffusers folder or file, the original's names, differences to a base, and ControlLoRAs.

    folder        config.json and weights in diffusers' names
    original      `input_blocks.0.0.weight`, `zero_convs.0.0.weight`, perhaps under `control_model.`
    difference    likewise with a tensor named `difference`: the base's weights are to be added where it has that name
    ControlLoRA   likewise with `lora_controlnet`: where `x.up` and `x.down` stand for `x.weight`, their product is a
                  change to the base's, and what is missing is the base's
    union         diffusers' names, with `task_embedding`

A file from elsewhere must have the shape of a known model's net; one of ours has its settings in the metadata.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from plainsd.disk import read_json, whole_folder, written_whole
from plainsd.errors import UserError, unknown
from plainsd.files import detect
from plainsd.files.configs import CONTROL_CLASSES, read_control
from plainsd.files.configs_out import write_control
from plainsd.files.folder import STEMS, open_part, read_network
from plainsd.files.names import TensorPlace, places
from plainsd.files.stored import StoredNetwork, blueprint, packed_tensors, places_of
from plainsd.files.tensorfile import Stored, TensorFile, open_tensors, write_safetensors
from plainsd.files.unusable import damaged
from plainsd.json_reader import parsed_json
from plainsd.listing import suffix_of
from plainsd.models.control import ControlConfig, ControlNet, way_down
from plainsd.models.unet import UNetConfig
from plainsd.models.variants import XL_UNET

CONTROL_NOTE = "plainsd.control"  # in a file's metadata: config.json
PREFIX = "control_model."
DIFFERENCE, LOW_RANK = "difference", "lora_controlnet"  # tensors that are words
CONTROL_LAYOUTS = ("diffusers", "single-file")
OUTERMOST = {
    "conv_in": -1,
    "conv_out": 1000,
}  # the first and the last of the convolutions that diffusers numbers between
XL_MID = replace(XL_UNET, depth=(0, 0, 1), mid_depth=1)  # diffusers' smaller nets for SDXL
XL_SMALL = replace(XL_UNET, depth=(0, 0, 0), mid_depth=0)
CONTROL_FORMS = {"": "a ControlNet", DIFFERENCE: "a ControlNet's difference to a base", LOW_RANK: "a ControlLoRA"}


@dataclass(frozen=True)
class StoredControl:
    """A ControlNet whose weights are still in their file."""

    config: ControlConfig
    file: TensorFile
    conv: bool  # whether its files hold projections as convolutions
    names: str = "diffusers"  # or "original"
    form: str = ""  # or DIFFERENCE, LOW_RANK: what it takes from a base

    def network(self, base: Callable[[], Mapping[str, Tensor]] | None = None) -> StoredNetwork:
        """The whole net. `base`: gives a UNet's weights by our names, where the file has a part only."""
        if not self.form:
            return read_network(self.file, ControlNet, self.config, conv=self.conv, layout=self.names)
        if base is None:
            raise UserError(
                f"{self.file.path} is {CONTROL_FORMS[self.form]}, and needs the model that it is for; give "
                "that to load_control with base=, and the result to save_control",
                field="control",
            )
        return StoredNetwork(ControlNet, self.config, with_base(self, base()))


# --- what it is ------------------------------------------------------------------------------------------------------


def is_control(path: Path) -> bool:
    """Whether a folder or a file holds a ControlNet."""
    if path.is_dir():
        file = path / "config.json"
        return file.is_file() and read_json(file).get("_class_name") in CONTROL_CLASSES
    return holds_control(open_tensors(path))


def holds_control(file: TensorFile) -> bool:
    """Whether a file is a ControlNet; a whole checkpoint with one beside it is a model."""
    names = file.tensors
    if detect.is_checkpoint(names):
        return False
    starts = ("controlnet_cond_embedding.", f"{PREFIX}input_hint_block.", "input_hint_block.")
    return CONTROL_NOTE in file.metadata or LOW_RANK in names or any(name.startswith(starts) for name in names)


def open_control(path: Path, variant_file: str | None = None) -> StoredControl:
    """A ControlNet in any of its forms, in a whole checkpoint too."""
    if path.is_dir():
        config, conv = read_control(read_json(path / "config.json"), str(path / "config.json"))
        return StoredControl(config, open_part(path, variant_file), conv)
    file = without_model(open_tensors(path))
    if not holds_control(file):
        raise UserError(f"{path} is not a ControlNet: it seems to be {detect.seems(file.tensors)}", field="control")
    form = next((word for word in (LOW_RANK, DIFFERENCE) if word in file.tensors), "")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in file.tensors.items() if name != form}
    file = TensorFile(path, tensors, file.metadata)
    names = "original" if "zero_convs.0.0.weight" in tensors else "diffusers"
    config = noted(file) or shaped(file, names, partial=bool(form))
    conv = any(name.endswith("proj_in.weight") and len(tensor.shape) == 4 for name, tensor in tensors.items())
    return StoredControl(config, file, conv, names, form)


def without_model(file: TensorFile) -> TensorFile:
    """The net alone, where the original's training saved it with the model that it is for."""
    if not any(name.startswith(PREFIX) for name in file.tensors):
        return file
    own = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name.startswith(PREFIX) or name in (DIFFERENCE, LOW_RANK)
    }
    return replace(file, tensors=own)


def noted(file: TensorFile) -> ControlConfig | None:
    """The settings in a file of ours."""
    if CONTROL_NOTE not in file.metadata:
        return None
    try:
        return read_control(parsed_json(file.metadata[CONTROL_NOTE]), str(file.path))[0]
    except (ValueError, AttributeError) as error:
        raise damaged(file.path, f"the note {CONTROL_NOTE!r} in its metadata is not JSON") from error


def shaped(file: TensorFile, names: str, partial: bool) -> ControlConfig:
    """Of the known models' nets the one with these names and widths."""
    pooled = "shuffle" in file.path.stem.lower()
    if pooled:
        warnings.warn(f"{file.path}: by its name its residuals are means over the whole picture", stacklevel=4)
    for unet in known_unets():
        config = ControlConfig(unet, *hint_of(file, names), pooled=pooled)
        if "task_embedding" in file.tensors:
            config = replace(config, kinds=(*file.tensors["task_embedding"].shape, 0)[0])
        if fits(file, config, names, partial):
            return config
    raise UserError(
        f"{file.path} is a ControlNet of an unknown size ({len(file.tensors)} tensors); give it as a "
        "folder with config.json",
        field="control",
    )


def known_unets() -> list[UNetConfig]:
    """Of all models that read latents alone."""
    own = [variant.unet for variant in detect.VARIANTS.values() if variant.unet.in_channels == 4]
    return list(dict.fromkeys(way_down(unet) for unet in [*own, XL_MID, XL_SMALL]))


def hint_of(file: TensorFile, names: str) -> tuple[tuple[int, ...], int]:
    """Widths of the convolutions that bring a map down, and the map's channels."""
    start = "input_hint_block." if names == "original" else "controlnet_cond_embedding."
    shapes = {}
    for name, tensor in file.tensors.items():
        place = name.removeprefix(start).removesuffix(".weight").removeprefix("blocks.")
        if name.startswith(start) and len(tensor.shape) == 4:
            shapes[OUTERMOST[place] if place in OUTERMOST else int(place) if place.isdigit() else 0] = tensor.shape
    found = [shape for _, shape in sorted(shapes.items())]  # each width twice, then the UNet's
    if len(found) < 2:
        return ControlConfig.hint, 3
    return tuple(shape[0] for shape in (found[0], *found[2:-1:2])), found[0][1]


def fits(file: TensorFile, config: ControlConfig, names: str, partial: bool) -> bool:
    """Whether the file has the names of a net of this config, and the widths that tell models of the same names apart.
    `partial`: it has some of them, and products in the place of others."""
    unet, found = config.unet, file.tensors
    vector = {"original": "label_emb.0.0", "diffusers": "add_embedding.linear_1"}[names]
    first = {"original": "input_blocks.0.0.weight", "diffusers": "conv_in.weight"}[names]
    texts = {
        tensor.shape[1] for name, tensor in found.items() if name.endswith(("attn2.to_k.weight", "attn2.to_k.down"))
    }
    if texts - {unet.context} or (unet.vector is not None) != any(name.startswith(vector) for name in found):
        return False
    if first in found and found[first].shape[0] != unet.channels[0]:
        return False
    wanted = {place.name for place in places(blueprint(ControlNet, config), names)}
    held = {f"{name.rpartition('.')[0]}.weight" if name.endswith((".up", ".down")) else name for name in found}
    return held <= wanted and (held == wanted or partial and wanted - held <= base_names(config, names))


def base_names(config: ControlConfig, names: str) -> set[str]:
    """What a UNet has too."""
    own = places(blueprint(ControlNet, config), names)
    return {place.name for place in own if not place.ours[0].startswith(("hint.", "zero.", "union."))}


# --- what is a base's, and a change to it ----------------------------------------------------------------------------


def with_base(control: StoredControl, base: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The whole net's tensors by our names."""
    net = blueprint(ControlNet, control.config)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    found: dict[str, Stored] = {}
    for place in places_of(net, control.names, control.file.tensors, conv=control.conv):
        (ours,) = place.ours
        own = base.get(ours)
        if own is not None and own.shape != shapes[ours]:
            raise UserError(
                f"{control.file.path} does not fit the model: its {ours!r} is {list(shapes[ours])}, and the model's "
                f"{list(own.shape)}; give the model that it is for",
                field="control",
            )
        found[ours] = Stored(torch.float32, tuple(shapes[ours]), partial(summed, control, place, own))
    return found


def summed(control: StoredControl, place: TensorPlace, base: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor: the file's own, the base's, or the base's with a change. Added up in float32."""
    tensors, shape = control.file.tensors, None if base is None else base.shape
    change: Tensor | float = 0.0
    if (module := place.name.removesuffix(".weight")) + ".up" in tensors:
        up, down = (tensors[f"{module}.{side}"].read(torch.float32).flatten(1) for side in ("up", "down"))
        change = (up @ down).view(shape)
    elif place.name in tensors:
        change = place.to_ours(tensors[place.name].read(torch.float32))[0]
        if control.form == LOW_RANK or base is None:
            return change.to(dtype or torch.float32)
    assert base is not None  # `fits` sees to it
    return (base.detach().float().cpu() + change).to(dtype or torch.float32)


# --- in and out ------------------------------------------------------------------------------------------------------


def write_control_net(
    network: StoredNetwork, target: Path, layout: str | None, conv: bool, dtype: torch.dtype | None
) -> None:
    """A folder, or a file in the original's names with its settings in the metadata; a union net's has diffusers'. The
    layout None: a file where the target ends in .safetensors."""
    layout = layout or ("single-file" if suffix_of(target) == ".safetensors" else "diffusers")
    if layout not in CONTROL_LAYOUTS:
        raise unknown("layout", layout, CONTROL_LAYOUTS)
    text = json.dumps(write_control(network.config, conv), indent=2, sort_keys=True) + "\n"
    if layout == "diffusers":
        if network.config.unet.mid_depth is None:
            warnings.warn(
                "diffusers has no ControlNets of models without a middle, and cannot read this one", stacklevel=3
            )
        with whole_folder(target) as folder:
            (folder / "config.json").write_text(text, encoding="utf-8")
            tensors = packed_tensors(network, "diffusers", conv=conv, dtype=dtype)
            write_safetensors(folder / f"{STEMS[0]}.safetensors", tensors)
        return
    if suffix_of(target) != ".safetensors":
        raise UserError(f"{target}: a single file is written as .safetensors; give it that ending")
    names, prefix = ("diffusers", "") if network.config.kinds else ("original", PREFIX)
    tensors = packed_tensors(network, names, conv=conv, prefix=prefix, dtype=dtype)
    with written_whole(target) as draft:
        write_safetensors(draft, tensors, {CONTROL_NOTE: text})
