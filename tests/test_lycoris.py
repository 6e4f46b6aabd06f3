"""LoHa and LoKr, trained: gradients and files beside lycoris-lora's own modules, in float64."""

import pytest
import torch
from conftest import TINY_XL, tiny_sd
from diffusers import StableDiffusionPipeline
from lycoris import create_lycoris_from_weights
from lycoris.functional import factorization
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora import differ, ours, randn, same, theirs
from torch import nn

import plainsd
from plainsd.adapters.layers import Hadamard, Kronecker, attach
from plainsd.adapters.lora import add_lora, inject, save_lora
from plainsd.adapters.new import halves, new_adapter
from plainsd.errors import UserError

KINDS = {"loha": (LohaModule, Hadamard, "hada_"), "lokr": (LokrModule, Kronecker, "lokr_")}
BASES = {
    "linear": (lambda: nn.Linear(24, 40), (2, 5, 24)),
    "convolution": (lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 7, 6)),
    "1x1": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 5, 5)),
}


@pytest.fixture
def sd():
    return tiny_sd().to(dtype=torch.float64)


def test_the_sides_of_a_kronecker_product_are_lycoris():
    counts = [*range(1, 400), 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 5120, 10240]
    for count in counts:
        assert halves(count) == factorization(count)
        assert all(halves(count, factor) == factorization(count, factor) for factor in (1, 2, 3, 4, 7, 8, 16, 64))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind, factor, rank", [("loha", None, 3), ("lokr", None, 2), ("lokr", 2, 3), ("lokr", 4, 64)])
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
def test_outputs_and_gradients_are_lycoris(base, kind, factor, rank, dora):
    """Of a loss on one layer's output, to every factor and to the input."""
    torch.manual_seed(0)
    make, shape = BASES[base]
    layer, other = make().double().requires_grad_(False), make().double().requires_grad_(False)
    other.load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(1)
    mine = new_adapter(kind, layer, rank, 1.7, factor, dora=dora, generator=generator)
    attach(layer, "mine", mine)
    twin = KINDS[kind][0]("twin", other, lora_dim=rank, alpha=1.7, factor=factor or -1, weight_decompose=dora)
    twin.double().apply_to()
    pairs = {}
    for number, (name, value) in enumerate(mine.named_parameters()):
        value.data += 0.3 * randn(*value.shape, seed=number)
        pairs[name] = twin.dora_scale if name == "magnitude" else getattr(twin, KINDS[kind][2] + name)
        if name == "magnitude":  # it is made in float32, and no parameter any more after .float()
            twin.dora_scale = pairs[name] = nn.Parameter(value.data.clone())
        assert pairs[name].shape == value.shape
        pairs[name].data = value.data.clone()
    assert {name for name, _ in twin.named_parameters()} == {
        "dora_scale" if name == "magnitude" else KINDS[kind][2] + name for name in pairs
    }
    x, y = (randn(*shape, seed=9).requires_grad_() for _ in range(2))
    (layer(x) ** 3).sum().backward()
    (other(y) ** 3).sum().backward()
    torch.testing.assert_close(layer(x), other(y), rtol=1e-12, atol=1e-12)
    for one, two in [(x, y), *((dict(mine.named_parameters())[name], pairs[name]) for name in pairs)]:
        assert one.grad.norm() > 0
        assert (one.grad - two.grad).norm() <= 1e-12 * two.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_new_one_begins_is_lycoris(kind):
    """One factor zero, the others with LyCORIS' spread, alphas and scales as there."""
    torch.manual_seed(0)
    base = nn.Linear(640, 1280)
    mine = new_adapter(kind, base, 8, 3.0, generator=torch.Generator().manual_seed(0))
    twin = KINDS[kind][0]("twin", base, lora_dim=8, alpha=3.0)
    for name, value in mine.named_parameters():
        other = getattr(twin, KINDS[kind][2] + name)
        assert value.shape == other.shape and value.any() == other.any()
        assert abs(value.std() - other.std()) <= 0.1 * other.std()
    assert mine.scale == pytest.approx(twin.scale) and mine.alpha == float(twin.alpha)
    whole, twin = new_adapter("lokr", base, 64, 3.0), LokrModule("twin", base, lora_dim=64, alpha=3.0)
    assert whole.scale == twin.scale == 1.0 and whole.alpha == float(twin.alpha) == 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
