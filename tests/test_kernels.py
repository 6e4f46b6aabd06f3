"""The kernels in kernels.cpp give what their formulas give, as near to float64 as their precision allows.

How near is worked out from the arithmetic (`rounding`, `attention_in_order`, `gradients_of_attention`), for PyTorch's
own error is another one on each kind of processor. What is chosen where: test_processors.py.
"""

import copy
import ctypes
import errno
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_sd
from test_speed import assert_as_exact, relative

from plainsd import disk
from plainsd.models.layers import Attention, ResBlock, norm_silu
from plainsd.models.unet import geglu
from plainsd.speed import building, kernels, model, training
from plainsd.speed.packed import PackedResBlock


def has_compiler():
    try:
        return bool(building.compiler_command())
    except building.Unavailable:
        return False


pytestmark = [
    pytest.mark.skipif(not kernels.suit(torch.float32), reason="kernels.cpp is for AVX-512"),
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def suits(request):
    if "dtype" in request.fixturenames and not kernels.suit(request.getfixturevalue("dtype")):
        pytest.skip("not in this precision on this processor")


def rounding(dtype):
    """The error of many numbers that are rounded to the nearest of their precision, relative to them: in the mean at
    most u / sqrt(3), where u is half the distance from 1 to the next number; and a third more for chance."""
    return 0.75 * torch.finfo(dtype).eps / 2


def strided(x):
    """The same as one of three parts of a projection's output."""
    return torch.cat(3 * [x.transpose(1, 2)], dim=2)[:, :, : x.shape[1]].transpose(1, 2)


SHAPES = pytest.mark.parametrize(
    "batch, heads, n, m, d",
    [
        (2, 3, 96, 512, 40),
        (1, 2, 1, 1, 8),
        (2, 2, 49, 77, 64),
        (1, 1, 100, 1100, 80),
        (1, 2, 47, 513, 160),
        (1, 1, 64, 65, 22),
        (1, 1, 50, 63, 33),
        (2, 1, 7, 2000, 512),
    ],
)


@DTYPES
@SHAPES
def test_attention(dtype, batch, heads, n, m, d):
    """Lengths and widths that fill their blocks and that do not; scores up to +-100, so that blocks are scaled anew. As
    far from float64 as its formula in float32, each sum in order, within a quarter."""
    if dtype == torch.bfloat16 and d % 2:
        pytest.skip("PyTorch's, by `attention`")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (5 * torch.randn((batch, heads, length, d), generator=generator).to(dtype) for length in (n, m, m))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    allowed = 1.25 * relative(attention_in_order(q, k, v).double(), expected) + 1e-7
    for form in (torch.Tensor.clone, strided, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)):
        found = kernels._attention(*(form(t) for t in (q, k, v)))
        assert found.shape == q.shape and relative(found.double(), expected) < allowed


STRICT = ("-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized")  # GCC 12's own immintrin.h


