"""What was tried for speed on a CPU, piece by piece: forms of attention, layouts of convolution weights, doubling,
GroupNorm with SiLU, small linear layers, the small UNet, a guided step as one batch and as two.

    python bench/tried.py              some minutes
    python bench/tried.py --compile    also torch.compile on the small UNet

Each line: milliseconds, the least of several turns. Let the machine do nothing else meanwhile.
"""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plainsd
from plainsd.models.layers import Upsample
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.variants import VARIANTS
from plainsd.reports import bench
from plainsd.speed import kernels, model
from plainsd.speed.model import frozen_weights
from plainsd.speed.packed import PackedConv, PackedUpsample, pack_inside

SMALL = UNetConfig(channels=(64, 128, 192), depth=(1, 1, 1), heads=(2, 4, 6), layers=1, context=256, groups=16)
ATTENTIONS = ((2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80), (2, 8, 4096, 77, 40), (2, 10, 4096, 4096, 64))
CONVS = ((2, 2560, 1280, 8), (2, 1280, 1280, 16), (2, 640, 640, 32), (2, 320, 320, 64), (2, 64, 64, 16))


def least(work: Callable[[], object], turns: int = 5) -> float:
    """Milliseconds."""
    work()
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of queries, all heads at once."""
    keys = (k * q.shape[-1] ** -0.5).transpose(-1, -2)
    return torch.cat([torch.softmax(piece @ keys, dim=-1) @ v for piece in q.split(model.PIECE, dim=2)], dim=2)


def attention(dtype: torch.dtype) -> None:
    for b, heads, n, m, d in ATTENTIONS:
        q, k, v = (torch.randn(b, length, heads, d, dtype=dtype).transpose(1, 2) for length in (n, m, m))
        forms = {
            "PyTorch": lambda: F.scaled_dot_product_attention(q, k, v),
            "PyTorch, contiguous": lambda: F.scaled_dot_product_attention(*contiguous),
            "blocked, head by head": lambda: model.blocked_attention(q, k, v),
            "blocked, all heads": lambda: all_heads(*contiguous),
        }
        if kernels.have_kernels(dtype):
            name = "our kernel, by AMX" if dtype == torch.bfloat16 and kernels.attend_by_amx() else "our kernel"
            forms[name] = lambda: kernels._attention(q, k, v)
        contiguous = [t.contiguous() for t in (q, k, v)]
        tell(f"attention {b}x{heads} heads, {n} x {m}, {d} wide", dtype, forms)


def attention_with_gradients() -> None:
    leaves = [torch.randn(1, 4096, 8, 40, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    slope = torch.randn(1, 4096, 8, 40, dtype=torch.bfloat16).transpose(1, 2)
    forms = {"PyTorch": F.scaled_dot_product_attention, "our kernel": kernels.trained_attention}
    for way, work in {
        "forwards": lambda form: form(*leaves),
        "forwards and back": lambda form: torch.autograd.grad(form(*leaves), leaves, slope),
    }.items():
        tell(
            f"attention 1x8 heads, 4096 x 4096, 40 wide, for gradients, {way}",
            torch.bfloat16,
            {name: lambda form=form, work=work: work(form) for name, form in forms.items()},
        )


def convolution(dtype: torch.dtype) -> None:
    for b, c_in, c_out, side in CONVS:
        conv = nn.Conv2d(c_in, c_out, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
        x = torch.randn(b, c_in, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        packed, how = PackedConv(conv), ([1, 1], [1, 1], [1, 1], 1)
        anyhow = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *how, None)
        tell(
            f"3x3 convolution {c_in} -> {c_out} on {side}x{side}",
            dtype,
            {
                "plain": lambda: conv(x),
                "packed for this size": lambda: packed(x),
                "packed for any size": lambda: torch.ops.mkldnn._convolution_pointwise(
                    x, anyhow, conv.bias, *how, "none", [], ""
                ),
            },
        )


def doubling(dtype: torch.dtype) -> None:
    for b, channels, side in ((1, 256, 256), (1, 512, 64), (2, 640, 32), (2, 1280, 8)):
        plain = Upsample(channels).to(dtype).requires_grad_(False).to(memory_format=torch.channels_last)
        x = torch.randn(b, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        after, before = PackedConv(plain.conv), PackedUpsample(plain)
        tell(
            f"doubling {side}x{side} of {channels} channels, with its convolution",
            dtype,
            {
                "plain": lambda: plain(x),
                "packed": lambda: after(F.interpolate(x, scale_factor=2, mode="nearest")),
                "convolved before": lambda: before(x),
            },
        )


def own_kernels(dtype: torch.dtype) -> None:
    for shape in ((2, 320, 64, 64), (1, 128, 512, 512), (2, 96, 8, 8)):
        norm = nn.GroupNorm(32, shape[1]).to(dtype)
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        tell(
            f"GroupNorm and SiLU, {'x'.join(map(str, shape))}",
            dtype,
            {"PyTorch": lambda: F.silu(norm(x)), "our kernel": lambda: kernels.fused_norm_silu(norm, x)},
        )
    for rows, k, n in ((32, 160, 160), (128, 96, 384), (2, 1280, 320)):
        layer, x = nn.Linear(k, n).to(dtype), torch.randn(rows, k, dtype=dtype)
        packed, own = torch.ops.mkldnn._reorder_linear_weight(layer.weight, None), kernels.packed_weight(layer.weight)
        tell(
            f"linear layer {k} -> {n}, {rows} rows",
            dtype,
            {
                "PyTorch": lambda: layer(x),
                "oneDNN, packed": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], ""),
                "our kernel": lambda: kernels.linear(x, own, n, layer.bias),
            },
        )


def guidance(dtype: torch.dtype) -> None:
    """A guided step of SD 1.5's UNet: text and no text in one batch, or one after the other."""
    sd = plainsd.load(device="cpu", dtype=dtype)
    sd.unet = UNet(VARIANTS["sd1"].unet).to(dtype)
    unet = model.faster(sd).unet
    x, context = torch.randn(2, 4, 64, 64, dtype=dtype), torch.randn(2, 77, 768, dtype=dtype)
    rows = [(x[i : i + 1], context[i : i + 1]) for i in range(2)]
    tell(
        "UNet of SD 1.5's shape, guided step",
        dtype,
        {
            "a batch of two": lambda: unet(x, 500.0, context),
            "two batches of one": lambda: [unet(row, 500.0, text) for row, text in rows],
        },
    )


