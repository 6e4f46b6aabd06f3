"""A model from its files and back: load, save, convert, and the autoencoder alone."""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from plainsd.files.configs import read_vae
from plainsd.files.stored import Contents, Network, empty, first, parts
from plainsd.files.configs_out import write_variant
from plainsd.errors import UserError, unknown
from plainsd.files.folder import open_part, read_folder, read_network, write_folder, write_weights
from plainsd.disk import read_json, whole_folder
from plainsd.pictures.model import StableDiffusion
from plainsd.files.hub import find
from plainsd.pictures.previews import fit_latent_rgb
from plainsd.disk import written_whole
from plainsd.adapters.lora import add_lora
from plainsd.models.vae import VAE, VAEConfig
from plainsd.files.folder import PREVIEW
from plainsd.pictures.previews import preview_text, read_preview
from plainsd.files.single import read_single, write_single
from plainsd.files.tensorfile import TensorFile, open_tensors, stored
from plainsd.text.tokenizer import Tokenizer, find_vocabulary
from plainsd.models.variants import SD_VAE, Variant, encoder_names

LAYOUTS = ("diffusers", "single-file")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP_MERGES = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # SHA-256 of CLIP's, one a line


# --- where, and how precisely ----------------------------------------------------------------------------------------


def choose_device(device: str | torch.device) -> torch.device:
    """auto: the accelerator where there is one, else the CPU."""
    if str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UserError(f"unknown device {device!r}; try auto, cpu or cuda") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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


# --- the three things to do ------------------------------------------------------------------------------------------


def load(
    source: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    variant_file: str | None = None,
    family: str | None = None,
    vae: str | Path | None = None,
    loras: Iterable[tuple[str | Path, float]] = (),
    lora_partial: bool = False,
) -> StableDiffusion:
    """The embedded model, or the one in a folder, in a single file, or on the hub.

    `variant_file`: "fp16" reads `*.fp16.safetensors` of a folder. `family`: a name in VARIANTS, for a single file that
    does not tell. `vae`: another autoencoder, a folder or a file, in place of the model's own. `loras`: files and
    strengths; with `lora_partial`, names in them that have no place are left out.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    path = find(source, variant_file)
    contents = read(path, variant_file, family, vae=vae is None)
    variant = contents.variant
    networks = {
        name: network.build(device, dtype)
        for name, network in contents.networks.items()
        if name != "vae" or vae is None
    }
    if vae is not None:
        networks["vae"] = load_vae(vae, device=device, dtype=dtype, like=variant.vae)
        variant = replace(variant, vae=networks["vae"].config)
    sd = StableDiffusion(
        tokenizers=tokenizers(contents, path),
        text_encoders=[networks[name] for name in encoder_names(variant)],
        unet=networks["unet"],
        vae=networks["vae"],
        schedule=variant.schedule.build(),
        prediction=variant.prediction,
        variant=variant,
        path=path,
        latent_rgb=read_preview(contents.texts, variant.vae.latent_channels, str(path)) if vae is None else None,
    )
    for file, strength in loras:
        add_lora(sd, file, strength, partial=lora_partial)
    return sd


def save(
    sd: StableDiffusion, path: str | Path, layout: str | None = None, dtype: str | torch.dtype | None = None
) -> None:
    """Writes a model as a diffusers folder or a single file, with its projection for previews.

    `layout`: "diffusers" or "single-file"; None: a single file where the path ends in .safetensors. `dtype`: what it
    shall hold; None: the networks' own.
    """
    networks = [sd.unet, sd.vae, *sd.text_encoders]
    variant = replace(
        sd.variant,
        unet=sd.unet.config,
        vae=sd.vae.config,
        prediction=sd.prediction,
        text=tuple(encoder.config for encoder in sd.text_encoders),
    )
    if not torch.equal(variant.schedule.build().alphas_cumprod, sd.schedule.alphas_cumprod):
        raise UserError("the model's noise schedule is not the one that its variant describes; set sd.variant.schedule")
    packed = {name: packed_network(network) for name, network in zip(parts(variant), networks, strict=True)}
    texts = write_variant(variant) | tokenizer_texts(sd.tokenizers, variant)
    texts[PREVIEW] = preview_text(fit_latent_rgb(sd.vae))
    write(Contents(variant, packed, texts), Path(path), layout, dtype and choose_dtype(dtype, sd.device))


def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    *,
    variant_file: str | None = None,
    family: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """From one layout to the other, a tensor at a time. There and back again is bit-identical, names included. The
    layout None is read off the target's name, as by `save`."""
    path = find(source, variant_file)
    contents = read(path, variant_file, family)
    if not any(name.startswith("tokenizer") for name in contents.texts):
        texts = tokenizer_texts(tokenizers(contents, path), contents.variant)
        contents = replace(contents, texts=contents.texts | texts)
    write(contents, Path(target), layout, dtype and choose_dtype(dtype, torch.device("cpu")))


