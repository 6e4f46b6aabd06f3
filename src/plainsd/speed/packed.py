"""Layers with weights packed for a CPU's matrix units, which replace the plain ones; see model.py.

For inference in float32 and bfloat16, with PyTorch's oneDNN, and kernels.cpp where that works. Packing moves numbers,
and changes none: `plain()` of each gives the layer back exactly (models/forms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.forms import OtherForm, in_form, plain_of, refilled
from plainsd.models.layers import Attention, Beside, ResBlock, Upsample, found_beside
from plainsd.models.unet import FeedForward
from plainsd.speed import kernels
from plainsd.speed.kernels import have_kernels

SMALL, SHORT = 2**18, 2**23  # elements of a weight, and multiplications, up to which our kernel beats oneDNN's


def pack_inside(module: nn.Module) -> None:
    """Replaces the plain layers inside by packed ones, except those with a LoRA, with weights in 8 bits, or with hooks,
    which see a plain layer's call."""
    for name, child in module.named_children():
        if hooked(child):
            pack_inside(child)
        elif type(child) is ResBlock and fuses(child):
            setattr(module, name, in_form(PackedResBlock, child))
        elif type(child) is FeedForward and is_linear(child.up) and is_linear(child.down):
            setattr(module, name, in_form(PackedFeedForward, child))
        elif type(child) is Upsample and type(child.conv) is nn.Conv2d:
            setattr(module, name, in_form(PackedUpsample, child))
        elif name in PACKED and type(child) is Attention and all(map(is_linear, child.children())):
            setattr(module, name, in_form(PACKED[name], child))
        elif is_linear(child):
            setattr(module, name, in_form(PackedLinear, child))
        elif type(child) is nn.Conv2d:
            setattr(module, name, in_form(PackedPoint if is_point(child) else PackedConv, child))
        elif type(child) in NORMS and have_kernels(child.weight.dtype):
            setattr(module, name, in_form(NORMS[type(child)], child))
        else:
            pack_inside(child)


def hooked(layer: nn.Module) -> bool:
    """Whether it, or a layer inside, has hooks."""
    return any(one._forward_hooks or one._forward_pre_hooks for one in layer.modules())


def fuses(block: ResBlock) -> bool:
    return type(block.norm1) is type(block.norm2) is nn.GroupNorm and have_kernels(block.norm1.weight.dtype)


def is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def own_bias(layer: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    return None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)


class PackedLinear(OtherForm):
    """A Linear whose weight is packed for oneDNN, or for small products our kernel. A layer that has the kernel's form
    is packed for oneDNN when a larger product comes, if ever: in a small model that is most of packing's time."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        weight = plain.weight.detach()
        self.form, self.bias = (refilled(plain, {}),), own_bias(plain)
        self.n, k = weight.shape
        self.held = (weight, False)  # and whether oneDNN laid it out; together: another thread may use the layer
        small = weight.numel() <= SMALL and k % 2 == 0 and have_kernels(weight.dtype)
        self.small = kernels.packed_weight(weight) if small else None
        if not small:
            self.packed()

    def plain(self) -> nn.Linear:
        weight, laid_out = self.held
        return refilled(self.form[0], {"weight": weight.to_dense() if laid_out else weight, "bias": self.bias})

    def packed(self) -> Tensor:
        """The weight for oneDNN."""
        weight, laid_out = self.held
        if not laid_out:  # a graph cannot ask the tensor
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            self.held = (weight, True)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed(), self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the output, before it leaves the cache."""
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias, "gelu")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed(), self.bias, "gelu", [], "none")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The output times another tensor, fused likewise."""
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias, "times", other)
        if kernels.is_traced(x):  # PyTorch has no fake implementation of the fused one
            return self(x) * other
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed(), self.bias, "mul")

    def short(self, x: Tensor) -> bool:
        kernels.check_no_gradients(x)  # oneDNN's own operators would give none either
        return self.small is not None and x.numel() * self.n <= SHORT


class PackedConv(OtherForm):
    """A packed Conv2d on channels-last maps. The best layout depends on the map's size: another size repacks.

    `padding_mode` may change between calls, as that of the plain one.
    """

    def __init__(self, plain: nn.Conv2d):
        super().__init__()
        self.form, self.bias = (refilled(plain, {}),), own_bias(plain)
        self.padding, self.padding_mode = list(plain.padding), plain.padding_mode
        self.moves = (list(plain.stride), list(plain.dilation), plain.groups)
        # the weight, and height, width and padding of the maps that its layout is for; together, as above
        self.held: tuple[Tensor, tuple[int, ...] | None] = (plain.weight.detach(), None)

    def plain(self) -> nn.Conv2d:
        weight, suits = self.held
        weight = weight if suits is None else weight.to_dense()
        plain = refilled(self.form[0], {"weight": weight, "bias": self.bias})
        plain.padding_mode = self.padding_mode
        return plain

    def forward(self, x: Tensor) -> Tensor:
        kernels.check_no_gradients(x)
        padding = self.padding
        if self.padding_mode != "zeros":
            (rows, columns), padding = self.padding, [0, 0]
            x = F.pad(x, (columns, columns, rows, rows), mode=self.padding_mode)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, suits = self.held
        if suits != (*x.shape[2:], *padding):
            plain = weight if suits is None else weight.to_dense()
            weight = torch.ops.mkldnn._reorder_convolution_weight(plain, padding, *self.moves, list(x.shape))
            self.held = (weight, (*x.shape[2:], *padding))
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, padding, *self.moves, "none", [], "")


def is_point(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class PackedPoint(OtherForm):
    """A 1x1 Conv2d as a Linear over the channels of each position. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, plain: nn.Conv2d):
        super().__init__()
        self.form, self.linear = (refilled(plain, {}),), PackedLinear(linear_of(plain.weight.flatten(1), plain.bias))

    def plain(self) -> nn.Conv2d:
        linear = self.linear.plain()
        return refilled(self.form[0], {"weight": linear.weight[:, :, None, None], "bias": linear.bias})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class PackedNorm(OtherForm):
    """A normalisation with float32 weight and bias, for the kernel."""

    def take(self, plain: nn.LayerNorm | nn.GroupNorm) -> None:
        self.form, self.kind = (refilled(plain, {}),), plain.weight.dtype
        for name, weight in plain.named_parameters():
            setattr(self, name, nn.Parameter(weight.detach().float().clone(), requires_grad=False))

    def plain(self) -> nn.Module:
        return refilled(self.form[0], {name: weight.to(self.kind) for name, weight in self.named_parameters()})


