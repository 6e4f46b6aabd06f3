"""A model from its files and back: the diffusers folder, and the original single file.

Loading is lazy (networks are made without memory, tensors are read and cast one by one) and strict (every tensor of the
file must have its place and every place its tensor). Saving is whole or not at all.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plainsd.errors import UserError, unknown
from plainsd.generate import StableDiffusion
from plainsd.layouts import Place, places, spelled
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE
from plainsd.tensorfile import Stored, TensorFile, merged, open_tensors, stored, write_safetensors
from plainsd.tokenizer import Tokenizer
from plainsd.configs import (
    read_schedule, read_text, read_unet, read_vae, write_schedule, write_text, write_unet, write_vae,
)
from plainsd.variants import Variant, encoder_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS = ("name", "context", "size", "guidance", "sampler", "steps", "spacing")   # of a Variant, kept beside a model
IGNORED = ("embeddings.position_ids",)                    # 0, 1, 2, ...: a buffer in older text encoders
NOTE = "_plainsd"                     # where in model_index.json; diffusers passes over names that begin with _


# --- where, and how precisely ----------------------------------------------------------------------------------------

def choose_device(device: str | torch.device) -> torch.device:
    if str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UserError(f"unknown device {device!r}; try auto, cpu or cuda") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the processor or GPU computes in it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, ["auto", *DTYPES])
        return DTYPES[dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = device.type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


# --- reading ---------------------------------------------------------------------------------------------------------

def load(
    source: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    variant_file: str | None = None,
) -> StableDiffusion:
    """The embedded model, or the one in a folder. `variant_file`: "fp16" reads `*.fp16.safetensors`."""
    path = Path(source) if source is not None else Path(str(files("plainsd") / "assets" / "emoji"))
    if not path.is_dir():
        raise UserError(f"there is no model folder {str(path)!r}; give a folder with model_index.json")
    device = choose_device(device)
    return load_folder(path, device, choose_dtype(dtype, device), variant_file)


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype, variant_file: str | None) -> StableDiffusion:
    """A diffusers folder of any sizes: everything is taken from the config files in it."""
    index = read_json(folder / "model_index.json")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if present(index, name)]
    unet_config, conv = read_unet(*config(folder, "unet"))
    vae_config = read_vae(*config(folder, "vae"))
    text_configs = tuple(read_text(*config(folder, name)) for name in encoders)
    schedule, prediction, spacing = read_schedule(*config(folder, "scheduler", "scheduler_config.json"))
    sample = config(folder, "unet")[0].get("sample_size") or 64
    variant = Variant(
        "custom", unet_config, vae_config, text_configs, schedule, prediction,
        context="penultimate" if unet_config.vector else "final", conv_projections=conv,
        size=(max(sample) if isinstance(sample, list) else sample) * vae_config.factor, spacing=spacing,
    )
    variant = replace(variant, **{name: value for name, value in index.get(NOTE, {}).items() if name in SETTINGS})
    options = {"device": device, "dtype": dtype}

    def network(kind: type[nn.Module], name: str, settings: Any) -> nn.Module:
        return fill(empty(kind, settings), open_part(folder / name, variant_file), "diffusers", conv=conv, **options)

    return StableDiffusion(
        tokenizers=[Tokenizer.from_folder(folder / name.replace("text_encoder", "tokenizer")) for name in encoders],
        text_encoders=[network(TextEncoder, *pair) for pair in zip(encoders, text_configs, strict=True)],
        unet=network(UNet, "unet", unet_config),
        vae=network(VAE, "vae", vae_config),
        schedule=schedule.build(),
        prediction=prediction,
        variant=variant,
        path=folder,
    )


def present(index: Mapping[str, Any], name: str) -> bool:
    return isinstance(index.get(name), list) and None not in index[name]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a model folder needs this file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a table of settings; fetch it again")
    return content


def config(folder: Path, part: str, name: str = "config.json") -> tuple[dict[str, Any], str]:
    """The settings of one part, and the file's name for messages."""
    path = folder / part / name
    return read_json(path), str(path)