def test_a_new_one_changes_nothing_yet(sd, kind, dora):
    bare = ours(sd)
    lora = inject(sd, 2, targets="all", text=True, kind=kind, dora=dora)
    assert all(parameter.requires_grad for parameter in lora.parameters())
    if dora:
        same(ours(sd), bare, 1e-12)
    else:
        assert all(torch.equal(a, b) for a, b in zip(ours(sd), bare, strict=True))


def moved(sd, kind, **options):
    generator = torch.Generator().manual_seed(0)
    lora = inject(
        sd, **{"rank": 2, "alpha": 1.5, "targets": "all", "text": True} | options, kind=kind, generator=generator
    )
    for number, parameter in enumerate(lora.parameters()):
        parameter.data += 0.1 * randn(*parameter.shape, seed=number)
    return lora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rank": 64}, {"dora": True}], ids=["", "whole", "DoRA"])
def test_what_is_saved_comes_back(sd, tmp_path, kind, options):
    moved(sd, kind, **options)
    save_lora(sd, tmp_path / "mine.safetensors", metadata={"ss_output_name": "mine"})
    fresh = tiny_sd().to(dtype=torch.float64)
    bare = ours(fresh)
    add_lora(fresh, tmp_path / "mine.safetensors")
    same(ours(fresh), ours(sd), 1e-12)
    differ(ours(fresh), bare)
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["ss_network_module"] == "lycoris.kohya" and kind in notes["ss_network_args"]
    assert notes["ss_output_name"] == "mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rank": 64}, {"dora": True}], ids=["", "whole", "DoRA"])
def test_lycoris_reads_what_is_saved(tmp_path, kind, options):
    """Its own loader, on diffusers' networks; it asks for a prefix of its own. Of a LoKr of conv_in (4 to 32 channels)
    lycoris-lora 4.1.3 cannot read its own files either: it takes the kernel's sides for channels."""
    sd = tiny_sd().to(dtype=torch.float64)
    plainsd.save(sd, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float64, safety_checker=None)
    lora, bare = moved(sd, kind, targets=["*.*"], **options), theirs(pipe)
    save_lora(sd, tmp_path / "mine.safetensors")
    tensors, count = load_file(tmp_path / "mine.safetensors"), 0
    for prefix, network in (("lora_unet_", pipe.unet), ("lora_te_", pipe.text_encoder)):
        bare_names = not any(name.startswith("text_model") for name, _ in network.named_modules())
        prefix += "text_model_" if prefix == "lora_te_" and bare_names else ""
        own = {f"lycoris_{name.removeprefix(prefix)}": t for name, t in tensors.items() if name.startswith(prefix)}
        torch.set_default_dtype(torch.float64)  # it makes modules in the default, and copies the numbers into them
        try:
            wrapper, _ = create_lycoris_from_weights(1.0, None, network, weights_sd=own)
        finally:
            torch.set_default_dtype(torch.float32)
        wrapper.apply_to()
        count += len(wrapper.loras)
    assert count == len(lora.adapters) > 40
    same(theirs(pipe), ours(sd), 1e-6 if options.get("dora") else 1e-11)  # it keeps DoRA's lengths in float32
    differ(theirs(pipe), bare)


@pytest.mark.parametrize("kind", KINDS)
def test_sdxl(tmp_path, kind):
    sd, fresh = (tiny_sd(TINY_XL).to(dtype=torch.float64) for _ in range(2))
    moved(sd, kind)
    save_lora(sd, tmp_path / "mine.safetensors")
    assert any(name.startswith("lora_unet_input_blocks_") for name in load_file(tmp_path / "mine.safetensors"))
    add_lora(fresh, tmp_path / "mine.safetensors")
    same(ours(fresh), ours(sd), 1e-12)


def test_what_cannot_be(sd, tmp_path):
    for said, wrong in {
        "unknown kind of LoRA 'lorc'; did you mean 'lora'": lambda: inject(sd, 2, kind="lorc"),
        "factor 0 for a lokr": lambda: inject(sd, 2, kind="lokr", factor=0),
        "factor 8 for a loha": lambda: inject(sd, 2, kind="loha", factor=8),
    }.items():
        with pytest.raises(UserError, match=said):
            wrong()
    for kind in KINDS:
        alone = tiny_sd()
        moved(alone, kind)
        for naming in ("peft", "diffusers"):
            with pytest.raises(UserError, match="cannot tell .LoHa, LoKr"):
                save_lora(alone, tmp_path / "no.safetensors", naming)
    assert not list(tmp_path.iterdir())
