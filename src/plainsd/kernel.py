"""The attention kernel in attention.cpp: compiled with the machine's own C++ compiler when first asked for, some two seconds,
and kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache, in plainsd/) for later processes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
FEW = 2**24                     # multiplications of a picture's product below which PyTorch's kernel, which starts sooner, is faster


class Unavailable(Exception):
    """Why there is no kernel on this machine."""


def suits(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in this precision as the kernel does. (Where it has AMX, PyTorch's own is faster.)"""
    if torch.cpu._is_amx_tile_supported():
        return False
    return {torch.float32: torch.cpu._is_avx512_supported, torch.bfloat16: torch.cpu._is_avx512_bf16_supported}.get(
        dtype, lambda: False)()


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q (B, heads, N, d), k and v (B, heads, M, d), float32 or bfloat16 -> (B, heads, N, d).

    Where that is little work, or is_causal, PyTorch's own. Errors: Unavailable.
    """
    _, heads, n, d = q.shape
    if is_causal or heads * n * k.shape[2] * d < FEW or (d % 2 and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return _attention(q, k, v)


@torch.library.custom_op("plainsd::attention", mutates_args=())       # so that torch.compile takes it as it is
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (batch, heads, n, d), m, out = q.shape, k.shape[2], _empty(q)
    tensors = [t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v)] + [out]
    strides = (ctypes.c_long * 12)(*(stride for t in tensors for stride in t.stride()[:3]))
    done = library()(8 * q.element_size(), *(t.data_ptr() for t in tensors), strides, batch, heads, n, m, d, d**-0.5,
                     torch.get_num_threads())
    if done != 0:
        raise Unavailable(f"attention.cpp was compiled without {q.dtype}")
    return out


@_attention.register_fake
def _empty(q: Tensor, *_: Tensor) -> Tensor:
    """As the linear layer after it reads it: the heads of a position lie together."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@functools.cache
def library() -> Callable[..., int]:
    """`attend` of attention.cpp. Errors: Unavailable, with the compiler's first complaint."""
    source = files("plainsd").joinpath("attention.cpp").read_bytes()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise Unavailable(f"no C++ compiler ({os.environ.get('CXX', 'c++')}) is installed")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainsd"
    path = folder / f"attention-{_key(source, compiler)}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, path)
        attend = ctypes.CDLL(str(path)).attend
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{path}: {error}") from None
    number, place = ctypes.c_long, ctypes.c_void_p
    attend.argtypes = [ctypes.c_int, *4 * [place], place, *5 * [number], ctypes.c_double, number]
    return attend


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
        (Path(place) / "attention.cpp").write_bytes(source)
        command = [compiler, *FLAGS, str(Path(place) / "attention.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            raise RuntimeError(f"{compiler}: {complaint}")
        os.replace(made, path)