class PackedLayerNorm(PackedNorm, nn.LayerNorm):
    """LayerNorm of rows."""

    def __init__(self, plain: nn.LayerNorm):
        super().__init__(plain.normalized_shape, plain.eps)
        self.take(plain)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(self, x)


class PackedGroupNorm(PackedNorm, nn.GroupNorm):
    """GroupNorm of maps, its output channels last."""

    def __init__(self, plain: nn.GroupNorm):
        super().__init__(plain.num_groups, plain.num_channels, plain.eps)
        self.take(plain)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.group_norm(self, x)


NORMS = {nn.LayerNorm: PackedLayerNorm, nn.GroupNorm: PackedGroupNorm}


class PackedResBlock(OtherForm):
    """A ResBlock whose normalisations, shift and SiLUs are one pass each."""

    def __init__(self, plain: ResBlock):
        super().__init__()
        self.form = (refilled(plain, {}),)
        for name, child in plain.named_children():
            setattr(self, name, PackedGroupNorm(child) if name in ("norm1", "norm2") else child)
        self.emb = plain.emb
        pack_inside(self)

    def plain(self) -> ResBlock:
        return refilled(self.form[0], {}, {name: plain_of(child) for name, child in self.named_children()})

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(kernels.fused_norm_silu(self.norm1, x))
        shift = None if self.emb is None else self.emb(nn.functional.silu(emb))
        h = self.conv2(kernels.fused_norm_silu(self.norm2, h, shift, over=True))
        return h.add_(self.skip(x))


class PackedUpsample(OtherForm):
    """2x upsampling and the 3x3 convolution after it, in 16 multiplications per input pixel and channel, not 36.

    In the doubled map, the three rows that an even output row reads are two rows of the small map: one weight meets the
    row above, two meet its own. So even rows are a convolution of the small map with two rows of weights, the second
    the sum of two; likewise odd rows, and columns: one 2x2 convolution for each of the four kinds of pixel. (Shi et al.
    2016, arXiv:1609.05158, learn such a convolution.)
    """

    def __init__(self, plain: Upsample):
        super().__init__()
        weight, bias = plain.conv.weight.detach(), plain.conv.bias
        self.form, self.whole, self.channels = (refilled(plain, {}),), PackedConv(plain.conv), len(weight)
        self.kinds = nn.ModuleDict()
        for row, column in PARITIES:
            merged = _merged(_merged(weight.float(), 2, row), 3, column).to(weight.dtype)
            conv = refilled(plain.conv, {"weight": merged, "bias": bias})
            conv.kernel_size = (2, 2)
            self.kinds[f"{row}{column}"] = PackedConv(conv)

    def plain(self) -> Upsample:
        return refilled(self.form[0], {}, {"conv": self.whole.plain()})

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):  # an odd side: not exactly doubled
            return self.whole(nn.functional.interpolate(x, size=size, mode="nearest"))
        out = x.new_empty(len(x), 2 * height, 2 * width, self.channels).permute(0, 3, 1, 2)
        for row, column in PARITIES:
            made = self.kinds[f"{row}{column}"](x)  # (B, C, H + 1, W + 1), padded all around
            out[:, :, row::2, column::2] = made[:, :, row : row + height, column : column + width]
        return out


