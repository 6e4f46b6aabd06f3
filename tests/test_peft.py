"""Files of PEFT, against PEFT itself: kinds beside LoRA, patterns, beginnings that are in the base, DoRA's order."""

import copy
import json
import shutil
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import tiny_sd
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import plainsd
from plainsd.adapters.kinds import Gains, InputButterfly, InputRotation
from plainsd.adapters.lora import add_lora, attached, bases, merge
from plainsd.adapters.names import known_names
from plainsd.adapters.reading import open_lora
from plainsd.errors import UserError
from plainsd.reports.info import info


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    plainsd.save(tiny_sd().to(dtype=torch.float64), folder / "sd")
    return UNet2DConditionModel.from_pretrained(folder / "sd/unet", torch_dtype=torch.float64)


@pytest.fixture
def sd():
    return tiny_sd().to(dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUT = randn(2, 4, 8, 8), 500.0, randn(2, 5, 32, seed=1)


def same(one, other, rel):
    assert (one - other).norm() <= rel * other.norm()


def saved(unet, config, folder, dtype=torch.float64):
    """PEFT's adapter over a copy of the network, with random values, saved as PEFT saves it."""
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(unet).to(dtype), config).to(dtype)
    adapted.save_pretrained(folder)
    return adapted.eval()


@torch.no_grad()
def compare(adapted, sd, lora, rel=1e-12):
    """Outputs kept apart and merged, and every weight and bias that PEFT merges."""
    known, tables = known_names(sd), bases(sd)
    inputs = tuple(one.to(sd.dtype) if isinstance(one, torch.Tensor) else one for one in INPUT)
    bare = tiny_sd().to(dtype=sd.dtype).unet(*inputs)
    right, apart = adapted(*inputs).sample, sd.unet(*inputs)
    same(apart, right, max(rel, 1e-11))
    assert (apart - bare).norm() > 1e-3 * bare.norm()
    adapted.merge_adapter()
    count = 0
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            weight, bias = tables[known[name]].adapted([lora.name])
            same(weight, module.base_layer.weight.view_as(weight), rel)
            if bias is not None:
                same(bias, module.base_layer.bias, rel)
            count += 1
    assert count == len(lora.adapters) > 3
    merge([lora])
    same(sd.unet(*inputs), apart, rel)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_cayley_neumann_terms": 3}, {"num_cayley_neumann_terms": 7}, {"use_cayley_neumann": False},
     {"block_share": True}, {"coft": True, "eps": 0.05}],
)  # fmt: skip
def test_oft(unet, sd, tmp_path, options):
    targets = ["to_q", "to_k", "ff.net.2", "proj_in"]
    config = peft.OFTConfig(oft_block_size=8, target_modules=targets, init_weights=False, **options)
    adapted = saved(unet, config, tmp_path)
    lora = add_lora(sd, tmp_path)
    assert {type(adapter) for adapter in lora.adapters.values()} == {InputRotation}
    compare(adapted, sd, lora, rel=1e-8 if "coft" in options else 1e-12)  # PEFT has the square root in float32


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft(unet, sd, tmp_path, monkeypatch, factors):
    """More than one butterfly factor needs PEFT's kernel for GPUs: here blocks come onto their diagonal without it."""
    diagonal = SimpleNamespace(forward=lambda blocks: [torch.stack([torch.block_diag(*turn) for turn in blocks])])
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", diagonal)
    config = peft.BOFTConfig(
        boft_block_size=4,
        boft_n_butterfly_factor=factors,
        target_modules=["to_q", "ff.net.2", "proj_in", "conv1"],
        init_weights=False,
    )
    adapted = saved(unet, config, tmp_path)
    lora = add_lora(sd, tmp_path)
    assert {type(adapter) for adapter in lora.adapters.values()} == {InputButterfly}
    compare(adapted, sd, lora)


