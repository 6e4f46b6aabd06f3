"""Layers with weights packed for a CPU's matrix units, which replace the plain ones; see model.py.

For inference in float32 and bfloat16, with PyTorch's oneDNN, and kernels.cpp where that works.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plainsd.models.layers import Attention, Beside, ResBlock, Upsample, found_beside
from plainsd.models.unet import FeedForward
from plainsd.speed import kernels
from plainsd.speed.kernels import have_kernels

SMALL, SHORT = 2**18, 2**23  # elements of a weight, and multiplications, up to which our kernel beats oneDNN's


def pack_inside(module: nn.Module) -> None:
    """Replaces the plain layers inside by packed ones, except those with a LoRA."""
    for name, child in module.named_children():
        if type(child) is ResBlock and have_kernels(child.conv1.weight.dtype):
            child = PackedResBlock(child)
            setattr(module, name, child)
        if type(child) is FeedForward and type(child.up) is nn.Linear and type(child.down) is nn.Linear:
            setattr(module, name, PackedFeedForward(child))
        elif type(child) is Upsample and type(child.conv) is nn.Conv2d:
            setattr(module, name, PackedUpsample(child))
        elif name in PACKED and all(type(layer) is nn.Linear for layer in (child.q, child.k, child.v, child.out)):
            setattr(module, name, PACKED[name](child))
        elif type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child.weight, child.bias))
        elif type(child) is nn.Conv2d:
            setattr(module, name, PackedPoint(child) if is_point(child) else PackedConv(child))
        elif type(child) in NORMS and have_kernels(child.weight.dtype):
            setattr(module, name, NORMS[type(child)](child))
        else:
            pack_inside(child)


class PackedLinear(nn.Module):
    """A Linear whose weight is packed for oneDNN, or for small products our kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.n, k = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        small = weight.numel() <= SMALL and k % 2 == 0 and have_kernels(weight.dtype)
        self.small = kernels.packed_weight(weight.detach()) if small else None

    def forward(self, x: Tensor) -> Tensor:
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the output, before it leaves the cache."""
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias, "gelu")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The output times another tensor, fused likewise."""
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias, "times", other)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")

    def short(self, x: Tensor) -> bool:
        return self.small is not None and x.numel() * self.n <= SHORT


class PackedConv(nn.Module):
    """A packed Conv2d on channels-last maps. The best layout depends on the map's size: another size repacks."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        self.how = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.weight, self.size = conv.weight.detach(), None

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self.size != x.shape[2:]:
            plain = self.weight if self.size is None else self.weight.to_dense()
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(plain, *self.how, list(x.shape))
            self.size = x.shape[2:]
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.how, "none", [], "")


def is_point(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class PackedPoint(nn.Module):
    """A 1x1 Conv2d as a Linear over the channels of each position. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.linear = PackedLinear(conv.weight.flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class PackedLayerNorm(nn.LayerNorm):
    """LayerNorm with float32 weight and bias, for the kernel."""

    def __init__(self, plain: nn.LayerNorm):
        super().__init__(plain.normalized_shape, plain.eps)
        self.load_state_dict(plain.state_dict())
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(self, x)


class PackedGroupNorm(nn.GroupNorm):
    """Likewise. Its output is channels last."""

    def __init__(self, plain: nn.GroupNorm):
        super().__init__(plain.num_groups, plain.num_channels, plain.eps)
        self.load_state_dict(plain.state_dict())
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.group_norm(self, x)


NORMS = {nn.LayerNorm: PackedLayerNorm, nn.GroupNorm: PackedGroupNorm}


class PackedResBlock(nn.Module):
    """A ResBlock whose normalisations, shift and SiLUs are one pass each."""

    def __init__(self, plain: ResBlock):
        super().__init__()
        for name, child in plain.named_children():
            setattr(self, name, PackedGroupNorm(child) if name in ("norm1", "norm2") else child)
        self.emb = plain.emb

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(kernels.fused_norm_silu(self.norm1, x))
        shift = None if self.emb is None else self.emb(nn.functional.silu(emb))
        h = self.conv2(kernels.fused_norm_silu(self.norm2, h, shift, over=True))
        return h.add_(self.skip(x))


class PackedUpsample(nn.Module):
    """2x upsampling and the 3x3 convolution after it, in 16 multiplications per input pixel and channel, not 36.

    In the doubled map, the three rows that an even output row reads are two rows of the small map: one weight meets the
    row above, two meet its own. So even rows are a convolution of the small map with two rows of weights, the second
    the sum of two; likewise odd rows, and columns: one 2x2 convolution for each of the four kinds of pixel. (Shi et al.
    2016, arXiv:1609.05158, learn such a convolution.)
    """

    def __init__(self, plain: Upsample):
        super().__init__()
        self.whole, weight = PackedConv(plain.conv), plain.conv.weight
        self.channels = len(weight)
        self.kinds = nn.ModuleDict()
        for row, column in KINDS:
            conv = nn.utils.skip_init(nn.Conv2d, *weight.shape[1::-1], 2, padding=1, dtype=weight.dtype).requires_grad_(
                False
            )
            conv.weight.copy_(_merged(_merged(weight.float(), 2, row), 3, column))
            conv.bias.copy_(plain.conv.bias)
            self.kinds[f"{row}{column}"] = PackedConv(conv)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):  # an odd side: not exactly doubled
            return self.whole(nn.functional.interpolate(x, size=size, mode="nearest"))
        out = x.new_empty(len(x), 2 * height, 2 * width, self.channels).permute(0, 3, 1, 2)
        for row, column in KINDS:
            made = self.kinds[f"{row}{column}"](x)  # (B, C, H + 1, W + 1), padded all around
            out[:, :, row::2, column::2] = made[:, :, row : row + height, column : column + width]
        return out