def small_unet(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    context = torch.randn(2, 24, SMALL.context, dtype=dtype)

    def network() -> UNet:
        return UNet(SMALL).to(dtype).requires_grad_(False).to(memory_format=torch.channels_last)

    packed, forms = network(), {}
    pack_inside(packed)
    for name, unet in {"plain": network(), "packed": packed}.items():
        forms[name] = lambda unet=unet: unet(x, 500.0, context)
    if compiled:
        timestep, ways = torch.tensor(500.0), {"compiled": nullcontext, "compiled, weights frozen in": frozen_on_cpu}
        for name, way in ways.items():
            fused = torch.compile(network(), dynamic=False)

            def run(fused=fused, way=way) -> Tensor:
                with way():
                    return fused(x, timestep, context)

            forms[name] = run
    tell("small UNet, two rows of 16x16", dtype, forms)


def frozen_on_cpu() -> AbstractContextManager:
    return frozen_weights(torch.device("cpu"))


def tell(name: str, dtype: torch.dtype, forms: dict[str, Callable[[], object]]) -> None:
    figures = ", ".join(f"{form} {least(work):.3f}" for form, work in forms.items())
    print(f"{name}, {str(dtype).removeprefix('torch.')}: {figures}", flush=True)


if __name__ == "__main__":
    print(f"{bench.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds")
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            attention(dtype)
            convolution(dtype)
            doubling(dtype)
            if kernels.have_kernels(dtype):
                own_kernels(dtype)
            small_unet(dtype, "--compile" in sys.argv)
            guidance(dtype)
    if kernels.have_kernels(torch.bfloat16):
        attention_with_gradients()