def test_ia3(unet, sd, tmp_path):
    targets, inputs = ["to_k", "to_v", "ff.net.2", "proj_in", "conv1", "conv2"], ["ff.net.2", "conv1"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, init_ia3_weights=False)
    adapted = saved(unet, config, tmp_path)
    lora = add_lora(sd, tmp_path)
    assert {type(adapter) for adapter in lora.adapters.values()} == {Gains}
    compare(adapted, sd, lora)


def test_strengths_of_turns_and_gains_are_a_straight_line(unet, sd, tmp_path):
    """PEFT has none."""
    saved(unet, peft.IA3Config(target_modules=["to_k"], feedforward_modules=[], init_ia3_weights=False), tmp_path)
    lora = add_lora(sd, tmp_path)
    for base in bases(sd).values():
        whole = base.adapted([lora.name])[0]
        lora.set_strength(0.25)
        part = base.adapted([lora.name])[0]
        torch.testing.assert_close(part, base.weight + 0.25 * (whole - base.weight), rtol=1e-12, atol=1e-12)
        lora.set_strength(1)


def test_what_cannot_be_told_without_settings(unet, sd, tmp_path):
    saved(unet, peft.OFTConfig(oft_block_size=8, target_modules=["to_q"]), tmp_path / "oft")
    (tmp_path / "oft/adapter_config.json").unlink()
    with pytest.raises(UserError, match="without its settings.*adapter_config.json"):
        add_lora(sd, tmp_path / "oft")
    saved(unet, peft.IA3Config(target_modules=["conv2"], feedforward_modules=[]), tmp_path / "ia3")
    (tmp_path / "ia3/adapter_config.json").unlink()
    with pytest.raises(UserError, match="inputs or outputs.*adapter_config.json"):
        add_lora(sd, tmp_path / "ia3")
    saved(unet, peft.OFTConfig(oft_block_size=8, target_modules=["conv1"]), tmp_path / "conv")
    with pytest.raises(UserError, match="OFT of PEFT for a convolution"):
        add_lora(sd, tmp_path / "conv")
    assert not attached(sd)


# --- patterns --------------------------------------------------------------------------------------------------------

PATTERNS = {  # regular expressions, the first that fits counts; LoKr's factors are whole where the rank is large
    "rank_pattern": {r"down_blocks\.\d+\..*to_q": 2, "^mid_block.*": 64, "to_q": 3},
    "alpha_pattern": {r"(up|down)_blocks\.[01]\.attentions\..*attn1\.to_[qk]": 5, "to_k": 1},
}


@pytest.mark.parametrize("kind", [LoraConfig, peft.LoHaConfig, peft.LoKrConfig])
def test_patterns(unet, sd, tmp_path, kind):
    lora = kind is LoraConfig
    options = {"lora_alpha": 7, "init_lora_weights": False} if lora else {"alpha": 7, "init_weights": False}
    adapted = saved(unet, kind(r=4, target_modules=["to_q", "to_k", "conv1"], **options, **PATTERNS), tmp_path)
    added = add_lora(sd, tmp_path)
    assert len({(adapter.rank, adapter.alpha) for adapter in added.adapters.values()}) >= 4
    compare(adapted, sd, added, rel=1e-7 if kind is peft.LoHaConfig else 1e-12)  # whose scale PEFT has in float32
    told = info(tmp_path)
    assert "7 (" in told and "5 (" in told and "64 (" in told and "the same as the rank" not in told


