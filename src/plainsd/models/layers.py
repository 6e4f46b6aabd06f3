"""What the networks share: attention, the timestep embedding, the residual block, resampling.

Shape letters: B batch, C channels, H W height and width, N queries, M keys, D width, E width of the time embedding.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of the timestep at `dim // 2` frequencies from 1 down to nearly 1 / max_period, and a zero
    where dim is odd.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, as Ho et al. 2020 apply it to diffusion time.
    timestep (B,), whole or fractional -> (B, dim) float32. The angles are float32 whatever the network's
    precision, because that is what the public weights were trained with.
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep.float()[:, None] * exponent.exp()
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))


class Beside(NamedTuple):
    """What queries look at beside their context, such as a picture (models/image_prompt.py)."""

    k: Tensor  # (B, M, D)
    v: Tensor  # (B, M, D), times the strength
    where: Tensor | None = None  # (N, 1), how much of it counts at each query; None: all


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(D / heads)) v. Keys and values come from `context`, or from x itself.

    x (B, N, D), context (B, M, context_dim) -> (B, N, D). What is found in each of `beside` is added.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, *, qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.v = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.attend = F.scaled_dot_product_attention  # speed/ and training may replace it

    def forward(
        self, x: Tensor, context: Tensor | None = None, beside: Sequence[Beside] = (), *, causal: bool = False
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, D / heads)
            for t in (self.q(x), self.k(context), self.v(context))
        )
        x = self.attend(q, k, v, is_causal=causal)
        for more in beside:
            x = x + found_beside(more, q, self.attend)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, N, D)


def found_beside(beside: Beside, q: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """What queries find there: (B, heads, N, D / heads) -> the same."""
    k, v = (t.unflatten(-1, (q.shape[1], -1)).transpose(1, 2).contiguous() for t in (beside.k, beside.v))
    found = attend(q, k, v)
    return found if beside.where is None else beside.where * found


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x))


class ResBlock(nn.Module):
    """Residual block of two pre-normalised 3x3 convolutions; the time embedding is added between them.

    x (B, C_in, H, W), emb (B, E) or None -> (B, C_out, H, W). eps: 1e-5 in the UNet, 1e-6 in the VAE.
    """

    def __init__(self, c_in: int, c_out: int, emb_dim: int | None = None, *, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out) if emb_dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.activate = norm_silu  # training may replace it

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.activate(self.norm1, x))
        if self.emb is not None:
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.activate(self.norm2, h))
        return self.skip(x) + h


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2. The VAE pads right and bottom only (`asymmetric`), the UNet all around."""

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling (or to `size`, where an odd side was halved), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
