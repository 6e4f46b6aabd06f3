"""The UNet: from a noisy latent, a time and a text to the noise (or v) in the latent.

Ronneberger et al. 2015 (arXiv:1505.04597) in the form of Ho et al. 2020 (arXiv:2006.11239), Rombach et al. 2022
(arXiv:2112.10752) and Podell et al. 2023 (SDXL, arXiv:2307.01952). Shape letters: B batch, C channels, H W latent
height and width, N = H * W positions, D width, M text tokens, T text width, E time-embedding width, V width of SDXL's
extra vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.layers import Attention, Beside, Downsample, ResBlock, Upsample, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """SD 1.x's numbers by default (859,520,964 parameters). Tuples have one entry a level; depth 0: no attention."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each ResBlock; SDXL (0, 2, 10)
    up_depth: tuple[tuple[int, ...], ...] | None = (
        None  # on the way up, one a ResBlock, where it differs: SSD-1B's last (4, 4, 10)
    )
    heads: tuple[int, ...] = (8, 8, 8, 8)  # a count of heads, never a head size
    mid_depth: int | None = 1  # SDXL 10; 0: one ResBlock alone (SSD-1B, Vega); None: no middle (BK-SDM, KOALA)
    layers: int = 2  # ResBlocks a level on the way down; one more on the way up
    context: int = 768  # T; SD 2.x 1024, SDXL 2048
    in_channels: int = 4  # 9 for inpainting: latent, mask, masked picture
    out_channels: int = 4
    groups: int = 32
    vector: int | None = None  # V; SDXL 2816
    guidance_dim: int | None = None  # embedding of the guidance scale in LCM distillations, 256

    def going_up(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each ResBlock of a level on the way up, in the order of computing."""
        return self.up_depth[level] if self.up_depth else (self.depth[level],) * (self.layers + 1)


def geglu(x: Tensor) -> Tensor:
    """(..., 2 D) -> (..., D)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated linear unit with GELU, Shazeer 2020 (arXiv:2002.05202): one half of a projection gates the other."""

    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, 2 * 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.activate = geglu  # training may replace it

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))


class TransformerBlock(nn.Module):
    """Self-attention over positions, cross-attention to the text (and what is beside it), feed-forward; each with a
    pre-norm and a residual. (B, N, D), (B, M, T) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, beside: Sequence[Beside] = ()) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), context, beside)
        return x + self.ff(self.norm3(x))


EachBeside = Sequence[Sequence[Beside]]  # for each of several cross-attentions


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it. (B, C, H, W), (B, M, T) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, beside: EachBeside | None = None) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, N, D)
        for block, more in zip(self.blocks, beside or [()] * len(self.blocks), strict=True):
            h = block(h, context, more)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Module):
    """One entry of the UNet's flat list: a ResBlock, then a Transformer, then a resampling; each may be absent."""

    def __init__(self, res: nn.Module | None = None, attn: nn.Module | None = None, resample: nn.Module | None = None):
        super().__init__()
        self.res, self.attn, self.resample = res, attn, resample

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        beside: EachBeside | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        if self.res is not None:
            x = self.res(x, emb)
        if self.attn is not None:
            x = self.attn(x, context, beside)
        if self.resample is not None:
            x = self.resample(x) if size is None else self.resample(x, size)
        return x


class Middle(nn.Module):
    """ResBlock, Transformer, ResBlock; distilled models keep only the first, or nothing."""

    def __init__(self, res1: nn.Module | None, attn: nn.Module | None, res2: nn.Module | None):
        super().__init__()
        self.res1, self.attn, self.res2 = res1, attn, res2

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, beside: EachBeside | None = None) -> Tensor:
        if self.res1 is not None:
            x = self.res1(x, emb)
        if self.attn is not None:
            x = self.attn(x, context, beside)
        return x if self.res2 is None else self.res2(x, emb)


def plus(x: Tensor, more: Tensor | None) -> Tensor:
    return x if more is None else x + more


def embedding_mlp(dim_in: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim), nn.SiLU(), nn.Linear(dim, dim))


