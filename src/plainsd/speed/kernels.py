"""The kernels in kernels.cpp: attention and small linear layers, for inference; GroupNorm, SiLU, GEGLU, to train too.

Each is an operator of PyTorch's, torch.ops.plainsd.NAME, which torch.compile and torch.export keep as one node.
building.py compiles them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.device import made_by_intel
from plainsd.disk import first_time
from plainsd.models.unet import geglu
from plainsd.speed.building import Unavailable, compiler_command, is_compiled, library

MIN_TRAINING_SIZE = 2**16  # queries times keys from which attention in training beats PyTorch's
BITS = {torch.float32: 32, torch.bfloat16: 16}
AFTER = {"none": 0, "gelu": 1, "times": 2}


# ---- the processor: what it has, and what PyTorch was told to use of it (ATEN_CPU_CAPABILITY)


def suit(dtype: torch.dtype) -> bool:
    """Whether this processor has the kernels' instructions for this dtype."""
    queries = {torch.float32: torch.cpu._is_avx512_supported, torch.bfloat16: torch.cpu._is_avx512_bf16_supported}
    return dtype in queries and torch.backends.cpu.get_cpu_capability() == "AVX512" and queries[dtype]()


def amx() -> bool:
    """Whether PyTorch uses AMX for bfloat16 products."""
    return suit(torch.bfloat16) and torch.cpu._is_amx_tile_supported()


@functools.cache
def attend_by_amx() -> bool:
    """Whether `attention` uses AMX too, in bfloat16: only if PLAINSD_AMX_ATTENTION=1. Its instructions were tested in
    emulation, and are not yet measured."""
    if os.environ.get("PLAINSD_AMX_ATTENTION") != "1" or not amx() or not have_kernels(torch.bfloat16):
        return False
    return bool(library().knows_amx()) and torch.cpu._init_amx()  # which asks Linux for the registers


INTEL = made_by_intel()  # PyTorch uses MKL and oneDNN, which are tuned for Intel


@functools.cache
def have_kernels(dtype: torch.dtype) -> bool:
    """Whether kernels.cpp works here. If it cannot be compiled, warns with the reason, once on a machine."""
    try:
        if not suit(dtype):
            return False
        if dtype == torch.bfloat16 and not library().knows_bfloat16():
            raise Unavailable(
                f"{' '.join(compiler_command())} does not know this processor's bfloat16 instructions; a newer one does"
            )
        return bool(library())
    except Unavailable as error:
        message = f"slower than it could be, without the kernels in kernels.cpp: {error} (not repeated on this machine)"
        if first_time(message):
            warnings.warn(message, stacklevel=2)
        return False


def to_be_compiled(dtype: torch.dtype) -> bool:
    """Whether `have_kernels` will compile kernels.cpp first, which takes seconds."""
    try:
        return suit(dtype) and not is_compiled()
    except Unavailable:
        return False


# ---- operators


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function that runs a kernel an operator of PyTorch's, plainsd::NAME. `fake` makes outputs of the same
    shapes, strides and dtypes, unfilled, from inputs without numbers.

    A call goes through PyTorch's dispatcher only where it is traced (torch.compile, torch.export, fake tensors): there
    the operator is one node of the graph. That takes longer than a small kernel does, so other calls skip it.
    """

    def registered(run: Callable[..., Any]) -> Callable[..., Any]:
        name = f"plainsd::{run.__name__.strip('_')}"
        traced = torch.library.custom_op(name, run, mutates_args=(), device_types="cpu", schema=schema)
        traced.register_fake(fake)

        @functools.wraps(run)
        def call(*arguments: Any) -> Any:
            if is_traced(arguments[0]):
                return traced(*arguments)
            check_no_gradients(*arguments)
            return run(*arguments)

        return call

    return registered


def is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter)


def check_no_gradients(*arguments: Any) -> None:
    """RuntimeError where a gradient is asked for: a kernel would give none, without a word."""
    if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments):
        raise RuntimeError("a packed model has no gradients; call plainsd.speed.plain_again first")


# What a kernel reads is checked, in shape, precision and place: it would read what lies beside.


def bits_of(x: Tensor) -> int:
    """Of its numbers. RuntimeError for those that no kernel reads."""
    if (bits := BITS.get(x.dtype)) is None or not x.is_cpu:
        raise RuntimeError(f"the kernels do not work in {x.dtype} on {x.device.type}")
    return bits


def operand(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor, contiguous. RuntimeError if it has another dtype or shape, or is not on a CPU."""
    if x.dtype != dtype or x.shape != shape or not x.is_cpu:
        raise RuntimeError(
            f"the kernel needs {shape} in {dtype}, and has {tuple(x.shape)} in {x.dtype} on {x.device.type}"
        )
    return x.contiguous()


