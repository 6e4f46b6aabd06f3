"""The device and dtype of a model."""

from __future__ import annotations

import torch
from torch.utils._triton import has_triton

from plainsd.errors import UserError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device) -> torch.device:
    """auto: the accelerator if there is one, else the CPU. UserError for a device that this machine lacks."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if str(device) == "auto":
        return found or torch.device("cpu")
    names = ["cpu", *([found.type] if found else [])]
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {str(device)!r}; choose auto or {' or '.join(names)}") from error
    if chosen.type not in names:
        raise UserError(
            f"device {str(device)!r} is not there: this PyTorch ({torch.__version__}) was built without it, or finds "
            f"none; choose auto or {' or '.join(names)}"
        )
    count = 1 if chosen.type == "cpu" else torch.accelerator.device_count()
    if (chosen.index or 0) >= count:
        last = f"{chosen.type}:{count - 1}"
        raise UserError(f"device {str(device)!r} is not there; the last one of this machine is {last}")
    return chosen


def own_gpu(local: int) -> torch.device:
    """The GPU of one of this machine's processes, by its number. UserError if there are too few."""
    if local >= (count := torch.cuda.device_count()):
        raise UserError(
            f"{local + 1} or more processes on a machine with {count} GPUs; start torchrun with one process per GPU"
        )
    return torch.device("cuda", local)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the processor or GPU is faster in it than in float32, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, ["auto", *DTYPES])
        return DTYPES[dtype]
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device.type == "cpu" and bfloat16_pays()
    return torch.bfloat16 if faster else torch.float32


def bfloat16_pays() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32.

    AMD's does by AVX512_BF16, Intel's by AMX alone: its VDPBF16PS makes two products a lane, and starts once in two
    cycles, where it starts two float32 operations a cycle. A virtual machine often hides AMX and shows AVX512_BF16.
    """
    found = torch.cpu.get_capabilities()
    by_vectors = found.get("avx512_bf16") and not made_by_intel()
    return bool(found.get("amx_bf16") or by_vectors or found.get("bf16"))  # the last one is ARM's


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there to lay out weights of this dtype for this processor (speed/packed.py); bfloat16 needs
    AVX-512 or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def made_by_intel() -> bool:
    return "Intel" in str(torch.cpu.get_capabilities().get("cpu_name", ""))


def check_can_compile(device: torch.device, what: str) -> None:
    """UserError where torch.compile would fail: for a CPU it writes C++, for a GPU Triton's language."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                f"{what} needs a C++ compiler ($CXX, or g++), and none works here; install one, or leave it out"
            ) from None
    elif device.type == "cuda" and not has_triton():
        raise UserError(f"{what} needs Triton, which is not installed; pip install triton, or leave it out")