def open_part(folder: Path, variant_file: str | None) -> TensorFile:
    """The weights in one folder: one file, or shards listed in an index. Safetensors before pickles."""
    middle = f".{variant_file}" if variant_file else ""
    for stem, ending in (("diffusion_pytorch_model", "safetensors"), ("model", "safetensors"),
                         ("diffusion_pytorch_model", "bin"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}{middle}.{ending}", folder / f"{stem}.{ending}.index{middle}.json"
        if whole.is_file():
            return open_tensors(whole)
        if index.is_file():
            names = read_json(index).get("weight_map", {}).values()
            return merged(open_tensors(folder / name) for name in dict.fromkeys(names))
    kind = f" of the variant {variant_file!r}" if variant_file else ""
    raise UserError(f"{folder} holds no weights{kind}; expected diffusion_pytorch_model.safetensors or model.safetensors")


def empty(kind: type[nn.Module], settings: Any) -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return kind(settings).eval()


def fill(network: nn.Module, file: TensorFile, layout: str, *, conv: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Reads a network's weights, each cast as soon as it is read."""
    wanted, shapes = places(network, layout, conv=conv), {name: t.shape for name, t in network.state_dict().items()}
    actual = {place.name: spelled(place.name, file.tensors) for place in wanted}
    check_names(list(actual.values()), file)
    state = {}
    for place in wanted:
        tensor = file.tensors[actual[place.name]].read().to(device, dtype)
        for ours, part in zip(place.ours, place.to_ours(tensor), strict=True):
            if part.shape != shapes[ours]:
                raise UserError(f"{file.path}: {place.name!r} has shape {list(tensor.shape)}, and the config calls for "
                                f"{list(place_shape(place, shapes))}")
            state[ours] = part.contiguous()
    network.load_state_dict(state, assign=True)
    return network


def place_shape(place: Place, shapes: Mapping[str, torch.Size]) -> torch.Size:
    """The shape that a tensor of the file should have."""
    return place.to_theirs([torch.empty(shapes[name], device="meta") for name in place.ours]).shape


def check_names(wanted: list[str], file: TensorFile) -> None:
    missing = [name for name in wanted if name not in file.tensors]
    unexpected = sorted(name for name in set(file.tensors) - set(wanted) if not name.endswith(IGNORED))
    if missing or unexpected:
        raise UserError(f"{file.path} does not fit: {len(missing)} names missing ({first(missing)}), "
                        f"{len(unexpected)} unexpected ({first(unexpected)})")


def first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


# --- writing ---------------------------------------------------------------------------------------------------------

def save(sd: StableDiffusion, path: str | Path, layout: str = "diffusers", dtype: str | torch.dtype | None = None) -> None:
    """Writes a model as a diffusers folder. `dtype`: what the files hold; None keeps what the networks have."""
    if layout != "diffusers":
        raise unknown("layout", layout, ["diffusers"])
    if isinstance(dtype, str):
        dtype = choose_dtype(dtype, sd.device)
    with whole_folder(Path(path)) as folder:
        save_folder(sd, folder, dtype)


def save_folder(sd: StableDiffusion, folder: Path, dtype: torch.dtype | None) -> None:
    variant = sd.variant
    names = encoder_names(variant)
    index = {
        "_class_name": "StableDiffusionXLPipeline" if variant.unet.vector else "StableDiffusionPipeline",
        NOTE: {name: value for name, value in asdict(variant).items() if name in SETTINGS},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not variant.unet.vector:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    write_json(folder / "scheduler" / "scheduler_config.json", write_schedule(variant))
    save_part(folder / "unet", sd.unet, write_unet(variant), variant, dtype)
    save_part(folder / "vae", sd.vae, write_vae(variant), variant, dtype)
    for name, tokenizer, encoder in zip(names, sd.tokenizers, sd.text_encoders, strict=True):
        settings = write_text(encoder.config)
        index |= {name: ["transformers", settings["architectures"][0]]}
        index |= {name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]}
        save_part(folder / name, encoder, settings, variant, dtype)
        tokenizer.save(folder / name.replace("text_encoder", "tokenizer"))
    write_json(folder / "model_index.json", index)


def save_part(folder: Path, network: nn.Module, settings: dict, variant: Variant, dtype: torch.dtype | None) -> None:
    state = network.state_dict()

    def lazily(place: Place) -> Stored:
        tensors = [state[name] for name in place.ours]
        shape = tuple(place_shape(place, {name: t.shape for name, t in zip(place.ours, tensors, strict=True)}))
        kind = dtype or tensors[0].dtype
        return Stored(kind, shape, lambda: place.to_theirs(tensors).to(kind))

    stem = "model" if isinstance(network, TextEncoder) else "diffusion_pytorch_model"
    write_json(folder / "config.json", settings)
    tensors = {place.name: lazily(place) for place in places(network, "diffusers", conv=variant.conv_projections)}
    write_safetensors(folder / f"{stem}.safetensors", tensors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when all went well, and vanishes if not."""
    if target.exists() and not (target / "model_index.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not a model folder; choose another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another place") from error
    old = draft.with_name(draft.name + ".old")
    try:
        yield draft
        draft.chmod(0o755)
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
