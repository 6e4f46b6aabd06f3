"""The CLIP text encoder: token ids to one vector a token.

Radford et al. 2021 (arXiv:2103.00020). SD 1.x uses OpenAI's ViT-L/14, SD 2.x OpenCLIP's ViT-H/14, SDXL the former and
OpenCLIP's ViT-bigG/14: the same network with other numbers. Shape letters: B batch, N tokens (77), D width, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.layers import Attention


@dataclass(frozen=True)
class TextConfig:
    """ViT-L/14's numbers by default (123,060,480 parameters)."""

    vocab: int = 49_408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3_072
    positions: int = 77
    activation: str = "quick_gelu"  # or "gelu" (OpenCLIP)
    projection: int | None = None  # width of the pooled vector's projection; None: no projection
    eos: int = 49_407  # the end token, at whose first place the pooled vector is read
    eps: float = 1e-5


class TextStates(NamedTuple):
    hidden: list[Tensor]  # the embedding, then each block's output: layers + 1 times (B, N, D), not normalised
    final: Tensor  # the last of them through the final norm, (B, N, D)
    pooled: Tensor  # the final state at the end token, projected where there is a projection, (B, D or P)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): OpenAI's approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class TextBlock(nn.Module):
    """Pre-norm transformer block: attention, of texts to earlier tokens only, then a two-layer MLP. (B, N, D) ->
    (B, N, D)."""

    def __init__(self, config: TextConfig, *, causal: bool = True):
        super().__init__()
        self.causal = causal
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attn = Attention(config.width, config.heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=self.causal)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    """ids (B, N), N at most `positions` -> TextStates."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def forward(self, ids: Tensor) -> TextStates:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))  # (B, N, D)
        hidden = [x]
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        final = self.norm(x)
        end = (ids == self.config.eos).int().argmax(dim=1)  # the first end token of each row
        pooled = final[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        if self.projection is not None:
            pooled = self.projection(pooled)  # (B, P)
        return TextStates(hidden, final, pooled)
