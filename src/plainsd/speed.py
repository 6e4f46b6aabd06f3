"""Speed: functions that make a loaded model faster, and its pictures the same but for rounding.

    pack               weights laid out once as the processor's matrix units read them, and not anew at each call;
                       GEGLU's gate and product inside the two projections that they follow; queries, keys and
                       values in one call, and those of a text that stays the same only once; a doubled map and
                       the 3x3 convolution after it as four 2x2 convolutions before it                (CPU)
                       GroupNorm and SiLU in one; small linear layers without oneDNN's start          (CPU with AVX-512)
    attend_faster      attention in pieces that stay in the cache                                     (CPU without AMX)
    trained_faster     GroupNorm and SiLU, and GEGLU, in one while training                          (CPU with AVX-512)
    compile_unet       fused kernels by torch.compile; minutes the first time                        (CPU, GPU)

`faster` applies what pays on the model's own device. All of them work in place and are meant to come last: a packed
model can no longer be trained or saved, or take up adapters. The plain forward passes stay as they are.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plainsd import kernels
from plainsd.errors import UserError
from plainsd.models.layers import Attention, ResBlock, Upsample, norm_silu
from plainsd.models.unet import FeedForward, geglu

if TYPE_CHECKING:
    from plainsd.generate import StableDiffusion

PIECE = 512                           # queries whose attention maps are in memory at once
LONG = 1024                           # queries from which on that pays
SMALL, SHORT = 2**18, 2**23           # numbers in a weight, and multiplications with it, up to which our kernel beats oneDNN's
DTYPES = (torch.float32, torch.bfloat16)


def faster(sd: StableDiffusion, *, compiled: bool = False) -> StableDiffusion:
    """The same model, in place, with what pays on its device. `compiled`: torch.compile too."""
    if sd.refiner is not None:
        faster(sd.refiner, compiled=compiled)
    for network in networks(sd):
        network.to(memory_format=torch.channels_last)
    if sd.device.type == "cpu":
        attend_faster(sd)
        if sd.dtype in DTYPES and torch.backends.mkldnn.is_available():
            pack(sd, unet=not compiled)
    if compiled:
        compile_unet(sd)
    return sd


def networks(sd: StableDiffusion) -> list[nn.Module]:
    return [*sd.text_encoders, sd.unet, sd.vae]


# ---- packed weights


def pack(sd: StableDiffusion, *, unet: bool = True) -> None:
    """Puts packed layers in place of every plain Linear, Conv2d and FeedForward, and of the UNet's attention. What carries
    a LoRA stays.

    `unet`: the UNet too; torch.compile packs for itself.
    """
    if sd.device.type != "cpu" or sd.dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        raise UserError(f"weights can be packed on a CPU, in float32 or bfloat16, by a PyTorch with oneDNN; "
                        f"this model is {sd.dtype} on {sd.device}")
    with torch.no_grad():
        for network in networks(sd):
            if unet or network is not sd.unet:
                _pack_inside(network)


def _pack_inside(module: nn.Module) -> None:
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
            setattr(module, name, PackedConv(child))
        else:
            _pack_inside(child)


@functools.cache
def have_kernels(dtype: torch.dtype) -> bool:
    """Whether kernels.cpp works here. If it cannot be compiled, a warning says why, once."""
    try:
        return kernels.suit(dtype) and bool(kernels.library())
    except kernels.Unavailable as error:
        warnings.warn(f"slower than it could be, without the kernels in kernels.cpp: {error}", stacklevel=2)
        return False


class PackedLinear(nn.Module):
    """A Linear whose weight is laid out as the one that multiplies wants it: oneDNN, or for little work our own kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.n, k = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        small = weight.numel() <= SMALL and k % 2 == 0 and have_kernels(weight.dtype)
        self.small = kernels.pack(weight.detach()) if small else None

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
        """The output times another tensor, likewise."""
        if self.short(x):
            return kernels.linear(x, self.small, self.n, self.bias, "times", other)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")

    def short(self, x: Tensor) -> bool:
        return self.small is not None and x.numel() * self.n <= SHORT


class PackedConv(nn.Module):
    """A Conv2d likewise, over channels-last maps. The best layout depends on the map's size: another size lays out anew."""

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


class PackedResBlock(nn.Module):
    """A ResBlock whose normalisations, shift and SiLUs are one pass each."""

    def __init__(self, plain: ResBlock):
        super().__init__()
        for name, child in plain.named_children():
            setattr(self, name, child)
        self.emb = plain.emb

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(kernels.norm_silu(self.norm1, x))
        shift = None if self.emb is None else self.emb(nn.functional.silu(emb))
        h = self.conv2(kernels.norm_silu(self.norm2, h, shift, over=True))
        return h.add_(self.skip(x))