PARITIES = ((0, 0), (0, 1), (1, 0), (1, 1))  # even and odd rows and columns


def _merged(weight: Tensor, dim: int, odd: int) -> Tensor:
    """Three weights as the two that small-map rows meet: (above, own + own) or (own + own, below)."""
    first, second, third = weight.unbind(dim)
    return torch.stack([first + second, third] if odd else [first, second + third], dim)


class PackedFeedForward(OtherForm):
    """GEGLU in three calls: gate = GELU of one half of the projection, value * gate, down."""

    def __init__(self, plain: FeedForward):
        super().__init__()
        self.form, halves = (refilled(plain, {}),), linears(plain.up, 2)
        self.value, self.gate, self.down = (PackedLinear(layer) for layer in (*halves, plain.down))

    def plain(self) -> FeedForward:
        up = together(self.value.plain(), self.gate.plain())
        return refilled(self.form[0], {}, {"up": up, "down": self.down.plain()})

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.value.times(x, self.gate.gelu(x)))


def together(*layers: nn.Linear) -> nn.Linear:
    """Layers with the same input fused into one, with their outputs concatenated."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return linear_of(torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None)


def linears(layer: nn.Linear, parts: int) -> list[nn.Linear]:
    """The inverse of `together`, for parts of equal width."""
    biases = [None] * parts if layer.bias is None else layer.bias.chunk(parts)
    return [linear_of(*pair) for pair in zip(layer.weight.chunk(parts), biases, strict=True)]


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with these weights, without gradients; none are drawn for it."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    (layer.out_features, layer.in_features), layer.weight = weight.shape, nn.Parameter(weight.detach(), False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), False))
    return layer


class PackedSelfAttention(OtherForm):
    """The UNet's self-attention, with queries, keys and values from one product."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.form, self.heads, self.attend = (refilled(plain, {}),), plain.heads, plain.attend
        self.qkv, self.out = PackedLinear(together(plain.q, plain.k, plain.v)), PackedLinear(plain.out)

    def plain(self) -> Attention:
        q, k, v = linears(self.qkv.plain(), 3)
        return attention_of(self.form[0], self.attend, q, k, v, self.out.plain())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*split_heads(self.qkv(x), 3, self.heads)).transpose(1, 2).flatten(2))

    def q(self, x: Tensor) -> Tensor:
        return self.qkv(x).chunk(3, dim=-1)[0]

    def k(self, x: Tensor) -> Tensor:
        return self.qkv(x).chunk(3, dim=-1)[1]

    def v(self, x: Tensor) -> Tensor:
        return self.qkv(x).chunk(3, dim=-1)[2]


class PackedCrossAttention(OtherForm):
    """The UNet's cross-attention. Keys and values are computed once and kept while the context is the same tensor."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.form, self.heads, self.attend = (refilled(plain, {}),), plain.heads, plain.attend
        self.q, self.out = PackedLinear(plain.q), PackedLinear(plain.out)
        self.kv = PackedLinear(together(plain.k, plain.v))
        self.kept: tuple[Tensor | None, list[Tensor]] = (None, [])  # the context seen last, and what was made of it

    def plain(self) -> Attention:
        k, v = linears(self.kv.plain(), 2)
        return attention_of(self.form[0], self.attend, self.q.plain(), k, v, self.out.plain())

    def forward(self, x: Tensor, context: Tensor, beside: Sequence[Beside] = ()) -> Tensor:
        (q,) = split_heads(self.q(x), 1, self.heads)
        x = self.attend(q, *self.keys_and_values(context))
        for more in beside:
            x = x + found_beside(more, q, self.attend)
        return self.out(x.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> list[Tensor]:
        traced = kernels.is_traced(context)  # a graph makes them at each call
        seen, kept = self.kept  # together: another thread may draw with the same layer
        if not traced and context is seen:
            return kept
        made = [t.contiguous() for t in split_heads(self.kv(context), 2, self.heads)]
        if not traced:
            self.kept = (context, made)
        return made

    def k(self, context: Tensor) -> Tensor:
        return self.kv(context).chunk(2, dim=-1)[0]


def attention_of(like: Attention, attend: Callable[..., Tensor], *layers: nn.Linear) -> Attention:
    """An Attention of the layers q, k, v and out."""
    plain = refilled(like, {}, dict(zip(("q", "k", "v", "out"), layers, strict=True)))
    plain.attend = attend
    return plain


PACKED = {"self_attn": PackedSelfAttention, "cross_attn": PackedCrossAttention}


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * D) -> (B, heads, N, D / heads) for each part."""
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(parts, dim=-1))
