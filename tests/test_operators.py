"""The kernels as operators of PyTorch's: what torch.compile, torch.export and fake tensors make of them."""

import shutil

import pytest
import torch
from conftest import tiny_sd
from test_speed import relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from plainsd.models.layers import Attention, ResBlock
from plainsd.models.unet import FeedForward
from plainsd.speed import building, kernels, model, packed, training

WITH_KERNELS = pytest.mark.skipif(
    not kernels.suit(torch.float32) or shutil.which(building.compiler_command()[0]) is None,
    reason="kernels.cpp is for AVX-512, and needs a C++ compiler",
)
DTYPES = [torch.float32, torch.bfloat16]


def heads(*lengths, width=16, dtype=torch.float32):
    """q, k and v as they come from one projection: the heads of a position lie together."""
    return [torch.randn(2, n, 3, width).to(dtype).transpose(1, 2) for n in lengths]


def cases(dtype):
    """Arguments for each operator: shapes that fill no register, layouts other than the kernel's own."""
    maps, dy = torch.randn(3, 20, 5, 7).to(dtype), torch.randn(3, 20, 5, 7).to(dtype)
    weight, bias, x = torch.randn(20), torch.randn(20), torch.randn(3, 5, 74).to(dtype)
    weights = kernels.packed_weight(torch.randn(37, 74).to(dtype)) if kernels.have_kernels(dtype) else None
    q, k, v = heads(50, 63, 63, dtype=dtype)
    yield "attention", (q, k, v)
    yield "attention", (q.contiguous(), k.contiguous(), v.contiguous())
    for after, other in (("none", None), ("gelu", None), ("times", torch.randn(3, 5, 37).to(dtype))):
        yield "linear", (x, weights, 37, torch.randn(37).to(dtype), after, other)
    yield "linear", (x.transpose(0, 1), weights, 37, None, "none", None)
    yield "layer_norm", (x, torch.randn(74), torch.randn(74), 1e-5)
    yield "layer_norm", (x.transpose(0, 1), torch.randn(74), torch.randn(74), 1e-5)
    for form in (torch.channels_last, torch.contiguous_format):
        shift = torch.randn(3, 40).to(dtype)[:, ::2]
        yield "norm_silu", (maps.contiguous(memory_format=form), weight, bias, 5, 1e-5, True, shift)
        yield "norm_silu", (maps[:, :, :1, :1].contiguous(memory_format=form), weight, bias, 4, 1e-5, False, None)
        yield "norm_silu_kept", (maps.contiguous(memory_format=form), weight, bias, 5, 1e-5, True)
    yield "norm_silu_back", (maps, dy, weight, bias, torch.rand(2, 3, 20) + 0.5, 5, True)
    yield "geglu", (x,)
    yield "geglu_back", (x, torch.randn(3, 5, 37).to(dtype))
    if dtype == torch.bfloat16:
        yield "attention_kept", (q, k, v)
        yield "attention_back", (q, k, v, torch.randn_like(q), torch.rand(2, 3, 50), torch.randn_like(q))


@WITH_KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorchs_own_checks(dtype):
    """Schemas that say what is mutated, fake outputs as the true ones are, the same under AOT dispatch at any size."""
    if not kernels.suit(dtype):
        pytest.skip("not in this precision on this processor")
    torch.manual_seed(0)
    checked = set()
    for name, arguments in cases(dtype):
        torch.library.opcheck(getattr(torch.ops.plainsd, name).default, arguments)
        checked.add(name)
    registered = {
        name.removeprefix("plainsd::") for name in torch._C._dispatch_get_all_op_names() if "plainsd::" in name
    }
    assert {name.split(".")[0] for name in registered} == checked | {
        name for name in ("attention_kept", "attention_back") if dtype == torch.float32
    }