def test_a_renamed_file_beside_its_settings(unet, sd, tmp_path):
    adapted = saved(unet, LoraConfig(r=4, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    compare(adapted, sd, add_lora(sd, tmp_path / "mine.safetensors"))
    assert "alpha           7" in info(tmp_path / "mine.safetensors")
    saved(unet, LoraConfig(r=2, target_modules=["to_q"]), tmp_path / "other")
    shutil.copy(tmp_path / "other/adapter_model.safetensors", tmp_path / "stray.safetensors")
    with pytest.raises(UserError, match="is of rank 2, and .*adapter_config.json says 4; they do not belong together"):
        add_lora(sd, tmp_path / "stray.safetensors")


# --- beginnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "gaussian"])
def test_a_lora_that_began_in_the_base(unet, tmp_path, start):
    """The part of the base with which it began is taken out of the base, as PEFT does on loading."""
    sd = tiny_sd()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=start)
    adapted = saved(unet, config, tmp_path / "start", torch.float32)
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data += 0.1 * randn(*parameter.shape, seed=index).float()
    adapted.save_pretrained(tmp_path)
    lora = add_lora(sd, tmp_path)
    assert {adapter.rank for adapter in lora.adapters.values()} == {8 if start in ("pissa", "olora") else 4}
    compare(adapted, sd, lora, rel=1e-5)


# --- DoRA ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("order", [("plain", "dora"), ("dora", "plain"), ("dora",)])
def test_dora_at_other_strengths_and_in_its_order(unet, sd, tmp_path, order):
    """As diffusers draws with both at once."""
    unet, targets = copy.deepcopy(unet), ["to_q", "conv1", "proj_in"]
    configs = {
        "plain": LoraConfig(r=3, lora_alpha=5, target_modules=targets),
        "dora": LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True),
    }
    strengths = {"plain": 0.5, "dora": 0.7}
    for name, config in configs.items():
        unet.add_adapter(config, name)
    for index, (name, parameter) in enumerate(unet.to(torch.float64).named_parameters()):
        if "lora_" in name:
            parameter.data += 0.2 * randn(*parameter.shape, seed=index)
    for name, config in configs.items():
        tensors = {
            f"unet.{key}": one.contiguous() for key, one in get_peft_model_state_dict(unet, adapter_name=name).items()
        }
        notes = json.dumps({"unet.r": config.r, "unet.lora_alpha": config.lora_alpha})
        save_file(tensors, tmp_path / f"{name}.safetensors", {"lora_adapter_metadata": notes})
    unet.set_adapters(list(order), [strengths[name] for name in order])
    right = unet(*INPUT).sample
    loras = [add_lora(sd, tmp_path / f"{name}.safetensors", strengths[name]) for name in order]
    same(sd.unet(*INPUT), right, 1e-11)
    merge(loras)
    same(sd.unet(*INPUT), right, 1e-11)


@torch.no_grad()
def test_a_dora_at_strength_0_keeps_its_lengths(unet, sd, tmp_path):
    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
    adapted = saved(unet, config, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * 2 if "magnitude" in name else tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert adapted is not None
    lora = add_lora(sd, tmp_path, 0)
    for base in bases(sd).values():
        torch.testing.assert_close(base.adapted([lora.name])[0], 2 * base.weight, rtol=1e-12, atol=1e-12)


# --- what is refused -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(32, 32)

    def forward(self, x):
        return self.to_q(x)


OTHERS = {
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["to_q"], total_step=10),
    "RandLoRA": peft.RandLoraConfig(target_modules=["to_q"], r=4),
    "DeLoRA": peft.DeloraConfig(target_modules=["to_q"]),
    "VeRA": peft.VeraConfig(target_modules=["to_q"]),
    "HRA": peft.HRAConfig(target_modules=["to_q"]),
    "MiSS": peft.MissConfig(target_modules=["to_q"], r=4),
    "VB-LoRA": peft.VBLoRAConfig(target_modules=["to_q"], vector_length=4, num_vectors=8, topk=2),
    "FourierFT": peft.FourierFTConfig(target_modules=["to_q"], n_frequency=10),
    "PEFT's GLoRA": peft.GloraConfig(target_modules=["to_q"]),
    "shira": peft.ShiraConfig(target_modules=["to_q"], r=2),
    "waveft": peft.WaveFTConfig(target_modules=["to_q"], n_frequency=10),
    "c3a": peft.C3AConfig(target_modules=["to_q"], block_size=8),
    "road": peft.RoadConfig(target_modules=["to_q"], group_size=8),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_refused_by_name(tmp_path, name):
    """With PEFT's settings beside the file, and without."""
    get_peft_model(Small(), OTHERS[name]).save_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=f"is not supported, {name}; merge it") as caught:
            open_lora(tmp_path)
        assert "\n" not in str(caught.value)
        assert f"not supported, {name}" in info(tmp_path)
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)


