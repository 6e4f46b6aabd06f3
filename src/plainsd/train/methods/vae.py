"""Training the autoencoder (method `vae`).

Kingma and Welling 2013 (arXiv:1312.6114) with the losses of Rombach et al. 2022 (arXiv:2112.10752): the absolute and
squared error of pixels, the absolute error of their differences (edges), a small KL term, and optionally, later on, a
patch discriminator (Isola et al. 2016, arXiv:1611.07004; hinge loss, Lim and Ye 2017, arXiv:1705.02894).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from plainsd.models.layers import ResBlock
from plainsd.models.vae import VAE
from plainsd.train.data.ahead import PixelsOf
from plainsd.train.data.pictures import PictureSet
from plainsd.train.order import Pick


def edges(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of horizontal and vertical pixel differences."""
    return F.l1_loss(a.diff(dim=-1), b.diff(dim=-1)) + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each picture, pixels in [-1, 1] -> (B,)."""
    return -10 * ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def init_vae(vae: VAE) -> None:
    """Initialisation with unit-variance outputs of every layer, and zero residual branches.

    He et al. 2015 (arXiv:1502.01852). The log variance starts at -4, so that pictures pass the bottleneck from the
    first step on. After 2,900 pictures of the emoji recipe: 17.6 dB, and 12.8 dB from PyTorch's own (one run each).
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.quant.bias[vae.config.latent_channels :], -4.0)


class Discriminator(nn.Module):
    """PatchGAN discriminator: a realness logit for each patch. (B, 3, H, W) -> (B, 1, H/8, W/8)."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        return self.out(x)


@dataclass
class VaeMethod:
    vae: VAE
    pictures: PictureSet
    edge_weight: float = 1.0
    kl_weight: float = 1e-4  # of the mean over latent numbers, in nats
    patch_weight: float = 0.0  # 0: no discriminator
    patch_after: int = 0  # pictures seen before it starts
    latent_noise: float = 0.0  # t, as a share of the latents' standard deviation: see `disturbed`
    pixels: PixelsOf | None = None  # what reads the picks' pictures; None: `pictures`, when they are wanted
    modules: nn.ModuleDict = field(init=False)

    def __post_init__(self):
        self.modules = nn.ModuleDict({"vae": self.vae})
        if self.patch_weight:
            self.modules["discriminator"] = Discriminator().to(next(self.vae.parameters()).device)

    def loss(self, picks: list[Pick]) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.vae.parameters()).device
        real = self.pixels(picks) if self.pixels else self.pictures.pixels([p.index for p in picks])
        real = real.to(device)
        real = real.contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(real)
        shape = latents.mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=p.generator) for p in picks]).to(latents.mean)
        fake = self.vae.decode(disturbed(latents.sample(noise), picks, self.latent_noise)).float()
        l1, l2, edge = F.l1_loss(fake, real), F.mse_loss(fake, real), edges(fake, real)
        kl = latents.kl().float().mean() / shape.numel()
        loss = l1 + l2 + self.edge_weight * edge + self.kl_weight * kl
        numbers = {
            "l1": l1.detach(),
            "edge": edge.detach(),
            "kl": kl.detach(),
            "psnr": psnr(fake.detach(), real).mean(),
        }
        if self.patch_weight:
            loss = loss + self._adversarial(real, fake, numbers, joined=picks[0].position >= self.patch_after)
        return loss, numbers

    def _adversarial(self, real: Tensor, fake: Tensor, numbers: dict[str, Tensor], joined: bool) -> Tensor:
        """The losses of generator and discriminator in one sum, each with the other's weights detached, for one
        optimizer; until they have `joined` 0, without gradients."""
        judge = self.modules["discriminator"]
        fixed = {name: p.detach() for name, p in judge.named_parameters()}
        with nullcontext() if joined else torch.no_grad():
            fool = -functional_call(judge, fixed, (fake,)).float().mean()
            catch = F.relu(1 - judge(real).float()).mean() + F.relu(1 + judge(fake.detach()).float()).mean()
        numbers |= {"fool": fool.detach(), "catch": catch.detach()}
        return (self.patch_weight * fool + catch) * joined


def disturbed(latents: Tensor, picks: Sequence[Pick], most: float) -> Tensor:
    """Latents (B, C, h, w) with noise in each picture: the absolute value of a normal number, times `most`, times the
    standard deviation of its latents.

    A UNet's latents are never quite right; a decoder that has learned from such latents forgives it (noise-augmented
    decoding, Zheng et al. 2025, arXiv:2510.11690).
    """
    if not most:
        return latents
    strengths = torch.stack([torch.randn(1, 1, 1, generator=pick.generator).abs() for pick in picks])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=pick.generator) for pick in picks])
    return latents + most * latents.detach().std((1, 2, 3), keepdim=True) * (strengths * noise).to(latents)


@torch.no_grad()
def measure_scaling(vae: VAE, pictures: PictureSet, count: int = 256) -> float:
    """1 / standard deviation of sampled latents, over the first `count` pictures; makes the UNet's input unit-sized."""
    device, values = next(vae.parameters()).device, []
    for start in range(0, min(count, len(pictures)), 32):
        q = vae.encode(pictures.pixels(range(start, min(start + 32, count, len(pictures)))).to(device))
        noise = torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(start)).to(q.mean)
        values.append(q.sample(noise).flatten().float().cpu())
    return 1 / torch.cat(values).std().item()


@torch.no_grad()
def validate(vae: VAE, pictures: PictureSet) -> dict[str, float]:
    """Held-out pictures through encoder (its mean) and decoder: PSNR in dB, and L1."""
    device, ratios, errors = next(vae.parameters()).device, [], []
    for start in range(0, len(pictures), 32):
        real = pictures.pixels(range(start, min(start + 32, len(pictures)))).to(device)
        fake = vae.decode(vae.encode(real).mean).float()
        ratios.append(psnr(fake, real).cpu())
        errors.append((fake.clamp(-1, 1) - real).abs().flatten(1).mean(1).cpu())
    return {"psnr": torch.cat(ratios).mean().item(), "l1": torch.cat(errors).mean().item()}