KINDS = ((0, 0), (0, 1), (1, 0), (1, 1))  # even and odd rows and columns


def _merged(weight: Tensor, dim: int, odd: int) -> Tensor:
    """Three weights as the two that small-map rows meet: (above, own + own) or (own + own, below)."""
    first, second, third = weight.unbind(dim)
    return torch.stack([first + second, third] if odd else [first, second + third], dim)


class PackedFeedForward(nn.Module):
    """GEGLU in three calls: gate = GELU of one half of the projection, value * gate, down."""

    def __init__(self, plain: FeedForward):
        super().__init__()
        (value, gate), biases = plain.up.weight.chunk(2), plain.up.bias.chunk(2)
        self.value, self.gate = PackedLinear(value, biases[0]), PackedLinear(gate, biases[1])
        self.down = PackedLinear(plain.down.weight, plain.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.value.times(x, self.gate.gelu(x)))


def together(*layers: nn.Linear) -> PackedLinear:
    """Layers with the same input fused into one, with their outputs concatenated."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return PackedLinear(torch.cat([layer.weight for layer in layers]), bias)


class PackedSelfAttention(nn.Module):
    """The UNet's self-attention, with queries, keys and values from one product."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.heads, self.attend = plain.heads, plain.attend
        self.qkv, self.out = together(plain.q, plain.k, plain.v), PackedLinear(plain.out.weight, plain.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*split_heads(self.qkv(x), 3, self.heads)).transpose(1, 2).flatten(2))

    def v(self, x: Tensor) -> Tensor:
        return self.qkv(x).chunk(3, dim=-1)[2]


class PackedCrossAttention(nn.Module):
    """The UNet's cross-attention. Keys and values are computed once and kept while the context is the same tensor."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.heads, self.attend = plain.heads, plain.attend
        self.q, self.out = (PackedLinear(layer.weight, layer.bias) for layer in (plain.q, plain.out))
        self.kv = together(plain.k, plain.v)
        self.seen: Tensor | None = None
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor, context: Tensor, beside: Sequence[Beside] = ()) -> Tensor:
        if context is not self.seen:
            self.seen, self.kept = context, [t.contiguous() for t in split_heads(self.kv(context), 2, self.heads)]
        (q,) = split_heads(self.q(x), 1, self.heads)
        x = self.attend(q, *self.kept)
        for more in beside:
            x = x + found_beside(more, q, self.attend)
        return self.out(x.transpose(1, 2).flatten(2))


PACKED = {"self_attn": PackedSelfAttention, "cross_attn": PackedCrossAttention}


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * D) -> (B, heads, N, D / heads) for each part."""
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(parts, dim=-1))
