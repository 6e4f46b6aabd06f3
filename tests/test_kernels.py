"""The kernels in kernels.cpp give what their formulas give, as near to float64 as their precision allows.

How near is worked out from the arithmetic (`rounding`, `attention_in_order`, `gradients_of_attention`), for PyTorch's
own error is another one on each kind of processor. What is chosen where: test_processors.py.
"""

import copy
import ctypes
import errno
import math
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_sd
from test_speed import assert_as_exact, relative

from plainsd.models.layers import Attention, ResBlock, norm_silu
from plainsd.models.unet import geglu
from plainsd.speed import building, kernels, model, training
from plainsd.speed.packed import PackedResBlock

pytestmark = [
    pytest.mark.skipif(not kernels.suit(torch.float32), reason="kernels.cpp is for AVX-512"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
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
        building._compile(building.compiler_path(), building.source_code(), path)
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
    compilers = [tmp_path / "one", tmp_path / "two"]
    for compiler in compilers:
        compiler.write_text(f"#!/bin/sh\necho {compiler.name}\n")
        compiler.chmod(0o755)

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
                        keys += [building._build_key(source, str(compiler)) for _ in range(2)]
    assert len(set(keys)) == 32 and all(a == b for a, b in zip(keys[::2], keys[1::2], strict=True))


def test_a_damaged_file_is_compiled_anew(own_cache):
    source = Path(building.__file__).with_name("kernels.cpp").read_bytes()
    kept = own_cache / f"kernels-{building._build_key(source, building.compiler_path())}.so"
    own_cache.mkdir()
    kept.write_bytes(b"\x7fELF, as far as the disk had room")
    kernels.library()
    assert list(own_cache.iterdir()) == [kept] and kept.stat().st_size > 10_000


@pytest.mark.parametrize("why", ["no folder can be made there", "the folder is read-only"])
def test_a_home_that_cannot_be_written(own_cache, monkeypatch, why):
    """The kernels are compiled for this process alone, and one line says so, once; nothing is left behind."""
    if why.startswith("no"):
        own_cache.write_text("a file in the folder's place")
    else:
        own_cache.mkdir()
        monkeypatch.setattr(building.tempfile, "TemporaryDirectory", refused_in(own_cache))
    with pytest.warns(UserWarning, match="compiled anew by each process, since .* cannot be written") as said:
        assert kernels.have_kernels(torch.float32) and kernels.have_kernels(torch.float32)
    assert len(said) == 1
    x, packed = torch.randn(3, 8), kernels.packed_weight(torch.eye(8))
    assert torch.equal(kernels.linear(x, packed, 8, None), x)
    assert not own_cache.is_dir() or not list(own_cache.iterdir())


def refused_in(folder):
    """tempfile.TemporaryDirectory on a disk that is read-only in `folder` (root may write wherever modes forbid it)."""
    made = tempfile.TemporaryDirectory

    def make(*, dir=None, **named):
        if dir == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return made(dir=dir, **named)

    return make


def test_a_temporary_folder_that_runs_no_code(own_cache, monkeypatch):
    """And a home that cannot be written: no kernels, and the reason in one line."""
    own_cache.write_text("a file in the folder's place")
    monkeypatch.setattr(building, "_compile", lambda compiler, source, path: path.write_bytes(b"not to be mapped"))
    with pytest.warns(UserWarning) as said:
        assert not kernels.have_kernels(torch.float32)
    assert [str(one.message).split(":")[0] for one in said][
        -1
    ] == "slower than it could be, without the kernels in kernels.cpp"
    assert len(said) == 2


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
    building._compile("c++", source, tmp_path / "kernels.so")
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
