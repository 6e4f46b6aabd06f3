"""ControlNet: the networks beside diffusers', and the slot of the UNet that they speak through."""

import math

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from test_models import ATTN, DTYPES, PLAIN, TOLERANCE, UNETS, error, ours, strong, unet_inputs, unet_reference

from plainsd.files.configs import read_control, read_unet
from plainsd.files.configs_out import write_control
from plainsd.models.control import ControlConfig, ControlNet, control_of, way_down
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.variants import SD1_UNET, SD2_UNET, XL_UNET

NETS = {name: UNETS[name] for name in ("sd1", "sd2", "emoji", "sdxl", "one ResBlock in the middle")}
HINT = (4, 8, 12)  # maps are four times as large as latents


def config_of(name: str) -> dict:
    kept = {key: value for key, value in NETS[name].items() if not key.startswith(("reverse", "out_channels"))}
    return kept | {"conditioning_embedding_out_channels": HINT}


def reference_net(name: str, dtype: torch.dtype, **more) -> ControlNetModel:
    return strong(ControlNetModel(**config_of(name) | more)).to(dtype)


def reference_union(dtype: torch.dtype) -> ControlNetUnionModel:
    union = ControlNetUnionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=(PLAIN, ATTN, ATTN),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        norm_num_groups=8,
        projection_class_embeddings_input_dim=6 * 256 + 40,
        conditioning_embedding_out_channels=HINT,
        num_control_type=5,
        num_trans_channel=32,
        num_proj_channel=32,
    )
    return strong(union).to(dtype)


def maps(count: int, size: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, 3, 4 * size[0], 4 * size[1], generator=generator).to(dtype) for _ in range(count)]


@DTYPES
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_net_equals_diffusers(name, order, dtype):
    reference = reference_net(name, dtype, controlnet_conditioning_channel_order=order)
    config, conv = read_control(dict(reference.config), name)
    assert config.bgr == (order == "bgr")
    mine, theirs = unet_inputs(config.unet, (6, 8), dtype)
    (map,) = maps(1, (6, 8), dtype)
    net = ours(ControlNet, config, reference, conv=conv)
    down, middle = reference(**theirs, controlnet_cond=map, return_dict=False)
    residuals = net(**mine, hint=net.read([map]))
    assert len(residuals) == len(down) + 1
    for own, its in zip(residuals, [*down, middle], strict=True):
        assert error(own, its) < TOLERANCE[dtype]


@DTYPES
@torch.no_grad()
def test_a_net_whose_residuals_are_means_equals_diffusers(dtype):
    reference = reference_net("sd1", dtype, global_pool_conditions=True)
    config, conv = read_control(dict(reference.config), "pooled")
    mine, theirs = unet_inputs(config.unet, (6, 8), dtype)
    (map,) = maps(1, (6, 8), dtype)
    net = ours(ControlNet, config, reference, conv=conv)
    down, middle = reference(**theirs, controlnet_cond=map, return_dict=False)
    for own, its in zip(net(**mine, hint=net.read([map])), [*down, middle], strict=True):
        assert own.shape[2:] == (1, 1) and error(own, its) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("kinds", [(3,), (0, 4), (2, 1, 3)], ids=str)
@torch.no_grad()
def test_a_union_net_equals_diffusers(kinds, dtype):
    """Row by row: diffusers' attention mixes the pictures of a batch."""
    reference = reference_union(dtype)
    config, conv = read_control(dict(reference.config), "union")
    assert config.kinds == 5
    mine, theirs = unet_inputs(config.unet, (6, 8), dtype)
    given, share = maps(len(kinds), (6, 8), dtype), 0.7
    net = ours(ControlNet, config, reference, conv=conv)
    residuals = net(**mine, hint=net.read(given, kinds, share if len(kinds) > 1 else 1.0), kinds=kinds)
    if len(kinds) == 1:
        residuals = [each * share for each in residuals]
    told = torch.zeros(1, 5)
    told[0, list(kinds)] = 1
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in theirs.items() if isinstance(value, torch.Tensor)}
        one["added_cond_kwargs"] = {name: value[row : row + 1] for name, value in theirs["added_cond_kwargs"].items()}
        down, middle = reference(
            **one,
            controlnet_cond=[map[row : row + 1] for map in given],
            control_type=told,
            control_type_idx=list(kinds),
            conditioning_scale=share,
            return_dict=False,
        )
        for own, its in zip(residuals, [*down, middle], strict=True):
            assert error(own[row : row + 1], its) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("name", ["sd1", "sdxl", "no middle", "lcm"])
