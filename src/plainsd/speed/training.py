"""Faster training: bfloat16 autocast, explicit attention, and our own kernels with gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from plainsd.models.layers import Attention, ResBlock
from plainsd.models.unet import FeedForward
from plainsd.speed import kernels
from plainsd.speed.kernels import have_kernels


def autocast(device: str, bf16: bool, *, long_attention: bool = False) -> ExitStack:
    """bf16 autocast if `bf16`. On a CPU attention is explicit, since the flash kernel's backward pass is slower; that
    pays only where N x N attention maps would fill the memory."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=bf16))
    if device == "cpu" and not long_attention:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(WrittenOut())
    return stack


class WrittenOut(TorchFunctionMode):
    """Attention without a mask as plain softmax(q k^T / sqrt(d)) v, without PyTorch's handling of fully masked rows: a
    UNet's training step of 64 pictures took 0.62 s with this, and 0.81 s without. With more than q, k and v it is
    PyTorch's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        bare = len(args) == 3 and kwargs in ({}, {"is_causal": False})
        if func is not F.scaled_dot_product_attention or not bare:
            return func(*args, **kwargs)
        q, k, v = args
        maps = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)  # (B, heads, N, M)
        return maps.to(v.dtype) @ v


def same_attention() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`: PyTorch leaves WrittenOut for the backward pass, where
    blocks are recomputed, and they must be as they were."""
    written_out = any(isinstance(mode, WrittenOut) for mode in _get_current_function_mode_stack())
    return nullcontext(), WrittenOut() if written_out else nullcontext()


@contextmanager
def trained_faster(network: nn.Module) -> Iterator[None]:
    """In this context the network's GroupNorms (with the SiLU after them), GEGLUs and attention, and their gradients,
    use our own kernels: on a CPU with AVX512_BF16. Elsewhere nothing changes."""
    works = next(network.parameters()).device.type == "cpu" and have_kernels(torch.bfloat16)
    changed: list[tuple[nn.Module, str, Callable[..., Tensor]]] = []  # (module, attribute, replacement)
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
                delattr(module, name)  # uncovers the class's own
            else:
                setattr(module, name, old)
