"""Training text encoder and UNet together from scratch (method `scratch`): initialisation, and then `full`.

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) on cached latents of a frozen VAE. The networks are described
by a JSON file, see `plainsd.files.described`.
"""

from dataclasses import replace

from torch import nn

from plainsd.errors import UserError
from plainsd.files.configs import check_end
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE
from plainsd.models.variants import Variant, encoder_names
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.text.tokenizer import Tokenizer


def from_scratch(variant: Variant, vae: VAE, tokenizer: Tokenizer) -> StableDiffusion:
    """An untrained model around a trained autoencoder, with a text encoder for the tokenizer's vocabulary. Random
    numbers come from PyTorch's global generator: seed it first."""
    if len(variant.text) != 1:
        raise UserError(f"the model has {len(variant.text)} text encoders, and method scratch trains one; describe one")
    check_end(tokenizer.end)  # now, and not when hours later the model is saved
    text = replace(variant.text[0], vocab=len(tokenizer), eos=tokenizer.end)
    tokenizer.max_length = text.positions
    variant = replace(variant, vae=vae.config, text=(text,))
    unet, encoder = UNet(variant.unet), TextEncoder(text)
    init_weights(unet, encoder)
    return assemble(variant, {"unet": unet, "vae": vae, encoder_names(variant)[0]: encoder}, [tokenizer])


def init_weights(unet: UNet, encoder: TextEncoder) -> None:
    """Small text embeddings (as CLIP's), and zero-initialised residual branches and output of the UNet.

    A zero branch passes its input through unchanged, so that the first steps are not spent on undoing noise.
    """
    nn.init.normal_(encoder.token.weight, std=0.02)
    nn.init.normal_(encoder.position.weight, std=0.01)
    for name, p in unet.named_parameters():
        if name.rsplit(".", 1)[0].endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(p)