# --- without settings ------------------------------------------------------------------------------------------------

SCALED = {
    "LoRA": LoraConfig(r=4, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False),
    "LoHa": peft.LoHaConfig(r=4, alpha=7, target_modules=["to_q"], init_weights=False),
    "LoKr": peft.LoKrConfig(r=64, alpha=7, target_modules=["to_q"], init_weights=False),  # whole factors
}


@pytest.mark.parametrize("kind", SCALED)
def test_an_alpha_that_is_assumed_is_said(unet, sd, tmp_path, kind):
    saved(unet, SCALED[kind], tmp_path)
    with warnings.catch_warnings(action="error"):
        assert {adapter.alpha for adapter in add_lora(sd, tmp_path).adapters.values()} == {7.0}
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="taken to be its rank.*put the adapter_config.json that came with it") as said:
        lora = add_lora(sd, tmp_path)
    assert len({str(one.message) for one in said}) == 1
    assert {adapter.scale for adapter in lora.adapters.values()} == {1.0}


def test_a_scale_of_whole_factors_is_in_the_file(unet, sd, tmp_path):
    """No reader takes the alpha of a LoKr whose factors are both whole: LyCORIS, A1111, ComfyUI."""
    saved(unet, SCALED["LoKr"], tmp_path / "theirs")
    first = add_lora(sd, tmp_path / "theirs")
    assert {adapter.scale for adapter in first.adapters.values()} == {7 / 64}
    plainsd.save_lora(sd, tmp_path / "x.safetensors", lora=first, dtype=torch.float64)
    again = add_lora(sd, tmp_path / "x.safetensors")
    for place, adapter in again.adapters.items():
        weight = torch.zeros(adapter.shape, dtype=torch.float64)
        same(adapter.change(weight), first.adapters[place].change(weight), 1e-12)


def test_no_alpha_is_missed_in_the_files_of_others(unet, sd, tmp_path):
    """Old ones of diffusers have none, as it is the rank; its new ones have settings, kohya's the alphas themselves."""
    saved(unet, SCALED["LoRA"], tmp_path / "peft")
    unet = copy.deepcopy(unet)
    unet.add_adapter(SCALED["LoRA"])
    layers = get_peft_model_state_dict(unet)
    unet.save_lora_adapter(tmp_path / "network")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "pipeline", unet_lora_layers=layers)
    old = {f"unet.{name.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}": t for name, t in layers.items()}
    save_file(old, tmp_path / "old.safetensors")
    ours = add_lora(sd, tmp_path / "peft")
    for naming in ("kohya", "peft", "diffusers"):
        plainsd.save_lora(sd, tmp_path / f"{naming}.safetensors", naming, lora=ours)
    theirs = load_file(tmp_path / "peft/adapter_model.safetensors")
    alphas = {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(7.0) for name in theirs if "lora_A" in name}
    save_file(theirs | alphas, tmp_path / "alphas.safetensors")
    places = (
        "network",
        "pipeline",
        *(f"{name}.safetensors" for name in ("old", "kohya", "peft", "diffusers", "alphas")),
    )
    with warnings.catch_warnings(action="error"):
        found = [add_lora(sd, tmp_path / name) for name in places]
    alphas = [{adapter.alpha for adapter in one.adapters.values()} for one in found]
    assert alphas == [{7.0}, {4.0}, {4.0}, {7.0}, {7.0}, {4.0}, {7.0}]