# ---- attention


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q (B, heads, N, d), k and v (B, heads, M, d), float32 or bfloat16
    -> (B, heads, N, d).

    Falls back to PyTorch's where that is faster (`pays`), and for what the kernel does not support: other dtypes and
    devices, tensors that do not `belong` together, odd d in bfloat16, is_causal, gradients.
    """
    (_, heads, n, d), m = q.shape, k.shape[2]
    fits = q.is_cpu and q.dtype in BITS and d * BITS[q.dtype] % 32 == 0 and not is_causal and belong(q, k, v)
    if not fits or not pays(q.dtype, heads, n, m, d) or q.requires_grad or k.requires_grad or v.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return _attention(q, k, v)


def belong(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are of one dtype and device, and nothing is broadcast."""
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        return False
    return k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])


def pays(dtype: torch.dtype, heads: int, n: int, m: int, d: int) -> bool:
    """Whether the kernel is faster than PyTorch's at this shape, as measured in either dtype.

    On Intel where maps are large and heads narrow: 1.01 to 1.21 times as fast at 4,096 x 4,096 and up to 64 wide, but
    0.64 to 0.83 times at 512 wide, and 0.86 to 1.01 times at 1,024 x 1,024. Elsewhere from so many multiplications of q
    k^T on.
    """
    if dtype == torch.bfloat16 and attend_by_amx():
        return n * m >= 2**20
    if INTEL:
        return n * m >= 2**24 and d <= 64
    return heads * n * m * d >= {torch.float32: 2**24, torch.bfloat16: 2**18}[dtype]


def _empty(q: Tensor, *_: Tensor) -> Tensor:
    """An output in the layout of the next linear layer: the heads of a position are contiguous."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@operator("(Tensor q, Tensor k, Tensor v) -> Tensor", _empty)
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, None)


@operator("(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", lambda q, k, v: (_empty(q), _per_query(q)))
def _attention_kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and for its gradients log2 of each query's sum of exponentials: (B, heads, N)."""
    kept = _per_query(q)
    return _attend(q, k, v, kept), kept


