"""Training made faster: bfloat16 arithmetic, attention written out, and kernels with gradients of our own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from plainsd.models.layers import Attention, ResBlock
from plainsd.models.unet import FeedForward
from plainsd.speed import kernels
from plainsd.speed.kernels import have_kernels


def autocast(device: str, bf16: bool, *, long_attention: bool = False) -> ExitStack:
    """bf16 arithmetic where asked for. On a CPU attention is written out: the flash kernel's backward pass is slower,
    and is worth it only where attention maps of N x N positions would fill the memory."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=bf16))
    if device == "cpu" and not long_attention:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(WrittenOut())
    return stack


class WrittenOut(TorchFunctionMode):
    """Attention without a causal mask as softmax(q k^T / sqrt(d)) v, without the care that PyTorch's own takes for rows
    that are masked as a whole: a UNet's training step of 64 pictures took 0.62 s with it, and 0.81 s without."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v = args
        maps = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)  # (B, heads, N, M)
        return maps.to(v.dtype) @ v


@contextmanager
def trained_faster(network: nn.Module) -> Iterator[None]:
    """Inside, the network's GroupNorms, with the SiLU after them, its GEGLUs and its attention are kernels of our own,
    and so are their gradients: on a CPU with AVX512_BF16. Elsewhere nothing changes."""
    works = next(network.parameters()).device.type == "cpu" and have_kernels(torch.bfloat16)
    changed: list[tuple[nn.Module, str, Callable[..., Tensor]]] = []  # of which object, which name, what instead
    for module in network.modules() if works else []:
        if isinstance(module, ResBlock):
            changed.append((module, "activate", kernels.trained_norm_silu))
        elif isinstance(module, FeedForward):
            changed.append((module, "activate", kernels.trained_geglu))
        elif isinstance(module, Attention) and not kernels.amx():
            changed.append((module, "attend", kernels.trained_attention))
        elif isinstance(module, nn.GroupNorm):
            changed.append((module, "forward", functools.partial(kernels.trained_norm, module)))
    before = [vars(module).get(name) for module, name, _ in changed]
    for module, name, form in changed:
        setattr(module, name, form)
    try:
        yield
    finally:
        for (module, name, _), old in zip(changed, before, strict=True):
            if old is None:
                delattr(module, name)  # the class's own shows again
            else:
                setattr(module, name, old)
