"""The kernels in kernels.cpp: attention and small linear layers, for inference; GroupNorm, SiLU, GEGLU, to train too.

They are compiled with the machine's C++ compiler on first use, in some three seconds, and cached in the user's cache
folder (XDG_CACHE_HOME or ~/.cache, in plainsd/) for later processes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import warnings
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.disk import cache_folder, written_whole
from plainsd.errors import DiskError
from plainsd.models.unet import geglu

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
MIN_TRAINING_SIZE = 2**16  # queries times keys from which attention in training beats PyTorch's
BITS = {torch.float32: 32, torch.bfloat16: 16}
AFTER = {"none": 0, "gelu": 1, "times": 2}


class Unavailable(Exception):
    """Why there are no kernels on this machine."""


# ---- the processor: what it has, and what PyTorch was told to use of it (ATEN_CPU_CAPABILITY)


def suit(dtype: torch.dtype) -> bool:
    """Whether this processor has the kernels' instructions for this dtype."""
    queries = {torch.float32: torch.cpu._is_avx512_supported, torch.bfloat16: torch.cpu._is_avx512_bf16_supported}
    return dtype in queries and torch.backends.cpu.get_cpu_capability() == "AVX512" and queries[dtype]()


def amx() -> bool:
    """Whether PyTorch uses AMX for bfloat16 products; the kernels do not."""
    return suit(torch.bfloat16) and torch.cpu._is_amx_tile_supported()


def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as facts:
            return "GenuineIntel" in facts.read(1000)
    except OSError:
        return False


INTEL = _is_intel()  # PyTorch uses MKL and oneDNN, which are tuned for Intel


@functools.cache
def have_kernels(dtype: torch.dtype) -> bool:
    """Whether kernels.cpp works here. If it cannot be compiled, warns once with the reason."""
    try:
        return suit(dtype) and bool(library())
    except Unavailable as error:
        warnings.warn(f"slower than it could be, without the kernels in kernels.cpp: {error}", stacklevel=2)
        return False


# ---- attention


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q (B, heads, N, d), k and v (B, heads, M, d), float32 or bfloat16
    -> (B, heads, N, d).

    Falls back to PyTorch's where that is faster (`pays`), and for what the kernel does not support: other dtypes and
    devices, odd d in bfloat16, is_causal, gradients.
    """
    (_, heads, n, d), m = q.shape, k.shape[2]
    fits = q.is_cpu and q.dtype in BITS and d * BITS[q.dtype] % 32 == 0 and not is_causal
    if not fits or not pays(q.dtype, heads, n, m, d) or q.requires_grad or k.requires_grad or v.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return (_compiled_attention if torch.compiler.is_compiling() else _attention)(q, k, v)


def pays(dtype: torch.dtype, heads: int, n: int, m: int, d: int) -> bool:
    """Whether the kernel is faster than PyTorch's at this shape, as measured in either dtype.

    On Intel where maps are large and heads narrow: 1.01 to 1.21 times as fast at 4,096 x 4,096 and up to 64 wide, but
    0.64 to 0.83 times at 512 wide, and 0.86 to 1.01 times at 1,024 x 1,024. Elsewhere from so many multiplications of q
    k^T on.
    """
    if INTEL:
        return n * m >= 2**24 and d <= 64
    return heads * n * m * d >= {torch.float32: 2**24, torch.bfloat16: 2**18}[dtype]


def _attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
    (batch, heads, n, d), m, out = q.shape, k.shape[2], _empty(q)
    tensors = [*map(_as_rows, (q, k, v)), out]
    library().attend(
        BITS[q.dtype],
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


def _as_rows(x: Tensor) -> Tensor:
    """With contiguous rows."""
    return x if x.stride(3) == 1 else x.contiguous()


def _stride_array(tensors: list[Tensor]) -> ctypes.Array:
    """Of batch, head and row."""
    return (ctypes.c_long * (3 * len(tensors)))(*(stride for t in tensors for stride in t.stride()[:3]))


def _empty(q: Tensor, *_: Tensor) -> Tensor:
    """An output in the layout of the next linear layer: the heads of a position are contiguous."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


_compiled_attention = torch.library.custom_op(
    "plainsd::attention", _attention, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor"
)
_compiled_attention.register_fake(_empty)