def _per_query(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None) -> Tensor:
    (batch, heads, n, d), m, out = q.shape, k.shape[2], _empty(q)
    tensors = [*map(_as_rows, (q, k, v)), out]
    library().attend(
        bits_of(q),
        attend_by_amx(),
        *map(_pointer, tensors),
        _pointer(kept),
        _stride_array(tensors),
        batch,
        heads,
        n,
        m,
        d,
        d**-0.5,
        torch.get_num_threads(),
    )
    return out


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor kept, Tensor dout) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, *_: tuple(map(_empty, (q, k, v))),
)
def _attention_back(q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    (batch, heads, n, d), m = q.shape, k.shape[2]
    gradients = tuple(map(_empty, (q, k, v)))
    tensors = [*map(_as_rows, (q, k, v, out, dout.to(q.dtype))), *gradients]
    pointers = (ctypes.c_void_p * 8)(*map(_pointer, tensors))
    library().attend_back(
        pointers, _stride_array(tensors), kept.data_ptr(), batch, heads, n, m, d, d**-0.5, torch.get_num_threads()
    )
    return gradients


def _as_rows(x: Tensor) -> Tensor:
    """With contiguous rows."""
    return x if x.stride(3) == 1 else x.contiguous()


def _stride_array(tensors: list[Tensor]) -> ctypes.Array:
    """Of batch, head and row."""
    return (ctypes.c_long * (3 * len(tensors)))(*(stride for t in tensors for stride in t.stride()[:3]))


class _Attend(torch.autograd.Function):
    """Attention in bfloat16, with gradients."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, kept = _attention_kept(q, k, v)
        ctx.save_for_backward(q, k, v, out, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:
        return _attention_back(*ctx.saved_tensors, dout)


# ---- linear layers


def packed_weight(weight: Tensor) -> Tensor:
    """A weight (n, k) packed for `linear`; k even in bfloat16."""
    (n, k), weight = weight.shape, weight.contiguous()
    packed = torch.zeros(k * BITS[weight.dtype] // 32, -(-n // 16) * 16, dtype=torch.int32)
    library().pack(BITS[weight.dtype], weight.data_ptr(), packed.data_ptr(), k, n)
    return packed


def linear(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None, after: str = "none", other: Tensor | None = None
) -> Tensor:
    """x W^T + bias, then its GELU, or `times` another tensor. x (..., k), other (..., n) -> (..., n)."""
    return _linear(x, packed, n, bias, after, other)


@operator(
    "(Tensor x, Tensor packed, int n, Tensor? bias, str after, Tensor? other) -> Tensor",
    lambda x, packed, n, bias, after, other: x.new_empty(*x.shape[:-1], n),
)
def _linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, after: str, other: Tensor | None) -> Tensor:
    x, k, (units, room) = x.contiguous(), x.shape[-1], packed.shape
    if units * 32 != k * BITS.get(x.dtype, 0) or room < n:
        raise RuntimeError(f"an input of width {k} in {x.dtype} does not fit the packed weight")
    out = x.new_empty(*x.shape[:-1], n)
    if bias is not None:
        bias = operand(bias, x.dtype, n)
    if other is not None:
        other = operand(other, x.dtype, *out.shape)
    library().linear(
        bits_of(x),
        x.data_ptr(),
        packed.data_ptr(),
        _pointer(bias),
        _pointer(other),
        out.data_ptr(),
        x.numel() // k,
        k,
        n,
        AFTER[after],
        torch.get_num_threads(),
    )
    return out


# ---- LayerNorm, GroupNorm and SiLU, GEGLU


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x), whose weight and bias are float32. (..., k) -> (..., k)."""
    return _layer_norm(x, norm.weight, norm.bias, norm.eps)


@operator("(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", lambda x, *_: _filled(x))
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out, k = _filled(x), x.shape[-1]
    weight, bias = operand(weight, torch.float32, k), operand(bias, torch.float32, k)
    library().layer_norm(
        bits_of(x),
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        x.numel() // k,
        k,
        eps,
        torch.get_num_threads(),
    )
    return out


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x), whose weight and bias are float32. (B, C, H, W) -> the same, channels last."""
    return _norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, False, None)


def fused_norm_silu(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, over: bool = False) -> Tensor:
    """silu(norm(x + shift)). x (B, C, H, W), shift (B, C) -> (B, C, H, W), channels last. `over`: into x, if it is
    channels last."""
    weight, bias = norm.weight.float(), norm.bias.float()
    if over and not is_traced(x):
        check_no_gradients(x, weight, bias, shift)
        x = _channels_last(x)
        return _norm(x, weight, bias, norm.num_groups, norm.eps, True, shift, x)
    return _norm_silu(x, weight, bias, norm.num_groups, norm.eps, True, shift)


@operator(
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, Tensor? shift) -> Tensor",
    lambda x, *_: _map(x),
)
def _norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    x = _channels_last(x)
    return _norm(x, weight, bias, groups, eps, silu, shift, _map(x))


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    out: Tensor,
    kept: Tensor | None = None,
) -> Tensor:
    batch, channels, height, width = x.shape
    weight, bias = operand(weight, torch.float32, channels), operand(bias, torch.float32, channels)
    if shift is not None:
        shift = operand(shift, x.dtype, batch, channels)
    library().norm_silu(
        bits_of(x),
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        _pointer(shift),
        out.data_ptr(),
        _pointer(kept),
        batch,
        height * width,
        channels,
        groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return out


def _filled(x: Tensor) -> Tensor:
    """For an output of x's shape, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _map(x: Tensor) -> Tensor:
    """Likewise, channels last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@operator(
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor)",
    lambda x, *_: (_map(x), _norm_moments(x)),
)
def _norm_silu_kept(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """And for its gradients means and 1 / standard deviations: (2, B, C)."""
    x = _channels_last(x)
    out, kept = _map(x), _norm_moments(x)
    return _norm(x, weight, bias, groups, eps, silu, None, out, kept), kept


def _norm_moments(x: Tensor) -> Tensor:
    return x.new_empty(2, *x.shape[:2], dtype=torch.float32)


@operator(
    "(Tensor x, Tensor dy, Tensor weight, Tensor bias, Tensor kept, int groups, bool silu) -> (Tensor, Tensor, Tensor)",
    lambda x, dy, weight, bias, *_: (_map(x), _filled(weight), _filled(bias)),
)
def _norm_silu_back(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = _channels_last(x), _channels_last(dy.to(x.dtype))
    weight, bias = (operand(part, torch.float32, x.shape[1]) for part in (weight, bias))
    dx, dweight, dbias = _map(x), _filled(weight), _filled(bias)
    pointers = (tensor.data_ptr() for tensor in (x, dy, weight, bias, kept, dx, dweight, dbias))
    library().norm_silu_back(
        bits_of(x), *pointers, len(x), x.shape[2] * x.shape[3], x.shape[1], groups, silu, torch.get_num_threads()
    )
    return dx, dweight, dbias


class _Norm(torch.autograd.Function):
    """GroupNorm, or that and SiLU, with gradients; weight and bias are float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        out, kept = _norm_silu_kept(x, weight, bias, groups, eps, silu)
        ctx.groups, ctx.silu = groups, silu
        ctx.save_for_backward(x, weight, bias, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kept = ctx.saved_tensors
        return *_norm_silu_back(x, dy, weight, bias, kept, ctx.groups, ctx.silu), None, None, None


@operator("(Tensor x) -> Tensor", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
def _geglu(x: Tensor) -> Tensor:
    return _gated(x.contiguous(), None, x.new_empty(*x.shape[:-1], x.shape[-1] // 2))


@operator("(Tensor x, Tensor dy) -> Tensor", lambda x, dy: _filled(x))
def _geglu_back(x: Tensor, dy: Tensor) -> Tensor:
    return _gated(x.contiguous(), dy.to(x.dtype).contiguous(), _filled(x))


def _gated(x: Tensor, dy: Tensor | None, out: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    library().geglu(
        bits_of(x), x.data_ptr(), _pointer(dy), out.data_ptr(), x.numel() // (2 * d), d, torch.get_num_threads()
    )
    return out


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _geglu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return _geglu_back(*ctx.saved_tensors, dy)


# For training. On other devices and for other dtypes than float32 and bfloat16 they fall back to PyTorch's.


def trained_norm(norm: nn.GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
    """norm(x), or silu(norm(x)). (B, C, H, W) -> the same, channels last."""
    if x.dtype not in BITS or not x.is_cpu:
        x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(x) if silu else x
    return _Norm.apply(x, norm.weight.float(), norm.bias.float(), norm.num_groups, norm.eps, silu)


def trained_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; see `attention`."""
    fits = q.is_cpu and q.dtype == torch.bfloat16 and q.shape[3] % 2 == 0 and not is_causal and belong(q, k, v)
    if not fits or q.shape[2] * k.shape[2] < MIN_TRAINING_SIZE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return _Attend.apply(q, k, v)


trained_norm_silu = functools.partial(trained_norm, silu=True)


def trained_geglu(x: Tensor) -> Tensor:
    """value * GELU(gate) of values and gates side by side: (..., 2 D) -> (..., D)."""
    return _Geglu.apply(x) if x.dtype in BITS and x.is_cpu and x.shape[-1] % 2 == 0 else geglu(x)
