"""Speed: functions that make a loaded model faster, with the same pictures but for rounding.

    pack               weights laid out once as the processor's matrix units read them, and not anew at each call;
                       GEGLU's gate and product inside the two projections that they follow; queries, keys and
                       values in one call, and those of a text that stays the same only once; a doubled map and
                       the 3x3 convolution after it as four 2x2 convolutions before it        (CPU)
                       GroupNorm and SiLU in one; small linear layers without oneDNN's start  (CPU with AVX-512)
    attend_faster      attention in pieces that stay in the cache                             (CPU; bfloat16: if no AMX)
    trained_faster     GroupNorm and SiLU, and GEGLU, in one while training; long attention   (CPU with AVX512_BF16)
    compile_unet       fused kernels by torch.compile; minutes the first time                 (CPU, GPU)

`faster` applies what pays on the model's device. All of them work in place and come last: adapters are added before. A
packed model is saved as ever, and trained after `plain_again`. The plain forward passes stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from plainsd.device import can_pack, check_can_compile
from plainsd.errors import UserError
from plainsd.models import forms
from plainsd.models.layers import Attention
from plainsd.pictures.model import StableDiffusion
from plainsd.speed import kernels
from plainsd.speed.kernels import have_kernels
from plainsd.speed.packed import PackedCrossAttention, PackedSelfAttention, pack_inside

PIECE = 512  # queries whose attention maps are in memory at once
MIN_QUERIES = 1024  # queries from which this pays


def faster(
    sd: StableDiffusion, *, compiled: bool = False, tell: Callable[[str], None] = lambda line: None
) -> StableDiffusion:
    """Speeds the model up in place, with what pays on its device. `compiled`: torch.compile too. `tell` is called with
    a line before anything is compiled: the kernels, once on a machine, and the UNet; and then with the time it took."""
    if compiled:
        check_can_compile(sd.device, "--compile")  # before anything is changed
    if sd.refiner is not None:
        faster(sd.refiner, compiled=compiled, tell=tell)
    with as_loaded(sd):
        for network in networks_of(sd):
            channels_last(network)
        if sd.device.type == "cpu":
            if kernels.to_be_compiled(sd.dtype):
                tell("compiling the kernels for this processor; takes some seconds, the first time only")
            attend_faster(sd)
            if can_pack(sd.dtype):
                pack(sd, unet=not compiled)
    if compiled:
        compile_unet(sd, tell)
    return sd


def as_loaded(sd: StableDiffusion) -> AbstractContextManager[Any]:
    """Inference mode if the weights were made in it, and else not: what is packed in it could not be trained again."""
    return torch.inference_mode(next(sd.unet.parameters()).is_inference())


def networks_of(sd: StableDiffusion) -> list[nn.Module]:
    return [*sd.text_encoders, sd.unet, sd.vae]


def channels_last(network: nn.Module) -> None:
    """Lays out the weights of its plain convolutions so."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


# ---- packed weights


def plain_again(sd: StableDiffusion) -> None:
    """Gives a packed or compiled model its plain layers back, with the same numbers and weights channels last, to train
    it or to give it adapters; then `faster` again."""
    for model in (sd, sd.refiner):
        for network in networks_of(model) if model is not None else []:
            network.__dict__.pop("forward", None)  # a compiled one
            forms.make_plain(network)
            channels_last(network)
            for module in network.modules():
                if isinstance(module, Attention):
                    module.attend = nn.functional.scaled_dot_product_attention


def pack(sd: StableDiffusion, *, unet: bool = True) -> None:
    """Replaces every plain Linear, Conv2d and FeedForward, and the UNet's attention, by packed layers, except those
    with a LoRA.

    `unet`: the UNet too; torch.compile does its own packing.
    """
    if sd.device.type != "cpu" or not can_pack(sd.dtype):
        raise UserError(
            f"cannot pack weights in {sd.dtype} on {sd.device}; "
            f"choose float32 on a CPU, or bfloat16 where the processor has AVX-512, with a PyTorch that has oneDNN"
        )
    with torch.no_grad():
        for network in networks_of(sd):
            if unet or network is not sd.unet:
                pack_inside(network)


# ---- attention


def attentions(sd: StableDiffusion) -> Iterator[nn.Module]:
    kinds = (Attention, PackedSelfAttention, PackedCrossAttention)
    return (module for network in networks_of(sd) for module in network.modules() if isinstance(module, kinds))