class _Attend(torch.autograd.Function):
    """Attention in bfloat16, with gradients."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, kept = _as_rows(q), _as_rows(k), _as_rows(v), torch.empty(q.shape[:3])
        out = _attention(q, k, v, kept)
        ctx.save_for_backward(q, k, v, out, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, kept = ctx.saved_tensors
        (batch, heads, n, d), gradients = q.shape, [*map(_empty, (q, k, v))]
        tensors = [q, k, v, out, _as_rows(dout.to(q.dtype)), *gradients]
        pointers = (ctypes.c_void_p * 8)(*map(_pointer, tensors))
        library().attend_back(
            pointers,
            _stride_array(tensors),
            _pointer(kept),
            batch,
            heads,
            n,
            k.shape[2],
            d,
            d**-0.5,
            torch.get_num_threads(),
        )
        return tuple(gradients)


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
    x, k = x.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], n)
    if other is not None:
        other = other.contiguous()
    library().linear(
        BITS[x.dtype],
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
    x = x.contiguous()
    out, k = torch.empty_like(x), x.shape[-1]
    library().layer_norm(
        BITS[x.dtype],
        x.data_ptr(),
        norm.weight.data_ptr(),
        norm.bias.data_ptr(),
        out.data_ptr(),
        x.numel() // k,
        k,
        norm.eps,
        torch.get_num_threads(),
    )
    return out


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x), whose weight and bias are float32. (B, C, H, W) -> the same, channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return _norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, False)


def fused_norm_silu(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, over: bool = False) -> Tensor:
    """silu(norm(x + shift)). x (B, C, H, W), shift (B, C) -> (B, C, H, W), channels last. `over`: into x."""
    x = x.contiguous(memory_format=torch.channels_last)
    return _norm(x, norm.weight.float(), norm.bias.float(), norm.num_groups, norm.eps, True, shift, x if over else None)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    out: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    if shift is not None:
        shift = shift.contiguous()
    library().norm_silu(
        BITS[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        _pointer(shift),
        out.data_ptr(),
        _pointer(kept),
        len(x),
        x.shape[2] * x.shape[3],
        x.shape[1],
        groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return out


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Norm(torch.autograd.Function):
    """GroupNorm, or that and SiLU, with gradients; weight and bias are float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        kept = torch.empty(2, len(x), x.shape[1])  # means and 1 / standard deviations
        ctx.how = groups, silu
        ctx.save_for_backward(x, weight, bias, kept)
        return _norm(x, weight, bias, groups, eps, silu, kept=kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kept = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        pointers = (tensor.data_ptr() for tensor in (x, dy, weight, bias, kept, dx, dweight, dbias))
        library().norm_silu_back(
            BITS[x.dtype], *pointers, len(x), x.shape[2] * x.shape[3], x.shape[1], *ctx.how, torch.get_num_threads()
        )
        return dx, dweight, dbias, None, None, None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _Geglu.run(x, None, x.new_empty(*x.shape[:-1], x.shape[-1] // 2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Geglu.run(x, dy.to(x.dtype).contiguous(), torch.empty_like(x))

    @staticmethod
    def run(x: Tensor, dy: Tensor | None, out: Tensor) -> Tensor:
        d = x.shape[-1] // 2
        library().geglu(
            BITS[x.dtype], x.data_ptr(), _pointer(dy), out.data_ptr(), x.numel() // (2 * d), d, torch.get_num_threads()
        )
        return out


# For training. On other devices and for other dtypes than float32 and bfloat16 they fall back to PyTorch's.


def trained_norm(norm: nn.GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
    """norm(x), or silu(norm(x)). (B, C, H, W) -> the same, channels last."""
    if x.dtype not in BITS or not x.is_cpu:
        x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(x) if silu else x
    x = x.contiguous(memory_format=torch.channels_last)
    return _Norm.apply(x, norm.weight.float(), norm.bias.float(), norm.num_groups, norm.eps, silu)


def trained_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; see `attention`."""
    fits = q.is_cpu and q.dtype == torch.bfloat16 and q.shape[3] % 2 == 0 and not is_causal
    if not fits or q.shape[2] * k.shape[2] < MIN_TRAINING_SIZE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return _Attend.apply(q, k, v)


trained_norm_silu = functools.partial(trained_norm, silu=True)


def trained_geglu(x: Tensor) -> Tensor:
    """value * GELU(gate) of values and gates side by side: (..., 2 D) -> (..., D)."""
    return _Geglu.apply(x.contiguous()) if x.dtype in BITS and x.is_cpu else geglu(x)


# ---- compiling


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, compiled and loaded. Errors: Unavailable, with the compiler's first error."""
    source = files("plainsd.speed").joinpath("kernels.cpp").read_bytes()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise Unavailable(f"no C++ compiler ({os.environ.get('CXX', 'c++')}) is installed")
    try:
        path = cache_folder() / f"kernels-{_build_key(source, compiler)}.so"
        if not path.exists():
            _compile(compiler, source, path)
        made = ctypes.CDLL(str(path))
    except (OSError, DiskError, RuntimeError) as error:
        raise Unavailable(str(error)) from None
    if suit(torch.bfloat16) and not made.knows_bfloat16():
        raise Unavailable(f"{compiler} does not know this processor's bfloat16 instructions; a newer one does")
    kind, number, place, real = ctypes.c_int, ctypes.c_long, ctypes.c_void_p, ctypes.c_double
    for name, arguments in {
        "attend": [kind, *6 * [place], *5 * [number], real, number],
        "attend_back": [*3 * [place], *5 * [number], real, number],
        "pack": [kind, *2 * [place], *2 * [number]],
        "linear": [kind, *5 * [place], *3 * [number], kind, number],
        "layer_norm": [kind, *4 * [place], *2 * [number], real, number],
        "norm_silu": [kind, *6 * [place], *4 * [number], real, kind, number],
        "norm_silu_back": [kind, *8 * [place], *4 * [number], kind, number],
        "geglu": [kind, *3 * [place], *3 * [number]],
    }.items():
        getattr(made, name).argtypes, getattr(made, name).restype = arguments, None
    return made


def _build_key(source: bytes, compiler: str) -> str:
    """A hash of all that the compiled file depends on: machines with other processors may share a home folder."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu = torch.backends.cpu.get_cpu_capability()
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    return hashlib.sha256(b"\0".join([source, version, cpu.encode(), *map(str.encode, FLAGS)])).hexdigest()[:16]


def _compile(compiler: str, source: bytes, path: Path) -> None:
    with written_whole(path) as made:
        done = subprocess.run([compiler, *FLAGS, "-x", "c++", "-", "-o", made], input=source, capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").splitlines()
            complaint = next((line for line in said if "error" in line), f"exit {done.returncode}")
            raise RuntimeError(f"{compiler}: {complaint}")
