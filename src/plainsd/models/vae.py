"""The autoencoder between pictures and latents.

Rombach et al. 2022 (arXiv:2112.10752), appendix G; the KL-regularised autoencoder of Kingma and Welling
(arXiv:1312.6114). Shape letters: B batch, C channels, H W height and width in pixels, L latent channels,
f = 2 ** (levels - 1), 8 in SD.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.layers import Attention, Downsample, ResBlock, Upsample

EPS = 1e-6  # of every GroupNorm here; 1e-5, a common mistake, changes pictures visibly


@dataclass(frozen=True)
class VAEConfig:
    """SD 1.x's numbers by default (83,653,863 parameters)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # ResBlocks a level in the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32
    scaling_factor: float = 0.18215  # brings latents to about unit variance for the UNet
    pixel_channels: int = 3
    latents_mean: tuple[float, ...] | None = None  # one a channel, of unscaled latents; Playground 2.5's
    latents_std: tuple[float, ...] | None = None  # likewise; both or neither

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def widest(self) -> int:
        """Channels of the widest map at full size: the decoder's last level starts with those of the level below."""
        return self.channels[min(1, len(self.channels) - 1)]

    def scaled(self, latents: Tensor) -> Tensor:
        """Encoder output (B, L, h, w) -> latents in the UNet's scale."""
        if self.latents_mean is None:
            return latents * self.scaling_factor
        mean, std = self._moments(latents)
        return (latents - mean) * (self.scaling_factor / std)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`: latents in the decoder's scale."""
        if self.latents_mean is None:
            return latents / self.scaling_factor
        mean, std = self._moments(latents)
        return latents * (std / self.scaling_factor) + mean

    def _moments(self, like: Tensor) -> Tensor:
        return torch.tensor([self.latents_mean, self.latents_std]).to(like).view(2, 1, -1, 1, 1)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over latents with a diagonal covariance: mean and log variance, both (B, L, H/f, W/f)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + standard deviation * noise, noise being unit normal of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """The divergence from the unit normal, in nats a picture: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map, added to it. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.attn = Attention(channels, heads=1, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + self.attn(h).transpose(1, 2).unflatten(2, x.shape[2:])


class VAEMiddle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.res1 = ResBlock(channels, channels, groups=groups, eps=EPS)
        self.attn = SpatialAttention(channels, groups)
        self.res2 = ResBlock(channels, channels, groups=groups, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.attn(self.res1(x)))


class VAELevel(nn.Module):
    """ResBlocks at one resolution, then a resampling (none at the last level)."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: nn.Module | None):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.res = nn.ModuleList(
            ResBlock(a, b, groups=groups, eps=EPS) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for res in self.res:
            x = res(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to the moments of a Gaussian over latents (B, 2L, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        ch, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.pixel_channels, ch[0], 3, padding=1)
        self.levels = nn.ModuleList(
            VAELevel(
                ch[max(i - 1, 0)], c, config.layers, config.groups, Downsample(c, asymmetric=True) if i < last else None
            )
            for i, c in enumerate(ch)
        )
        self.mid = VAEMiddle(ch[-1], config.groups)
        self.norm = nn.GroupNorm(config.groups, ch[-1], EPS)
        self.conv_out = nn.Conv2d(ch[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, L, H/f, W/f) to pixels (B, 3, H, W). Its levels run from the deepest to the shallowest."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        ch, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, ch[0], 3, padding=1)
        self.mid = VAEMiddle(ch[0], config.groups)
        self.levels = nn.ModuleList(
            VAELevel(ch[max(i - 1, 0)], c, config.layers + 1, config.groups, Upsample(c) if i < last else None)
            for i, c in enumerate(ch)
        )
        self.norm = nn.GroupNorm(config.groups, ch[-1], EPS)
        self.conv_out = nn.Conv2d(ch[-1], config.pixel_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm(x)))


class VAE(nn.Module):
    """Pixels are in [-1, 1]. Latents here are unscaled; `config.scaled` gives those that the UNet expects."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Gaussian:
        """pixels (B, 3, H, W) -> a Gaussian over (B, L, H/f, W/f). The log variance is clamped to [-30, 20]."""
        return self.gaussian(self.encoder(pixels))

    def gaussian(self, moments: Tensor) -> Gaussian:
        """Encoder output (B, 2L, H/f, W/f) as a distribution."""
        mean, logvar = self.quant(moments).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, L, H/f, W/f) -> pixels (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant(latents))
