"""The CLIP image encoder: a picture to one vector, and to one for each of its patches.

Radford et al. 2021 (arXiv:2103.00020); Dosovitskiy et al. 2020 (ViT, arXiv:2010.11929). Image prompts read OpenCLIP's
ViT-H/14 or ViT-bigG/14 (models/image_prompt.py); CLIP scores are made with OpenAI's ViT-L/14 and others: the same
network with other numbers. Shape letters: B batch, G patches a side, N = 1 + G * G states, D width, P projection.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plainsd.models.clip import TextBlock, TextConfig


@dataclass(frozen=True)
class VisionConfig:
    """ViT-L/14's numbers by default (303,966,208 parameters)."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    patch: int = 14  # pixels
    size: int = 224  # pixels, either side
    activation: str = "quick_gelu"  # or "gelu" (OpenCLIP)
    projection: int = 768
    eps: float = 1e-5

    @property
    def block(self) -> TextConfig:
        """The same numbers as a transformer block of CLIP reads them; the text's are the same."""
        return TextConfig(width=self.width, heads=self.heads, mlp=self.mlp, activation=self.activation, eps=self.eps)


VISION_TOWERS = {
    "ViT-B/32": VisionConfig(width=768, layers=12, heads=12, mlp=3072, patch=32, projection=512),
    "ViT-B/16": VisionConfig(width=768, layers=12, heads=12, mlp=3072, patch=16, projection=512),
    "ViT-L/14": VisionConfig(),
    "ViT-L/14@336": VisionConfig(size=336),
    "ViT-H/14": VisionConfig(width=1280, layers=32, mlp=5120, activation="gelu", projection=1024),
    "ViT-bigG/14": VisionConfig(width=1664, layers=48, mlp=8192, activation="gelu", projection=1280),
}


class VisionStates(NamedTuple):
    hidden: list[Tensor]  # what enters the first block, then each block's output: layers + 1 times (B, N, D)
    embeds: Tensor  # the class token's last state, normalised by a LayerNorm and projected, (B, P)


class VisionTower(nn.Module):
    """Pixels (B, 3, size, size), as `clip_pixels` makes them -> VisionStates."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.class_token = nn.Parameter(torch.randn(config.width))
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position = nn.Embedding((config.size // config.patch) ** 2 + 1, config.width)
        self.norm_in = nn.LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(TextBlock(config.block, causal=False) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width, config.eps)
        self.projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> VisionStates:
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # (B, G * G, D)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # (B, N, D)
        x = self.norm_in(x + self.position.weight)
        hidden = [x]
        for block in self.blocks:
            hidden.append(x := block(x))
        return VisionStates(hidden, self.projection(self.norm_out(x[:, 0])))
