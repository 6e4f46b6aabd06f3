"""A model from its files and back: load, save, convert, and the autoencoder alone."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from plainsd.adapters.lora import add_lora
from plainsd.device import choose_device, choose_dtype
from plainsd.diffusion.schedule import same_schedule
from plainsd.disk import whole_folder, written_whole
from plainsd.errors import UserError
from plainsd.files.clip import open_clip
from plainsd.files.configs_out import write_variant
from plainsd.files.control import open_control, write_control_net
from plainsd.files.convert import read, read_vae_alone, write
from plainsd.files.folder import PREVIEW, write_weights
from plainsd.files.hub import find
from plainsd.files.image_prompt import TOWER_FOLDER, open_image_adapter, open_tower, tower_beside
from plainsd.files.predicted import asked, told_otherwise
from plainsd.files.stored import Contents, StoredNetwork, empty, first, parts
from plainsd.files.t2i_adapter import is_t2i_adapter, open_t2i_adapter
from plainsd.files.tensorfile import stored
from plainsd.files.tokenizers import tokenizer_texts, tokenizers
from plainsd.models.clip import TextEncoder
from plainsd.models.control import ControlNet
from plainsd.models.forms import quantized
from plainsd.models.image_prompt import ImageAdapter
from plainsd.models.t2i_adapter import T2IAdapter
from plainsd.models.tiny_vae import AnyVAE, AnyVAEConfig
from plainsd.models.variants import SD_VAE, Variant
from plainsd.models.vision import VisionTower
from plainsd.pictures.clip_score import Clip
from plainsd.pictures.image_prompt import ImageReader
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.pictures.previews import fit_latent_rgb, preview_text, read_preview

# --- device and dtype ------------------------------------------------------------------------------------------------


# --- load, save, convert ---------------------------------------------------------------------------------------------


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
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> StableDiffusion:
    """Loads the embedded model, or one from a folder, a single file, or the hub.

    `variant_file`: "fp16" reads `*.fp16.safetensors` of a folder; None: the plain files, or if there are none those of
    a variant, with a notice. `family`: a name in VARIANTS, for a single file that does not reveal it. `vae`: a folder
    or file of another autoencoder, instead of the model's own. `loras`: files and strengths; with `lora_partial`,
    unmatched names in them are skipped. `prediction`: "epsilon", "v_prediction" or "sample", and `zero_snr`: whether
    the noise schedule ends at zero SNR, if the files lack it or are wrong.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    path = find(source, variant_file)
    contents = read(path, variant_file, family, vae=vae, prediction=prediction, zero_snr=zero_snr, ask=False)
    networks = {name: network.build(device, dtype) for name, network in contents.networks.items()}
    contents = told_otherwise(asked(contents, path, networks["unet"]), path, prediction, zero_snr)
    variant = contents.variant
    projection = read_preview(contents.texts, variant.vae.latent_channels, str(path))
    sd = assemble(variant, networks, tokenizers(contents, path), path, projection)
    for file, strength in loras:
        add_lora(sd, file, strength, partial=lora_partial)
    return sd


def save(
    sd: StableDiffusion, path: str | Path, layout: str | None = None, dtype: str | torch.dtype | None = None
) -> None:
    """Writes a model as a diffusers folder or a single file, with its projection for previews.

    `layout`: "diffusers" or "single-file"; None: a single file if the path ends in .safetensors. `dtype`: of the stored
    weights; None: the networks' own.
    """
    networks = [sd.unet, sd.vae, *sd.text_encoders]
    variant = replace(
        sd.variant,
        unet=sd.unet.config,
        vae=sd.vae.config,
        prediction=sd.prediction,
        text=tuple(encoder.config for encoder in sd.text_encoders),
    )
    if not same_schedule(variant.schedule.build(), sd.schedule):
        raise UserError("the model's noise schedule is not the one that its variant describes; set sd.variant.schedule")
    packed = {name: packed_network(network) for name, network in zip(parts(variant), networks, strict=True)}
    texts = write_variant(variant) | tokenizer_texts(sd.tokenizers, variant)
    texts[PREVIEW] = preview_text(fit_latent_rgb(sd.vae))
    write(Contents(variant, packed, texts), Path(path), layout, dtype and choose_dtype(dtype, sd.device))


# --- tokenizers ------------------------------------------------------------------------------------------------------


# --- one network -----------------------------------------------------------------------------------------------------


def packed_network(network: nn.Module) -> StoredNetwork:
    """A network in memory, in the form that writers take."""
    if quantized(network):
        raise UserError("the model's weights are in 8 bits, which no layout has; save it without int8")
    state, bare = network.state_dict(), empty(type(network), network.config).state_dict()
    if extra := [name for name in state if name not in bare]:
        raise UserError(
            f"the model carries {len(extra)} tensors that no layout has a place for ({first(extra)}); "
            "merge its LoRAs into it before it is saved, or save them alone"
        )
    return StoredNetwork(type(network), network.config, {name: stored(state[name]) for name in bare})