class WayDown(nn.Module):
    """What a UNet and a ControlNet (models/control.py) have alike: embeddings, the way down, the middle."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        ch, emb_dim, levels = config.channels, 4 * config.channels[0], range(len(config.channels))
        self.time = embedding_mlp(ch[0], emb_dim)
        self.vector = embedding_mlp(config.vector, emb_dim) if config.vector else None
        self.guidance = nn.Linear(config.guidance_dim, ch[0], bias=False) if config.guidance_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, ch[0], 3, padding=1)

        self.widths, width = [ch[0]], ch[0]  # channels of the skip connections
        self.down = nn.ModuleList()
        for i in levels:
            for _ in range(config.layers):
                self.down.append(Block(self.res(width, ch[i]), self.attn(i, config.depth[i])))
                width = ch[i]
                self.widths.append(width)
            if i != levels[-1]:
                self.down.append(Block(resample=Downsample(width)))
                self.widths.append(width)

        mid = config.mid_depth
        self.mid = Middle(
            None if mid is None else self.res(width, width),
            self.attn(-1, mid),
            self.res(width, width) if mid else None,
        )

    def res(self, c_in: int, c_out: int) -> ResBlock:
        return ResBlock(c_in, c_out, 4 * self.config.channels[0], groups=self.config.groups)

    def attn(self, level: int, depth: int | None) -> Transformer | None:
        c = self.config
        return Transformer(c.channels[level], c.heads[level], depth, c.context, c.groups) if depth else None

    def embed(self, timestep: Tensor | float, batch: Tensor, vector: Tensor | None, guidance: Tensor | None) -> Tensor:
        """The embedding of timestep, guidance scale and extra vector: (B, E)."""
        if not isinstance(timestep, Tensor):  # filled in there; a copy would make a GPU wait
            timestep = torch.full((), timestep, dtype=torch.float32, device=batch.device)
        timestep = timestep.to(batch.device).expand(len(batch))
        emb = timestep_embedding(timestep, self.config.channels[0]).to(batch.dtype)
        if self.guidance is not None and guidance is not None:
            emb = emb + self.guidance(guidance)  # (B, C)
        emb = self.time(emb)
        return emb if self.vector is None else emb + self.vector(vector)


class UNet(WayDown):
    """x (B, C_in, H, W), timestep () or (B,), context (B, M, T), vector (B, V) -> (B, C_out, H, W). Any H and W.

    What joins it comes as tensors, one for conv_in's output, one for each block of the way down, the last for the
    middle's. `residuals` are added to what the way up is handed, and the way down never sees them (ControlNet, Zhang et
    al. 2023, arXiv:2302.05543); `features` to the outputs themselves, None where there is nothing to add, and what
    follows goes on from there (T2I-Adapter, Mou et al. 2023, arXiv:2302.08453). `beside`: for each block of the way
    down, the middle and each block of the way up, what its cross-attentions read beside the text (IP-Adapter, Ye et al.
    2023, arXiv:2308.06721), None where there are none.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        ch, levels = config.channels, range(len(config.channels))
        skips, width = list(self.widths), ch[-1]

        self.up = nn.ModuleList()
        for i in reversed(levels):
            for j, depth in enumerate(config.going_up(i)):
                upsample = Upsample(ch[i]) if i and j == config.layers else None
                self.up.append(Block(self.res(width + skips.pop(), ch[i]), self.attn(i, depth), upsample))
                width = ch[i]

        self.norm_out = nn.GroupNorm(config.groups, ch[0])
        self.conv_out = nn.Conv2d(ch[0], config.out_channels, 3, padding=1)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without a compiled forward (speed/model.py), which is the original's."""
        return {name: value for name, value in vars(self).items() if name != "forward"}

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | float,
        context: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
        features: Sequence[Tensor | None] | None = None,
        beside: Sequence[EachBeside | None] | None = None,
    ) -> Tensor:
        emb = self.embed(timestep, x, vector, guidance)
        added = iter(features or [None] * (len(self.down) + 2))
        more = iter(beside or [None] * (len(self.down) + 1 + len(self.up)))
        skips = [x := plus(self.conv_in(x), next(added))]
        for block in self.down:
            skips.append(x := plus(block(x, emb, context, next(more)), next(added)))
        x = plus(self.mid(x, emb, context, next(more)), next(added))
        if residuals is not None:
            *skips, x = (plus(*pair) for pair in zip([*skips, x], residuals, strict=True))
        for block in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if block.resample is not None else None
            x = block(x, emb, context, next(more), size)
        return self.conv_out(F.silu(self.norm_out(x)))
