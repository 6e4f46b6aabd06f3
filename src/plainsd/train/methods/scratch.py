"""Training text encoder and UNet together, from nothing (method `scratch`): the first weights, and then `full`.

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) on latents that the frozen VAE made once. A description of the
networks is a JSON file with the fields of `plainsd.models.variants.Variant`.
"""

import dataclasses
import types
import typing
from dataclasses import replace
from pathlib import Path

from torch import nn

from plainsd.disk import read_json
from plainsd.errors import UserError
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE
from plainsd.models.variants import Variant
from plainsd.pictures.model import StableDiffusion
from plainsd.text.tokenizer import Tokenizer


def from_scratch(variant: Variant, vae: VAE, tokenizer: Tokenizer) -> StableDiffusion:
    """A model that has learned nothing yet, around a trained autoencoder. Its text encoder is as large as the
    tokenizer's vocabulary. Random numbers come from PyTorch's own generator: seed it first."""
    text = replace(variant.text[0], vocab=len(tokenizer), eos=tokenizer.end)
    tokenizer.max_length = text.positions
    variant = replace(variant, vae=vae.config, text=(text,))
    unet, encoder = UNet(variant.unet), TextEncoder(text)
    init_weights(unet, encoder)
    return StableDiffusion([tokenizer], [encoder], unet, vae, variant.schedule.build(), variant.prediction, variant)


def init_weights(unet: UNet, encoder: TextEncoder) -> None:
    """Small text embeddings (as CLIP's), and a UNet whose residual branches and output begin at zero.

    A branch that begins at zero lets the signal through unchanged, so that the first steps are not spent on undoing
    noise.
    """
    nn.init.normal_(encoder.token.weight, std=0.02)
    nn.init.normal_(encoder.position.weight, std=0.01)
    for name, p in unet.named_parameters():
        if name.rsplit(".", 1)[0].endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(p)


# ---- a model's description


def read_variant(path: Path) -> Variant:
    """A Variant from JSON: the dataclass's own field names, nested; what is left out keeps its default."""
    return build(Variant, read_json(path), str(path))


def build(kind: type, fields: dict, where: str):
    hints = typing.get_type_hints(kind)
    unknown_names = [name for name in fields if name not in hints]
    if unknown_names:
        raise UserError(f"{where}: {kind.__name__} has no field {unknown_names[0]!r}; it has {', '.join(hints)}")
    try:
        return kind(**{name: convert(hints[name], value, where) for name, value in fields.items()})
    except TypeError as error:
        raise UserError(f"{where}: {kind.__name__}: {error}") from error


def convert(hint, value, where: str):
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(value, list):
        inner = typing.get_args(hint)
        nested = inner and not isinstance(inner[0], types.EllipsisType)
        return tuple(convert(inner[0], v, where) if nested else v for v in value)
    return value
