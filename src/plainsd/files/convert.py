"""A model's files in either layout: read, written and converted, a tensor at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from plainsd.device import choose_dtype
from plainsd.disk import read_json
from plainsd.errors import UserError, unknown
from plainsd.files.config_vae import read_vae
from plainsd.files.configs_out import write_variant
from plainsd.files.control import is_control, open_control, write_control_net
from plainsd.files.detect import UNET_PREFIX, seems
from plainsd.files.folder import PREVIEW, open_part, read_folder, read_network, write_folder
from plainsd.files.hub import find
from plainsd.files.predicted import asked, check_prediction, told_otherwise
from plainsd.files.single import FILES_KEY, read_single, variant_in, write_single
from plainsd.files.stored import Contents, StoredNetwork, parts
from plainsd.files.tensorfile import TensorFile, open_tensors
from plainsd.files.tiny_vae import check_tiny_layout, read_tiny_vae_file, seems_tiny
from plainsd.files.tokenizers import is_stand_in, read_tokenizers, tokenizer_texts, tokenizers
from plainsd.json_reader import parsed_json
from plainsd.listing import suffix_of
from plainsd.models.tiny_vae import AnyVAEConfig, TinyVAEConfig, check_same_latents, vae_class
from plainsd.models.vae import VAE

LAYOUTS = ("diffusers", "single-file")


def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    *,
    variant_file: str | None = None,
    family: str | None = None,
    dtype: str | torch.dtype | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    change: Callable[[Contents], Contents] | None = None,
) -> None:
    """Converts between layouts, a tensor at a time. A round trip is bit-identical, names included. `layout` None is
    inferred from the target's name, as in `save`. `change` transforms the contents; the other arguments are those of
    `load`."""
    path = find(source, variant_file)
    if is_control(path):
        told = {"family": family, "vae": vae, "prediction": prediction, "zero_snr": zero_snr, "lora": change}
        if useless := [f"--{name.replace('_', '-')}" for name, value in told.items() if value is not None]:
            raise UserError(f"{path} is a ControlNet, and {' and '.join(useless)} change whole models; leave it out")
        control = open_control(path, variant_file)
        cast_to = dtype and choose_dtype(dtype, torch.device("cpu"))
        return write_control_net(control.network(), Path(target), layout, control.conv, cast_to)
    contents = read(path, variant_file, family, vae=vae, prediction=prediction, zero_snr=zero_snr)
    contents = change(contents) if change else contents
    if not any(name.startswith("tokenizer") for name in contents.texts):
        texts = tokenizer_texts(tokenizers(contents, path), contents.variant)
        contents = replace(contents, texts=contents.texts | texts)
    write(contents, Path(target), layout, dtype and choose_dtype(dtype, torch.device("cpu")))


def read(
    path: Path,
    variant_file: str | None = None,
    family: str | None = None,
    *,
    vae: str | Path | Literal[False] | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    ask: bool = True,
) -> Contents:
    """A model in either layout; arguments as for `load`, and `vae` False: without one. Assumptions are reported. `ask`:
    where a file does not say what its UNet predicts, the UNet is probed."""
    check_prediction(prediction)
    own = vae is None
    if path.is_dir():
        contents = read_folder(path, variant_file, vae=own)
    else:
        contents = read_single(path, family, vae=own, prediction=prediction)
    for remark in contents.remarks:
        warnings.warn(remark, stacklevel=2)
    if ask:
        contents = asked(contents, path)
    if contents.certain:
        contents = told_otherwise(contents, path, prediction, zero_snr)
    if vae is None or vae is False:
        return contents
    other = read_vae_alone(vae, contents.variant.vae)
    check_same_latents(other.config, contents.variant.vae, str(vae), "vae")
    return with_vae(contents, other)


def with_vae(contents: Contents, vae: StoredNetwork) -> Contents:
    """The contents with another autoencoder, and without the preview projection of the model's own."""
    variant = replace(contents.variant, vae=vae.config)
    texts = {name: text for name, text in contents.texts.items() if name != PREVIEW}
    written = write_variant(variant)
    texts["vae/config.json"] = written["vae/config.json"]
    index = parsed_json(texts["model_index.json"])
    index["vae"] = parsed_json(written["model_index.json"])["vae"]
    texts["model_index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    networks = {name: vae if name == "vae" else contents.networks[name] for name in parts(variant)}
    return replace(contents, variant=variant, texts=texts, networks=networks)


def read_vae_alone(path: str | Path, like: AnyVAEConfig, variant_file: str | None = None) -> StoredNetwork:
    """An autoencoder: a folder with config.json, the `vae` folder of a model, a file in either naming, the one in a
    whole checkpoint, or TAESD (files/tiny_vae.py).

    A file without settings must have the sizes of `like`, and takes its scaling factor.
    """
    path = find(path, variant_file)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = read_vae(read_json(folder / "config.json"), str(folder / "config.json"))
        return read_network(open_part(folder, variant_file), vae_class(config), config, conv=False)
    whole = open_tensors(path)
    if seems_tiny(whole.tensors):
        return read_tiny_vae_file(whole)
    if any(name.startswith(UNET_PREFIX) for name in whole.tensors):
        return vae_of(whole, like)
    tensors = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in whole.tensors.items()
        if not name.startswith(("loss.", "model_ema.", "first_stage_model.loss."))
    }
    layout = "diffusers" if any(".resnets." in name for name in tensors) else "original"
    return read_network(TensorFile(path, tensors, whole.metadata), VAE, like, conv=False, layout=layout)


def vae_of(whole: TensorFile, like: AnyVAEConfig) -> StoredNetwork:
    """The autoencoder of a whole checkpoint, with the settings in its metadata."""
    start = "first_stage_model."
    tensors = {name.removeprefix(start): tensor for name, tensor in whole.tensors.items() if name.startswith(start)}
    if not tensors:
        raise UserError(
            f"{whole.path} is {seems(whole.tensors)} and holds no autoencoder (VAE); give another file with --vae"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}
    config = variant_in(whole)[0].vae if whole.metadata.get(FILES_KEY) else like
    file = TensorFile(whole.path, tensors, whole.metadata)
    return read_network(file, VAE, config, conv=False, layout="original")


def write(contents: Contents, target: Path, layout: str | None, dtype: torch.dtype | None) -> None:
    layout = layout or ("single-file" if suffix_of(target) == ".safetensors" else "diffusers")
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if isinstance(contents.variant.vae, TinyVAEConfig):
        check_tiny_layout(contents.variant.vae, layout)
    if layout == "diffusers":
        return write_folder(contents, target, dtype)
    own = {path: text for path, text in contents.texts.items() if path.startswith("tokenizer")}
    pairs = zip(read_tokenizers(own, contents.variant), contents.variant.text, strict=True)
    if all(is_stand_in(tokenizer, text) for tokenizer, text in pairs):
        contents = replace(contents, texts={path: text for path, text in contents.texts.items() if path not in own})
    return write_single(contents, target, dtype)