def read(path: Path, variant_file: str | None = None, family: str | None = None, *, vae: bool = True) -> Contents:
    if path.is_dir():
        return read_folder(path, variant_file)
    return read_single(path, family, vae=vae)


def write(contents: Contents, target: Path, layout: str | None, dtype: torch.dtype | None) -> None:
    layout = layout or ("single-file" if target.suffix == ".safetensors" else "diffusers")
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if layout == "diffusers":
        return write_folder(contents, target, dtype)
    own = {path: text for path, text in contents.texts.items() if path.startswith("tokenizer")}
    if all(is_clip(tokenizer) for tokenizer in read_tokenizers(own, contents.variant)):
        contents = replace(contents, texts={path: text for path, text in contents.texts.items() if path not in own})
    return write_single(contents, target, dtype)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_names(variant: Variant) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in encoder_names(variant)]


def tokenizers(contents: Contents, path: Path) -> list[Tokenizer]:
    """One a text encoder: those that came with the model; for a single file, CLIP's, if the vocabulary is found."""
    if any(name.startswith("tokenizer") for name in contents.texts):
        return read_tokenizers(contents.texts, contents.variant)
    vocabulary = find_vocabulary(path)
    pads = ["<|endoftext|>" if text.activation == "quick_gelu" else "!" for text in contents.variant.text]
    return [Tokenizer.from_vocabulary(vocabulary, pad=pad) for pad in pads]


def read_tokenizers(texts: dict[str, str], variant: Variant) -> list[Tokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        for path, text in texts.items():
            if path.startswith("tokenizer"):
                (Path(folder) / path).parent.mkdir(exist_ok=True)
                (Path(folder) / path).write_text(text, encoding="utf-8")
        return [Tokenizer.from_folder(Path(folder) / name) for name in tokenizer_names(variant)]


def tokenizer_texts(tokenizers: list[Tokenizer], variant: Variant) -> dict[str, str]:
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in zip(tokenizer_names(variant), tokenizers, strict=True):
            tokenizer.save(place := Path(folder) / name)
            texts |= {f"{name}/{path.name}": path.read_text("utf-8") for path in sorted(place.iterdir())}
    return texts


def is_clip(tokenizer: Tokenizer) -> bool:
    """Whether it has CLIP's own tokens and no others, so that a single file can do without it."""
    merges = "\n".join(" ".join(pair) for pair in tokenizer.merges)
    return len(tokenizer) == 49_408 and hashlib.sha256(merges.encode()).hexdigest() == CLIP_MERGES


# --- one network -----------------------------------------------------------------------------------------------------


def packed_network(network: nn.Module) -> Network:
    """A network in memory, ready to be written."""
    state, bare = network.state_dict(), empty(type(network), network.config).state_dict()
    if extra := [name for name in state if name not in bare]:
        raise UserError(
            f"the model carries {len(extra)} tensors that no layout has a place for ({first(extra)}); "
            "merge its LoRAs into it before it is saved, or save them alone"
        )
    return Network(type(network), network.config, {name: stored(state[name]) for name in bare})


def load_vae(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    like: VAEConfig = SD_VAE,
    variant_file: str | None = None,
) -> VAE:
    """An autoencoder alone: a folder with config.json, the `vae` folder of a model, or a file in either naming.

    A file has no settings; it must have the sizes of `like`, and gets its scaling factor.
    """
    device = choose_device(device)
    dtype, path = choose_dtype(dtype, device), find(path, variant_file)
    folder = path / "vae" if (path / "vae").is_dir() else path
    if path.is_dir():
        config = read_vae(read_json(folder / "config.json"), str(folder / "config.json"))
        return read_network(open_part(folder, variant_file), VAE, config, conv=False).build(device, dtype)
    whole = open_tensors(path)
    tensors = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in whole.tensors.items()
        if not name.startswith(("loss.", "model_ema.", "first_stage_model.loss."))
    }
    layout = "diffusers" if any(".resnets." in name for name in tensors) else "original"
    file = TensorFile(path, tensors, whole.metadata)
    return read_network(file, VAE, like, conv=False, layout=layout).build(device, dtype)


def save_vae(vae: VAE, path: str | Path, variant: Variant, dtype: torch.dtype | None = None) -> None:
    """An autoencoder alone, as the `vae` folder of a diffusers model."""
    text = write_variant(replace(variant, vae=vae.config))["vae/config.json"]
    with whole_folder(Path(path)) as folder:
        (folder / "config.json").write_text(text, encoding="utf-8")
        write_weights(folder, packed_network(vae), dtype=dtype)


def add_preview(folder: str | Path) -> None:
    """Gives a model's folder the projection for previews that `save` would have written; see previews.py."""
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{folder} is no folder of a model: it has no model_index.json; give one in diffusers' layout")
    text = preview_text(fit_latent_rgb(load_vae(folder, device="cpu", dtype="float32")))
    with written_whole(Path(folder) / PREVIEW) as draft:
        draft.write_text(text, encoding="utf-8")
