"""LoRAs: every dialect against W + s * alpha/r * B A in float64, to diffusers and back, training, bad files."""

import json
import re
from math import prod

import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, tiny_sd
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import plainsd
from plainsd.adapters.baking import baked
from plainsd.adapters.embeddings import vectors_of
from plainsd.adapters.layers import LoraConv, LoraLinear, LowRank, attach
from plainsd.adapters.lora import (
    TARGETS,
    add_lora,
    attached,
    find_lora,
    inject,
    load_lora_state,
    lora_state,
    merge,
    save_lora,
    targeted,
)
from plainsd.adapters.names import adaptable_networks, dotted_name, known_names, kohya_name, modules_of
from plainsd.errors import UserError
from plainsd.files.convert import read
from plainsd.files.stored import empty
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.variants import SD2_UNET, VARIANTS, VIT_BIGG, VIT_L, XL_UNET
from plainsd.pictures.conditioning import size_vector
from plainsd.reports.info import info

SIZES = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny models in float64, as diffusers folders."""
    place = tmp_path_factory.mktemp("models")
    for name, variant in (("sd", TINY), ("xl", TINY_XL)):
        plainsd.save(tiny_sd(variant).to(dtype=torch.float64), place / name)
    return place


def pipeline(folder, dtype=torch.float64):
    kind = StableDiffusionXLPipeline if "xl" in folder.name else StableDiffusionPipeline
    unsafe = {} if "xl" in folder.name else {"safety_checker": None, "requires_safety_checker": False}
    return kind.from_pretrained(folder, dtype=dtype, **unsafe)


def load(folder):
    return plainsd.load(folder, device="cpu", dtype=torch.float64)


@pytest.fixture
def sd():
    return tiny_sd().to(dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


IDS = torch.randint(0, 512, (2, 77), generator=torch.Generator().manual_seed(1))
IDS[:, 20:] = TINY.text[0].eos


@torch.no_grad()
def ours(sd):
    """What each network makes of the same input, as one vector each."""
    config, dtype = sd.unet.config, sd.dtype
    vector = None
    if config.vector:
        vector = size_vector(randn(2, 16, seed=2, dtype=dtype), SIZES)
    out = [sd.unet(randn(2, 4, 8, 8, dtype=dtype), 500.0, randn(2, 5, config.context, seed=1, dtype=dtype), vector)]
    for encoder in sd.text_encoders:
        states = encoder(IDS)
        out += [states.final, states.pooled]
    return [tensor.flatten() for tensor in out]


@torch.no_grad()
def theirs(pipe):
    unet, dtype = pipe.unet, pipe.unet.dtype
    told = {"text_embeds": randn(2, 16, seed=2, dtype=dtype), "time_ids": SIZES.to(dtype)}
    context = randn(2, 5, unet.config.cross_attention_dim, seed=1, dtype=dtype)
    out = [
        unet(
            randn(2, 4, 8, 8, dtype=dtype),
            500.0,
            context,
            added_cond_kwargs=told if hasattr(pipe, "text_encoder_2") else None,
        ).sample
    ]
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            states = getattr(pipe, name)(IDS)
            pooled = states.text_embeds if hasattr(states, "text_embeds") else states.pooler_output
            out += [states.last_hidden_state, pooled]
    return [tensor.flatten() for tensor in out]


def same(a, b, rel):
    for one, other in zip(a, b, strict=True):
        assert (one - other).norm() <= rel * other.norm()


def differ(a, b, rel=1e-3):
    for one, other in zip(a, b, strict=True):
        assert (one - other).norm() > rel * other.norm()


# --- every dialect, in float64 ---------------------------------------------------------------------------------------


def is_attention(name):
    return re.search(r"attn[12]\.to_|self_attn", name)


def some_modules(pipe):
    """name -> module, in diffusers' names; all linear layers and convolutions of UNet and text encoder."""
    found = {f"unet.{name}": module for name, module in pipe.unet.named_modules()}
    found |= {f"text_encoder.{name}": module for name, module in pipe.text_encoder.named_modules()}
    return {name: module for name, module in found.items() if isinstance(module, (nn.Linear, nn.Conv2d))}


def factors(modules, mid=False):
    """For each module A, B, alpha and perhaps the middle one; ranks and alphas differ from module to module."""
    made = {}
    for index, (name, module) in enumerate(modules.items()):
        o, i, *sides = module.weight.shape
        r, alpha = 2 + index % 3, float(1 + index % 4)
        inner = randn(r, r, *sides, seed=index) if mid and max(sides, default=1) > 1 else None
        down = (r, i) if not sides else (r, i, *sides) if inner is None else (r, i, 1, 1)
        up = (o, r, 1, 1) if sides else (o, r)
        made[name] = (0.1 * randn(*down, seed=2 * index), randn(*up, seed=2 * index + 1), alpha, inner)
    return made


def weight_change(down, up, inner, shape):
    if inner is None:
        return (up.flatten(1) @ down.flatten(1)).reshape(shape)
    return torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], inner, down[:, :, 0, 0])


def kohya(name, prefix="lora_te_"):
    network, _, inner = name.partition(".")
    if network == "text_encoder" and not inner.startswith("text_model."):
        inner = f"text_model.{inner}"
    return ({"unet": "lora_unet_", "text_encoder": prefix}[network] + inner).replace(".", "_")


def kohya_file(made, **options):
    tensors = {}
    for name, (down, up, alpha, inner) in made.items():
        key = kohya(name, **options)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        tensors |= {f"{key}.lora_mid.weight": inner} if inner is not None else {}
    return tensors, {}


def flat_file(made):
    """As some programs write kohya's: 1x1 convolutions without their sides, alpha with one."""
    tensors = kohya_file(made, prefix="lora_te1_")[0]
    short = {name: t[:, :, 0, 0] if t.ndim == 4 and t.shape[2:] == (1, 1) else t for name, t in tensors.items()}
    return {name: t.reshape(1) if t.ndim == 0 else t for name, t in short.items()}, {}


def dotted_file(made, a, b, te_a, te_b, alphas=True):
    tensors = {}
    for name, (down, up, alpha, _) in made.items():
        first, second = (a, b) if name.startswith("unet.") else (te_a, te_b)
        tensors |= {name + first: down, name + second: up}
        tensors |= {f"{name}.alpha": torch.tensor(alpha)} if alphas else {}
    return tensors, {}


