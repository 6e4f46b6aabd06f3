"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), with moments in float32 or, through torchao, in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plainsd.device import check_can_compile
from plainsd.errors import UserError
from plainsd.train.options import FitOptions


def make_optimizer(parameters: list[nn.Parameter], options: FitOptions) -> torch.optim.Optimizer:
    """No weight decay for norms, biases and DoRA's magnitudes (all one-dimensional).

    PyTorch's fused step reads each tensor once; it does not support sharded weights.
    """
    plain = [p for p in parameters if p.ndim == 0 or p.numel() == max(p.shape)]
    decayed = [p for p in parameters if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]] if options.adam8bit else groups
    numbers = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.adam8bit:
        check_can_compile(parameters[0].device, "--adam8bit")  # its step is one kernel
        return adam8bit()(groups, **numbers)
    return torch.optim.AdamW(groups, **numbers, fused=not any(isinstance(p, DTensor) for p in parameters))


def adam8bit() -> type[torch.optim.Optimizer]:
    """Dettmers et al. 2021 (arXiv:2110.02861): blocks of 256 numbers share a scale. A quarter of the memory."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("8-bit AdamW needs torchao; pip install torchao") from None
    return AdamW8bit


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao would recompile for each float
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