@WITH_KERNELS
def test_a_plain_call_skips_the_dispatcher_and_a_fake_one_needs_no_kernel(monkeypatch):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = heads(50, 63, 63)
    with Watch():
        kernels._attention(q, k, v)
        kernels.trained_geglu(torch.randn(3, 74))
    assert seen and not [name for name in seen if "plainsd" in name]
    monkeypatch.setattr(kernels, "library", None)
    with FakeTensorMode() as mode:
        fake = kernels._attention(*(mode.from_tensor(x) for x in (q, k, v)))
    assert fake.shape == q.shape and fake.stride() == kernels._empty(q).stride()


# ---- a packed model, with kernels and without


def inputs(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 77, 32, generator=generator)
    return x, torch.tensor(500.0), context


@pytest.fixture(params=["with kernels", "without"])
def packed_unet(request, monkeypatch):
    """Its convolutions are laid out for maps of 8x8: another size lays them out anew, which no graph can."""
    monkeypatch.setattr(kernels, "pays", lambda *shape: True)
    if request.param == "without":  # as on a processor without AVX-512, or without a compiler
        for place in (kernels, packed, model):
            monkeypatch.setattr(place, "have_kernels", lambda dtype: False)
    unet = model.faster(tiny_sd()).unet
    with torch.no_grad():
        unet(*inputs())
    torch._dynamo.reset()
    return unet


def ours_in(graph):
    return {str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("plainsd.")}


EXPECTED = {"attention", "linear", "layer_norm", "norm_silu"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_a_packed_unet_is_one_graph(packed_unet, backend):
    """No break (fullgraph), no number of one call left in the graph: other maps and texts, and the first again."""
    graphs = []

    def counted(graph, example):
        graphs.append(graph.graph)
        return graph.forward if backend == "eager" else torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(packed_unet, fullgraph=True, backend=counted)
    for seed in (0, 1, 0):
        expected = packed_unet(*inputs(seed=seed))
        assert relative(compiled(*inputs(seed=seed)), expected) < 1e-6
    assert len(graphs) == 1
    if kernels.have_kernels(torch.float32):
        assert {str(node.target).split(".")[1] for node in graphs[0].nodes if "plainsd" in str(node.target)} == EXPECTED


@torch.no_grad()
def test_a_packed_unet_can_be_exported(packed_unet):
    exported = torch.export.export(packed_unet, inputs())
    for seed in (0, 1):
        assert relative(exported.module()(*inputs(seed=seed)), packed_unet(*inputs(seed=seed))) < 1e-6
    if kernels.have_kernels(torch.float32):
        assert ours_in(exported.graph) == EXPECTED


# ---- training


@pytest.mark.skipif(not kernels.suit(torch.bfloat16), reason="a processor without AVX512_BF16")
@WITH_KERNELS
@pytest.mark.parametrize("kind", [ResBlock, FeedForward, Attention])
def test_a_block_in_training_is_one_graph_with_its_gradients(kind, monkeypatch):
    monkeypatch.setattr(kernels, "amx", lambda: False)
    monkeypatch.setattr(kernels, "MIN_TRAINING_SIZE", 0)
    torch.manual_seed(0)
    unet = tiny_sd().unet
    with training.trained_faster(unet):
        block = next(module for module in unet.modules() if isinstance(module, kind))
        if kind is ResBlock:
            given = torch.randn(2, block.conv1.in_channels, 5, 7), torch.randn(2, block.emb.in_features)
        else:
            given = (torch.randn(2, 33, 32),)
        block = block.bfloat16()
        given = [x.bfloat16().requires_grad_() for x in given]

        def gradients(run):
            for leaf in (*given, *block.parameters()):
                leaf.grad = None
            run(*given).float().square().mean().backward()
            return [leaf.grad.clone() for leaf in (*given, *block.parameters()) if leaf.grad is not None]

        expected = gradients(block)
        torch._dynamo.reset()
        found = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert len(found) == len(expected) > 1
    for ours, right in zip(found, expected, strict=True):
        assert relative(ours.float(), right.float()) < 1e-2
