"""What tests share: a tiny model with random weights, and marks for what a machine lacks."""

from dataclasses import replace

import pytest
import torch

from plainsd.generate import StableDiffusion
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.vae import VAE, VAEConfig
from plainsd.tokenizer import WORD_END, Tokenizer, byte_symbols
from plainsd.variants import ScheduleConfig, Variant

BYTES = byte_symbols()
VOCABULARY = [*BYTES, *(symbol + WORD_END for symbol in BYTES), "<|startoftext|>", "<|endoftext|>"]

TINY = Variant(
    "tiny",
    unet=UNetConfig(channels=(32, 64), depth=(1, 1), heads=(2, 4), layers=1, context=32),
    vae=VAEConfig(channels=(8, 8, 16, 16), layers=1, groups=4),
    text=(TextConfig(vocab=len(VOCABULARY), width=32, layers=2, heads=2, mlp=64, eos=len(VOCABULARY) - 1),),
    schedule=ScheduleConfig(),
    size=64,
    sampler="ddim",
    steps=4,
)

TEXT = TINY.text[0]
TINY_REFINER = replace(
    TINY,
    name="tiny-refiner",
    unet=replace(TINY.unet, context=32, vector=16 + 5 * 256),
    text=(replace(TEXT, activation="gelu", projection=16),),
    context="penultimate",
    conv_projections=False,
)
TINY_XL = replace(
    TINY_REFINER,
    name="tiny-xl",
    unet=replace(TINY.unet, depth=(0, 2), mid_depth=2, context=64, vector=16 + 6 * 256),
    text=(TEXT, *TINY_REFINER.text),
)


@torch.no_grad()
def tiny_sd(variant: Variant = TINY, seed: int = 0, **unet) -> StableDiffusion:
    """A model of a million weights. Its last layers are scaled so that pictures have contrast, and depend on the
    prompt. `unet` changes single numbers of the UNet's configuration."""
    variant = replace(variant, unet=replace(variant.unet, **unet))
    torch.manual_seed(seed)
    sd = StableDiffusion(
        tokenizers=[Tokenizer({word: i for i, word in enumerate(VOCABULARY)}, []) for _ in variant.text],
        text_encoders=[TextEncoder(text).eval() for text in variant.text],
        unet=UNet(variant.unet).eval(),
        vae=VAE(variant.vae).eval(),
        schedule=variant.schedule.build(),
        prediction=variant.prediction,
        variant=variant,
    )
    latents = torch.randn(2, variant.vae.latent_channels, 8, 8)
    for block in [*sd.unet.down, *sd.unet.up]:
        if block.attn is not None:
            for transformer in block.attn.blocks:
                transformer.cross_attn.out.weight *= 20
    context = torch.randn(2, 5, variant.unet.context)
    vector = torch.randn(2, variant.unet.vector) if variant.unet.vector else None
    noisy = torch.randn(2, variant.unet.in_channels, 8, 8)
    sd.unet.conv_out.weight /= sd.unet(noisy, 500.0, context, vector).std()
    sd.vae.decoder.conv_out.weight *= 0.5 / sd.vae.decode(latents / variant.vae.scaling_factor).std()
    return sd


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
