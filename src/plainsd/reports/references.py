"""diffusers and transformers over a model's own weights: what `plainsd verify` compares with.

A folder is read by their loaders, a single file by their conversion, so that our reading is compared too. This needs
the packages of plainsd[verify]; only `plainsd bench` also imports them (rivals.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from plainsd.diffusion.schedule import EDMSchedule
from plainsd.files.configs_out import pipeline
from plainsd.files.folder import file_variant, open_part
from plainsd.files.single import known_beside, prefixes
from plainsd.files.stored import Contents
from plainsd.files.tensorfile import open_tensors
from plainsd.files.tokenizers import tokenizer_names, tokenizer_texts, tokenizers
from plainsd.models.tiny_vae import TinyVAEConfig
from plainsd.models.variants import Variant, encoder_names


@contextmanager
def quiet() -> Iterator[None]:
    """Silences their warnings about settings that do not matter here."""
    import diffusers
    import transformers

    libraries = [package.utils.logging for package in (diffusers, transformers)]
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def kind_there(name: str, variant: Variant) -> type[nn.Module]:
    import diffusers
    import transformers

    if name in ("unet", "vae"):
        tiny = isinstance(variant.vae, TinyVAEConfig)
        vae = diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL
        return diffusers.UNet2DConditionModel if name == "unet" else vae
    text = variant.text[encoder_names(variant).index(name)]
    return transformers.CLIPTextModelWithProjection if text.projection else transformers.CLIPTextModel


def reference_network(contents: Contents, path: Path, name: str, variant_file: str | None) -> nn.Module:
    """A network of diffusers or transformers with the file's weights, in float32."""
    kind = kind_there(name, contents.variant)
    if path.is_dir():
        dtype = {"torch_dtype" if name in ("unet", "vae") else "dtype": torch.float32}
        variant = variant_file or file_variant(open_part(path / name).path.name)
        return kind.from_pretrained(path / name, variant=variant, local_files_only=True, **dtype).eval()
    from accelerate import init_empty_weights

    config = json.loads(contents.texts[f"{name}/config.json"])
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(config) if name in ("unet", "vae") else kind(kind.config_class(**config))
    weights = converted(path, name, contents.variant, config, network)
    network.load_state_dict(spelled_as(weights, network.state_dict()), assign=True)
    return network.float().eval()


def converted(path: Path, name: str, variant: Variant, config: dict, network: nn.Module) -> dict[str, Tensor]:
    """A single file's state dict with diffusers' names, by diffusers' conversion."""
    from diffusers.loaders import single_file_utils as convert

    prefix, layout = prefixes(variant)[name]
    file = open_tensors(path)
    names = {key for key in file.tensors if key.startswith(prefix)}.difference(known_beside(file, variant))
    tensors = {key: file.tensors[key].read(torch.float32) for key in names}
    if name == "unet":
        weights = convert.convert_ldm_unet_checkpoint(dict(tensors), config)
        if variant.unet.guidance_dim:  # LCM's, which their conversion leaves out
            weights["time_embedding.cond_proj.weight"] = tensors[f"{prefix}time_embed.cond_proj.weight"]
        return weights
    if name == "vae":
        return convert.convert_ldm_vae_checkpoint(tensors, config)
    if layout == "openclip":
        return convert.convert_open_clip_checkpoint(network, tensors, prefix)
    return convert.convert_ldm_clip_checkpoint(tensors, prefix)


def spelled_as(weights: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With or without `text_model.`, as this version of transformers has it."""

    def spelled(name: str) -> str:
        without = name.removeprefix("text_model.")
        return next((other for other in (name, without, f"text_model.{without}") if other in names), name)

    return {spelled(name): tensor for name, tensor in weights.items()}


def tokenizers_there(contents: Contents, path: Path) -> list:
    """transformers' tokenizers from the model's files, or for a single file from ours."""
    from transformers import CLIPTokenizer

    texts = {at: text for at, text in contents.texts.items() if at.startswith("tokenizer")}
    texts = texts or tokenizer_texts(tokenizers(contents, path), contents.variant)
    with tempfile.TemporaryDirectory() as folder:
        for at, text in texts.items():
            (Path(folder) / at).parent.mkdir(exist_ok=True)
            (Path(folder) / at).write_text(text, encoding="utf-8")
        return [CLIPTokenizer.from_pretrained(Path(folder) / name) for name in tokenizer_names(contents.variant)]


def pipe_there(contents: Contents, path: Path, variant_file: str | None, spacing: str, device: torch.device):
    """Their pipeline of their networks, with the scheduler equal to our `ddim`."""
    import diffusers

    variant, name = contents.variant, pipeline(contents.variant)
    settings = json.loads(contents.texts["scheduler/scheduler_config.json"])
    if isinstance(variant.schedule, EDMSchedule):
        scheduler = diffusers.EDMEulerScheduler.from_config(settings, sigma_schedule=spacing)
    else:
        scheduler = diffusers.DDIMScheduler.from_config(
            settings, timestep_spacing=spacing, set_alpha_to_one=False, steps_offset=1, clip_sample=False
        )
    parts = {part: reference_network(contents, path, part, variant_file) for part in contents.networks}
    parts |= dict(zip(tokenizer_names(variant), tokenizers_there(contents, path), strict=True))
    if variant.unet.vector:
        parts = {"text_encoder": None, "tokenizer": None, **parts, "add_watermarker": False}
        if "Img2Img" in name or "Inpaint" in name:
            parts["requires_aesthetics_score"] = len(variant.text) == 1
        if "Pix2Pix" in name:
            parts["is_cosxl_edit"] = isinstance(variant.schedule, EDMSchedule)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, name)(scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