def old_file(made):
    """Diffusers in 2023: attention processors; to_out without its number, and text encoders with the UNet's names."""
    tensors = {}
    for name, (down, up, alpha, _) in made.items():
        key = re.sub(r"(attn[12])\.", r"\1.processor.", name).replace(".to_out.0", ".to_out")
        key = re.sub(r"self_attn\.(\w+)_proj", r"self_attn.to_\1", key)
        tensors |= {f"{key}_lora.down.weight": down, f"{key}_lora.up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors, {}


def peft_file(made):
    """Alphas in settings, as exceptions to one that most have."""
    tensors, _ = dotted_file(made, *(".lora_A.weight", ".lora_B.weight") * 2, alphas=False)
    settings = {}
    for part in ("unet", "text_encoder"):
        own = {
            name.removeprefix(f"{part}."): alpha
            for name, (_, _, alpha, _) in made.items()
            if name.startswith(f"{part}.")
        }
        settings |= {
            f"{part}.lora_alpha": 3,
            f"{part}.r": 2,
            f"{part}.alpha_pattern": {f"^{name}": alpha for name, alpha in own.items() if alpha != 3},
        }
    return tensors, {"lora_adapter_metadata": json.dumps(settings)}


DIALECTS = {  # how to write it; which modules it can hold
    "kohya": (kohya_file, lambda name: True),
    "kohya, flat": (flat_file, lambda name: True),
    "diffusers": (
        lambda made: dotted_file(
            made,
            ".lora.down.weight",
            ".lora.up.weight",
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
        lambda name: True,
    ),
    "diffusers, 2023": (old_file, is_attention),
    "PEFT": (peft_file, lambda name: True),
    "PEFT, adapter named": (
        lambda made: dotted_file(made, *(".lora_A.default.weight", ".lora_B.default.weight") * 2),
        lambda name: True,
    ),
}


def expected(folder, made, tmp_path, strength, text_strength):
    """Our model, loaded from a folder in whose weights each sum was formed by hand."""
    pipe = pipeline(folder)
    for name, module in some_modules(pipe).items():
        if name in made:
            down, up, alpha, inner = made[name]
            s = strength if name.startswith("unet.") else text_strength
            change = weight_change(down, up, inner, module.weight.shape)
            module.weight.data += s * alpha / len(down) * change
    pipe.save_pretrained(tmp_path / "edited")
    return load(tmp_path / "edited")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_is_its_formula(folders, sd, tmp_path, dialect):
    write, holds = DIALECTS[dialect]
    modules = {name: module for name, module in some_modules(pipeline(folders / "sd")).items() if holds(name)}
    made = factors(modules, mid=dialect == "kohya")
    assert len(made) >= 30 and any(name.startswith("text") for name in made)
    tensors, metadata = write(made)
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    bare = ours(sd)
    lora = add_lora(sd, tmp_path / "lora.safetensors", 0.7, 0.4)
    assert len(lora.adapters) == len(made)
    same(ours(sd), ours(expected(folders / "sd", made, tmp_path, 0.7, 0.4)), 1e-11)
    differ(ours(sd), bare)
    merge([lora])
    assert not attached(sd)
    same(ours(sd), ours(load(tmp_path / "edited")), 1e-11)


# LyCORIS: what a factor is called, and its shape for a weight (o, i) or (o, i, k, k); alpha; whether for
# convolutions
def loha(o, i, sides, r=3):
    return {f"hada_w{n}_{end}": shape for n in (1, 2) for end, shape in (("a", (o, r)), ("b", (r, i * prod(sides))))}


def loha_tucker(o, i, sides, r=3):
    if not sides:
        return loha(o, i, sides, r)
    return {
        f"hada_{name}": shape
        for n in (1, 2)
        for name, shape in ((f"t{n}", (r, r, *sides)), (f"w{n}_a", (r, o)), (f"w{n}_b", (r, i)))
    }


def lokr_whole(o, i, sides):
    return {"lokr_w1": (2, 2), "lokr_w2": (o // 2, i // 2, *sides)}


def lokr(o, i, sides, r=3):
    return {"lokr_w1": (2, 2), "lokr_w2_a": (o // 2, r), "lokr_w2_b": (r, i // 2 * prod(sides))}


def lokr_factors(o, i, sides, r=3):
    return {"lokr_w1_a": (2, r), "lokr_w1_b": (r, 2)} | {
        name: s for name, s in lokr(o, i, sides).items() if "w2" in name
    }


def lokr_tucker(o, i, sides, r=3):
    if not sides:
        return lokr(o, i, sides, r)
    return {"lokr_w1": (2, 2), "lokr_t2": (r, r, *sides), "lokr_w2_a": (r, o // 2), "lokr_w2_b": (r, i // 2)}


def by_hand(f, scale, shape):
    """The change, number by number of the formulas in LyCORIS' paper."""

    def side(n):
        a, b, t = (
            f.get(f"{kind}{n}{end}") for kind, end in ((f"{family}w", "_a"), (f"{family}w", "_b"), (f"{family}t", ""))
        )
        return f[f"lokr_w{n}"] if a is None else a @ b if t is None else torch.einsum("ijkl,ip,jr->prkl", t, a, b)

    family = "hada_" if "hada_w1_a" in f else "lokr_"
    one, two = side(1), side(2)
    if family == "hada_":
        return scale * (one * two).reshape(shape)
    blocks = [torch.cat([one[x, y] * two for y in range(one.shape[1])], dim=1) for x in range(len(one))]
    return scale * torch.cat(blocks).reshape(shape)


@pytest.mark.parametrize("kind", [loha, loha_tucker, lokr_whole, lokr, lokr_factors, lokr_tucker])
@pytest.mark.parametrize("weighed", [False, True], ids=["", "DoRA"])
def test_lycoris_is_its_formula(folders, sd, tmp_path, kind, weighed):
    pipe, tensors, count = pipeline(folders / "sd"), {}, 0
    for index, (name, module) in enumerate(some_modules(pipe).items()):
        o, i, *sides = module.weight.shape
        if o % 2 or i % 2:
            continue
        factors = {
            end: 0.5 * randn(*shape, seed=10 * index + n)
            for n, (end, shape) in enumerate(kind(o, i, tuple(sides)).items())
        }
        scale = 1.0 if kind is lokr_whole else (1 + index % 4) / 3
        change = by_hand(factors, scale, module.weight.shape)
        extra = {"alpha": torch.tensor(float(1 + index % 4))}
        full = module.weight.data + (0.7 if name.startswith("unet.") else 0.4) * change
        if weighed:
            extra["dora_scale"] = 1 + randn(o, 1, *[1] * len(sides), seed=index).abs()
            full = full * extra["dora_scale"] / full.flatten(1).norm(dim=1).view(-1, 1, *[1] * len(sides))
        tensors |= {f"{kohya(name)}.{end}": tensor for end, tensor in (factors | extra).items()}
        module.weight.data = full
        count += 1
    save_file(tensors, tmp_path / "lycoris.safetensors")
    pipe.save_pretrained(tmp_path / "edited")
    bare, right = ours(sd), ours(load(tmp_path / "edited"))
    lora = add_lora(sd, tmp_path / "lycoris.safetensors", 0.7, 0.4)
    assert len(lora.adapters) == count > 30
    same(ours(sd), right, 1e-10)
    differ(ours(sd), bare)
    save_lora(sd, tmp_path / "again.safetensors")
    fresh = load(folders / "sd")
    add_lora(fresh, tmp_path / "again.safetensors", 0.7, 0.4)
    same(ours(fresh), right, 1e-10)
    merge([lora])
    same(ours(sd), right, 1e-10)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("tucker", [False, True])
def test_lycoris_of_peft(folders, sd, tmp_path, config, tucker):
    """A folder that PEFT's own LoHa or LoKr saved, with alphas in its settings."""
    torch.manual_seed(0)
    unet = pipeline(folders / "sd").unet
    adapted = get_peft_model(
        unet,
        config(
            r=4,
            alpha=3,
            target_modules=["to_q", "to_k", "proj_in", "conv1"],
            init_weights=False,
            use_effective_conv2d=tucker,
        ),
    )
    adapted.to(torch.float64).save_pretrained(tmp_path)
    config = sd.unet.config
    inputs = randn(2, 4, 8, 8), 500.0, randn(2, 5, config.context, seed=1)
    with torch.no_grad():
        bare, right = sd.unet(*inputs), adapted(*inputs).sample
        lora = add_lora(sd, tmp_path)
        assert any("conv1" in module for _, module in lora.adapters)
        same([sd.unet(*inputs).flatten()], [right.flatten()], 1e-11)
        differ([bare], [right])


@pytest.mark.parametrize("rank", [0, -4, "four", 2.5])
def test_a_rank_of_peft_that_is_none(folders, sd, tmp_path, rank):
    """Whole factors do not show their rank, and alpha is given beside it."""
    adapted = get_peft_model(pipeline(folders / "sd").unet, LoKrConfig(r=64, alpha=3, target_modules=["to_q"]))
    adapted.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    add_lora(sd, tmp_path)
    config.write_text(json.dumps(settings | {"r": rank}))
    with pytest.raises(UserError, match=f"PEFT's settings give {rank!r} as a rank"):
        add_lora(sd, tmp_path)


def test_no_alpha_means_the_rank(folders, sd, tmp_path):
    made = {
        name: (*made[:2], float(len(made[0])), None)
        for name, made in factors(some_modules(pipeline(folders / "sd"))).items()
    }
    tensors = {name: tensor for name, tensor in kohya_file(made)[0].items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "lora.safetensors")
    add_lora(sd, tmp_path / "lora.safetensors")
    same(ours(sd), ours(expected(folders / "sd", made, tmp_path, 1, 1)), 1e-11)


def test_pickled_loras(folders, sd, tmp_path):
    made = factors({"unet.conv_in": pipeline(folders / "sd").unet.conv_in})
    torch.save(kohya_file(made)[0], tmp_path / "lora.pt")
    add_lora(sd, tmp_path / "lora.pt")
    same(ours(sd), ours(expected(folders / "sd", made, tmp_path, 1, 1)), 1e-11)


# --- names -----------------------------------------------------------------------------------------------------------

XL_NAMES = {  # found in public files for SDXL
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down.3.attn.blocks.0.self_attn.q",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": "down.7.attn.blocks.9.ff.up",
    "lora_unet_input_blocks_3_0_op": "down.2.resample.conv",
    "lora_unet_input_blocks_1_0_in_layers_2": "down.0.res.conv1",
    "lora_unet_input_blocks_4_0_emb_layers_1": "down.3.res.emb",
    "lora_unet_middle_block_1_proj_in": "mid.attn.proj_in",
    "lora_unet_middle_block_2_out_layers_3": "mid.res2.conv2",
    "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": "up.5.attn.blocks.1.cross_attn.out",
    "lora_unet_output_blocks_2_2_conv": "up.2.resample.conv",
    "lora_unet_output_blocks_8_0_skip_connection": "up.8.res.skip",
    "lora_unet_label_emb_0_0": "vector.0",
    "lora_unet_time_embed_2": "time.2",
    "lora_unet_out_2": "conv_out",
    "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": "down.4.attn.blocks.0.cross_attn.k",
    "lora_unet_up_blocks_0_attentions_2_proj_out": "up.2.attn.proj_out",
    "unet.mid_block.attentions.0.transformer_blocks.3.attn1.to_v": "mid.attn.blocks.3.self_attn.v",
    "diffusion_model.output_blocks.0.1.proj_in": "up.0.attn.proj_in",
}


def test_names_in_public_files():
    known = known_names(empty(UNet, XL_UNET))
    assert {name: known[name] for name in XL_NAMES} == {name: ("unet", place) for name, place in XL_NAMES.items()}
    known = known_names(empty(TextEncoder, VIT_L))
    for name in (
        "lora_te_text_model_encoder_layers_11_mlp_fc1",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        "text_encoder.text_model.encoder.layers.11.mlp.fc1",
        "text_encoder.encoder.layers.11.mlp.fc1",
    ):
        assert known[name] == ("text_encoder", "blocks.11.fc1")


@pytest.mark.parametrize(
    "network, xl",
    [
        (empty(UNet, SD2_UNET), False),
        (empty(UNet, XL_UNET), True),
        (empty(UNet, VARIANTS["sdxl-refiner"].unet), True),
        (empty(TextEncoder, VIT_BIGG), True),
    ],
)
def test_what_we_write_is_read_as_the_same_module(network, xl):
    """At full size; no two modules share a name."""
    part = "unet" if isinstance(network, UNet) else "text_encoder"
    known, modules = known_names(network), modules_of(network)
    assert len(modules) == sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in network.modules())
    for write in (dotted_name, lambda part, named: kohya_name(part, named, xl=xl)):
        written = {write(part, named): (part, ours) for ours, named in modules.items()}
        assert len(written) == len(modules)
        assert {name: known[name] for name in written} == written


# --- to diffusers and back -------------------------------------------------------------------------------------------


def trained(sd, **options):
    """A LoRA with random factors. alpha / rank is no power of two, which would be too kind to rounding."""
    lora = inject(sd, **{"rank": 5, "alpha": 1.7, "targets": "all", "text": True, **options})
    for index, parameter in enumerate(lora.parameters()):
        parameter.data += 0.3 * randn(*parameter.shape, seed=index, dtype=parameter.dtype)
    return lora


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("naming", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_diffusers_loads_our_files(folders, tmp_path, family, naming, targets):
    pipe, sd = pipeline(folders / family, torch.float32), plainsd.load(folders / family, device="cpu", dtype="float32")
    bare = ours(sd)
    same(theirs(pipe), bare, 1e-5)
    adapters = trained(sd, targets=targets).adapters
    for adapter in list(adapters.values())[::3]:
        adapter.down.data, adapter.up.data = adapter.down.data[:3], adapter.up.data[:, :3]
        if naming != "kohya":  # whose alphas diffusers mixes up where they differ
            adapter.alpha = 3.0
    save_lora(sd, tmp_path / "lora.safetensors", naming)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    differ(ours(sd), bare)
    same(theirs(pipe), ours(sd), 1e-5)


@pytest.mark.parametrize("naming", ["peft", "diffusers"])
def test_diffusers_loads_our_dora(folders, tmp_path, naming):
    pipe, sd = pipeline(folders / "sd", torch.float32), plainsd.load(folders / "sd", device="cpu", dtype="float32")
    trained(sd, dora=True)
    save_lora(sd, tmp_path / "lora.safetensors", naming)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    same(theirs(pipe), ours(sd), 1e-5)


@pytest.mark.parametrize("naming", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("variant", [TINY, TINY_XL, TINY_REFINER], ids=lambda variant: variant.name)
@pytest.mark.parametrize("dora", [False, True])
def test_our_files_load_in_ours(tmp_path, variant, naming, dora):
    sd = tiny_sd(variant).to(dtype=torch.float64)
    lora = trained(sd, dora=dora)
    for index, adapter in enumerate(lora.adapters.values()):
        adapter.alpha = float(1 + index % 3)
    before = ours(sd) if variant is not TINY_REFINER else None
    save_lora(sd, tmp_path / "lora.safetensors", naming)
    again = tiny_sd(variant).to(dtype=torch.float64)
    add_lora(again, tmp_path / "lora.safetensors")
    assert attached(again)[0].adapters.keys() == lora.adapters.keys()
    for place, adapter in attached(again)[0].adapters.items():
        weight = adaptable_networks(sd)[place[0]].get_submodule(place[1]).weight
        torch.testing.assert_close(adapter.change(weight), lora.adapters[place].change(weight), rtol=1e-12, atol=1e-12)
    if before is not None:
        same(ours(again), before, 1e-11)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_diffusers_files_load_in_ours(folders, tmp_path, family, dora):
    """Made by PEFT on diffusers' networks, with exceptions to rank and alpha, saved by diffusers."""
    pipe, sd = pipeline(folders / family), load(folders / family)
    bare = ours(sd)
    settings = {
        "unet": LoraConfig(
            r=4,
            lora_alpha=6,
            rank_pattern={"to_k": 2},
            alpha_pattern={"to_k": 5, "conv2": 1},
            use_dora=dora,
            target_modules=["to_q", "to_k", "to_out.0", "conv1", "conv2", "proj_in", "linear_1"],
        ),
        "text_encoder": LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "out_proj", "fc1"], use_dora=dora),
        "text_encoder_2": LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj", "k_proj"], use_dora=dora),
    }
    layers, notes = {}, {}
    for name, config in settings.items():
        if hasattr(pipe, name):
            network = getattr(pipe, name)
            network.add_adapter(config)
            own = {key: parameter for key, parameter in network.named_parameters() if "lora_" in key}
            for index, parameter in enumerate(own.values()):
                parameter.data += 0.3 * randn(*parameter.shape, seed=index)
            layers[f"{name}_lora_layers"] = {key.replace(".default", ""): value for key, value in own.items()}
            notes[f"{name}_lora_adapter_metadata"] = {
                key: value
                for key, value in config.to_dict().items()
                if isinstance(value, (int, dict, list, set)) and value
            }
    pipe.save_lora_weights(tmp_path, **layers, **notes)
    lora = add_lora(sd, tmp_path)
    assert {part for part, _ in lora.adapters} == {name for name in settings if hasattr(pipe, name)}
    differ(ours(sd), bare)
    same(ours(sd), theirs(pipe), 1e-6)  # their time embedding is float32


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folders_load_in_ours(folders, sd, tmp_path, rslora):
    """PEFT's own format: its settings lie beside the file, and its names begin with base_model.model."""
    pipe = pipeline(folders / "sd")
    network = get_peft_model(
        pipe.unet,
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "conv1"],
            use_rslora=rslora,
            alpha_pattern={r"mid_block\.resnets\.0\.conv1": 3},
        ),
    )
    for index, (name, parameter) in enumerate(network.named_parameters()):
        if "lora_" in name:
            parameter.data += 0.3 * randn(*parameter.shape, seed=index)
    network.save_pretrained(tmp_path)
    lora = add_lora(sd, tmp_path)
    alphas = {adapter.alpha for adapter in lora.adapters.values()}
    assert alphas == ({12.0, 6.0} if rslora else {6.0, 3.0})
    same(ours(sd)[:1], theirs(pipe)[:1], 1e-6)


# --- one module ------------------------------------------------------------------------------------------------------

BASES = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 8, 3, padding=1), (3, 6, 5, 5)),
    "convolution of stride 2": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (3, 6, 8, 8)),
    "1x1 convolution": (lambda: nn.Conv2d(6, 8, 1), (3, 6, 5, 5)),
}


@pytest.mark.parametrize("lengths", ["none", "rows", "columns"])
@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_computes_with_the_changed_weight(kind, lengths):
    """Beside the base, or folded in: the same; and DoRA by the paper's formula."""
    torch.manual_seed(0)
    base, shape = BASES[kind][0]().double(), BASES[kind][1]
    weight, x = base.weight.detach().clone(), randn(*shape, seed=5)
    sides = weight.shape[2:]
    mid = randn(2, 2, *sides, seed=3) if kind == "convolution" else None
    down = randn(2, 6, *(sides if mid is None else (1, 1)), seed=1)
    up = randn(8, 2, *[1] * len(sides), seed=2)
    shapes = {"rows": (8, 1), "columns": (1, 6)}
    magnitude = None if lengths == "none" else randn(*shapes[lengths], *[1] * len(sides), seed=4)
    attach(base, "one", LowRank(down, up, 3.0, mid=mid, magnitude=magnitude, strength=0.5))
    assert type(base) is (LoraConv if sides else LoraLinear)

    full = weight + 0.5 * 1.5 * weight_change(down, up, mid, weight.shape)
    if lengths != "none":
        axes = [axis for axis in range(weight.ndim) if axis != (lengths == "columns")]
        full = magnitude * full / full.pow(2).sum(axes, keepdim=True).sqrt()
    bare = BASES[kind][0]().double()
    bare.weight.data, bare.bias = full, base.bias
    torch.testing.assert_close(base(x), bare(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(base.adapters["one"].change(weight), full - weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_pefts(folders, dora):
    """Of a loss on the UNet's output, in float64, to every A, B and magnitude."""
    pipe, sd = pipeline(folders / "sd"), load(folders / "sd")
    lora = inject(sd, 5, 1.7, "all", dora=dora)
    pipe.unet.add_adapter(
        LoraConfig(
            r=5,
            lora_alpha=1.7,
            use_dora=dora,
            target_modules=[named.diffusers for named in modules_of(sd.unet).values()],
        )
    )
    twins = {}
    for (_, module), adapter in lora.adapters.items():
        twin = pipe.unet.get_submodule(modules_of(sd.unet)[module].diffusers)
        twins[module] = (
            twin.lora_A.default.weight,
            twin.lora_B.default.weight,
            *([twin.lora_magnitude_vector.default.weight] if dora else []),
        )
        adapter.up.data += 0.1 * randn(*adapter.up.shape)
        mine = (adapter.down, adapter.up, *([adapter.magnitude] if dora else []))
        for own, other in zip(mine, twins[module], strict=True):
            other.data = own.data.reshape(other.shape).clone()
    args = (randn(2, 4, 8, 8), torch.tensor([500, 500]), randn(2, 5, 32, seed=1))
    (sd.unet(*args) ** 2).mean().backward()
    (pipe.unet(*args).sample ** 2).mean().backward()
    largest = max(other.grad.abs().max() for pair in twins.values() for other in pair)
    for (_, module), adapter in lora.adapters.items():
        for own, other in zip((adapter.down, adapter.up, adapter.magnitude), twins[module], strict=False):
            torch.testing.assert_close(own.grad.reshape(other.shape), other.grad, rtol=1e-6, atol=float(largest) * 1e-9)


# --- several, and off again ------------------------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path):
    for index, dora in enumerate((False, True)):
        sd = tiny_sd(seed=0).to(dtype=torch.float64)
        lora = trained(sd, targets=("all", "all-linear")[index], rank=2 + index, dora=dora)
        for parameter in lora.parameters():
            parameter.data += 0.1 * randn(*parameter.shape, seed=10 + index)
        save_lora(sd, tmp_path / f"{index}.safetensors")
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]


def test_several_at_once_and_off_again(sd, two_files):
    bare, weights = ours(sd), [parameter.clone() for parameter in sd.unet.parameters()]
    kinds, names = [type(module) for module in sd.unet.modules()], list(sd.unet.state_dict())
    first = add_lora(sd, two_files[0], 0.5)
    alone = ours(sd)
    twice, second = add_lora(sd, two_files[0], 0.25), add_lora(sd, two_files[1], 0.8, 0.3)
    all_three = ours(sd)
    assert [lora.name for lora in attached(sd)] == ["lora_0", "lora_0_2", "lora_1"]
    differ(all_three, alone)
    first.set_strength(0.75)  # as much as both of the same file
    twice.remove()
    same(ours(sd), all_three, 1e-12)
    second.remove()
    first.set_strength(0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours(sd), alone, strict=True))
    first.set_strength(0)
    same(ours(sd), bare, 1e-12)
    first.remove()
    assert all(torch.equal(a, b) for a, b in zip(ours(sd), bare, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sd.unet.parameters(), weights, strict=True))
    assert [type(module) for module in sd.unet.modules()] == kinds and list(sd.unet.state_dict()) == names


def test_text_encoders_may_have_a_strength_of_their_own(sd, two_files):
    lora = add_lora(sd, two_files[0], 0.5, 0.25)

    def strengths():
        return {part: {a.strength for (p, _), a in lora.adapters.items() if p == part} for part, _ in lora.adapters}

    assert strengths()["unet"] == {0.5} and strengths()["text_encoder"] == {0.25}
    lora.set_strength(0.75, 0.125)
    assert strengths()["unet"] == {0.75} and strengths()["text_encoder"] == {0.125}
    lora.set_strength(0.5)
    assert set.union(*strengths().values()) == {0.5}


def test_merged_is_the_same(sd, two_files):
    loras = [add_lora(sd, path, strength) for path, strength in zip(two_files, (0.5, 0.8), strict=True)]
    beside = ours(sd)
    merge(loras)
    assert not attached(sd)
    same(ours(sd), beside, 1e-12)


def test_merging_one_leaves_the_other(sd, two_files):
    first, second = add_lora(sd, two_files[0], 0.5), add_lora(sd, two_files[0], 0.25)
    beside = ours(sd)
    first.merge()
    assert [lora.name for lora in attached(sd)] == [second.name]
    same(ours(sd), beside, 1e-12)


def test_merged_weights_in_half_precision_are_rounded_once(sd, two_files):
    """What is added is reckoned in float32; the sum alone is rounded to the weights' own type."""
    sd.to(dtype=torch.bfloat16)
    lora = add_lora(sd, two_files[0], 0.7)
    (part, name), adapter = next(iter(lora.adapters.items()))
    base = (sd.unet if part == "unet" else sd.text_encoders[0]).get_submodule(name)
    before, change = base.weight.clone(), adapter.change(base.weight)
    assert change.dtype == torch.float32
    lora.merge()
    assert torch.equal(base.weight, (before.float() + change).bfloat16())


def test_half_precision(tmp_path, two_files):
    """Adapters are cast with the model, and the sum is formed in float32."""
    sd = tiny_sd().to(dtype=torch.bfloat16)
    weight = sd.unet.conv_in.weight.clone()
    lora = add_lora(sd, two_files[0])
    assert all(parameter.dtype == torch.bfloat16 and not parameter.requires_grad for parameter in lora.parameters())
    adapter = lora.adapters["unet", "conv_in"]
    change = weight_change(adapter.down.float(), adapter.up.float(), None, weight.shape)
    expected = weight.float() + adapter.scale * change
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in ours(sd))
    lora.merge()
    assert torch.equal(sd.unet.conv_in.weight, expected.bfloat16())


def test_a_model_with_loras_is_not_saved_without_them(sd, tmp_path):
    lora = trained(sd)
    with pytest.raises(UserError, match="merge its LoRAs"):
        plainsd.save(sd, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    lora.merge()
    plainsd.save(sd, tmp_path / "model")
    same(ours(load(tmp_path / "model")), ours(sd), 1e-12)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_new_lora_changes_nothing_yet(sd):
    bare = ours(sd)
    for dora in (False, True):
        lora = inject(sd, 4, targets="all", text=True, dora=dora)
        assert all(parameter.requires_grad for parameter in lora.parameters())
        assert {adapter.alpha for adapter in lora.adapters.values()} == {4.0}
        same(ours(sd), bare, 1e-12)
        lora.remove()


def test_how_a_new_lora_begins(sd):
    """A uniform in 1 / sqrt(fan in), repeatable by its generator; at least float32."""
    sd.to(dtype=torch.bfloat16)
    states = []
    for seed in (0, 0, 1):
        lora = inject(sd, 8, targets="all", generator=torch.Generator().manual_seed(seed))
        states.append(lora_state(sd))
        for adapter in lora.adapters.values():
            bound = adapter.down[0].numel() ** -0.5
            assert adapter.down.dtype == torch.float32 and not adapter.up.any()
            assert 0.8 * bound < adapter.down.abs().max() <= bound and abs(adapter.down.mean()) < 0.3 * bound
        lora.remove()
    same_seed, other_seed = (
        [torch.equal(states[0][name], state[name]) for name in states[0] if name.endswith("down")]
        for state in states[1:]
    )
    assert all(same_seed) and not any(other_seed)


def test_targets():
    """How many modules of SD 1.x: 16 transformers, 22 ResBlocks (14 with a skip), 6 resamplings, 12 layers of text."""
    unet, text = empty(UNet, VARIANTS["sd1"].unet), empty(TextEncoder, VIT_L)
    linear = 16 * 12 + 22 + 2
    count = {targets: len(targeted(unet, targets, conv=False)) for targets in TARGETS}
    assert count == {
        "attention": 16 * 8,
        "transformers": 16 * 12,
        "all-linear": linear,
        "all": linear + 2 * 22 + 14 + 6 + 2,
    }
    assert len(targeted(unet, "transformers", conv=True)) == 16 * 12 + 2 * 22 + 14 + 6
    assert len(targeted(text, "attention", conv=True)) == 12 * 4
    assert len(targeted(text, "transformers", conv=False)) == 12 * 6
    assert targeted(unet, "mid.*cross_attn.k", conv=False) == ["mid.attn.blocks.0.cross_attn.k"]
    assert targeted(unet, ["conv_in", "time.?"], conv=False) == ["time.0", "time.2", "conv_in"]


def test_a_network_alone(sd):
    lora = inject(sd.unet, 2)
    assert {part for part, _ in lora.adapters} == {"unet"} and attached(sd)[0].adapters.keys() == lora.adapters.keys()
    lora = inject(sd.text_encoders[0], 2, name="text")
    assert {part for part, _ in lora.adapters} == {"text_encoder"}
    assert len(attached(sd)) == 2


def test_state_returns(sd):
    lora = trained(sd, dora=True)
    state = {name: tensor.clone() for name, tensor in lora_state(sd).items()}
    assert {name.rpartition(".")[2] for name in state} == {"down", "up", "magnitude"}
    before = ours(sd)
    for parameter in lora.parameters():
        parameter.data += 1
    differ(ours(sd), before)
    load_lora_state(sd, state)
    assert all(torch.equal(a, b) for a, b in zip(ours(sd), before, strict=True))
    with pytest.raises(UserError, match="another LoRA"):
        load_lora_state(sd, {name: tensor for name, tensor in state.items() if "mid" not in name})
    with pytest.raises(UserError, match="shapes differ"):
        load_lora_state(sd, state | {"unet.mid.attn.proj_in.down": torch.zeros(7, 64)})


def test_only_the_adapter_learns(sd):
    lora = trained(sd, dora=True)
    for network in (sd.unet, *sd.text_encoders):
        network.requires_grad_(False)
    for parameter in lora.parameters():
        parameter.requires_grad_(True)
    target = ours(tiny_sd(seed=3).to(dtype=torch.float64))[0]
    frozen = [parameter for parameter in sd.unet.parameters() if not parameter.requires_grad]
    weights = [parameter.clone() for parameter in frozen]
    optimizer, losses = torch.optim.Adam(lora.parameters(), 1e-2), []
    for _ in range(5):
        out = sd.unet(randn(2, 4, 8, 8), 500.0, randn(2, 5, 32, seed=1)).flatten()
        losses.append(((out - target) ** 2).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, frozen, strict=True))


# --- files -----------------------------------------------------------------------------------------------------------


def test_notes(sd, tmp_path):
    lora = trained(sd)
    save_lora(sd, tmp_path / "a.safetensors", metadata={"ss_output_name": "ink"}, dtype=torch.float16)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["ss_network_dim"] == "5" and notes["ss_network_alpha"] == "1.7" and notes["ss_output_name"] == "ink"
    tensors = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {torch.float16}
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {torch.tensor(1.7).item()}
    next(iter(lora.adapters.values())).alpha = 3.0
    save_lora(sd, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["ss_network_alpha"] == "Dynamic"


def test_shapes_in_files_are_those_of_the_public_networks(tmp_path):
    """Attention's projections are 1x1 convolutions in SD 1.x, and linear in SDXL."""
    for variant, shape in ((TINY, (4, 32, 1, 1)), (TINY_XL, (4, 64))):
        sd = tiny_sd(variant)
        inject(sd, 4, targets="*.proj_in")
        save_lora(sd, tmp_path / "a.safetensors")
        tensors = load_file(tmp_path / "a.safetensors")
        name = next(name for name in tensors if name.endswith("proj_in.lora_down.weight"))
        assert tensors[name].shape == shape


def test_find_lora(tmp_path):
    for name in ("ink.safetensors", "styles/Oil.v2.safetensors", "a/twin.pt", "b/twin.safetensors", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_lora(tmp_path, "ink") == tmp_path / "ink.safetensors"
    for name in ("Oil.v2", "styles/Oil.v2"):
        assert find_lora(tmp_path, name) == tmp_path / "styles/Oil.v2.safetensors"
    assert find_lora(tmp_path, "b/twin") == tmp_path / "b/twin.safetensors"
    with pytest.raises(UserError, match="2 times"):
        find_lora(tmp_path, "twin")
    for name, message in (("inc", "did you mean 'ink'"), ("notes", "unknown LoRA"), ("../ink", "unknown LoRA")):
        with pytest.raises(UserError, match=message):
            find_lora(tmp_path / "." if name != "../ink" else tmp_path / "styles", name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no files of LoRAs"):
        find_lora(tmp_path / "empty", "ink")


def test_find_lora_takes_folders_too_and_of_one_name_the_safetensors(tmp_path):
    weights = ("v1.5/pytorch_lora_weights.safetensors", "a/v2.0/adapter_model.bin", "v2/pytorch_lora_weights.bin")
    for name in (*weights, "d2.pt", "d2.safetensors", "d3.pt", "d3.ckpt", "v2.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    for name, place in (("v1.5", "v1.5"), ("v2.0", "a/v2.0"), ("a/v2.0", "a/v2.0"), ("d2", "d2.safetensors"),
                        ("v2", "v2.safetensors"), ("v1.5/pytorch_lora_weights", weights[0])):  # fmt: skip
        assert find_lora(tmp_path, name) == tmp_path / place
    with pytest.raises(UserError, match=r"'d3' is there 2 times: .*d3\.ckpt.*; remove or rename one of them"):
        find_lora(tmp_path, "d3")


def called(path, alias):
    """A LoRA that its trainer called so."""
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file(factors_of(KEY), path, {"ss_output_name": alias})
    return path


def test_find_lora_by_its_trainers_name(tmp_path, monkeypatch):
    """As A1111 does by default; the names of files and folders come first."""
    file, saved = called(tmp_path / "a.safetensors", "ink"), tmp_path / "saved"
    called(saved / "pytorch_lora_weights.safetensors", "oil")
    monkeypatch.setattr("plainsd.files.tensorfile._Pages.read", None)  # headers alone are read
    (tmp_path / "b.pt").write_bytes(b"no header"), (tmp_path / "c.safetensors").write_bytes(b"nor here")
    assert find_lora(tmp_path, "ink") == file
    assert find_lora(tmp_path, "oil") == saved  # rather than the file in it
    given = called(tmp_path / "elsewhere/d.safetensors", "chalk")
    assert find_lora(saved, "chalk", [given, given]) == given
    called(tmp_path / "e.safetensors", "ink")
    with pytest.raises(
        UserError, match="2 LoRAs were called 'ink' by their trainers: .*a.safetensors, .*e.safetensors"
    ):
        find_lora(tmp_path, "ink")
    (tmp_path / "ink.safetensors").touch()
    assert find_lora(tmp_path, "ink") == tmp_path / "ink.safetensors"


@pytest.mark.parametrize("name", ["my style-v1.5", "my_style-v1.5", "ink_2"])
def test_a_lora_keeps_its_name(sd, tmp_path, name):
    (tmp_path / name).mkdir()
    save_file(factors_of(KEY), tmp_path / f"{name}.safetensors")
    save_file(factors_of(KEY), tmp_path / name / "pytorch_lora_weights.safetensors")
    for path in (tmp_path / f"{name}.safetensors", tmp_path / name):
        assert add_lora(sd, path).called == attached(sd)[-1].called == name
    assert inject(sd.unet, 2, name=name).called == name


# --- bad files -------------------------------------------------------------------------------------------------------

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def factors_of(key, o=32, i=32, r=4):
    return {f"{key}.lora_down.weight": torch.zeros(r, i), f"{key}.lora_up.weight": torch.zeros(o, r)}


def renamed(prefix):
    return {f"{prefix}{n}.{end}": torch.zeros(4, 4) for n in range(7) for end in ("lora_down.weight", "lora_up.weight")}


BAD = {
    "no LoRA": ({"model.diffusion_model.x": torch.zeros(1)}, "is not an adapter of a known kind.*tell of a UNet"),
    "an OFT without sides": ({f"{KEY}.oft_blocks": torch.tensor(1.0)}, "do not make a change of the weight"),
    "a LoKr of a vector": (
        {f"{KEY}.lokr_w1": torch.zeros(4), f"{KEY}.lokr_w2": torch.zeros(8, 8, 1, 1)},
        "do not make a change of the weight",
    ),
    "an OFT of no shape": ({f"{KEY}.oft_blocks": torch.zeros(2, 2)}, "do not make a change of the weight"),
    "half a LoHa": ({f"{KEY}.hada_w1_a": torch.zeros(2, 2)}, "1 of its 1 names have no place"),
    "a LoHa for another": (
        {f"{KEY}.hada_{name}": torch.zeros(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        r"hada_w1_a' and its like, of shapes \[4, 4\], .* do not make a change of the weight \[32, 32\]",
    ),
    "a LoHa of rank 0": (
        {
            f"{KEY}.hada_{name}": torch.zeros(32, 0) if name[-1] == "a" else torch.zeros(0, 32)
            for name in ("w1_a", "w1_b", "w2_a", "w2_b")
        },
        "do not make a change",
    ),
    "a LoKr with the outputs of another": (
        {f"{KEY}.lokr_w1": torch.zeros(2, 8), f"{KEY}.lokr_w2": torch.zeros(8, 8)},
        "do not make a change",
    ),
    "a LoHa and a LoRA in one": (factors_of(KEY) | {f"{KEY}.hada_w1_a": torch.zeros(32, 4)}, r"hada_w1_a' has shape"),
    "of SD 2": (factors_of(KEY, i=1024), r"has shape \[4, 1024\].*\[32, 32\]; it seems to be made for SD 2.x; take"),
    "of SDXL": (
        renamed("lora_unet_input_blocks_40_1_transformer_blocks_9_"),
        r"14 of its 14 names have no place.*, \.\.\.\).*SDXL; take",
    ),
    "of FLUX": (renamed("lora_unet_double_blocks_"), "made for FLUX"),
    "one name too many": (
        factors_of(KEY) | factors_of(f"{KEY}_x"),
        r"2 of its 4 names have no place \(.*to_k_x.*--lora-partial",
    ),
    "half a module": ({f"{KEY}.lora_down.weight": torch.zeros(4, 32)}, "1 of its 1 names have no place"),
    "a bias": (factors_of(KEY) | {f"{KEY}.lora_up.bias": torch.zeros(32)}, "lora_up.bias"),
    "ranks that differ": (
        factors_of(KEY) | {f"{KEY}.lora_up.weight": torch.zeros(32, 5)},
        r"lora_up.* has shape \[32, 5\]",
    ),
    "rank 0": (factors_of(KEY, r=0), r"has shape \[0, 32\]"),
    "an alpha of two": (factors_of(KEY) | {f"{KEY}.alpha": torch.zeros(2)}, r"alpha' has shape \[2\]"),
    "a middle for a linear layer": (factors_of(KEY) | {f"{KEY}.lora_mid.weight": torch.zeros(4, 4, 3, 3)}, "lora_mid"),
    "not a number": (factors_of(KEY) | {f"{KEY}.lora_up.weight": torch.full((32, 4), float("nan"))}, "not finite"),
    "an endless alpha": (factors_of(KEY) | {f"{KEY}.alpha": torch.tensor(float("inf"))}, "not finite"),
    "a scalar": (
        {f"{KEY}.lora_down.weight": torch.tensor(1.0), f"{KEY}.lora_up.weight": torch.zeros(32, 4)},
        r"has shape \[\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(sd, tmp_path, case):
    tensors, message = BAD[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        add_lora(sd, tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)
    assert not attached(sd)


def test_five_names_are_listed(sd, tmp_path):
    save_file(factors_of(KEY) | renamed("lora_unet_other_"), tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as caught:
        add_lora(sd, tmp_path / "bad.safetensors")
    assert str(caught.value).count("lora_unet_other_") == 5


def test_partial(sd, tmp_path):
    save_file(factors_of(KEY) | renamed("lora_unet_other_"), tmp_path / "some.safetensors")
    with pytest.warns(
        UserWarning, match=r"14 of its 16 names are ignored: lora_unet_other_0\.lora_\w+\.weight, .*\.\.\.$"
    ):
        lora = add_lora(sd, tmp_path / "some.safetensors", partial=True)
    assert list(lora.adapters) == [("unet", "down.0.attn.blocks.0.cross_attn.k")]
    other = KEY.replace("to_k", "to_v")
    save_file(factors_of(KEY) | factors_of(other, i=768), tmp_path / "shapes.safetensors")
    with pytest.raises(UserError, match=r"to_v.* has shape \[4, 768\]"):
        add_lora(sd, tmp_path / "shapes.safetensors")
    with pytest.warns(UserWarning, match="2 of its 4 names are ignored: .*to_v"):
        lora = add_lora(sd, tmp_path / "shapes.safetensors", partial=True)
    assert list(lora.adapters) == [("unet", "down.0.attn.blocks.0.cross_attn.k")]
    save_file(renamed("lora_unet_other_"), tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="take a LoRA for this model"):
        add_lora(sd, tmp_path / "none.safetensors", partial=True)


def test_vectors_that_are_not_supported_are_left_out_in_part(tmp_path):
    """OneTrainer's of a text encoder's outputs: the LoRA and its other words remain."""
    sd, rows = tiny_sd(), randn(2, 32).float()
    words = {f"bundle_emb.{name}": rows.clone() for name in ("<a>.clip_l", "<a>.clip_l_out", "<b>.clip_l_out")}
    save_file(factors_of(KEY) | words, tmp_path / "a.safetensors")
    outputs = "in a way that is not supported, 'bundle_emb.<a>.clip_l_out', 'bundle_emb.<b>.clip_l_out'"
    with pytest.raises(UserError, match=f"{outputs}; known are .*--lora-partial"):
        add_lora(sd, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=f"{outputs}: they are ignored"):
        lora = add_lora(sd, tmp_path / "a.safetensors", partial=True)
    assert len(lora.adapters) == 1 and torch.equal(vectors_of(sd, "<a>")[0], rows)
    with pytest.raises(UserError, match="'<b>' is not a learned word"):
        vectors_of(sd, "<b>")


def test_words_left_out_of_a_checkpoint_are_told_and_its_recipe_names_the_folder(folders, tmp_path):
    (tmp_path / "v1.5").mkdir()
    words = {"bundle_emb.<a>.clip_l": randn(2, 32).float()}
    save_file(factors_of(KEY) | words, tmp_path / "v1.5" / "pytorch_lora_weights.safetensors")
    with pytest.warns(UserWarning, match="v1.5 brings words along, which a checkpoint cannot hold: they are ignored"):
        contents = baked(read(folders / "sd"), [(tmp_path / "v1.5", 0.5)], partial_fit=True)
    assert json.loads(contents.notes["sd_merge_recipe"])["loras"] == ["v1.5:0.5"]


@pytest.mark.parametrize("settings, message", [
    ("not JSON", "not a JSON table"), ("[1]", "not a JSON table"),
    (json.dumps({"unet.lora_alpha": "high"}), "'high' as an alpha"),
    (json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(to_k|to_q": 2}}), "which cannot be read"),
    (json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}), "alpha_pattern that is not a table"),
    (json.dumps({"unet.lora_alpha": 1, "unet.init_lora_weights": "corda"}), "'corda', and does not tell how"),
    (json.dumps({"unet.lora_alpha": 1, "unet.init_lora_weights": "pissa_niter_4"}), "'pissa_niter_4', and does not"),
    (json.dumps({"unet.lora_alpha": 1, "unet.use_qalora": True}), "not supported, PEFT's use_qalora"),
])  # fmt: skip
def test_bad_peft_settings(sd, tmp_path, settings, message):
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{key}.lora_A.weight": torch.zeros(4, 32), f"{key}.lora_B.weight": torch.zeros(32, 4)}
    save_file(tensors, tmp_path / "bad.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=message):
        add_lora(sd, tmp_path / "bad.safetensors")
    assert not attached(sd)


def test_bad_calls(sd, tmp_path):
    save_file(factors_of(KEY), tmp_path / "good.safetensors")
    (tmp_path / "folder").mkdir()
    calls = {
        "strength nan": lambda: add_lora(sd, tmp_path / "good.safetensors", float("nan")),
        "strength inf": lambda: add_lora(sd, tmp_path / "good.safetensors", 1, float("inf")),
        "cannot read": lambda: add_lora(sd, tmp_path / "none.safetensors"),
        "folder without": lambda: add_lora(sd, tmp_path / "folder"),
        "rank 0": lambda: inject(sd, 0),
        "alpha nan": lambda: inject(sd, 4, float("nan")),
        "did you mean 'attention'": lambda: inject(sd, 4, targets="attentoin"),
        "no module of the model fits": lambda: inject(sd, 4, targets="*.nothing"),
        "no module of the text encoders fits": lambda: inject(sd, 4, targets="mid.*cross_attn.k", text=True),
        "0 LoRAs": lambda: save_lora(sd, tmp_path / "out.safetensors"),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            call()
    assert not attached(sd)
    first, _ = inject(sd, 2), inject(sd, 2)
    with pytest.raises(UserError, match="2 LoRAs.*lora_trained, lora_trained_2"):
        save_lora(sd, tmp_path / "out.safetensors")
    for path, naming, message in (("out.pt", "kohya", "ending"), ("out.safetensors", "kohia", "did you mean 'kohya'")):
        with pytest.raises(UserError, match=message):
            save_lora(sd, tmp_path / path, naming, lora=first)
    adapter = next(iter(first.adapters.values()))
    adapter.by_column = True
    with pytest.raises(UserError, match="cannot tell"):
        save_lora(sd, tmp_path / "out.safetensors", "peft", lora=first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "good.safetensors"]


@pytest.mark.parametrize(
    "word", ["lily_cole", "miss_fortune", "road_style", "poly_art", "lora_E", "hra_u", "double_blocks", "lora_te2_x"]
)
def test_any_word_may_come_along(tmp_path, word):
    """Words in a file are no names of adapters."""
    sd = tiny_sd()
    o, i = sd.unet.get_submodule("mid.attn.blocks.0.cross_attn.q").weight.shape
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    rows = randn(2, sd.text_encoders[0].config.width).float()
    factors = {f"{module}.lora_down.weight": torch.zeros(2, i), f"{module}.lora_up.weight": torch.zeros(o, 2)}
    save_file(factors | {f"bundle_emb.{word}.emb_params": rows}, tmp_path / "a.safetensors")
    assert len(add_lora(sd, tmp_path / "a.safetensors").adapters) == 1
    assert torch.equal(vectors_of(sd, word)[0], rows)
    assert "not supported" not in info(tmp_path / "a.safetensors")
    wrong = {name.replace("to_q", "to_x"): tensor for name, tensor in factors.items()}
    save_file(wrong | {f"bundle_emb.{word}.emb_params": rows}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="does not fit this model") as caught:
        add_lora(sd, tmp_path / "b.safetensors")
    assert "made for" not in str(caught.value)