class PackedUpsample(nn.Module):
    """Doubling and the 3x3 convolution after it, in 16 multiplications a pixel and channel instead of 36.

    In the doubled map, the three rows that an even row reads are two of the small map: one of the three weights meets the
    row above, two meet its own. So even rows are a convolution of the small map with two rows of weights, whose second is
    the sum of two; odd rows likewise; and columns. One convolution for each of the four kinds of pixel then does. (Shi et
    al. 2016, arXiv:1609.05158, have such a convolution learned.)
    """

    def __init__(self, plain: Upsample):
        super().__init__()
        self.whole, weight = PackedConv(plain.conv), plain.conv.weight
        self.kinds = nn.ModuleDict()
        for row, column in KINDS:
            conv = nn.utils.skip_init(nn.Conv2d, *weight.shape[1::-1], 2, padding=1, dtype=weight.dtype).requires_grad_(False)
            conv.weight.copy_(_merged(_merged(weight.float(), 2, row), 3, column))
            conv.bias.copy_(plain.conv.bias)
            self.kinds[f"{row}{column}"] = PackedConv(conv)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):          # an odd side: not quite doubled
            return self.whole(nn.functional.interpolate(x, size=size, mode="nearest"))
        out = x.new_empty(len(x), 2 * height, 2 * width, len(self.whole.bias)).permute(0, 3, 1, 2)
        for row, column in KINDS:
            made = self.kinds[f"{row}{column}"](x)                               # (B, C, H + 1, W + 1), padded all around
            out[:, :, row::2, column::2] = made[:, :, row : row + height, column : column + width]
        return out


KINDS = ((0, 0), (0, 1), (1, 0), (1, 1))          # even and odd rows and columns


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
    """Layers with the same input as one, whose output is theirs side by side."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return PackedLinear(torch.cat([layer.weight for layer in layers]), bias)


class PackedSelfAttention(nn.Module):
    """The UNet's attention of positions to each other, with its queries, keys and values out of one product."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.heads, self.attend = plain.heads, plain.attend
        self.qkv, self.out = together(plain.q, plain.k, plain.v), PackedLinear(plain.out.weight, plain.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*split(self.qkv(x), 3, self.heads)).transpose(1, 2).flatten(2))

    def v(self, x: Tensor) -> Tensor:
        return self.qkv(x).chunk(3, dim=-1)[2]


class PackedCrossAttention(nn.Module):
    """The UNet's attention to a text. Its keys and values are made once, and kept for as long as the text is the same tensor."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.heads, self.attend = plain.heads, plain.attend
        self.q, self.out = (PackedLinear(layer.weight, layer.bias) for layer in (plain.q, plain.out))
        self.kv, self.seen, self.kept = together(plain.k, plain.v), None, None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if context is not self.seen:
            self.seen, self.kept = context, [t.contiguous() for t in split(self.kv(context), 2, self.heads)]
        q, = split(self.q(x), 1, self.heads)
        return self.out(self.attend(q, *self.kept).transpose(1, 2).flatten(2))


PACKED = {"self_attn": PackedSelfAttention, "cross_attn": PackedCrossAttention}


def split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * D) -> (B, heads, N, D / heads) for each part."""
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(parts, dim=-1))


# ---- attention


def attentions(sd: StableDiffusion) -> Iterator[nn.Module]:
    kinds = (Attention, PackedSelfAttention, PackedCrossAttention)
    return (module for network in networks(sd) for module in network.modules() if isinstance(module, kinds))


def attend_faster(sd: StableDiffusion) -> None:
    """Puts the fastest form of attention that this processor and this precision have in place of PyTorch's, if it is faster."""
    if torch.cpu._is_amx_tile_supported():
        return
    form = kernels.attention if have_kernels(sd.dtype) else blocked_attention if sd.dtype == torch.bfloat16 else None
    if form is not None:
        for attention in attentions(sd):
            attention.attend = form


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head and PIECE queries at a time. q, k, v (B, heads, N or M, d) -> (B, heads, N, d).

    Where few queries look at few keys, PyTorch's own.
    """
    if is_causal or q.shape[2] < LONG or k.shape[2] < LONG:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    scale, out = q.shape[-1] ** -0.5, torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = (k[b, head] * scale).t(), v[b, head].contiguous()         # (d, M), (M, d)
            for start in range(0, q.shape[2], PIECE):
                piece = q[b, head, start : start + PIECE]
                out[b, head, start : start + PIECE] = torch.softmax(piece @ keys, dim=-1) @ values
    return out


# ---- training


@contextmanager
def trained_faster(network: nn.Module) -> Iterator[None]:
    """Inside, the network's GroupNorms, with the SiLU after them, and its GEGLUs are one pass each, and their gradients one
    or two: on a CPU with AVX-512."""
    works = next(network.parameters()).device.type == "cpu" and have_kernels(torch.bfloat16)
    modules = list(network.modules()) if works else []
    for module in modules:
        if isinstance(module, ResBlock):
            module.activate = kernels.trained_norm_silu
        elif isinstance(module, FeedForward):
            module.activate = kernels.trained_geglu
        elif isinstance(module, nn.GroupNorm):
            module.forward = functools.partial(kernels.trained_norm, module)
    try:
        yield
    finally:
        for module in modules:
            if isinstance(module, ResBlock):
                module.activate = norm_silu
            elif isinstance(module, FeedForward):
                module.activate = geglu
            elif isinstance(module, nn.GroupNorm):
                del module.forward                       # the class's own shows again


# ---- torch.compile


def compile_unet(sd: StableDiffusion) -> None:
    """Compiles the UNet for the shapes that it meets: on a GPU with CUDA graphs, on a CPU with its weights frozen in.

    The first step of each shape takes a minute or two; later processes find most of it in torch's cache.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    options = {"triton.cudagraphs": True} if sd.device.type == "cuda" else {"freezing": True}
    compiled = torch.compile(sd.unet.forward, dynamic=False, options=options)

    def forward(x: Tensor, timestep: Tensor | float, *rest: Tensor | None, **named: Tensor | None) -> Tensor:
        if not isinstance(timestep, Tensor):              # a number would be compiled in, and each step anew
            timestep = x.new_full((), timestep, dtype=torch.float32)
        return compiled(x, timestep, *rest, **named)

    sd.unet.forward = forward
