"""T2I-Adapters: the network, its files and whole pipelines beside diffusers'."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY_XL, difference, seeded, smooth_picture, tiny_sd
from diffusers import T2IAdapter as Theirs
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_control_pictures import OPTIONS, close, picture_of, tiny_net
from test_models import DTYPES, TOLERANCE, error, strong

import plainsd
from plainsd import Control
from plainsd.errors import UserError
from plainsd.files.names import places
from plainsd.files.t2i_adapter import is_t2i_adapter
from plainsd.generate import final, image_to_image, inpaint, text_to_image
from plainsd.models.t2i_adapter import AdapterConfig, T2IAdapter, as_features, feature_places
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.variants import KOALA_700M_UNET, SD1_UNET, XL_UNET
from plainsd.pictures.control import fitted

CPU = {"device": "cpu", "dtype": "float32"}
XL = replace(TINY_XL, unet=replace(TINY_XL.unet, channels=(32, 64, 64), heads=(2, 4, 4), depth=(0, 1, 2)))
TYPES = {  # diffusers' settings; the tiny model's levels
    "full": {"adapter_type": "full_adapter", "channels": [32, 64, 64], "downscale_factor": 8},
    "grey": {"adapter_type": "full_adapter", "channels": [32, 64, 64], "downscale_factor": 8, "in_channels": 1},
    "xl": {"adapter_type": "full_adapter_xl", "channels": [32, 64, 64, 64], "downscale_factor": 16},
    "light": {"adapter_type": "light_adapter", "channels": [32, 64], "downscale_factor": 8},
}
EACH = pytest.mark.parametrize("name", TYPES)


def reference_of(name: str, dtype=torch.float32) -> Theirs:
    return strong(Theirs(**TYPES[name])).to(dtype).eval()


@pytest.fixture(scope="module")
def sd():
    return tiny_sd(channels=(32, 64, 64), heads=(2, 4, 4), depth=(1, 1, 0))


@pytest.fixture(scope="module")
def xl():
    return tiny_sd(XL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sd, xl):
    place = tmp_path_factory.mktemp("models")
    plainsd.save(sd, place / "sd")
    plainsd.save(xl, place / "xlmodel")
    for name in TYPES:
        reference_of(name).save_pretrained(place / name)
    return place


def original(net: T2IAdapter) -> dict[str, torch.Tensor]:
    own = net.state_dict()
    return {place.name: own[place.ours[0]] for place in places(net, "original")}


# --- the network, and its files --------------------------------------------------------------------------------------


@DTYPES
@EACH
@torch.no_grad()
def test_an_adapter_equals_diffusers(folder, name, dtype):
    """Odd sizes of features too."""
    reference = reference_of(name, dtype)
    net = plainsd.load_control(folder / name, device="cpu", dtype=dtype)
    map = torch.rand(2, net.config.hint_channels, 112, 144, generator=seeded(0)).to(dtype)
    own, its = net(map), reference(map)
    assert len(own) == len(its) == {"xl": 4}.get(name, 3)
    for mine, theirs in zip(own, its, strict=True):
        assert error(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "config, parameters",
    [
        (AdapterConfig(), 77_369_280),
        (AdapterConfig("xl", factor=16), 79_028_160),
        (AdapterConfig("light", layers=4), 18_689_200),
    ],
    ids=["sd1", "sdxl", "light"],
)
def test_sizes_of_the_public_adapters(config, parameters):
    kinds = {"full": "full_adapter", "xl": "full_adapter_xl", "light": "light_adapter"}
    with torch.device("meta"):
        net = T2IAdapter(config)
        channels = list(config.channels)[: 3 if config.kind == "light" else 4]
        reference = Theirs(3, channels, config.layers, config.factor, kinds[config.kind])
    own, its = (sum(p.numel() for p in one.parameters()) for one in (net, reference))
    assert own == its and own == parameters
    assert {place.name for place in places(net, "diffusers")} == set(reference.state_dict())


def test_the_originals_names():
    """Full adapters' blocks are numbered through all levels; projections stand where the width changes."""
    with torch.device("meta"):
        names = set(original(T2IAdapter(AdapterConfig())))
        light = set(original(T2IAdapter(AdapterConfig("light", layers=4))))
    blocks = {f"body.{n}.block{k}.{x}" for n in range(8) for k in (1, 2) for x in ("weight", "bias")}
    ends = {f"{module}.{x}" for module in ("conv_in", "body.2.in_conv", "body.4.in_conv") for x in ("weight", "bias")}
    assert names == blocks | ends
    assert {"body.0.in_conv.weight", "body.3.body.3.block2.bias", "body.3.out_conv.weight"} <= light
    assert "conv_in.weight" not in light


