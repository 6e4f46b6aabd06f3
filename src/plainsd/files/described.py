"""A model described by a JSON file with the fields of `plainsd.models.variants.Variant`, for training from scratch."""

import json
from pathlib import Path

from plainsd.diffusion.denoiser import KNOWN, PREDICTIONS
from plainsd.diffusion.samplers import check_names
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.disk import read_json
from plainsd.errors import WITH_CHOICES, UserError, unknown
from plainsd.files.checked import read_fields, wrong
from plainsd.files.config_noise import CURVES
from plainsd.files.configs import read_variant
from plainsd.files.configs_out import write_variant
from plainsd.models.clip import ACTIVATIONS
from plainsd.models.tiny_vae import AnyVAEConfig, TinyVAEConfig
from plainsd.models.unet import UNetConfig
from plainsd.models.variants import Variant, check_reads

CONTEXTS = ("final", "penultimate")


def read_description(path: Path) -> Variant:
    """The Variant in the file; missing fields keep their defaults. UserError where its networks cannot be built."""
    variant = read_fields(Variant, read_json(path), str(path))
    check_variant(variant, str(path))
    return variant


def check_variant(variant: Variant, where: str) -> None:
    """UserError for the first setting that contradicts another."""
    check_unet(variant.unet, where)
    check_vae(variant.vae, where)
    check_texts(variant, where)
    channels, latents = variant.unet.in_channels, variant.vae.latent_channels
    check_reads(channels, latents, where)
    if variant.unet.out_channels != latents:
        raise wrong(where, "unet.out_channels", variant.unet.out_channels, f"{latents}, the autoencoder's channels")
    noise = variant.schedule
    choices: list[tuple[str, str, tuple[str, ...]]] = [("context", variant.context, CONTEXTS)]
    if isinstance(noise, EDMSchedule):
        choices.append(("prediction", variant.prediction, KNOWN))
        if noise.sigma_min >= noise.sigma_max:
            raise wrong(where, "schedule.sigma_min", noise.sigma_min, "below schedule.sigma_max")
    else:
        choices.append(("prediction", variant.prediction, PREDICTIONS))
        choices.append(("schedule.curve", noise.curve, tuple(CURVES.values())))
    for name, value, known in choices:
        if value not in known:
            raise UserError(f"{where}: {unknown(name, value, known)}", most=WITH_CHOICES)
    try:
        check_names(variant.sampler, variant.spacing)
        files = {path: json.loads(text) for path, text in write_variant(variant).items()}
        read_variant(files.__getitem__, "as a folder")  # so that the trained model can be saved and loaded
    except UserError as error:
        raise UserError(f"{where}: {error}", most=WITH_CHOICES) from None


def check_unet(unet: UNetConfig, where: str) -> None:
    levels = len(unet.channels)
    for name in ("channels", "depth", "heads", "up_depth"):
        value = getattr(unet, name)
        if value is not None and not 0 < len(value) == levels:
            raise wrong(where, f"unet.{name}", value, f"a list of one entry a level; unet.channels has {levels}")
    for level, (width, heads) in enumerate(zip(unet.channels, unet.heads, strict=True)):
        up = unet.going_up(level)
        if len(up) != unet.layers + 1:
            raise wrong(where, f"unet.up_depth[{level}]", up, f"a list of {unet.layers + 1}, one a ResBlock going up")
        if width % unet.groups:
            raise wrong(where, f"unet.channels[{level}]", width, f"a multiple of unet.groups, {unet.groups}")
        attends = unet.depth[level] or any(up) or level == levels - 1 and unet.mid_depth
        if attends and width % heads:
            raise wrong(where, f"unet.channels[{level}]", width, f"a multiple of unet.heads[{level}], {heads}")


def check_vae(vae: AnyVAEConfig, where: str) -> None:
    if isinstance(vae, TinyVAEConfig):
        raise UserError(
            f"{where}: vae describes TAESD, which is not trained here; describe an autoencoder with channels"
        )
    if not vae.channels:
        raise wrong(where, "vae.channels", vae.channels, "a list of one entry a level")
    for level, width in enumerate(vae.channels):
        if width % vae.groups:
            raise wrong(where, f"vae.channels[{level}]", width, f"a multiple of vae.groups, {vae.groups}")
    if (vae.latents_mean is None) != (vae.latents_std is None):
        raise UserError(f"{where}: vae.latents_mean and vae.latents_std go together; give both, or neither")
    for name in ("latents_mean", "latents_std"):
        value = getattr(vae, name)
        if value is not None and len(value) != vae.latent_channels:
            raise wrong(where, f"vae.{name}", value, f"a list of {vae.latent_channels}, one a channel of the latents")


def check_texts(variant: Variant, where: str) -> None:
    texts, unet = variant.text, variant.unet
    if len(texts) not in (1, 2):
        raise UserError(f"{where}: text describes {len(texts)} text encoders; give one, or two as SDXL has")
    for number, text in enumerate(texts):
        if text.activation not in ACTIVATIONS:
            raise UserError(f"{where}: {unknown(f'text[{number}].activation', text.activation, ACTIVATIONS)}")
        if text.width % text.heads:
            raise wrong(where, f"text[{number}].width", text.width, f"a multiple of its heads, {text.heads}")
    if unet.context != (width := sum(text.width for text in texts)):
        raise wrong(where, "unet.context", unet.context, f"{width}, the width of what the text encoders give")
