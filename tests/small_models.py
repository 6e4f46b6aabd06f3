"""One small model of each family, and what tests of checkpoints ask of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_sd
from safetensors.torch import load_file, save_file

from plainsd.models.clip import TextConfig
from plainsd.models.unet import UNetConfig
from plainsd.models.vae import VAEConfig
from plainsd.models.variants import ScheduleConfig, Variant

CPU = {"device": "cpu", "dtype": "float32"}
QUICK = TextConfig(vocab=len(VOCABULARY), width=16, layers=2, heads=2, mlp=24, eos=len(VOCABULARY) - 1)
GELU = replace(QUICK, activation="gelu", width=24)
BIG = replace(GELU, projection=24)
SMALL_VAE = VAEConfig(channels=(8, 16), layers=1, groups=4)
SMALL_UNET = UNetConfig(channels=(16, 32), depth=(1, 0), heads=(2, 2), layers=1, context=16, groups=8)
XL_UNET = replace(SMALL_UNET, depth=(0, 2), mid_depth=2, context=40, vector=24 + 6 * 256)

FAMILIES = {  # one of each kind, in sizes for a test
    "sd1": Variant("sd1", SMALL_UNET, SMALL_VAE, (QUICK,), size=32),
    "sd1-inpainting": Variant("sd1-inpainting", replace(SMALL_UNET, in_channels=9), SMALL_VAE, (QUICK,), size=32),
    "sd1-lcm": Variant("sd1-lcm", replace(SMALL_UNET, guidance_dim=12), SMALL_VAE, (QUICK,), size=32, sampler="lcm"),
    "sd2-base": Variant(
        "sd2-base", replace(SMALL_UNET, context=24, heads=(1, 4)), SMALL_VAE, (GELU,), size=32, conv_projections=False
    ),
    "sd2-768": Variant(
        "sd2-768",
        replace(SMALL_UNET, context=24, heads=(1, 4)),
        SMALL_VAE,
        (GELU,),
        size=48,
        conv_projections=False,
        prediction="v_prediction",
    ),
    "sdxl-base": Variant(
        "sdxl-base",
        XL_UNET,
        SMALL_VAE,
        (QUICK, BIG),
        size=64,
        conv_projections=False,
        context="penultimate",
        guidance=5.0,
    ),
    "sdxl-inpainting": Variant(
        "sdxl-inpainting",
        replace(XL_UNET, in_channels=9),
        SMALL_VAE,
        (QUICK, BIG),
        size=64,
        conv_projections=False,
        context="penultimate",
        guidance=5.0,
    ),
    "sdxl-refiner": Variant(
        "sdxl-refiner",
        replace(XL_UNET, context=24, vector=24 + 5 * 256),
        SMALL_VAE,
        (BIG,),
        size=64,
        conv_projections=False,
        context="penultimate",
    ),
    "odd": Variant(
        "odd",
        UNetConfig(
            channels=(16, 24, 32),
            depth=(0, 1, 1),
            heads=(1, 3, 4),
            layers=1,
            context=16,
            in_channels=12,
            out_channels=12,
            groups=8,
        ),
        VAEConfig(channels=(8, 8, 16), layers=1, groups=4, latent_channels=12, scaling_factor=0.61),
        (replace(QUICK, positions=24),),
        ScheduleConfig(zero_terminal_snr=True),
        "v_prediction",
        size=64,
        guidance=3.5,
        sampler="ddim",
        steps=12,
        spacing="trailing",
    ),
}
EACH = pytest.mark.parametrize("name", FAMILIES)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def model(name: str):
    sd = tiny_sd(FAMILIES[name])
    for tokenizer, text in zip(sd.tokenizers, sd.variant.text, strict=True):
        tokenizer.max_length = text.positions
    return sd


def same_networks(a, b) -> bool:
    pairs = zip([a.unet, a.vae, *a.text_encoders], [b.unet, b.vae, *b.text_encoders], strict=True)
    return all(same_tensors(x.state_dict(), y.state_dict()) for x, y in pairs)


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and torch.equal(x, b[name]) for name, x in a.items()
    )


def weights(folder: Path) -> dict:
    """All tensors of a folder."""
    return {
        f"{part}/{name}": tensor
        for part in PARTS
        for path in sorted(folder.glob(f"{part}/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def without_notes(path: Path) -> Path:
    """A single file as others write it."""
    other = path.with_name("bare-" + path.name)
    save_file(load_file(path), other)
    return other
