"""Training text encoder and UNet together, from nothing (method `scratch`): the first weights, and then `full`.

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) on latents that the frozen VAE made once. A description of the
networks is a JSON file, see `plainsd.files.described`.
"""

from dataclasses import replace

from torch import nn

from plainsd.errors import UserError
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE
from plainsd.models.variants import Variant, encoder_names
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.text.tokenizer import Tokenizer


def from_scratch(variant: Variant, vae: VAE, tokenizer: Tokenizer) -> StableDiffusion:
    """A model that has learned nothing yet, around a trained autoencoder. Its text encoder is as large as the
    tokenizer's vocabulary. Random numbers come from PyTorch's own generator: seed it first."""
    if len(variant.text) != 1:
        raise UserError(f"the model has {len(variant.text)} text encoders, and method scratch trains one; describe one")
    text = replace(variant.text[0], vocab=len(tokenizer), eos=tokenizer.end)
    tokenizer.max_length = text.positions
    variant = replace(variant, vae=vae.config, text=(text,))
    unet, encoder = UNet(variant.unet), TextEncoder(text)
    init_weights(unet, encoder)
    return assemble(variant, {"unet": unet, "vae": vae, encoder_names(variant)[0]: encoder}, [tokenizer])


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