@torch.no_grad()
def test_residuals_join_the_unet_as_in_diffusers(name, dtype):
    reference = unet_reference(name, dtype)
    config, conv = read_unet(dict(reference.config), name)
    unet = ours(UNet, config, reference, conv=conv)
    mine, theirs = unet_inputs(config, (8, 8), dtype)
    generator = torch.Generator().manual_seed(3)
    shapes = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: shapes.append(o.shape)) for m in [unet.conv_in, *unet.down, unet.mid]
    ]
    unet(**mine)
    [hook.remove() for hook in hooks]
    more = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    its = reference(**theirs, down_block_additional_residuals=more[:-1], mid_block_additional_residual=more[-1]).sample
    assert error(unet(**mine, residuals=more), its) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_features_join_the_way_down_as_in_diffusers(name, dtype):
    """Where a T2I-Adapter's are added: after a level's last block before it is halved; of a level that does not attend,
    after that."""
    reference = unet_reference(name, dtype)
    config, conv = read_unet(dict(reference.config), name)
    unet = ours(UNet, config, reference, conv=conv)
    mine, theirs = unet_inputs(config, (8, 8), dtype)
    places = {"sd1": (2, 5, 8, 11), "sdxl": (2, 3, 5, 6)}[name]  # counted from conv_in
    sizes = {"sd1": (8, 4, 2, 1), "sdxl": (4, 4, 2, 2)}[name]
    widths = {"sd1": (32, 64, 64, 64), "sdxl": (32, 64, 64, 64)}[name]
    generator = torch.Generator().manual_seed(3)
    more = [torch.randn(3, c, s, s, generator=generator).to(dtype) for c, s in zip(widths, sizes, strict=True)]
    features = [None] * (len(unet.down) + 2)
    for place, each in zip(places, more, strict=True):
        features[place] = each
    its = reference(**theirs, down_intrablock_additional_residuals=list(more)).sample
    assert error(unet(**mine, features=features), its) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "unet, count, residuals",
    [(SD1_UNET, 361_279_120, 13), (SD2_UNET, 364_228_240, 13), (XL_UNET, 1_251_014_160, 10)],
    ids=["sd1", "sd2", "sdxl"],
)
def test_sizes_of_the_public_nets(unet, count, residuals):
    with torch.device("meta"):
        net = ControlNet(ControlConfig(way_down(unet)))
        assert sum(p.numel() for p in net.parameters()) == count
        reference = ControlNetModel.from_config(write_control(net.control, conv=True))
        assert sum(p.numel() for p in reference.parameters()) == count
        hint = torch.zeros(1, 3, 64, 64)
        vector = torch.zeros(1, unet.vector) if unet.vector else None
        found = net(torch.zeros(1, 4, 8, 8), 3.0, torch.zeros(1, 77, unet.context), net.read([hint]), vector)
    assert len(found) == residuals


@pytest.mark.parametrize("name", NETS)
def test_settings_there_and_back(name):
    reference = reference_net(name, torch.float32)
    config, conv = read_control(dict(reference.config), name)
    written = write_control(config, conv)
    assert read_control(written, name) == (config, conv)
    again = ControlNetModel.from_config(written).state_dict()
    assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in reference.state_dict().items()}


def test_settings_of_a_union_net_there_and_back():
    reference = reference_union(torch.float32)
    config, conv = read_control(dict(reference.config), "union")
    written = write_control(config, conv)
    assert read_control(written, "union") == (config, conv)
    again = ControlNetUnionModel.from_config(written).state_dict()
    assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in reference.state_dict().items()}


@torch.no_grad()
def test_a_new_net_is_the_unets_way_down_and_changes_nothing():
    torch.manual_seed(0)
    config = UNetConfig(channels=(16, 32), depth=(1, 1), heads=(2, 2), layers=1, context=12, groups=8)
    unet = UNet(config)
    net = control_of(unet, (4, 8))
    x, context, map = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 12), torch.rand(2, 3, 12, 12)
    residuals = net(x, 7.0, context, net.read([map]))
    assert all(not each.any() for each in residuals)
    assert torch.equal(unet(x, 7.0, context), unet(x, 7.0, context, residuals=residuals))
    own, its = net.state_dict(), unet.state_dict()
    assert all(
        torch.equal(own[name], its[name]) for name in own if name.startswith(("down.", "mid.", "time.", "conv_in."))
    )
    assert math.isclose(sum(p.abs().sum() for p in net.zero.parameters()), 0)
