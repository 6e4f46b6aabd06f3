"""Adapters of every kind that LyCORIS trains, against lycoris-lora itself: its files and its merged weights."""

import copy

import pytest
import torch
from conftest import tiny_sd
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork
from lycoris.modules import LohaModule, LokrModule, get_module, make_module
from safetensors.torch import save_file
from transformers import CLIPTextModel

import plainsd
from plainsd.adapters.kinds import Butterfly, Difference, Gains, Global, Rotation
from plainsd.adapters.layers import Adapted, Hadamard, Kronecker, LowRank
from plainsd.adapters.lora import add_lora, attached, bases, merge, save_lora
from plainsd.adapters.names import adaptable_networks, known_names
from plainsd.errors import UserError


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The tiny model's UNet and text encoder as diffusers and transformers have them, in float64."""
    folder = tmp_path_factory.mktemp("model")
    plainsd.save(tiny_sd().to(dtype=torch.float64), folder / "sd")
    unet = UNet2DConditionModel.from_pretrained(folder / "sd/unet", torch_dtype=torch.float64)
    return unet, CLIPTextModel.from_pretrained(folder / "sd/text_encoder", torch_dtype=torch.float64)


@pytest.fixture
def sd():
    return tiny_sd().to(dtype=torch.float64)


@pytest.fixture
def double(monkeypatch):
    """LyCORIS turns in float32 even where all else is float64: here it is as precise as its formula."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *sizes, **more: eye(*sizes, **{"dtype": torch.float64, **more}))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUT = randn(2, 4, 8, 8), 500.0, randn(2, 5, 32, seed=1)
IDS = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(1))
SOME = ["Attention", "ResnetBlock2D", "CLIPEncoderLayer", "CLIPAttention"]


@torch.no_grad()
def ours(sd):
    return [sd.unet(*INPUT), sd.text_encoders[0](IDS).final]


def network(module, algo, strength=1.0, **options):
    """LyCORIS' own network over a copy of a module, with random values."""
    kind = type("Some", (LycorisNetwork,), {"TARGET_REPLACE_MODULE": SOME})
    options = {"lora_dim": 4, "alpha": 2, "conv_lora_dim": 4, "conv_alpha": 3, **options}
    made = kind(copy.deepcopy(module), strength, network_module=algo, **options)
    for index, lora in enumerate(made.loras):
        for place, parameter in enumerate(lora.to(torch.float64).parameters()):
            parameter.data = 0.3 * randn(*parameter.shape, seed=9 * index + place) + (parameter.data == 1)
    return made.eval()


def tensors_of(made):
    """As LyCORIS saves them, which is after it has put them on."""
    made.apply_to()
    return {name: tensor.detach().contiguous() for name, tensor in made.state_dict().items()}


def same(one, other, rel):
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= rel * b.norm()


CASES = {  # options for LyCORIS; what the file is for ours
    "full": ({}, Difference),
    "norm": ({"algo": "full", "train_norm": True}, Difference),
    "locon": ({}, LowRank),
    "loha": ({}, Hadamard),
    "loha, Tucker": ({"algo": "loha", "use_tucker": True}, Hadamard),
    "lokr": ({}, Kronecker),
    "lokr, whole": ({"algo": "lokr", "full_matrix": True}, Kronecker),
    "glora": ({}, Global),
    "diag-oft": ({}, Rotation),
    "diag-oft, rescaled": ({"algo": "diag-oft", "rescaled": True}, Rotation),
    "diag-oft, bound": ({"algo": "diag-oft", "constraint": 2**-10}, Rotation),
    "boft": ({}, Butterfly),
    "boft, rescaled and bound": ({"algo": "boft", "rescaled": True, "constraint": 2**-10}, Butterfly),
    "ia3": ({}, Gains),
    "ia3, inputs": ({"algo": "ia3", "train_on_input": True}, Gains),
}


def merged_by_them(lora, strength):
    """LyCORIS 4.1.3 multiplies LoHas and LoKrs by their scale twice when it merges them, and once when it runs them."""
    shape = lora.org_weight.shape
    if isinstance(lora, LohaModule | LokrModule):
        return [lora.org_weight + lora.get_weight(shape) * strength]
    return [one.clone() for one in lora.get_merged_weight(strength, shape) if one is not None]


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_theirs(theirs, sd, tmp_path, double, case, strength):
    """Every weight and bias of a file with LyCORIS' own prefix; kept apart and merged it does the same."""
    options, kind = CASES[case]
    tensors, known, expected = {}, known_names(sd), {}
    for module in theirs:
        made = network(module, **{"algo": case, **options}, strength=strength)
        expected |= {known[lora.lora_name]: merged_by_them(lora, strength) for lora in made.loras}
        tensors |= tensors_of(made)
    save_file(tensors, tmp_path / "it.safetensors")
    bare = ours(sd)
    lora = add_lora(sd, tmp_path / "it.safetensors", strength)
    assert {type(adapter) for adapter in lora.adapters.values()} == {kind} and len(lora.adapters) > 30
    assert {part for part, _ in lora.adapters} == {"unet", "text_encoder"}
    for place, base in bases(sd).items():
        for mine, their in zip(base.adapted([lora.name]), expected[place], strict=False):
            assert (mine - their.view_as(mine)).norm() <= 1e-12 * their.norm()
    apart = ours(sd)
    merge([lora])
    assert not attached(sd) and not any(isinstance(module, Adapted) for module in sd.unet.modules())
    same(ours(sd), apart, 1e-12)
    assert all((one - other).norm() > 1e-3 * other.norm() for one, other in zip(apart, bare, strict=True))


@torch.no_grad()
def test_dylora_is_a_lora_to_its_readers(theirs, sd, tmp_path):
    """Its files have the whole rank, as LoRA's; LyCORIS reads them as such too."""
    made = network(theirs[0], "dylora", block_size=2)
    tensors = tensors_of(made)
    save_file(tensors, tmp_path / "it.safetensors")
    lora = add_lora(sd, tmp_path / "it.safetensors")
    known = known_names(sd)
    for one in made.loras:
        part, name = known[one.lora_name]
        own = adaptable_networks(sd)[part].get_submodule(name).weight
        change = one.scale * torch.cat(list(one.up_list), 1) @ torch.cat(list(one.down_list))
        torch.testing.assert_close(lora.adapters[part, name].change(own).flatten(1), change, rtol=1e-12, atol=1e-12)
        if one.module_type == "linear":  # LyCORIS 4.1.3 cannot read its own files of convolutions again
            kind, weights = get_module(tensors, one.lora_name)
            their = make_module(kind, weights, one.lora_name, one.org_module[0]).to(torch.float64)
            torch.testing.assert_close(their.get_diff_weight()[0], change, rtol=1e-4, atol=1e-6)  # float32 on its way


def test_a_tlora_is_refused(theirs, sd, tmp_path):
    """Which rows of it count depends on the timestep."""
    save_file(tensors_of(network(theirs[1], "tlora")), tmp_path / "it.safetensors")
    with pytest.raises(UserError, match="not supported, T-LoRA; merge it"):
        add_lora(sd, tmp_path / "it.safetensors")


def test_what_is_not_low_rank_is_not_saved_as_a_lora(theirs, sd, tmp_path):
    save_file(tensors_of(network(theirs[1], "full")), tmp_path / "it.safetensors")
    add_lora(sd, tmp_path / "it.safetensors")
    with pytest.raises(UserError, match="only read here; keep its own file, or bake it in"):
        save_lora(sd, tmp_path / "again.safetensors")
