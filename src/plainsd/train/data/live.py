"""Latents without a cache: each batch's pictures are encoded when it is trained on (`--live-latents`).

That takes no disk and no start, and pays where the pictures are computed, so that none comes twice, or where a GPU
encodes faster than the latents could be stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plainsd.errors import UserError
from plainsd.models.vae import VAE
from plainsd.train.data.ahead import PixelsOf
from plainsd.train.data.crops import Framing
from plainsd.train.data.latents import check_latents, drawn_latents, vae_moments
from plainsd.train.data.pictures import PictureSet
from plainsd.train.order import Pick


@dataclass(frozen=True)
class LiveLatents:
    """In the place of `Latents`: the same Gaussians of the first view, in float32."""

    vae: VAE
    pictures: PictureSet
    pixels: PixelsOf
    dtype: torch.dtype

    def __post_init__(self):
        check_latents(self.vae)
        if self.pictures.framing != Framing() or any(item.masked for item in self.pictures.items):
            raise UserError(
                "--live-latents encodes one square of each picture, without mask; leave it out, or leave out "
                "--buckets, --crop, --flip and masks",
                field="live_latents",
            )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        side = self.pictures.size // self.vae.config.factor
        return [(side, side)] * len(self.pictures)

    def choose(self, picks: Sequence[Pick]) -> list[int]:
        """The view of each pick: there is one."""
        return [0] * len(picks)

    def draw(self, picks: Sequence[Pick], views: Sequence[int] | None = None) -> Tensor:
        """A scaled latent of each pick, (B, L, h, w) float32 on the CPU."""
        moments = vae_moments(self.vae, self.pixels(picks), self.dtype)
        return drawn_latents(moments, picks, self.vae.config.scaling_factor)

    def masks(self, picks: Sequence[Pick], views: Sequence[int] | None = None) -> None:
        return None
