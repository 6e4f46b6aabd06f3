"""What is chosen on each kind of processor, and that it draws the same there.

A kind is what `kernels` asks about the processor, which can be answered otherwise than the processor at hand would.
PyTorch's own settings (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA), which it reads when it starts, are for another
process; `make test-isa` runs this file and those of the kernels under them as a whole.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_sd
from test_speed import assert_as_exact, latents, relative

from plainsd.errors import UserError
from plainsd.models.layers import Attention
from plainsd.speed import kernels, model
from plainsd.speed.packed import PackedLinear, PackedResBlock

PLAIN, OURS, BLOCKED = F.scaled_dot_product_attention, kernels.attention, model.blocked_attention


class Processor(NamedTuple):
    suits: tuple = ()  # precisions in which it multiplies as the kernels do
    amx: bool = False
    intel: bool = False
    compiler: bool = True


BOTH = (torch.float32, torch.bfloat16)
KINDS = {
    "AVX2": (Processor(), PLAIN, BLOCKED),
    "AVX-512": (Processor((torch.float32,), intel=True), OURS, BLOCKED),
    "AVX512_BF16": (Processor(BOTH), OURS, OURS),
    "AVX512_BF16, Intel": (Processor(BOTH, intel=True), OURS, OURS),
    "AVX512_BF16, no compiler": (Processor(BOTH, compiler=False), PLAIN, BLOCKED),
    "AMX": (Processor(BOTH, amx=True, intel=True), OURS, PLAIN),
    "AMX, no compiler": (Processor(BOTH, amx=True, intel=True, compiler=False), PLAIN, PLAIN),
}
here = pytest.mark.parametrize("processor, float32, bfloat16", KINDS.values(), ids=KINDS)


@pytest.fixture
def on(own_cache, monkeypatch):
    """Makes the processor at hand one of another kind, as far as `kernels` is told."""

    def become(processor):
        monkeypatch.setattr(kernels, "suit", lambda dtype: dtype in processor.suits)
        monkeypatch.setattr(kernels, "amx", lambda: processor.amx)
        monkeypatch.setattr(kernels, "INTEL", processor.intel)
        if not processor.compiler:
            monkeypatch.setenv("CXX", "no-such-compiler")

    return become


@here
@pytest.mark.filterwarnings("ignore:slower than it could be")
def test_which_attention(on, monkeypatch, processor, float32, bfloat16):
    on(processor)
    if processor.compiler:
        monkeypatch.setattr(kernels, "library", lambda: SimpleNamespace(knows_bfloat16=lambda: 1))
    assert model.attention_for(torch.float32) is float32
    assert model.attention_for(torch.bfloat16) is bfloat16
    assert model.attention_for(torch.float64) is PLAIN


@here
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.filterwarnings("ignore:slower than it could be")
def test_what_is_chosen_there_draws_the_same_here(on, monkeypatch, processor, float32, bfloat16, dtype):
    """With the attention of that kind at each shape, and its kernels or none. In bfloat16 the distance from float32 is
    that of the plain model, within a fifth; within a half with blocked attention, which rounds the scores too."""
    if not all(map(kernels.suit, processor.suits)) or processor.compiler and processor.suits and not kernels_here():
        pytest.skip("this processor does not have what that one has")
    on(processor)
    monkeypatch.setattr(kernels, "pays", lambda *shape: True)
    monkeypatch.setattr(model, "MIN_QUERIES", 1)
    fast = model.faster(tiny_sd().to(dtype=dtype))
    assert {module.attend for module in model.attentions(fast)} == {float32 if dtype == torch.float32 else bfloat16}
    fused = any(isinstance(module, PackedResBlock) for module in fast.vae.modules())
    assert fused == (dtype in processor.suits and processor.compiler)
    if dtype == torch.float32:
        assert_as_exact(fast, tiny_sd)
    else:
        exact, plain = latents(tiny_sd()), latents(tiny_sd().to(dtype=dtype))
        allowed = 1.5 if bfloat16 is BLOCKED else 1.2
        assert relative(latents(fast), exact) < allowed * relative(plain, exact)


@pytest.mark.parametrize("asked, compiled, allowed", [("1", 1, True), (None, 1, True), ("1", 0, True), ("1", 1, False)])
def test_attention_by_amx_is_asked_for(on, monkeypatch, asked, compiled, allowed):
    """And the compiler must know it, and the system allow it."""
    on(Processor(BOTH, amx=True, intel=True))
    knows = SimpleNamespace(knows_bfloat16=lambda: 1, knows_amx=lambda: compiled)
    monkeypatch.setattr(kernels, "library", lambda: knows)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    monkeypatch.delenv("PLAINSD_AMX_ATTENTION", raising=False)
    if asked:
        monkeypatch.setenv("PLAINSD_AMX_ATTENTION", asked)
    kernels.attend_by_amx.cache_clear()
    try:
        ours = bool(asked and compiled and allowed)
        assert model.attention_for(torch.bfloat16) is (OURS if ours else PLAIN)
        assert kernels.pays(torch.bfloat16, 10, 1024, 1024, 64) == ours
        assert not kernels.pays(torch.float32, 10, 1024, 1024, 64)
    finally:
        kernels.attend_by_amx.cache_clear()


def kernels_here():
    try:
        return bool(kernels.library())
    except kernels.Unavailable:
        return False


SHAPES = {  # heads, n, m, d: in float32 elsewhere, in bfloat16 elsewhere, on Intel
    (8, 4096, 4096, 40): (True, True, True),
    (10, 4096, 4096, 64): (True, True, True),
    (1, 4096, 4096, 512): (True, True, False),
    (10, 1024, 1024, 64): (True, True, False),
    (8, 4096, 77, 40): (True, True, False),
    (8, 64, 64, 160): (False, True, False),
    (2, 64, 64, 16): (False, False, False),
}


@pytest.mark.parametrize("shape, where", SHAPES.items(), ids=str)
def test_at_which_shapes_ours_is_the_faster_one(monkeypatch, shape, where):
    monkeypatch.setattr(kernels, "INTEL", False)
    assert tuple(kernels.pays(dtype, *shape) for dtype in BOTH) == where[:2]
    monkeypatch.setattr(kernels, "INTEL", True)
    assert [kernels.pays(dtype, *shape) for dtype in BOTH] == 2 * [where[2]]


@pytest.mark.parametrize("n, ours", [(4095, 0), (4096, 1)])
def test_attention_asks_whether_ours_is_the_faster_one(monkeypatch, n, ours):
    calls = []
    monkeypatch.setattr(kernels, "INTEL", True)
    monkeypatch.setattr(kernels, "_attention", lambda q, k, v: calls.append(q.shape) or q)
    kernels.attention(*torch.zeros(3, 1, 1, n, 2).unbind(0))
    assert len(calls) == ours


@pytest.mark.parametrize(
    "compiler, told", [("no-such-compiler", "no C.. compiler .no-such-compiler."), ("false", "false: exit 1")]
)
@pytest.mark.parametrize("dtype", BOTH)
def test_without_a_compiler_that_is_said(own_cache, monkeypatch, dtype, compiler, told):
    monkeypatch.setattr(kernels, "suit", lambda asked: asked in BOTH)
    monkeypatch.setenv("CXX", compiler)
    sd = tiny_sd().to(dtype=dtype)
    with pytest.warns(UserWarning, match=f"slower than it could be.*{told}") as said:
        model.faster(sd)
    assert len(said) == 1
    assert latents(sd).isfinite().all()
    assert [path.suffix for path in own_cache.iterdir()] == [".txt"]  # that it was said; no half of a kernel


def reasons(monkeypatch, compiler):
    """What a process with this compiler says about missing kernels."""
    monkeypatch.setattr(kernels, "suit", lambda asked: asked in BOTH)
    monkeypatch.setenv("CXX", compiler)
    for cached in (kernels.library, kernels.have_kernels):
        cached.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not kernels.have_kernels(torch.float32)
    return [str(one.message).split(": ")[1] for one in said]


def test_each_reason_is_said_once_on_a_machine(own_cache, monkeypatch):
    assert reasons(monkeypatch, "no-such-compiler") and reasons(monkeypatch, "no-such-compiler") == []
    assert reasons(monkeypatch, "false") and reasons(monkeypatch, "false") == []
    monkeypatch.setattr("socket.gethostname", lambda: "another machine with the same home")
    assert reasons(monkeypatch, "no-such-compiler")
    for path in own_cache.iterdir():
        path.unlink()
    assert reasons(monkeypatch, "no-such-compiler")


def test_each_process_says_it_where_nothing_can_be_kept(own_cache, monkeypatch):
    own_cache.write_text("a file in the folder's place")
    assert reasons(monkeypatch, "no-such-compiler") and reasons(monkeypatch, "no-such-compiler")


# ---- a PyTorch that was told to be on an older processor

ASKED = """
import json, torch, test_speed
from conftest import tiny_sd
from plainsd.speed import kernels, model
from plainsd.speed.packed import PackedLinear
test_speed.test_a_faster_model_draws_the_same({})
test_speed.test_faster_in_bfloat16_is_no_less_exact()
fast = {dtype: model.faster(tiny_sd().to(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
print(json.dumps({
    "suits": any(map(kernels.suit, fast)),
    "amx": kernels.amx(),
    "forms": [next(model.attentions(sd)).attend.__name__ for sd in fast.values()],
    "packed": [any(isinstance(module, PackedLinear) for module in sd.unet.modules()) for sd in fast.values()],
}))
"""


@pytest.mark.parametrize(
    "settings, packed",
    [
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, [True, False]),
        pytest.param(
            {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, [True, False], marks=pytest.mark.full
        ),
    ],
    ids=["AVX2", "SSE4.1"],
)
def test_on_an_older_processor(settings, packed):
    """oneDNN has no bfloat16 there, so such a model stays unpacked; and it draws the same."""
    tests = Path(__file__).parent
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tests), *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-c", ASKED], env=environment, cwd=tests.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "suits": False,
        "amx": False,
        "forms": ["scaled_dot_product_attention", "blocked_attention"],
        "packed": packed,
    }


def test_a_precision_that_onednn_does_not_have_here(monkeypatch):
    monkeypatch.setattr(model, "can_pack", lambda dtype: dtype == torch.float32)
    sd = tiny_sd().to(dtype=torch.bfloat16)
    with pytest.raises(UserError, match="cannot pack weights in torch.bfloat16 on cpu; choose float32"):
        model.pack(sd)
    model.faster(sd)
    kinds = {type(module) for module in sd.unet.modules()}
    assert Attention in kinds and PackedLinear not in kinds
