"""T2I-Adapters in files: a diffusers folder or file (`adapter.body.0.resnets.0.block1`), and the original's names
(`body.0.block1`). Told by their contents."""

import re
from pathlib import Path

from plainsd.disk import read_json
from plainsd.errors import UserError
from plainsd.files.config_values import Config, one_of, whole_number, wholes
from plainsd.files.folder import open_part, read_network
from plainsd.files.stored import StoredNetwork
from plainsd.files.tensorfile import TensorFile, open_tensors
from plainsd.models.t2i_adapter import AdapterConfig, T2IAdapter

T2I_CLASS = "T2IAdapter"
ADAPTER_TYPES = {"full_adapter": "full", "full_adapter_xl": "xl", "light_adapter": "light"}
FIRST_BLOCK = re.compile(r"(?:adapter\.)?body\.0\.(?:resnets\.0\.|body\.0\.)?block1\.weight")
LEVEL = re.compile(r"body\.(\d{1,4})\.")
BLOCKS = 2  # residual blocks a level, in all full adapters that were published
FOLDED_SD, FOLDED_XL = 8, 16  # pixels a side that are folded, SD's and SDXL's


def is_t2i_adapter(path: Path) -> bool:
    """Whether a folder or a file holds one."""
    if path.is_dir():
        file = path / "config.json"
        return file.is_file() and read_json(file).get("_class_name") == T2I_CLASS
    return any(FIRST_BLOCK.fullmatch(name) for name in open_tensors(path).tensors)


def open_t2i_adapter(path: Path, variant_file: str | None = None) -> StoredNetwork:
    if path.is_dir():
        config = read_t2i_adapter(read_json(path / "config.json"), str(path / "config.json"))
        return read_network(open_part(path, variant_file), T2IAdapter, config, conv=False)
    file = open_tensors(path)
    names = "diffusers" if any(name.startswith("adapter.") for name in file.tensors) else "original"
    return read_network(file, T2IAdapter, shaped_t2i_adapter(file), conv=False, layout=names)


def read_t2i_adapter(config: Config, where: str) -> AdapterConfig:
    """From diffusers' settings, which of a light adapter's levels leave the last out: it has the width of the one
    before."""
    kind = ADAPTER_TYPES[one_of(config, "adapter_type", where, "full_adapter", ADAPTER_TYPES)]
    channels = wholes({"channels": config.get("channels", AdapterConfig.channels)}, "channels", where)
    return AdapterConfig(
        kind,
        (*channels, channels[-1]) if kind == "light" else channels,
        whole_number(config, "num_res_blocks", where, BLOCKS, 64),
        whole_number(config, "in_channels", where, 3, 64),
        whole_number(config, "downscale_factor", where, FOLDED_SD, 64),
    )


def shaped_t2i_adapter(file: TensorFile) -> AdapterConfig:
    """By names and shapes. Full adapters of SD and SDXL differ in how many pixels they fold alone."""
    shapes = {name.removeprefix("adapter."): stored.shape for name, stored in file.tensors.items()}
    light = "body.0.out_conv.weight" in shapes
    folded = (*shapes.get("body.0.in_conv.weight" if light else "conv_in.weight", ()), 0, 0)[1]
    places = [int(found[1]) for name in shapes if (found := LEVEL.match(name))]
    flat = "body.0.block1.weight" in shapes
    levels = (max(places) + 1) // (BLOCKS if flat else 1)
    inside = len({name.split(".")[3] for name in shapes if re.match(r"body\.0\.(resnets|body)\.", name)})
    name = (
        "body.{}.out_conv.weight" if light else "body.{}.block1.weight" if flat else "body.{}.resnets.0.block1.weight"
    )
    widths = [(*shapes.get(name.format(level * BLOCKS if flat else level), ()), 0)[0] for level in range(levels)]
    factor = FOLDED_XL if folded % FOLDED_XL**2 == 0 else FOLDED_SD
    if not folded or folded % factor**2 or 0 in widths:
        raise UserError(
            f"{file.path} is a T2I-Adapter of a kind that is not known here; give it as a folder with config.json",
            field="control",
        )
    kind = "light" if light else "xl" if factor == FOLDED_XL else "full"
    return AdapterConfig(kind, tuple(widths), BLOCKS if flat else inside, folded // factor**2, factor)