def load_vae(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    like: AnyVAEConfig = SD_VAE,
    variant_file: str | None = None,
) -> AnyVAE:
    """Loads an autoencoder alone, see `plainsd.files.convert.read_vae_alone`."""
    device = choose_device(device)
    return read_vae_alone(path, like, variant_file).build(device, choose_dtype(dtype, device))


def save_vae(vae: AnyVAE, path: str | Path, variant: Variant, dtype: torch.dtype | None = None) -> None:
    """Writes an autoencoder alone, as the `vae` folder of a diffusers model."""
    text = write_variant(replace(variant, vae=vae.config))["vae/config.json"]
    with whole_folder(Path(path)) as folder:
        (folder / "config.json").write_text(text, encoding="utf-8")
        write_weights(folder, packed_network(vae), dtype=dtype)


def load_control(
    path: str | Path,
    base: StableDiffusion | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    variant_file: str | None = None,
) -> ControlNet | T2IAdapter:
    """Loads a ControlNet or T2I-Adapter from a folder, a file with either kind of names, or the hub; see
    files/control.py and files/t2i_adapter.py.

    `base`: the model that it is for. Files of differences to it (`difference`, ControlLoRA) need it. "auto" takes the
    base's device and dtype.
    """
    device = base.device if base is not None and device == "auto" else choose_device(device)
    dtype = base.dtype if base is not None and dtype == "auto" else choose_dtype(dtype, device)
    weights = None if base is None else base.unet.state_dict
    path = find(path, variant_file)
    stored = (
        open_t2i_adapter(path, variant_file)
        if is_t2i_adapter(path)
        else open_control(path, variant_file).network(weights)
    )
    net = stored.build(device, dtype)
    assert isinstance(net, ControlNet | T2IAdapter)
    return net


def save_control(
    net: ControlNet, path: str | Path, layout: str | None = None, dtype: str | torch.dtype | None = None
) -> None:
    """Writes a ControlNet as a diffusers folder, or a single file with the original names. Arguments as for `save`."""
    if not isinstance(net, ControlNet):
        raise UserError(
            f"{type(net).__name__}s are not written; copy the file that it was loaded from", field="control"
        )
    conv = net.config.vector is None and net.config.context != 1024  # SD 2.x's and SDXL's files hold linear layers
    own = next(net.parameters())
    packed = StoredNetwork(ControlNet, net.control, {name: stored(t) for name, t in net.state_dict().items()})
    write_control_net(packed, Path(path), layout, conv, dtype and choose_dtype(dtype, own.device))


def load_image_prompt(
    path: str | Path,
    tower: str | Path | VisionTower | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> ImageReader:
    """Loads an IP-Adapter file with its CLIP image encoder: a folder, a file, or one already loaded. None: the folder
    `image_encoder` beside the adapter. See files/image_prompt.py."""
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    path = find(path)
    adapter = open_image_adapter(path).build(device, dtype)
    assert isinstance(adapter, ImageAdapter)
    if tower is None:
        tower = tower_beside(path)
        if tower is None:
            raise UserError(
                f"{path} needs its CLIP image encoder, and there is no folder {TOWER_FOLDER!r} beside it; give one "
                "with tower=, or --image-encoder",
                field="image_encoder",
            )
    return ImageReader(adapter, tower if isinstance(tower, VisionTower) else load_tower(tower, device, dtype))


def load_tower(path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> VisionTower:
    """Loads a CLIP image encoder, alone or from a whole CLIP."""
    device = choose_device(device)
    tower = open_tower(find(path)).build(device, choose_dtype(dtype, device))
    assert isinstance(tower, VisionTower)
    return tower


def load_clip(path: str | Path, device: str | torch.device = "auto") -> Clip:
    """Loads a whole CLIP, in float32: a folder of transformers', or a file of a known size. See files/clip.py."""
    device = choose_device(device)
    text, tower, tokenizer = open_clip(find(path))
    encoder, vision = text.build(device, torch.float32), tower.build(device, torch.float32)
    assert isinstance(encoder, TextEncoder) and isinstance(vision, VisionTower)
    return Clip(encoder, vision, tokenizer)


def add_preview(folder: str | Path) -> None:
    """Adds to a model's folder the preview projection that `save` would have written; see previews.py."""
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no model_index.json; give one in diffusers' layout")
    text = preview_text(fit_latent_rgb(load_vae(folder, device="cpu", dtype="float32")))
    with written_whole(Path(folder) / PREVIEW) as draft:
        draft.write_text(text, encoding="utf-8")
