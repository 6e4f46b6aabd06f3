"""TAESD: an autoencoder of plain convolutions, distilled from Stable Diffusion's, a hundred times faster and blurrier.

Ollin Boer Bohan 2023, github.com/madebyollin/taesd; one set of weights for SD 1.x and 2.x, one for SDXL. Its latents
are those that the UNet sees, so nothing is scaled. 2,445,063 parameters in all, 1,222,531 of them in the decoder.

Shape letters: B batch, C channels, H W height and width in pixels, L latent channels, f = 2 ** (levels - 1), 8 here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plainsd.errors import UserError
from plainsd.models.vae import VAE, Gaussian, VAEConfig

CLAMP = 3.0  # latents are kept within, smoothly
CERTAIN = -30.0  # log variance of an encoder that gives one latent, not a distribution: VAE's own lowest


@dataclass(frozen=True)
class TinyVAEConfig:
    """TAESD's numbers by default."""

    width: int = 64  # channels of every level
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # from the full size down
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)  # from the latents up
    latent_channels: int = 4
    pixel_channels: int = 3
    encodes: bool = True  # False: the decoder alone, as it is also published

    scaling_factor = 1.0  # the same for all: latents here are the UNet's
    latents_mean = latents_std = None

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.decoder_blocks) - 1)

    @property
    def widest(self) -> int:
        """Channels of the widest map at full size."""
        return self.width

    def scaled(self, latents: Tensor) -> Tensor:
        return latents

    def unscaled(self, latents: Tensor) -> Tensor:
        return latents


class TinyBlock(nn.Module):
    """Three convolutions and a way around them. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def tiny_encoder(config: TinyVAEConfig) -> nn.Sequential:
    """Pixels in 0..1 (B, 3, H, W) to latents (B, L, H/f, W/f)."""
    width = config.width
    layers: list[nn.Module] = [nn.Conv2d(config.pixel_channels, width, 3, padding=1)]
    for level, blocks in enumerate(config.encoder_blocks):
        if level > 0:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [TinyBlock(width) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))


def tiny_decoder(config: TinyVAEConfig) -> nn.Sequential:
    """Latents within +-3 (B, L, H/f, W/f) to pixels in about 0..1 (B, 3, H, W)."""
    width, last = config.width, len(config.decoder_blocks) - 1
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
    for level, blocks in enumerate(config.decoder_blocks):
        layers += [TinyBlock(width) for _ in range(blocks)]
        if level < last:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.Conv2d(width, config.pixel_channels, 3, padding=1))


AnyVAEConfig = VAEConfig | TinyVAEConfig


class TinyVAE(nn.Module):
    """Stands where a `VAE` does: pixels lie in [-1, 1], and its latents need no scaling."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = nn.ModuleDict({"layers": tiny_encoder(config)}) if config.encodes else None
        self.decoder = nn.ModuleDict({"layers": tiny_decoder(config)})

    def encode(self, pixels: Tensor) -> Gaussian:
        """pixels (B, 3, H, W) -> a Gaussian of no width over (B, L, H/f, W/f)."""
        if self.encoder is None:
            raise UserError("TAESD's decoder alone cannot encode; put taesd_encoder beside taesd_decoder", field="vae")
        mean = self.encoder["layers"]((pixels + 1) / 2)
        return Gaussian(mean, torch.full_like(mean, CERTAIN))

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, L, H/f, W/f) -> pixels (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder["layers"](torch.tanh(latents / CLAMP) * CLAMP) * 2 - 1


AnyVAE = VAE | TinyVAE
VAE_CLASSES: dict[type, type[AnyVAE]] = {VAEConfig: VAE, TinyVAEConfig: TinyVAE}


def vae_class(config: AnyVAEConfig) -> type[AnyVAE]:
    """The network that a configuration describes."""
    return VAE_CLASSES[type(config)]


def check_same_latents(vae: AnyVAEConfig, own: AnyVAEConfig, what: str, field: str) -> None:
    """UserError where an autoencoder cannot stand in for a model's own."""
    its, ours = ((config.latent_channels, config.factor) for config in (vae, own))
    if its != ours:
        raise UserError(
            f"{what}: its latents have {its[0]} channels at 1/{its[1]} of the size, and the model's have {ours[0]} at "
            f"1/{ours[1]}; choose an autoencoder of the model's family",
            field=field,
        )
