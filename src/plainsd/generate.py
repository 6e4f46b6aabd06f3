"""From a prompt to pictures: the parts of a model, and the three tasks on it.

Rombach et al. 2022 (arXiv:2112.10752). Shape letters: B pictures at once, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from plainsd.models.clip import TextEncoder
    from plainsd.models.unet import UNet
    from plainsd.models.vae import VAE
    from plainsd.schedule import NoiseSchedule
    from plainsd.tokenizer import Tokenizer
    from plainsd.variants import Variant


@dataclass
class StableDiffusion:
    """The parts of one model. SDXL has two tokenizers and text encoders, all others one of each."""

    tokenizers: list[Tokenizer]
    text_encoders: list[TextEncoder]
    unet: UNet
    vae: VAE
    schedule: NoiseSchedule
    prediction: str                   # what the network predicts: "epsilon" or "v_prediction"
    variant: Variant
    path: Path | None = None          # where it was loaded from

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Moves and casts the networks in place; returns itself."""
        for network in (*self.text_encoders, self.unet, self.vae):
            network.to(device=device, dtype=dtype)
        return self
