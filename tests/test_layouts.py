"""Names: the complete key lists of every family, against diffusers' classes and diffusers' own conversion functions."""

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as oracle
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from plainsd.files.configs_out import write_text, write_unet, write_vae
from plainsd.files.names import places, spelled
from plainsd.files.single import prefixes
from plainsd.files.stored import empty, parts, place_shape
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.vae import VAE, VAEConfig
from plainsd.models.variants import VARIANTS, VIT_BIGG, VIT_H, VIT_L, Variant

Shapes = dict[str, tuple[int, ...]]


@cache
def bare(kind, config):
    return empty(kind, config)


def names(kind, config, layout: str, conv: bool, prefix: str = "") -> Shapes:
    """What a file in that layout holds of a network, by our tables."""
    network = bare(kind, config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = places(network, layout, conv=conv)
    listed = [name for place in found for name in place.ours]
    assert sorted(listed) == sorted(shapes), "each of our tensors lies in one place"
    assert len({place.name for place in found}) == len(found), "no two share a name"
    return {prefix + place.name: tuple(place_shape(place, shapes)) for place in found}


def shapes_of(state: dict) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


# One of each kind of network among the families; LCM's projection has no name in diffusers' conversion.
UNETS = {name: variant for name, variant in VARIANTS.items() if "turbo" not in name and name != "sd2-768"}
TEXTS = {"ViT-L": VIT_L, "ViT-H": VIT_H, "ViT-bigG": VIT_BIGG}


@pytest.mark.parametrize("name", UNETS)
def test_unet_names(name):
    variant = UNETS[name]
    with torch.device("meta"):
        reference = shapes_of(UNet2DConditionModel.from_config(write_unet(variant)).state_dict())
    assert names(UNet, variant.unet, "diffusers", variant.conv_projections) == reference
    original = names(UNet, variant.unet, "original", variant.conv_projections, "model.diffusion_model.")
    converted = shapes_of(oracle.convert_ldm_unet_checkpoint(meta(original), write_unet(variant)))
    if variant.unet.guidance_dim:
        converted["time_embedding.cond_proj.weight"] = original["model.diffusion_model.time_embed.cond_proj.weight"]
    assert converted == reference


def test_vae_names():
    variant = VARIANTS["sd1"]
    with torch.device("meta"):
        reference = shapes_of(AutoencoderKL.from_config(write_vae(variant)).state_dict())
    assert names(VAE, variant.vae, "diffusers", False) == reference
    original = names(VAE, variant.vae, "original", False, "first_stage_model.")
    assert shapes_of(oracle.convert_ldm_vae_checkpoint(meta(original), write_vae(variant))) == reference


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder_names(name):
    config = TEXTS[name]
    settings = CLIPTextConfig(**write_text(config))
    with torch.device("meta"):
        network = (CLIPTextModelWithProjection if config.projection else CLIPTextModel)(settings)
    mine = names(TextEncoder, config, "transformers", False)
    reference = shapes_of(network.state_dict())
    assert {spelled(key, reference): shape for key, shape in mine.items()} == reference
    assert all(key.startswith("text_model.") or key == "text_projection.weight" for key in mine)
    if config.activation == "gelu":
        original = names(TextEncoder, config, "openclip", False, "model.")
        converted = oracle.convert_open_clip_checkpoint(network, meta(original), "model.")
        assert shapes_of(converted) == mine
    else:
        original = names(TextEncoder, config, "transformers", False, "cond_stage_model.transformer.")
        assert shapes_of(oracle.convert_ldm_clip_checkpoint(meta(original))) == mine


COUNTS = {  # tensors in the public single files, less what is not a network's
    "sd1": 1145 - 14 - 1,  # v1-5-pruned-emaonly: noise table, averaging's two numbers; position_ids
    "sdxl-base": 2515 - 1 - 1,  # sd_xl_base_1.0: position_ids, logit_scale
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_tensors_in_public_files(name):
    variant = VARIANTS[name]
    total = {}
    for part, (kind, config) in parts(variant).items():
        prefix, layout = prefixes(variant)[part]
        total |= names(kind, config, layout, variant.conv_projections, prefix)
    assert len(total) == COUNTS[name]


PARAMETERS = {  # of UNets, as the headers of the public files count them
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "bk-sdm-v2-small": 485_787_524,
    "bk-sdm-v2-tiny": 326_825_604,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_distilled_unets(name):
    assert sum(p.numel() for p in bare(UNet, VARIANTS[name].unet).parameters()) == PARAMETERS[name]


def test_parameters_of_ssd_vega_and_koala():
    """As their papers and cards round them: 1.3 billion; 247, 31 and 460 million by block; 0.78 and 1.16 billion."""
    count = {name: sum(p.numel() for p in bare(UNet, VARIANTS[name].unet).parameters()) for name in VARIANTS}
    vega = bare(UNet, VARIANTS["vega"].unet)
    blocks = [sum(p.numel() for p in part.parameters()) for part in (vega.down, vega.mid, vega.up)]
    assert [round(number / 1e6) for number in blocks] == [247, 31, 460]
    assert [round(count[name] / 1e7) for name in ("koala-700m", "koala-1b")] == [78, 116]
    assert round(count["ssd-1b"] / 1e8) == 13


# --- values, at sizes that a test can hold ---------------------------------------------------------------------------

SMALL = {
    "sd1": UNetConfig(channels=(8, 16, 16), depth=(1, 1, 0), heads=(2, 2, 2), context=12, groups=4),
    "sdxl": UNetConfig(
        channels=(8, 16), depth=(0, 2), heads=(1, 2), mid_depth=2, context=12, groups=4, vector=20, layers=1
    ),
}


def filled(kind, config):
    torch.manual_seed(0)
    return kind(config)


def as_layout(network, layout: str, conv: bool, prefix: str = "") -> dict[str, torch.Tensor]:
    state = network.state_dict()
    return {
        prefix + place.name: place.to_theirs([state[name] for name in place.ours])
        for place in places(network, layout, conv=conv)
    }


def assert_same(state: dict, reference: dict) -> None:
    assert state.keys() == reference.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, reference[name]), name


@pytest.mark.parametrize("name,conv", [("sd1", True), ("sdxl", False)])
def test_unet_values(name, conv):
    network = filled(UNet, SMALL[name])
    settings = write_unet(Variant(name, SMALL[name], VAEConfig(), (VIT_L,)))
    original = as_layout(network, "original", conv, "model.diffusion_model.")
    assert_same(oracle.convert_ldm_unet_checkpoint(original, settings), as_layout(network, "diffusers", conv))


def test_vae_values():
    config = VAEConfig(channels=(8, 16, 16), layers=1, groups=4)
    network = filled(VAE, config)
    settings = write_vae(Variant("small", UNetConfig(), config, (VIT_L,)))
    original = as_layout(network, "original", False, "first_stage_model.")
    assert original["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert_same(oracle.convert_ldm_vae_checkpoint(original, settings), as_layout(network, "diffusers", False))


def test_openclip_values():
    config = TextConfig(vocab=20, width=16, layers=2, heads=2, mlp=24, activation="gelu", projection=16)
    network = filled(TextEncoder, config)
    original = as_layout(network, "openclip", False, "m.")
    assert original["m.transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    reference = CLIPTextModelWithProjection(CLIPTextConfig(**write_text(config)))
    converted = oracle.convert_open_clip_checkpoint(reference, original, "m.")
    assert_same(converted, as_layout(network, "transformers", False))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("conv", [True, False])
def test_there_and_back(layout, conv):
    """Reading undoes writing, bit for bit."""
    for kind, config in (
        (UNet, SMALL["sd1"]),
        (VAE, VAEConfig(channels=(8, 8), groups=4)),
        (TextEncoder, TextConfig(vocab=9, width=8, layers=2, heads=2, mlp=8, projection=6)),
    ):
        network = filled(kind, config)
        state = network.state_dict()
        for place in places(network, layout, conv=conv):
            back = place.to_ours(place.to_theirs([state[name] for name in place.ours]))
            for name, tensor in zip(place.ours, back, strict=True):
                assert torch.equal(tensor, state[name])


def test_other_spellings():
    old = "encoder.mid_block.attentions.0.query.weight"
    assert spelled("encoder.mid_block.attentions.0.to_q.weight", {old}) == old
    assert spelled("text_model.final_layer_norm.bias", {"final_layer_norm.bias"}) == "final_layer_norm.bias"
    assert spelled("text_model.final_layer_norm.bias", {"other"}) == "text_model.final_layer_norm.bias"