@EACH
def test_a_file_in_any_naming_is_the_same(folder, tmp_path, name):
    net = plainsd.load_control(folder / name, **CPU)
    save_file(load_file(folder / name / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusers.safetensors")
    save_file(original(net), tmp_path / "original.safetensors")
    torch.save(original(net), tmp_path / "original.pth")
    for file in ("diffusers.safetensors", "original.safetensors", "original.pth"):
        assert is_t2i_adapter(tmp_path / file)
        again = plainsd.load_control(tmp_path / file, **CPU)
        assert again.config == net.config
        assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_broken_files_are_named(folder, tmp_path):
    tensors = load_file(folder / "full" / "diffusion_pytorch_model.safetensors")
    save_file({k: t for k, t in tensors.items() if k != "adapter.conv_in.weight"}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a T2I-Adapter of a kind that is not known here") as caught:
        plainsd.load_control(tmp_path / "a.safetensors")
    assert caught.value.field == "control"
    save_file(tensors | {"adapter.body.1.resnets.1.block2.bias": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="has shape"):
        plainsd.load_control(tmp_path / "b.safetensors")
    for odd in ({"adapter.body.x.block1": torch.zeros(3)}, {"adapter.body.0.resnets.0.block1.weight": torch.zeros(())}):
        save_file(tensors | odd, tmp_path / "odd.safetensors")
        with pytest.raises(UserError):
            plainsd.load_control(tmp_path / "odd.safetensors")
    config = json.loads((folder / "full" / "config.json").read_text())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"adapter_type": "heavy"}))
    with pytest.raises(UserError, match="adapter_type 'heavy' is not supported"):
        plainsd.load_control(tmp_path / "c")


@torch.no_grad()
def test_the_last_feature_belongs_to_the_middle():
    """Which some models do not have; diffusers adds it there alone."""
    for middle, mid_depth in (("UNetMidBlock2DCrossAttn", 1), (None, None)):
        theirs = strong(
            UNet2DConditionModel(
                block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=middle,
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
            )
        ).double().eval()  # fmt: skip
        config = UNetConfig(
            channels=(32, 64), depth=(1, 1), heads=(2, 2), layers=1, context=32, groups=8, mid_depth=mid_depth
        )
        unet = UNet(config).double().eval()
        state, own = theirs.state_dict(), unet.state_dict()
        for place in places(unet, "diffusers"):
            own[place.ours[0]].copy_(state[place.name].view_as(own[place.ours[0]]))
        x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 3, 32).double()
        each = [torch.randn(1, 32, 8, 8).double(), torch.randn(1, 64, 4, 4).double(), torch.randn(1, 64, 4, 4).double()]
        its = theirs(x, 5, text, down_intrablock_additional_residuals=[one.clone() for one in each]).sample
        assert error(unet(x, 5.0, text, features=as_features(unet, each)), its) < TOLERANCE[torch.float64]


def test_where_the_public_models_take_features():
    with torch.device("meta"):
        assert feature_places(UNet(SD1_UNET)) == [2, 5, 8, 11, 12]
        assert feature_places(UNet(XL_UNET)) == [3, 5, 8, 9]
        assert feature_places(UNet(KOALA_700M_UNET)) == [2, 3, 5]
        assert [f is not None for f in as_features(UNet(XL_UNET), [torch.zeros(1)] * 4)] == [
            i in (3, 5, 8, 9) for i in range(10)
        ]


# --- pictures, beside diffusers' pipelines ---------------------------------------------------------------------------


def theirs(folder, adapters: list[str], map, model: str = "sd", **options) -> torch.Tensor:
    from diffusers import MultiAdapter

    loaded = [Theirs.from_pretrained(folder / name) for name in adapters]
    kind = "StableDiffusionXLAdapterPipeline" if model == "xlmodel" else "StableDiffusionAdapterPipeline"
    adapter = MultiAdapter(loaded) if len(loaded) > 1 else loaded[0]
    made = adapted(kind, folder / model, adapter)
    more = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"} | options
    return torch.from_numpy(made(generator=seeded(3), image=map, **more).images[0])


def adapted(kind: str, folder, adapter):
    import diffusers

    unsafe = {} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
    made = getattr(diffusers, kind).from_pretrained(folder, adapter=adapter, **unsafe)
    made.set_progress_bar_config(disable=True)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
    return made


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("name", ["full", "grey", "light"])
def test_from_text(sd, folder, name, guidance):
    map, net = picture_of(0, (96, 64)), plainsd.load_control(folder / name, sd)
    reference = theirs(folder, [name], map.convert("L") if name == "grey" else map, prompt="a red apple",
                       negative_prompt="blurred", adapter_conditioning_scale=0.7, guidance_scale=guidance, width=96,
                       height=64)  # fmt: skip
    more = OPTIONS | {"size": (96, 64), "guidance": guidance}
    close(sd, text_to_image(sd, "a red apple", "blurred", control=[Control(net, map, 0.7)], **more), reference)
    plain = final(text_to_image(sd, "a red apple", "blurred", **more))[0]
    assert (
        difference(
            plain, final(text_to_image(sd, "a red apple", "blurred", control=[Control(net, map, 0.7)], **more))[0]
        )
        > 20
    )