def attention_for(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The fastest attention for this processor and dtype. Ours fall back to PyTorch's at shapes where that is faster:
    see `kernels.pays`.

                              with kernels.cpp    without
        float32               our kernel          PyTorch's
        bfloat16, no AMX      our kernel          blocked_attention
        bfloat16 by AMX       PyTorch's (1)       PyTorch's

    (1) With PLAINSD_AMX_ATTENTION=1 our kernel by AMX.
    """
    if dtype == torch.bfloat16 and kernels.amx() and not kernels.attend_by_amx():
        return nn.functional.scaled_dot_product_attention
    if have_kernels(dtype):
        return kernels.attention
    return blocked_attention if dtype == torch.bfloat16 else nn.functional.scaled_dot_product_attention


def attend_faster(sd: StableDiffusion) -> None:
    """Replaces PyTorch's attention by the fastest one for this processor and dtype."""
    form = attention_for(sd.dtype)
    for attention in attentions(sd):
        attention.attend = form


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head and PIECE queries at a time. q, k, v (B, heads, N or M, d)
    -> (B, heads, N, d).

    PyTorch's own for few queries and keys.
    """
    if is_causal or q.shape[2] < MIN_QUERIES or k.shape[2] < MIN_QUERIES:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    scale, out = q.shape[-1] ** -0.5, torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = (k[b, head] * scale).t(), v[b, head].contiguous()  # (d, M), (M, d)
            for start in range(0, q.shape[2], PIECE):
                piece = q[b, head, start : start + PIECE]
                out[b, head, start : start + PIECE] = torch.softmax(piece @ keys, dim=-1) @ values
    return out


# ---- torch.compile

JOINS = {"residuals": "ControlNets", "features": "T2I-Adapters", "beside": "image prompts"}  # arguments of the UNet


def compile_unet(sd: StableDiffusion, tell: Callable[[str], None]) -> None:
    """Compiles the UNet for each set of input shapes: on a GPU with CUDA graphs, on a CPU with its weights, which are
    laid out once and must not change afterwards. What joins it (ControlNets, T2I-Adapters, image prompts) are inputs
    too; its absence is a set of its own.

    The first step of each takes a minute or two; later processes reuse most of it from torch's cache. UserError without
    a compiler.
    """
    check_can_compile(sd.device, "--compile")
    met = set()
    sd.unet.__dict__.pop("forward", None)  # compiled before
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled = torch.compile(sd.unet.forward, dynamic=False, options=compiler_options(sd.device))

    def forward(x: Tensor, timestep: Tensor | float, context: Tensor, *rest: Any, **named: Any) -> Tensor:
        if not isinstance(timestep, Tensor):  # a float would be a constant, recompiled at each step
            timestep = x.new_full((), timestep, dtype=torch.float32)
        shapes, began = shapes_of([x, timestep, context, *rest, *named.items()]), time.perf_counter()
        kind = (shapes, x.dtype, sd.unet.conv_in.padding_mode)  # that of a tiling picture is another
        if new := kind not in met:
            joined = " and ".join(words for name, words in JOINS.items() if named.get(name) is not None)
            tell(
                f"compiling the UNet for {len(x)} rows of {x.shape[3]}x{x.shape[2]} latents"
                f"{joined and ' with '}{joined}; the first time takes minutes"
            )
        with frozen_weights(sd.device):
            out = compiled(x, timestep, context, *rest, **named)
        if sd.device.type == "cuda":  # a CUDA graph's output is overwritten when it runs again
            out = out.clone()
        if new:
            met.add(kind)
            tell(f"compiled in {time.perf_counter() - began:.0f} s")
        return out

    sd.unet.forward = forward  # type: ignore[method-assign]  # an instance's own, as torch.compile's in-place form


def shapes_of(value: Any) -> Any:
    """The same tuples and lists, as tuples, with the shapes of tensors in their places."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(map(shapes_of, value)) if isinstance(value, (list, tuple)) else value


def compiler_options(device: torch.device) -> dict[str, bool]:
    """Of torch.compile."""
    return {"triton.cudagraphs": True} if device.type == "cuda" else {}


def frozen_weights(device: torch.device) -> AbstractContextManager[Any]:
    """In which a first call on a CPU compiles weights in. As an option of torch.compile it has no effect (2.13):
    Dynamo, which traces before the options count, asks the setting itself."""
    return nullcontext() if device.type == "cuda" else torch._inductor.config.patch(freezing=True)
