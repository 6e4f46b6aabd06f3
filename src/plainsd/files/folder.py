"""The diffusers folder: model_index.json, and one folder a part with its settings and weights."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plainsd.disk import read_json, read_text_file, whole_folder
from plainsd.errors import WITH_NAMES, UserError
from plainsd.files.configs import NOTE, read_variant
from plainsd.files.distilled import with_distilled_settings
from plainsd.files.stored import (
    POSITION_IDS,
    Contents,
    StoredNetwork,
    blueprint,
    check_tensor_names,
    fragments,
    packed_tensors,
    parts,
    places_of,
    respelled,
    unpack,
)
from plainsd.files.tensorfile import TensorFile, joined_files, open_tensors, write_safetensors
from plainsd.json_reader import parsed_json
from plainsd.models.clip import TextEncoder

PREVIEW = "preview.json"  # latents to rough RGB, see pictures/previews.py
LEFTOVERS = "leftovers.safetensors"  # tensors of a single file that have no place in a folder, kept for a round trip
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # in public folders, but not part of the model
OF_NETS = re.compile("ControlNet(Union)?|Adapter")  # in names of pipelines with a part that is not of the model
STEMS = ("diffusion_pytorch_model", "model")
PICKLE_STEMS = ("diffusion_pytorch_model", "pytorch_model")
VARIANT_FILE = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?"
    r"(\.(?P<of_whole>\w+)\.(safetensors|bin)|\.(safetensors|bin)\.index\.(?P<of_index>\w+)\.json"
    r"|\.(?P<of_shard>\w+)-\d+-of-\d+\.(safetensors|bin))"
)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, variant_file: str | None = None, *, vae: bool = True) -> Contents:
    """A model of any size: everything is taken from the settings in the folder. `vae` False: leave out the
    autoencoder."""
    variant = read_variant(lambda path: read_json(folder / path), str(folder))
    index = read_json(folder / "model_index.json")
    note = index.get(NOTE) or {}
    networks, spellings, other = {}, [], []
    for name, (kind, config) in parts(variant).items():
        if name == "vae" and not vae:
            continue
        file = open_part(folder / name, variant_file)
        other += [f"{name}/{file.path.name}"] if variant_file is None and file_variant(file.path.name) else []
        networks[name] = read_network(file, kind, config, conv=variant.conv_projections)
        bare = blueprint(kind, config)
        spellings += [f"diffusers {name} {fragment}" for fragment in fragments(bare, "diffusers", file.tensors)]
    leftovers = open_tensors(folder / LEFTOVERS).tensors if (folder / LEFTOVERS).is_file() else {}
    remarks = [f"{folder} has no plain files of weights: read {', '.join(other)}"] if other else []
    if "steps" not in note:
        variant, remark = with_distilled_settings(variant, (public_name(folder), str(index.get("_name_or_path", ""))))
        remarks += [remark] if remark else []
    texts = read_texts(folder, parts(variant))
    return Contents(
        variant, networks, texts, dict(leftovers), (*spellings, *note.get("spellings", ())), remarks=tuple(remarks)
    )


def public_name(folder: Path) -> str:
    """The name of a model's folder; in the hub's cache, of its repository."""
    if folder.parent.name == "snapshots":  # models--owner--name/snapshots/hash
        return folder.parents[1].name.split("--")[-1]
    return folder.resolve().name


def read_network(file: TensorFile, kind: type, config: Any, *, conv: bool, layout: str = "diffusers") -> StoredNetwork:
    """A network in a file of its own."""
    bare = blueprint(kind, config)
    wanted = places_of(bare, layout, file.tensors, conv=conv)
    extras = {
        name: file.tensors[name]
        for name in (POSITION_IDS, POSITION_IDS.removeprefix("text_model."))
        if kind is TextEncoder and name in file.tensors
    }
    check_tensor_names([*(place.name for place in wanted), *extras], file)
    shapes = {name: tensor.shape for name, tensor in bare.state_dict().items()}
    return StoredNetwork(kind, config, unpack(file, wanted, shapes), extras)


TEXT_NAME = re.compile(r"\w[\w.-]*\.(json|txt)")  # not `vocab copy.json`, which a single file has no name for


def read_texts(folder: Path, names: dict) -> dict[str, str]:
    """The folder's settings and tokenizers, unparsed."""
    paths = ["model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in names)]
    for tokenizer in (name.replace("text_encoder", "tokenizer") for name in names if "text" in name):
        if not (folder / tokenizer).is_dir():
            raise UserError(f"{folder} has no folder {tokenizer!r}, which a model needs; download it again")
        paths += [
            f"{tokenizer}/{path.name}"
            for path in sorted((folder / tokenizer).iterdir())
            if TEXT_NAME.fullmatch(path.name)
        ]
    paths += [PREVIEW] if (folder / PREVIEW).is_file() else []
    return {path: read_text_file(folder / path) for path in paths}


def open_part(folder: Path, variant_file: str | None = None) -> TensorFile:
    """The weights in one folder: one file, or shards listed in an index. Safetensors before pickles."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; a model's folder needs it; download it again")
    for variant in [variant_file] if variant_file else ["", *variants_there(folder)]:
        middle = f".{variant}" if variant else ""
        for ending, stems in (("safetensors", STEMS), ("bin", PICKLE_STEMS)):
            for stem in stems:
                whole, index = folder / f"{stem}{middle}.{ending}", folder / f"{stem}.{ending}.index{middle}.json"
                if whole.is_file():
                    return open_tensors(whole)
                if index.is_file():
                    return open_shards(folder, index)
    kind = f" of the variant {variant_file!r}" if variant_file else ""
    middle = f".{variant_file}" if variant_file else ""
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"{folder} holds no weights{kind}, such as {STEMS[0]}{middle}.safetensors; it holds {there}",
                    most=WITH_NAMES)  # fmt: skip


def open_shards(folder: Path, index: Path) -> TensorFile:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is damaged: it lists no files; download it again")
    return joined_files(open_tensors(folder / Path(name).name) for name in dict.fromkeys(names.values()))


def file_variant(name: str) -> str | None:
    """`fp16` of diffusion_pytorch_model.fp16.safetensors, or of a shard or an index of that variant."""
    found = VARIANT_FILE.fullmatch(name)
    return found and (found["of_whole"] or found["of_index"] or found["of_shard"])


def variants_there(folder: Path) -> list[str]:
    """The variants of the weights in a folder: half precision first, non-EMA weights last."""
    found = {kind for path in folder.iterdir() if (kind := file_variant(path.name))}
    return sorted(found, key=lambda kind: (kind == "non_ema", kind != "fp16", kind != "bf16", kind))


# --- writing ---------------------------------------------------------------------------------------------------------


def write_folder(contents: Contents, target: Path, dtype: torch.dtype | None = None) -> None:
    """`contents.texts` must include the tokenizers' files. The folder is written whole or not at all."""
    with whole_folder(target) as folder:
        for path, text in contents.texts.items():
            if path == "model_index.json":
                text = index_text(text, contents)
            if dtype and path.startswith("text_encoder"):
                text = agreeing(text)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        for name, network in contents.networks.items():
            write_weights(
                folder / name,
                network,
                conv=contents.variant.conv_projections,
                dtype=dtype,
                spelling=spelling(contents, "diffusers", name),
            )
        if contents.leftovers:
            write_safetensors(folder / LEFTOVERS, contents.leftovers)


def write_weights(
    folder: Path,
    network: StoredNetwork,
    *,
    conv: bool = False,
    dtype: torch.dtype | None = None,
    spelling: Sequence[str] = (),
) -> None:
    """One network's file, in diffusers' names."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = STEMS[1] if network.kind is TextEncoder else STEMS[0]
    tensors = packed_tensors(network, "diffusers", conv=conv, dtype=dtype, spelling=spelling)
    extras = {respelled(name, spelling): stored for name, stored in network.extras.items()}
    write_safetensors(folder / f"{stem}.safetensors", tensors | extras)


def spelling(contents: Contents, layout: str, name: str) -> list[str]:
    start = f"{layout} {name} "
    return [note.removeprefix(start) for note in contents.spellings if note.startswith(start)]


def agreeing(text: str) -> str:
    """A text encoder's config.json that makes transformers compute in float32, as diffusers does in the other parts."""
    config = {name: value for name, value in parsed_json(text).items() if name not in ("dtype", "torch_dtype")}
    return json.dumps(config | {"torch_dtype": "float32"}, indent=2, sort_keys=True) + "\n"


def index_text(text: str, contents: Contents) -> str:
    """model_index.json without the parts that are not written, and with the tensor-name spellings of other layouts."""
    index = parsed_json(text)
    written = {*contents.networks, *(path.split("/")[0] for path in contents.texts)}
    for name, entry in index.items():
        if isinstance(entry, list) and (name in UNUSED_PARTS or name not in written):
            index[name] = [None, None]
    index |= {name: OF_NETS.sub("", str(index[name])) for name in ("_class_name",) if name in index}
    others = [note for note in contents.spellings if not note.startswith("diffusers ")]
    if others:
        index[NOTE] = (index.get(NOTE) or {}) | {"spellings": others}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
