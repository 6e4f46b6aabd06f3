"""TAESD's files: `taesd_encoder` and `taesd_decoder` as they were published, both in one file, or in diffusers' names.

The published halves number their layers from the root (`1.weight`), so only shapes tell them apart: the encoder starts
with layer 0, the decoder with a clamp and layer 1. One half is joined with the other if that is in the same folder,
under the same name with the other word in it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from plainsd.errors import UserError
from plainsd.files.folder import read_network
from plainsd.files.stored import StoredNetwork
from plainsd.files.tensorfile import Stored, TensorFile, open_tensors
from plainsd.models.tiny_vae import TinyVAE, TinyVAEConfig

DIFFUSERS = re.compile(r"(encoder|decoder)\.layers\.\d+\.")
BOTH = re.compile(r"(?:taesd_|taesdxl_)?((?:encoder|decoder)\.\d+\..*)")
HALF = re.compile(r"(\d+)\.(conv\.[024]\.)?(weight|bias)")


def seems_tiny(names: Iterable[str]) -> bool:
    names = list(names)
    return bool(names) and any(all(pattern.match(name) for name in names) for pattern in (DIFFUSERS, BOTH, HALF))


def read_tiny_vae_file(file: TensorFile) -> StoredNetwork:
    """The network of any of these files. A decoder alone makes one that cannot encode."""
    if all(DIFFUSERS.match(name) for name in file.tensors):
        tensors, layout = file.tensors, "diffusers"
    else:
        tensors, layout = whole(file), "original"
    if not any(name.startswith("decoder.") for name in tensors):
        raise UserError(
            f"{file.path} is the encoder of TAESD alone; give taesd_decoder, or put that beside it under the same name",
            field="vae",
        )
    encodes = any(name.startswith("encoder.") for name in tensors)
    first = tensors.get("decoder.layers.0.weight" if layout == "diffusers" else "decoder.1.weight")
    if first is None or len(first.shape) != 4:
        raise UserError(f"{file.path} lacks the first layer of TAESD's decoder; download the file again", field="vae")
    config = TinyVAEConfig(width=first.shape[0], latent_channels=first.shape[1], encodes=encodes)
    return read_network(TensorFile(file.path, tensors, file.metadata), TinyVAE, config, conv=False, layout=layout)


def whole(file: TensorFile) -> dict[str, Stored]:
    """Both halves, or the decoder, in the names `encoder.0.weight`, `decoder.1.weight`."""
    if not all(HALF.match(name) for name in file.tensors):
        return {BOTH.sub(r"\1", name): stored for name, stored in file.tensors.items()}
    side, other = ("encoder", "decoder") if "0.weight" in file.tensors else ("decoder", "encoder")
    halves = {side: file.tensors}
    if beside := sibling(file.path, side, other):
        halves[other] = open_tensors(beside).tensors
    return {f"{half}.{name}": stored for half, tensors in halves.items() for name, stored in tensors.items()}


def sibling(path: Path, side: str, other: str) -> Path | None:
    """The file of the other half: the same name with the other word in it."""
    beside = path.with_name(path.name.replace(side, other))
    return beside if beside != path and beside.is_file() else None


def check_tiny_layout(config: TinyVAEConfig, layout: str) -> None:
    """UserError where the layout has no place for this autoencoder."""
    if layout != "diffusers":
        raise UserError("a single file has no place for TAESD; write the model as a folder, with --layout diffusers")
    if not config.encodes:
        raise UserError(
            "a model's folder holds TAESD whole, and this is its decoder alone; give both halves with --vae"
        )
