"""The kernels in kernels.cpp, for inference: attention, small linear layers, GroupNorm with SiLU.

They are compiled with the machine's own C++ compiler when first asked for, some three seconds, and kept in the user's cache
folder (XDG_CACHE_HOME or ~/.cache, in plainsd/) for later processes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
ENOUGH = {torch.float32: 2**24, torch.bfloat16: 2**18}   # multiplications of q k^T from which on it beats PyTorch's
BITS = {torch.float32: 32, torch.bfloat16: 16}
AFTER = {"none": 0, "gelu": 1, "times": 2, "plus": 3}


class Unavailable(Exception):
    """Why there are no kernels on this machine."""


def suit(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in this precision as the kernels do."""
    return {torch.float32: torch.cpu._is_avx512_supported, torch.bfloat16: torch.cpu._is_avx512_bf16_supported}.get(
        dtype, lambda: False)()


# ---- attention


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q (B, heads, N, d), k and v (B, heads, M, d), float32 or bfloat16 -> (B, heads, N, d).

    PyTorch's own where that is little work, where is_causal, where gradients are asked for, or where d is odd in bfloat16.
    """
    (_, heads, n, d), m = q.shape, k.shape[2]
    little = heads * n * m * d < ENOUGH[q.dtype]
    if little or is_causal or q.requires_grad or k.requires_grad or (d % 2 and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return (_compiled_attention if torch.compiler.is_compiling() else _attention)(q, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (batch, heads, n, d), m, out = q.shape, k.shape[2], _empty(q)
    tensors = [t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v)] + [out]
    strides = (ctypes.c_long * 12)(*(stride for t in tensors for stride in t.stride()[:3]))
    library().attend(BITS[q.dtype], *(t.data_ptr() for t in tensors), strides, batch, heads, n, m, d, d**-0.5,
                     torch.get_num_threads())
    return out


def _empty(q: Tensor, *_: Tensor) -> Tensor:
    """As the linear layer after it reads it: the heads of a position lie together."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


_compiled_attention = torch.library.custom_op("plainsd::attention", _attention, mutates_args=(),
                                              schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
_compiled_attention.register_fake(_empty)


# ---- linear layers


def pack(weight: Tensor) -> Tensor:
    """A weight (n, k) as `linear` reads it; k even in bfloat16."""
    (n, k), weight = weight.shape, weight.contiguous()
    packed = torch.zeros(k * BITS[weight.dtype] // 32, -(-n // 16) * 16, dtype=torch.int32)
    library().pack(BITS[weight.dtype], weight.data_ptr(), packed.data_ptr(), k, n)
    return packed


def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, after: str = "none", other: Tensor | None = None) -> Tensor:
    """x W^T + bias, then its GELU, or `times` or `plus` another tensor. x (..., k), other (..., n) -> (..., n)."""
    x, k = x.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], n)
    if other is not None:
        other = other.contiguous()
    library().linear(BITS[x.dtype], x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(),
                     None if other is None else other.data_ptr(), out.data_ptr(), x.numel() // k, k, n, AFTER[after],
                     torch.get_num_threads())
    return out


# ---- GroupNorm and SiLU


def norm_silu(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, over: bool = False) -> Tensor:
    """silu(norm(x + shift)). x (B, C, H, W), shift (B, C) -> (B, C, H, W), channels last. `over`: x may be written over."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = x if over else torch.empty_like(x)
    if shift is not None:
        shift = shift.contiguous()
    library().norm_silu(BITS[x.dtype], x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(),
                        None if shift is None else shift.data_ptr(), out.data_ptr(), len(x), x.shape[2] * x.shape[3], x.shape[1],
                        norm.num_groups, norm.eps, torch.get_num_threads())
    return out


# ---- compiling


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, ready to be called. Errors: Unavailable, with the compiler's first complaint."""
    source = files("plainsd").joinpath("kernels.cpp").read_bytes()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise Unavailable(f"no C++ compiler ({os.environ.get('CXX', 'c++')}) is installed")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainsd"
    path = folder / f"kernels-{_key(source, compiler)}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, path)
        made = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{path}: {error}") from None
    kind, number, place, real = ctypes.c_int, ctypes.c_long, ctypes.c_void_p, ctypes.c_double
    for name, arguments in {
        "attend": [kind, *5 * [place], *5 * [number], real, number],
        "pack": [kind, *2 * [place], *2 * [number]],
        "linear": [kind, *5 * [place], *3 * [number], kind, number],
        "norm_silu": [kind, *5 * [place], *4 * [number], real, number],
    }.items():
        getattr(made, name).argtypes, getattr(made, name).restype = arguments, None
    return made


def _key(source: bytes, compiler: str) -> str:
    """Of all that the compiled file depends on. A home folder may be shared by machines with other processors."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu = torch.backends.cpu.get_cpu_capability()
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    return hashlib.sha256(b"\0".join([source, version, cpu.encode(), *map(str.encode, FLAGS)])).hexdigest()[:16]


def _compile(compiler: str, source: bytes, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as place:             # so that `path` is whole or absent
        made = Path(place) / "made.so"
        (Path(place) / "kernels.cpp").write_bytes(source)
        command = [compiler, *FLAGS, str(Path(place) / "kernels.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            raise RuntimeError(f"{compiler}: {complaint}")
        os.replace(made, path)