def test_two_adapters_add_up(sd, folder):
    maps = [picture_of(0), picture_of(1)]
    reference = theirs(folder, ["full", "light"], maps, prompt="a red apple", adapter_conditioning_scale=[0.6, 0.3],
                       width=64, height=64)  # fmt: skip
    control = [
        Control(plainsd.load_control(folder / name, sd), map, strength)
        for name, map, strength in zip(("full", "light"), maps, (0.6, 0.3), strict=True)
    ]
    close(sd, text_to_image(sd, "a red apple", size=64, control=control, **OPTIONS), reference)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sdxl(xl, folder, share):
    map, net = picture_of(0), plainsd.load_control(folder / "xl", xl)
    reference = theirs(folder, ["xl"], map, "xlmodel", prompt="a red apple", adapter_conditioning_scale=0.8,
                       adapter_conditioning_factor=share, width=64, height=64)  # fmt: skip
    events = text_to_image(xl, "a red apple", size=64, control=[Control(net, map, 0.8, end=share)], **OPTIONS)
    close(xl, events, reference)


# --- with all else ---------------------------------------------------------------------------------------------------


def test_beside_a_control_net_and_in_each_task(sd, folder):
    net, photo = plainsd.load_control(folder / "full", sd), smooth_picture(60)
    mask = Image.new("L", (60, 60), 255)
    control = Control(net, picture_of(0, (60, 60)), 0.5)
    follows = Control(tiny_net(sd), picture_of(1, (60, 60)))
    for task in (
        lambda **more: image_to_image(sd, "a", photo, **more),
        lambda **more: inpaint(sd, "a", photo, mask, **more),
    ):
        drawn = [final(task(control=some, **OPTIONS))[0] for some in ([], [control], [follows], [control, follows])]
        pairs = [(a, b) for i, a in enumerate(drawn) for b in drawn[:i]]
        assert all(a.size == (60, 60) and difference(a, b) > 10 for a, b in pairs)


def test_alone_and_in_a_batch_the_same(sd, folder):
    for mode in ("balanced", "prompt", "control"):
        control = [Control(plainsd.load_control(folder / "full", sd), picture_of(0), 0.8, mode=mode)]
        together = final(text_to_image(sd, ["a", "b"], "y", size=64, control=control, **OPTIONS))
        alone = final(text_to_image(sd, "b", "y", size=64, control=control, **OPTIONS | {"seed": 4}))[0]
        assert difference(alone, together[1]) <= 1


def test_weights_of_each_mode(sd, folder):
    net = plainsd.load_control(folder / "full", sd)
    of = lambda **options: Control(net, picture_of(0), 0.5, **options)  # noqa: E731
    assert of().weights(4) == [0.5] * 4
    for mode in ("prompt", "control"):
        assert of(mode=mode).weights(4) == [0.125, 0.31, 0.4125, 0.5]
    assert [of(mode=mode).prompted_only for mode in ("balanced", "prompt", "control")] == [False, False, True]


def test_maps_are_grey_and_padded_as_the_adapter_asks(sd, xl, folder):
    for name, model, shape in (("grey", sd, (1, 1, 64, 72)), ("xl", xl, (1, 3, 64, 80))):
        control = Control(plainsd.load_control(folder / name, model), picture_of(0, (70, 58)))
        assert fitted([control], (70, 58))[0].maps[0].shape == shape


def test_maps_of_other_channels_are_refused(sd, folder):
    net = T2IAdapter(AdapterConfig(channels=(32, 64, 64), hint_channels=2))
    with pytest.raises(UserError, match="it reads maps of 2 channels, and pictures have 1 or 3"):
        text_to_image(sd, "p", size=64, control=[Control(net, picture_of(0))])


def test_the_variant_of_its_files(folder, tmp_path):
    shutil.copytree(folder / "full", tmp_path / "full")
    weights = tmp_path / "full" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    net = plainsd.load_control(tmp_path / "full", variant_file="fp16", **CPU)
    whole = plainsd.load_control(folder / "full", **CPU)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(UserError, match="nothere"):
        plainsd.load_control(folder / "full", variant_file="nothere")
    with pytest.raises(UserError, match="T2IAdapters are not written; copy the file"):
        plainsd.save_control(net, tmp_path / "x")


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("full", {"guess": True}, "guess mode is for ControlNets, and this is a T2I-Adapter"),
        ("full", {"kind": 1}, "kind 1 is for union nets"),
        ("xl", {}, "does not fit the model: it gives features of widths 32-64-64-64 from 16 pixels on"),
    ],
    ids=str,
)
def test_wrong_values_are_named(sd, folder, name, options, says):
    net = plainsd.load_control(folder / name, sd)
    with pytest.raises(UserError, match=says) as caught:
        text_to_image(sd, "a", size=64, control=[Control(net, picture_of(0), **options)])
    assert caught.value.field == "control"


def test_generate_follows_one(generate, folder, tmp_path):
    picture_of(0).save(tmp_path / "map.png")
    flags = ("--control", f"{folder / 'full'}:0.7", "--control-image", tmp_path / "map.png")
    code, out, err = generate("a red apple", "--model", folder / "sd", *flags)
    assert code == 0, err
    from plainsd.pictures.images import read_settings

    (note,) = read_settings(out.strip()).control
    assert note.model.startswith("full [") and note.weight == 0.7