@pytest.fixture(scope="module")
def emulated_amx(tmp_path_factory):
    """kernels.cpp for a processor with AMX, whose instructions are loops here."""
    path = tmp_path_factory.mktemp("amx") / "kernels.so"
    include = ("-include", str(Path(__file__).with_name("amx_emulated.h")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "FLAGS", (*STRICT, *building.FLAGS, *include))
        building._compile(building.compiler_command(), building.source_code(), path)
    return building.typed(ctypes.CDLL(str(path)))


@pytest.fixture
def by_amx(emulated_amx, monkeypatch):
    assert emulated_amx.knows_amx() == 1
    monkeypatch.setattr(kernels, "library", lambda: emulated_amx)
    monkeypatch.setattr(kernels, "attend_by_amx", lambda: True)


@pytest.mark.skipif(not kernels.suit(torch.bfloat16), reason="a processor without AVX512_BF16")
@SHAPES
def test_attention_by_amx(by_amx, batch, heads, n, m, d):
    if d % 2:
        pytest.skip("PyTorch's, by `attention`")
    test_attention(torch.bfloat16, batch, heads, n, m, d)


@pytest.mark.skipif(not kernels.suit(torch.bfloat16), reason="a processor without AVX512_BF16")
def test_attention_by_amx_keeps_what_its_gradients_need(by_amx):
    q, k, v = torch.randn(3, 1, 2, 100, 40).bfloat16().unbind(0)
    out, kept = kernels._attention_kept(q, k, v)
    scores = q.double() @ k.double().transpose(2, 3) * 40**-0.5
    assert torch.allclose(kept.double(), scores.logsumexp(-1) / math.log(2), atol=1e-5)
    assert torch.equal(out, kernels._attention(q, k, v))


@pytest.mark.full  # the first run of these instructions on a processor that has them: in a process of its own
@pytest.mark.skipif(not kernels.amx(), reason="a processor without AMX")
def test_attention_by_amx_itself():
    here = f"{__file__}::test_attention"
    environment = os.environ | {"PLAINSD_AMX_ATTENTION": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", here], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def attention_in_order(q, k, v):
    """softmax(q k^T / sqrt(d)) v, each sum in float32 from its first term to its last, weights and output rounded to
    the precision of q. Made of additions and products of single numbers, which are the same on every processor."""
    d, m, dtype = q.shape[3], k.shape[2], q.dtype
    q, k, v = q.float(), k.float(), v.float()
    scores, out, total = q.new_zeros(*q.shape[:3], m), torch.zeros_like(q), q.new_zeros(*q.shape[:3], 1)
    for c in range(d):
        scores += q[..., c, None] * k[..., None, :, c]
    scores *= d**-0.5
    weights = (scores - scores.amax(-1, keepdim=True)).double().exp().float()
    for j in range(m):
        out += weights[..., j, None].to(dtype).float() * v[..., j, None, :]
        total += weights[..., j, None]
    return (out / total).to(dtype)


def test_attention_passes_on_what_is_not_a_number():
    q, k, v = torch.randn(3, 1, 2, 60, 16).unbind(0)
    q[0, 1, 5, 3] = torch.nan
    bad = kernels._attention(q, k, v).isnan()
    assert bad[0, 1, 5].all() and bad.sum() == 16


@pytest.mark.parametrize("case", ["causal", "gradient", "odd"])
def test_where_attention_is_pytorchs(case, monkeypatch):
    monkeypatch.setattr(kernels, "pays", lambda *shape: True)
    monkeypatch.setattr(kernels, "_attention", None)
    q, k, v = torch.randn(3, 1, 2, 60, 15).to(torch.bfloat16 if case == "odd" else torch.float32).unbind(0)
    q.requires_grad_(case == "gradient")
    assert torch.equal(
        kernels.attention(q, k, v, is_causal=case == "causal"),
        F.scaled_dot_product_attention(q, k, v, is_causal=case == "causal"),
    )


@pytest.mark.parametrize("case", ["batch", "heads", "wide values", "dtype"])
def test_what_pytorch_broadcasts_or_refuses_is_pytorchs(case, monkeypatch):
    """In inference and in training: the kernel would read beside the keys, or take their bits for other numbers."""
    monkeypatch.setattr(kernels, "pays", lambda *shape: True)
    monkeypatch.setattr(kernels, "MIN_TRAINING_SIZE", 0)
    for name in ("_attention", "_Attend"):
        monkeypatch.setattr(kernels, name, None)
    q, k, v = torch.randn(3, 2, 2, 60, 16).bfloat16().unbind(0)
    if case == "batch":
        k, v = k[:1], v[:1]
    if case == "heads":
        k, v = k[:, :1], v[:, :1]
    if case == "wide values":
        v = torch.cat([v, v], -1)
    for attend in (kernels.attention, kernels.trained_attention):
        if case == "dtype":
            with pytest.raises(RuntimeError, match="same dtype"):
                attend(q, k.float(), v)
        else:
            assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


@DTYPES
@pytest.mark.parametrize(
    "m, k, n",
    [(1, 2, 1), (32, 160, 160), (7, 50, 37), (128, 96, 384), (300, 64, 65), (5, 1280, 640), (13, 34, 15), (6, 2, 129)],
)
@pytest.mark.parametrize("after", ["none", "gelu", "times"])
def test_linear(dtype, m, k, n, after):
    torch.manual_seed(0)
    layer, other = torch.nn.Linear(k, n).to(dtype).requires_grad_(False), torch.randn(2, m, n).to(dtype)
    x, exact = torch.randn(2, m, 2 * k).to(dtype)[..., ::2], copy.deepcopy(layer).double()
    outcome = {"none": lambda y, other: y, "gelu": lambda y, other: F.gelu(y), "times": torch.mul}[after]
    packed = kernels.packed_weight(layer.weight)
    for bias in (layer.bias, None):
        expected = outcome(F.linear(x.double(), exact.weight, None if bias is None else exact.bias), other.double())
        allowed = rounding(dtype) + 3e-7 + k**0.5 * 2**-25  # of the output; GELU, to 3 in 10^7; a sum of k in order
        assert relative(kernels.linear(x, packed, n, bias, after, other).double(), expected) < allowed


@DTYPES
def test_linear_reads_nothing_beside_its_weight(dtype):
    packed = kernels.packed_weight(torch.randn(24, 64).to(dtype))
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    for x in (torch.randn(2, 64, dtype=other), torch.randn(2, 62).to(dtype), torch.randn(2, 64).half()):
        with pytest.raises(RuntimeError, match="does not fit the packed weight"):
            kernels.linear(x, packed, 24, None)
    with pytest.raises(RuntimeError, match="does not fit the packed weight"):
        kernels.linear(torch.randn(2, 64).to(dtype), packed, 33, None)


@DTYPES
def test_what_does_not_fit_is_refused(dtype):
    """A kernel would read beside it: biases, factors, shifts and weights of another shape or dtype."""
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    maps, x, packed = (
        torch.randn(2, 8, 3, 3).to(dtype),
        torch.randn(3, 16).to(dtype),
        kernels.packed_weight(torch.eye(16).to(dtype)),
    )
    group, layer = torch.nn.GroupNorm(2, 8).requires_grad_(False), torch.nn.LayerNorm(16).requires_grad_(False)
    for shift in (torch.zeros(2, 8, dtype=other), torch.zeros(1, 8, dtype=dtype), torch.zeros(2, 4, dtype=dtype)):
        for over in (False, True):
            with pytest.raises(RuntimeError, match="the kernel needs"):
                kernels.fused_norm_silu(group, maps.clone(), shift, over=over)
    for bad in (torch.zeros(16, dtype=other), torch.zeros(8, dtype=dtype)):
        with pytest.raises(RuntimeError, match="the kernel needs"):
            kernels.linear(x, packed, 16, bad)
        with pytest.raises(RuntimeError, match="the kernel needs"):
            kernels.linear(x, packed, 16, None, "times", bad.expand(3, -1))
    for run in (
        lambda: kernels.fused_norm_silu(group, torch.cat([maps, maps], 1)),
        lambda: kernels.layer_norm(layer, torch.cat([x, x], 1)),
        lambda: kernels.layer_norm(torch.nn.LayerNorm(16).double().requires_grad_(False), x),
    ):
        with pytest.raises(RuntimeError, match="the kernel needs"):
            run()
    for bad in (maps.half(), maps.to("meta")):
        with pytest.raises(RuntimeError, match="the kernels do not work in"):
            kernels.group_norm(group, bad)
    every_second = torch.randn(32).to(dtype)[::2]
    assert torch.equal(
        kernels.linear(x, packed, 16, every_second), kernels.linear(x, packed, 16, every_second.contiguous())
    )


def test_no_gradient_is_lost_without_a_word():
    """Kernels for inference have none; those for training do."""
    x, maps = torch.randn(3, 16).requires_grad_(), torch.randn(2, 8, 3, 3).requires_grad_()
    packed, group, layer = kernels.packed_weight(torch.eye(16)), torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(16)
    calls = [
        lambda: kernels.linear(x, packed, 16, None),
        lambda: kernels.linear(x.detach(), packed, 16, layer.bias),
        lambda: kernels.layer_norm(layer, x.detach()),
        lambda: kernels.group_norm(group.requires_grad_(False), maps),
        lambda: kernels.fused_norm_silu(group, maps),
        lambda: kernels.fused_norm_silu(group, maps.contiguous(memory_format=torch.channels_last), over=True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="a packed model has no gradients; call plainsd.speed.plain_again first"):
            call()
    with torch.no_grad():
        assert not any(call().requires_grad for call in calls)
    kernels.trained_norm(group, maps).square().sum().backward()
    assert maps.grad.any()


NO_MEMORY = """
import ctypes, torch
from plainsd.speed.building import library
many, nothing, strides = 2**50, 5 * [None], (ctypes.c_long * 24)()
for name, arguments in (
    ("attend", (32, 0, *nothing, strides, 1, 1, 1, many, 8, 1.0, 1)),
    ("attend", (32, 0, *nothing, strides, 1, 1, 1, 0, many, 1.0, 1)),  # within a thread
    ("attend_back", ((ctypes.c_void_p * 8)(), strides, None, 1, 1, many, 1, 8, 1.0, 2)),
    ("norm_silu", (32, None, *nothing, 1, many, 8, 1, 1e-5, 1, 1)),
    ("norm_silu_back", (32, *3 * [None], *nothing, 1, many, 8, 1, 1, 1)),
):
    try:
        getattr(library(), name)(*arguments)
    except torch.OutOfMemoryError as error:
        print(error)
"""


def test_a_kernel_that_finds_no_memory_does_not_end_the_process():
    """For more than any machine has, in a process of its own."""
    done = in_process(NO_MEMORY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == 5 * ["out of memory in a kernel; try less at once"]


def in_process(code):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 37), (1, 1), (3, 1, 65), (130, 15)], ids=str)
def test_layer_norm(dtype, shape):
    """Means of several times the deviation, as in networks."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(shape[-1]).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    x = (torch.randn(shape) + 10).to(dtype)
    expected, kept = copy.deepcopy(norm).double()(x.double()), x.clone()
    for form in (torch.Tensor.clone, lambda x: torch.cat([x, x], -1)[..., : shape[-1]]):
        assert relative(kernels.layer_norm(norm, form(x)).double(), expected) < rounding(dtype) + 10 * 2**-24
    assert torch.equal(x, kept)


def test_gelu_far_out():
    """Also where its tail is nearly nothing, and where it is nearly x."""
    x = torch.linspace(-12, 12, 2001).reshape(-1, 1).repeat(1, 2)
    packed = kernels.packed_weight(torch.eye(2))
    assert (kernels.linear(x, packed, 2, None, "gelu").double() - F.gelu(x.double())).abs().max() < 2e-6


@DTYPES
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 96, 8, 8), 16),
        ((1, 24, 5, 7), 4),
        ((2, 20, 33, 17), 5),
        ((1, 128, 40, 64), 32),
        ((3, 8, 1, 1), 2),
        ((3, 35, 1, 257), 7),
        ((1, 67, 3, 5), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
def test_norm_silu(dtype, shape, groups, shifted, form):
    """Means of several times the deviation, as in networks."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, shape[1]).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    exact, norm = copy.deepcopy(norm).double(), norm.to(dtype)
    exact.load_state_dict(norm.state_dict())
    x = (torch.randn(shape) + 10 * torch.randn(1, shape[1], 1, 1)).to(dtype).contiguous(memory_format=form)
    shift = torch.randn(shape[:2]).to(dtype) if shifted else None
    plus = shift[:, :, None, None].double() if shifted else 0.0
    expected = F.silu(exact(x.double() + plus))
    allowed = rounding(dtype) + 10 * 2**-24  # of the output, and of means of ten deviations
    kept = x.clone()
    assert relative(kernels.fused_norm_silu(norm, x, shift).double(), expected) < allowed
    assert torch.equal(x, kept)
    assert relative(kernels.fused_norm_silu(norm, x, shift, over=True).double(), expected) < allowed


@DTYPES
def test_norm_silu_reads_a_strided_shift(dtype):
    """Every second number of a row, as a part of a larger projection comes."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 24).requires_grad_(False)
    x, shift = torch.randn(2, 24, 5, 7).to(dtype), torch.randn(2, 48).to(dtype)[:, ::2]
    expected = F.silu(copy.deepcopy(norm).double()(x.double() + shift[:, :, None, None].double()))
    found = kernels.fused_norm_silu(norm.to(dtype), x, shift)
    assert relative(found.double(), expected) < (1e-6 if dtype == torch.float32 else 3e-3)


@DTYPES
@pytest.mark.parametrize(
    "shape, groups",
    [((2, 96, 8, 8), 16), ((3, 20, 33, 17), 5), ((1, 8, 1, 1), 2), ((3, 35, 1, 257), 7), ((1, 67, 3, 5), 1)],
    ids=str,
)
@pytest.mark.parametrize("silu", [True, False])
def test_gradients_of_norm_silu(dtype, shape, groups, silu):
    """Also from maps that are not channels last, and means of several times the deviation."""
    torch.manual_seed(0)
    norm, x, dy = torch.nn.GroupNorm(groups, shape[1]), torch.randn(shape) + 5, torch.randn(shape)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, dy = x.to(dtype).requires_grad_(), dy.to(dtype)
    exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    expected = F.silu(exact(wide)) if silu else exact(wide)
    found = kernels.trained_norm(norm, x, silu)
    assert relative(found.double(), expected) < rounding(dtype) + 10 * 2**-24
    expected.backward(dy.double()), found.backward(dy)
    expected = (wide.grad, exact.weight.grad, exact.bias.grad)
    for found, right in zip((x.grad, norm.weight.grad, norm.bias.grad), expected, strict=True):
        assert relative(found.double(), right) < rounding(found.dtype) + 30 * 2**-24  # and sums over maps, in float32


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 74), (1, 3, 2), (7, 30), (3, 1, 66)], ids=str)
def test_geglu_and_its_gradients(dtype, shape):
    torch.manual_seed(0)
    x, dy = (3 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    wide = x.detach().double().requires_grad_()
    expected, found = geglu(wide), kernels.trained_geglu(x)
    expected.backward(dy.double()), found.backward(dy)
    for one, right in ((found, expected), (x.grad, wide.grad)):
        assert relative(one.double(), right) < rounding(dtype) + 3e-7


def test_of_an_odd_width_there_is_no_geglu():
    with pytest.raises(RuntimeError, match="size of tensor"):
        kernels.trained_geglu(torch.randn(2, 5))


@pytest.mark.skipif(not kernels.suit(torch.bfloat16), reason="a processor without AVX512_BF16")
@pytest.mark.parametrize(
    "batch, heads, n, m, d",
    [
        (1, 2, 512, 512, 40),
        (2, 3, 100, 77, 22),
        (1, 2, 257, 1100, 64),
        (1, 1, 63, 97, 160),
        (1, 2, 1, 2, 8),
        (2, 1, 1030, 5, 80),
    ],
)
@pytest.mark.parametrize("scale", [1, 6])
def test_gradients_of_attention(batch, heads, n, m, d, scale, monkeypatch):
    """As far from float64 as their formula, rounded where ours is, within a fifth; `scale`: up to scores of +-200, at
    which most weights are nothing."""
    monkeypatch.setattr(kernels, "MIN_TRAINING_SIZE", 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn((batch, heads, length, d), generator=generator).bfloat16() for length in (n, m, m, n))
    q, k = scale * q, scale * k

    def outcome(attend, dtype, form=torch.Tensor.clone):
        leaves = [form(x.to(dtype)).detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        out.backward(form(dout.to(dtype)))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    exact = outcome(F.scaled_dot_product_attention, torch.float64)
    rounded = gradients_of_attention(*(x.double() for x in (q, k, v, dout)), lambda x: x.bfloat16().double())
    for form in (torch.Tensor.clone, strided, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)):
        for ours, right, other in zip(
            outcome(kernels.trained_attention, torch.bfloat16, form), exact, rounded, strict=True
        ):
            assert relative(ours, right) < 1.2 * relative(other, right) + 1e-4


def gradients_of_attention(q, k, v, dout, stored):
    """Attention, and its gradients of q, k and v: Dao 2023 (arXiv:2307.08691), algorithm 2. `stored` rounds what the
    kernel stores in bfloat16: weights, their slopes, and what is handed back."""
    weights, scale = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, -1), q.shape[3] ** -0.5
    out = stored(stored(weights) @ v)
    slopes = stored(weights * (dout @ v.transpose(2, 3) - (dout * out).sum(-1, keepdim=True)))
    gradients = slopes @ k * scale, slopes.transpose(2, 3) @ q * scale, stored(weights).transpose(2, 3) @ dout
    return [out, *map(stored, gradients)]


def test_the_gradients_to_compare_with_are_those_of_attention():
    leaves = [torch.randn(1, 2, n, 6, dtype=torch.float64).requires_grad_() for n in (5, 7, 7)]
    dout = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    out, *gradients = gradients_of_attention(*leaves, dout, lambda x: x)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, dout)
    assert all(relative(a, b) < 1e-12 for a, b in zip(gradients, expected, strict=True))
    assert relative(out, F.scaled_dot_product_attention(*leaves)) < 1e-12


def test_where_attention_in_training_is_pytorchs(monkeypatch):
    monkeypatch.setattr(kernels, "_Attend", None)
    for dtype, n, d, causal in (
        (torch.bfloat16, 255, 8, False),
        (torch.bfloat16, 256, 9, False),
        (torch.bfloat16, 256, 8, True),
        (torch.float32, 256, 8, False),
    ):
        q, k, v = torch.randn(3, 1, 1, n, d).to(dtype).requires_grad_().unbind(0)
        assert torch.equal(
            kernels.trained_attention(q, k, v, is_causal=causal),
            F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        )


@pytest.mark.skipif(not kernels.suit(torch.bfloat16), reason="a processor without AVX512_BF16")
@pytest.mark.parametrize("amx", [False, True])
def test_inside_trained_faster_a_network_learns_the_same(amx, monkeypatch):
    monkeypatch.setattr(kernels, "amx", lambda: amx)
    torch.manual_seed(0)
    unet, x, context = tiny_sd().unet, torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)

    def gradients():
        unet.zero_grad()
        unet(x, torch.tensor([3.0, 700.0]), context).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters()])

    plain = gradients()
    with training.trained_faster(unet):
        blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
        assert blocks and all(block.activate is kernels.trained_norm_silu for block in blocks)
        assert any(getattr(module, "activate", None) is kernels.trained_geglu for module in unet.modules())
        attentions = [module for module in unet.modules() if isinstance(module, Attention)]
        form = F.scaled_dot_product_attention if amx else kernels.trained_attention
        assert attentions and all(attention.attend is form for attention in attentions)
        assert "forward" in vars(unet.norm_out)
        assert 0 < relative(gradients(), plain) < 1e-5
    assert all(block.activate is norm_silu for block in blocks) and "forward" not in vars(unet.norm_out)
    assert all(attention.attend is F.scaled_dot_product_attention for attention in attentions)
    assert torch.equal(gradients(), plain)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    torch.manual_seed(0)
    norm, x = torch.nn.GroupNorm(4, 32).requires_grad_(False), torch.randn(2, 32, 40, 40)
    q, k, v = torch.randn(3, 2, 4, 200, 40).unbind(0)
    packed, rows = kernels.packed_weight(torch.randn(96, 160)), torch.randn(100, 160)

    def all_of_them():
        outcome = [
            kernels.fused_norm_silu(norm, x),
            kernels._attention(q, k, v),
            kernels.linear(rows, packed, 96, None),
        ]
        if kernels.suit(torch.bfloat16):
            leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
            kernels._Attend.apply(*leaves).backward(v.bfloat16())
            outcome += [leaf.grad for leaf in leaves]
        return outcome

    before, expected = torch.get_num_threads(), all_of_them()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(all_of_them(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_model_with_all_of_them_draws_the_same(monkeypatch):
    fast, calls = model.faster(tiny_sd()), []
    assert {attention.attend for attention in model.attentions(fast)} == {kernels.attention}
    assert any(isinstance(module, PackedResBlock) for module in fast.vae.modules())
    monkeypatch.setattr(kernels, "pays", lambda *shape: True)

    def told(name, run):
        return lambda *args, **named: calls.append(name) or run(*args, **named)

    for name in ("_attention", "linear", "fused_norm_silu"):
        monkeypatch.setattr(kernels, name, told(name, getattr(kernels, name)))
    assert_as_exact(fast, tiny_sd)
    assert min(calls.count(name) for name in ("_attention", "linear", "fused_norm_silu")) > 10


def test_they_are_compiled_once(own_cache, monkeypatch):
    kernels.library()
    kernels.library.cache_clear()
    monkeypatch.setattr(building, "_compile", None)
    kernels.library()
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]


def test_it_is_told_before_they_are_compiled(own_cache, monkeypatch):
    """`faster` tells it, once on a machine; not where no compiler is, and not for a dtype without kernels."""
    said = []
    faster = partial(model.faster, tell=lambda line: said.append((line, own_cache.exists())))
    faster(tiny_sd().to(dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="slower"):
        patch.setenv("CXX", "no-such-compiler")
        faster(tiny_sd())
    for path in own_cache.iterdir():
        path.unlink()
    own_cache.rmdir()
    kernels.have_kernels.cache_clear()
    assert said == []
    faster(tiny_sd())
    line = "compiling the kernels for this processor; takes some seconds, the first time only"
    assert said == [(line, False)]
    faster(tiny_sd())
    kernels.library.cache_clear()  # as another process
    faster(tiny_sd())
    assert len(said) == 1


def test_compiled_files_are_told_apart_by_all_that_they_depend_on(tmp_path, monkeypatch):
    """A home folder may be shared by machines with other processors."""
    scripts = [tmp_path / "one", tmp_path / "two"]
    for script in scripts:
        script.write_text(f"#!/bin/sh\necho {script.name}\n")
        script.chmod(0o755)
    compilers = [(str(script), *flags) for script in scripts for flags in ((), ("-m64",))]

    class Processor:
        def __init__(self, path):
            assert path == "/proc/cpuinfo"

        def read_text(self):
            return f"model name : any\nflags : {self.flags}\n"

    monkeypatch.setattr(building, "Path", Processor)
    keys = []
    for Processor.flags in ("sse2 avx2", "sse2 avx2 avx512f"):
        for compiler in compilers:
            for source in (b"one", b"two"):
                for flags in (("-O3",), ("-O2",)):
                    for version in ("2.13.0", "2.14.0"):
                        monkeypatch.setattr(building, "FLAGS", flags)
                        monkeypatch.setattr(torch, "__version__", version)
                        keys += [building._build_key(source, compiler) for _ in range(2)]
    assert len(set(keys)) == 64 and all(a == b for a, b in zip(keys[::2], keys[1::2], strict=True))


def test_a_damaged_file_is_compiled_anew(own_cache):
    kept = building.kept_file(building.source_code(), building.compiler_command())
    own_cache.mkdir()
    kept.write_bytes(b"\x7fELF, as far as the disk had room")
    assert not building.is_compiled()
    kernels.library()
    assert list(own_cache.iterdir()) == [kept] and kept.stat().st_size > 10_000


def test_a_file_that_was_cut_off_is_compiled_anew(own_cache):
    """One that begins as it should would end the process that loads it: here another one."""
    kernels.library()
    (kept,) = own_cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # this process has it open
    kept.write_bytes(whole[: len(whole) // 2])
    done = in_process("from plainsd.speed import building; print(building.is_compiled(), bool(building.library()))")
    assert done.returncode == 0 and done.stdout.split() == ["False", "True"]
    assert building.is_sealed(kept) and list(own_cache.iterdir()) == [kept]


@pytest.mark.parametrize("why", ["no folder can be made there", "the disk is full"])
def test_a_home_that_cannot_be_written(own_cache, monkeypatch, why):
    """The kernels are compiled for this process alone, and one line says so, once; nothing is left behind."""
    if why.startswith("no"):
        own_cache.write_text("a file in the folder's place")
    else:
        monkeypatch.setattr(disk, "flush", full)
    with pytest.warns(UserWarning, match="compiled anew by each process, since .* cannot keep them") as said:
        assert kernels.have_kernels(torch.float32) and kernels.have_kernels(torch.float32)
    assert len(said) == 1
    x, packed = torch.randn(3, 8), kernels.packed_weight(torch.eye(8))
    assert torch.equal(kernels.linear(x, packed, 8, None), x)
    assert not own_cache.is_dir() or not list(own_cache.iterdir())


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_folders_that_run_no_code(own_cache, monkeypatch):
    """Nor a home that cannot be written: no kernels, and the reason in one line."""
    own_cache.write_text("a file in the folder's place")
    monkeypatch.setattr(building, "_compile", lambda compiler, source, path: path.write_bytes(b"not to be mapped"))
    with pytest.warns(UserWarning) as said:
        assert not kernels.have_kernels(torch.float32)
    (said,) = (str(one.message) for one in said)
    assert said.startswith("slower than it could be, without the kernels in kernels.cpp: ") and "kernels.so" in said


BUILD = """
import sys, warnings
warnings.simplefilter("error")
from plainsd.speed import building
compile = building._compile
def when_both_are_here(compiler, source, path):
    print("compiles", flush=True), sys.stdin.readline()
    compile(compiler, source, path)
building._compile = when_both_are_here
print(building.library().knows_bfloat16())
"""


def test_processes_that_compile_at_once(own_cache):
    """Each begins while the other has not ended; both work, and one file is there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen([sys.executable, "-c", BUILD], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == 2 * ["compiles\n"]
    ends = [process.communicate("go\n", timeout=120)[0] for process in both]
    assert ends[0] == ends[1] and ends[0].strip() in "01" and not any(process.returncode for process in both)
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]


@pytest.mark.full
@pytest.mark.parametrize(
    "processor, known", [("skylake-avx512", 0), ("cooperlake", 1), ("sapphirerapids", 1), ("znver4", 1)]
)
def test_it_compiles_for_other_processors(tmp_path, monkeypatch, processor, known):
    """With bfloat16 where they have it, and without a warning. What older ones run, this one runs too."""
    if subprocess.run(["c++", f"-march={processor}", "-E", "-x", "c++", "/dev/null"], capture_output=True).returncode:
        pytest.skip(f"this compiler does not know {processor}")
    assert building.FLAGS[1] == "-march=native"
    monkeypatch.setattr(building, "FLAGS", (*STRICT, building.FLAGS[0], f"-march={processor}", *building.FLAGS[2:]))
    source = Path(building.__file__).with_name("kernels.cpp").read_bytes()
    building._compile(("c++",), source, tmp_path / "kernels.so")
    tilerelease = bytes.fromhex("c4e27849c0")
    assert (tilerelease in (tmp_path / "kernels.so").read_bytes()) == (processor == "sapphirerapids")
    if processor == "skylake-avx512":
        assert ctypes.CDLL(str(tmp_path / "kernels.so")).knows_bfloat16() == known


@pytest.mark.skipif(not kernels.suit(torch.bfloat16), reason="a processor without AVX512_BF16")
def test_a_compiler_that_does_not_know_the_processor(own_cache, tmp_path, monkeypatch):
    old = tmp_path / "old-c++"
    old.write_text('#!/bin/sh\nexec c++ "$@" -mno-avx512bf16\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.warns(UserWarning, match="slower than it could be.*does not know this processor's bfloat16"):
        assert not kernels.have_kernels(torch.bfloat16)


def test_a_compiler_that_cannot_be_started(own_cache, tmp_path, monkeypatch):
    """Of another kind of machine, for instance."""
    other = tmp_path / "c++"
    other.write_bytes(b"\x7fELF of another machine")
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert not kernels.to_be_compiled(torch.float32)
    with pytest.warns(UserWarning, match=r"slower than it could be.*c\+\+ cannot be started \("):
        assert not kernels.have_kernels(torch.float32)


def test_a_compiler_with_flags(own_cache, monkeypatch):
    """As `ccache g++` or `g++ -m64`; where nothing is said, c++."""
    named = building.compiler_command()
    monkeypatch.setenv("CXX", f"env {' '.join(named)} -m64")
    assert building.compiler_command()[1:] == (*named, "-m64") and kernels.have_kernels(torch.float32)
    monkeypatch.setenv("CXX", "c++")
    usual = building.compiler_command()
    for nothing in ("", " "):
        monkeypatch.setenv("CXX", nothing)
        assert building.compiler_command() == usual
    monkeypatch.setenv("CXX", "g++ '-m64")
    with pytest.raises(building.Unavailable, match="CXX=g.*is no command"):
        building.compiler_command()


def test_attention_written_out_is_pytorchs_with_more_than_q_k_and_v():
    """A mask, another scale, groups of heads: what the short form knows nothing of."""
    q, k, v = torch.randn(3, 1, 4, 6, 8).unbind(0)
    mask = torch.rand(6, 6) > 0.5
    mask[:, 0] = True
    attend = F.scaled_dot_product_attention
    calls = [
        lambda: attend(q, k, v, mask),
        lambda: attend(q, k, v, attn_mask=mask),
        lambda: attend(q, k, v, scale=0.1),
        lambda: attend(q, k[:, :2], v[:, :2], enable_gqa=True),
        lambda: attend(q, k, v, is_causal=True),
        lambda: attend(query=q, key=k, value=v),
    ]
    for call in calls:
        expected = call()
        with training.WrittenOut():
            assert torch.equal(call(), expected)
    with training.WrittenOut():
        short = attend(q, k, v, is_causal=False)
        assert torch.equal(short, torch.softmax((q * 8**-0.5) @ k.transpose(-1, -2), -1) @ v)
