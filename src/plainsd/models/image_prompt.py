"""IP-Adapter: what an image encoder says of a picture, as tokens that the UNet's cross-attention reads beside the text.

Ye et al. 2023 (arXiv:2308.06721), equation 5: each cross-attention gets a second pair of projections, for the keys and
values of picture tokens, and adds what its queries find there, times a strength, to what they find in the text. Tokens
are made of the tower's projected vector by one linear layer ("base"), or of its last but one states by a resampler
("plus": Alayrac et al. 2022, arXiv:2204.14198, section 3.1) or by an MLP ("full").

Shape letters: B pictures, S states of the tower, E their width, M tokens, T width of the text, D of a cross-attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.layers import Attention
from plainsd.models.unet import Block, Middle
from plainsd.models.vision import VisionConfig, VisionStates


@dataclass(frozen=True)
class ImageAdapterConfig:
    """The base adapter's numbers for SD 1.5 by default (22,319,616 parameters)."""

    widths: tuple[int, ...] = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)
    kind: str = "base"  # or "plus", "full"
    context: int = 768  # T
    states: int = 1024  # E
    tokens: int = 4  # M; of "full" as many as the tower has states
    inner: int = 768  # width of the resampler
    layers: int = 4
    heads: int = 12


def width_read(tower: VisionConfig, adapter: ImageAdapterConfig) -> int:
    """The width of the states that the adapter reads of this tower."""
    return tower.projection if adapter.kind == "base" else tower.width


def tower_fits(tower: VisionConfig, adapter: ImageAdapterConfig) -> bool:
    return width_read(tower, adapter) == adapter.states


class Projection(nn.Module):
    """One linear layer, cut into tokens. (B, E) -> (B, M, T)."""

    def __init__(self, config: ImageAdapterConfig):
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.states, config.tokens * config.context)
        self.norm = nn.LayerNorm(config.context)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.norm(self.proj(embeds).unflatten(-1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """A token for each state, by an MLP. (B, S, E) -> (B, S, T)."""

    def __init__(self, config: ImageAdapterConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.states, config.states)
        self.fc2 = nn.Linear(config.states, config.context)
        self.norm = nn.LayerNorm(config.context)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(self.fc2(F.gelu(self.fc1(states))))


class ResamplerBlock(nn.Module):
    """Learned queries (B, M, inner) look at states (B, S, inner) and at each other; then an MLP. No biases."""

    def __init__(self, config: ImageAdapterConfig):
        super().__init__()
        dim = config.inner
        self.norm_states, self.norm_queries, self.norm_ff = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = Attention(dim, config.heads)
        self.attn.out = nn.Linear(dim, dim, bias=False)
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        q = self.norm_queries(queries)
        queries = queries + self.attn(q, torch.cat([self.norm_states(states), q], dim=1))
        return queries + self.fc2(F.gelu(self.fc1(self.norm_ff(queries))))


class Resampler(nn.Module):
    """(B, S, E) -> (B, M, T), whatever S is."""

    def __init__(self, config: ImageAdapterConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, config.tokens, config.inner) / config.inner**0.5)
        self.proj_in = nn.Linear(config.states, config.inner)
        self.blocks = nn.ModuleList(ResamplerBlock(config) for _ in range(config.layers))
        self.proj_out = nn.Linear(config.inner, config.context)
        self.norm_out = nn.LayerNorm(config.context)

    def forward(self, states: Tensor) -> Tensor:
        states, queries = self.proj_in(states), self.queries.expand(len(states), -1, -1)
        for block in self.blocks:
            queries = block(queries, states)
        return self.norm_out(self.proj_out(queries))


READERS_OF: dict[str, Callable[[ImageAdapterConfig], nn.Module]] = {
    "base": Projection,
    "plus": Resampler,
    "full": FullProjection,
}


class ImageAdapter(nn.Module):
    """Tokens of pictures, and their keys and values for every cross-attention: down, up, middle, as in files."""

    def __init__(self, config: ImageAdapterConfig):
        super().__init__()
        self.config = config
        self.reader = READERS_OF[config.kind](config)
        self.k = nn.ModuleList(nn.Linear(config.context, width, bias=False) for width in config.widths)
        self.v = nn.ModuleList(nn.Linear(config.context, width, bias=False) for width in config.widths)

    def read(self, states: VisionStates) -> Tensor:
        """What the tower says -> tokens (B, M, T)."""
        return self.reader(states.embeds if self.config.kind == "base" else states.hidden[-2])

    def nothing(self, states: VisionStates, black: VisionStates) -> Tensor:
        """The tokens beside an estimate without a prompt: those of a vector of zeros, or of a picture of zeros."""
        if self.config.kind == "base":
            return self.reader(torch.zeros_like(states.embeds))
        return self.reader(black.hidden[-2])

    def forward(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, M, T) -> keys and values (B, M, D) for each cross-attention."""
        return [(k(tokens), v(tokens)) for k, v in zip(self.k, self.v, strict=True)]


def attentions_of(block: Block | Middle) -> list[nn.Module]:
    """The cross-attentions of one block of a UNet."""
    return [] if block.attn is None else [inner.cross_attn for inner in block.attn.blocks]
