"""Training text encoder and UNet together, from nothing (method `scratch`).

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) on latents that the frozen VAE made once. Every picture of a batch
has its own timestep; a tenth of the captions is left empty, which is what classifier-free guidance steers away from
(Ho and Salimans 2022, arXiv:2207.12598).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from plainsd.denoiser import network_input, train_target
from plainsd.images import written_whole
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE, Gaussian
from plainsd.schedule import NoiseSchedule
from plainsd.tokenizer import Tokenizer
from plainsd.train.data import Pictures, random
from plainsd.train.loop import Pick


@dataclass(frozen=True)
class Latents:
    """The VAE's Gaussian of every picture, (N, 2L, H/f, W/f) float16: means, then standard deviations."""

    moments: Tensor
    scaling_factor: float

    def draw(self, picks: Sequence[Pick]) -> Tensor:
        """A scaled latent of each pick, (B, L, H/f, W/f) float32."""
        mean, std = self.moments[[p.index for p in picks]].float().chunk(2, dim=1)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=p.generator) for p in picks])
        return (mean + std * noise) * self.scaling_factor


@torch.no_grad()
def cache_latents(vae: VAE, pictures: Pictures, folder: Path, *, batch: int = 64, dtype: torch.dtype = torch.float32) -> Latents:
    """Encodes every picture once, into a file of `folder` that is named after the pictures and the VAE, and mapped in."""
    config, side = vae.config, pictures.size // vae.config.factor
    path = folder / f"latents-{fingerprint(vae, pictures)}.f16"
    shape = (len(pictures), 2 * config.latent_channels, side, side)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        weight = next(vae.parameters())
        with written_whole(path) as unfinished, open(unfinished, "wb") as file:
            for start in tqdm(range(0, len(pictures), batch), "encoding pictures", leave=False):
                pixels = pictures.pixels(range(start, min(start + batch, len(pictures)))).to(weight.device)
                with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
                    q: Gaussian = vae.encode(pixels.contiguous(memory_format=torch.channels_last))
                moments = torch.cat([q.mean.float(), (0.5 * q.logvar.float()).exp()], dim=1)
                file.write(moments.half().cpu().contiguous().numpy().tobytes())
    size = shape[0] * shape[1] * shape[2] * shape[3]
    return Latents(torch.from_file(str(path), shared=False, size=size, dtype=torch.float16).view(shape), config.scaling_factor)


def fingerprint(vae: VAE, pictures: Pictures) -> str:
    """Sixteen hexadecimal digits that change with the VAE's weights, the pictures' files or their size."""
    digest = hashlib.sha256(f"{vae.config} {pictures.size}".encode())
    for tensor in vae.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    for item in pictures.items:
        stat = item.path.stat()
        digest.update(f"{item.path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def token_rows(tokenizer: Tokenizer, texts: Sequence[str], positions: int) -> Tensor:
    """Ids (B, positions): start, the text's (cut if longer), end, padding."""
    rows = []
    for text in texts:
        ids = [tokenizer.start, *tokenizer.encode(text)[: positions - 2], tokenizer.end]
        rows.append(ids + [tokenizer.pad] * (positions - len(ids)))
    return torch.tensor(rows)


@dataclass
class ScratchMethod:
    unet: UNet
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    prediction: str
    latents: Latents
    pictures: Pictures
    dropout: float = 0.1             # share of captions left empty
    timestep_power: float = 1.0      # timesteps are count * chance ** power: below 1, noisy ones come more often
    modules: nn.ModuleDict = field(init=False)

    def __post_init__(self):
        self.modules = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})

    def loss(self, picks: list[Pick]) -> tuple[Tensor, dict[str, Tensor]]:
        captions = [self._caption(p) for p in picks]
        count = len(self.schedule.alphas_cumprod)
        chances = [float(torch.rand((), generator=p.generator)) for p in picks]
        timesteps = torch.tensor([int(count * chance**self.timestep_power) for chance in chances])
        x0 = self.latents.draw(picks)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=p.generator) for p in picks])
        return self._errors(captions, timesteps, x0, noise).mean(), {}

    def _caption(self, pick: Pick) -> str:
        drop = float(torch.rand((), generator=pick.generator)) < self.dropout
        caption = self.pictures.caption(pick.index, pick.generator)
        return "" if drop else caption

    def _errors(self, captions: Sequence[str], timesteps: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each picture's prediction: (B,)."""
        device = next(self.unet.parameters()).device
        alpha_bar = self.schedule.alphas_cumprod[timesteps].float()
        x = network_input(x0, noise, alpha_bar).to(device).contiguous(memory_format=torch.channels_last)
        target = train_target(self.prediction, x0, noise, alpha_bar).to(device)
        ids = token_rows(self.tokenizer, captions, self.text_encoder.config.positions).to(device)
        output = self.unet(x, timesteps.to(device), self.text_encoder(ids).final)
        return F.mse_loss(output.float(), target, reduction="none").flatten(1).mean(1)

    @torch.no_grad()
    def validate(self, latents: Latents, pictures: Pictures, batch: int = 64) -> dict[str, float]:
        """The loss on held-out pictures, always with the same noise and the same timesteps, spread evenly over the table."""
        count, errors, steps = len(pictures), [], len(self.schedule.alphas_cumprod)
        for start in range(0, count, batch):
            picks = [Pick(i, i, random(0, 3, i)) for i in range(start, min(start + batch, count))]
            captions = [pictures.items[p.index].texts[0] for p in picks]
            timesteps = torch.tensor([(2 * p.index + 1) * steps // (2 * count) for p in picks])
            x0 = latents.draw(picks)
            noise = torch.stack([torch.randn(x0.shape[1:], generator=p.generator) for p in picks])
            errors.append(self._errors(captions, timesteps, x0, noise).cpu())
        return {"validation": torch.cat(errors).mean().item()}
