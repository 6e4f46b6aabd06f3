"""The device and dtype of a model."""

from __future__ import annotations

import torch

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


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto: bfloat16 if the processor or GPU supports it natively, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, ["auto", *DTYPES])
        return DTYPES[dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = device.type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32
