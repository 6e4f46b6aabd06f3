"""Pictures that follow maps: equal to diffusers' pipelines, the same alone and in batches, in every task."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_XL, difference, pipeline, seeded, smooth_picture, tiny_sd
from PIL import Image

import plainsd
from plainsd import Control
from plainsd.errors import UserError
from plainsd.generate import batch, final, image_to_image, inpaint, outpaint, text_to_image
from plainsd.models.control import ControlConfig, ControlNet, control_of
from plainsd.models.unet import UNet
from plainsd.pictures import preprocess
from plainsd.pictures.control import as_map, fitted
from plainsd.pictures.drawing import Pictures
from plainsd.pictures.masks import MaskOptions, canvas_of
from plainsd.pictures.model import moved

HINT = (4, 4, 8, 8)
OPTIONS = {"sampler": "ddim", "spacing": "leading", "steps": 6, "seed": 3, "guidance": 4.0}


@torch.no_grad()
def tiny_net(sd, seed: int = 0, **more) -> ControlNet:
    """A net that changes pictures much, whatever its map shows: see `reading_its_map`."""
    torch.manual_seed(seed)
    net = ControlNet(ControlConfig(control_of(sd.unet, HINT).config, HINT, **more)).eval()
    for module in (*net.zero, net.hint[-1], *([net.union.shift] if net.union else [])):
        torch.nn.init.normal_(module.weight, std=0.5)
    if net.union:
        net.union.time[2].weight *= 20
    return net


def reading_its_map(net: ControlNet) -> ControlNet:
    for module in [*net.hint][:-1]:
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= 4
    return net


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def xl():
    return tiny_sd(TINY_XL)


@pytest.fixture(scope="module")
def nets(sd):
    return tiny_net(sd, 0), tiny_net(sd, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sd, xl, nets):
    place = tmp_path_factory.mktemp("models")
    plainsd.save(sd, place / "tiny")
    plainsd.save(tiny_sd(in_channels=9), place / "nine")
    plainsd.save(xl, place / "xl")
    for number, net in enumerate(nets):
        plainsd.save_control(net, place / f"net{number}")
    plainsd.save_control(tiny_net(sd, 2, pooled=True), place / "pooled")
    plainsd.save_control(tiny_net(xl), place / "xlnet")
    return place


def picture_of(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def theirs(name: str, folder, nets: list, model: str = "tiny", **options):
    import diffusers

    loaded = [diffusers.ControlNetModel.from_pretrained(folder / net) for net in nets]
    made = pipeline(name, folder / model, "DDIMScheduler", controlnet=loaded if len(loaded) > 1 else loaded[0])
    more = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"} | options
    return torch.from_numpy(made(generator=seeded(3), **more).images[0])


def ours(events) -> torch.Tensor:
    from plainsd.pictures.sampling import decode

    *_, last = events
    assert isinstance(last, Pictures)
    with torch.no_grad():
        return ((decode(SD[0], last.latents)[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1)


SD: list = []


def close(sd, events, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    SD[:] = [sd]
    own = ours(events)
    assert own.shape == reference.shape and own.std() > 0.05
    assert (own - reference).abs().max() < 3 * tolerance, (own - reference).abs().max()


# --- equal to diffusers ----------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "weak": {"strength": 0.6},
    "early": {"end": 0.5},
    "late": {"start": 0.35, "end": 0.9},
    "guess": {"guess": True, "strength": 0.8},
    "without guidance": {"strength": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_from_text(sd, folders, nets, case):
    options, map = CASES[case], picture_of(0, (72, 64))
    scale = 1.0 if case == "without guidance" else 4.0
    reference = theirs(
        "StableDiffusionControlNetPipeline",
        folders,
        ["net0"],
        prompt="a red apple",
        negative_prompt="blurred",
        image=map,
        guidance_scale=scale,
        controlnet_conditioning_scale=options.get("strength", 1.0),
        control_guidance_start=options.get("start", 0.0),
        control_guidance_end=options.get("end", 1.0),
        guess_mode=options.get("guess", False),
    )
    more = OPTIONS | {"size": (72, 64), "guidance": scale}
    close(
        sd, text_to_image(sd, "a red apple", "blurred", control=[Control(nets[0], map, **options)], **more), reference
    )
    plain = final(text_to_image(sd, "a red apple", "blurred", **more))[0]
    assert (torch.from_numpy(np.asarray(plain) / 255) - reference).abs().max() > 0.1


def test_a_net_of_means(sd, folders):
    net, map = plainsd.load_control(folders / "pooled", device="cpu", dtype="float32"), picture_of(0)
    assert net.control.pooled
    reference = theirs("StableDiffusionControlNetPipeline", folders, ["pooled"], prompt="a red apple", image=map,
                       height=64, width=64)  # fmt: skip
    close(sd, text_to_image(sd, "a red apple", size=64, control=[Control(net, map)], **OPTIONS), reference)


def test_two_nets_add_up(sd, folders, nets):
    maps = [picture_of(0), picture_of(1)]
    reference = theirs(
        "StableDiffusionControlNetPipeline",
        folders,
        ["net0", "net1"],
        prompt="a red apple",
        image=maps,
        controlnet_conditioning_scale=[0.7, 0.5],
        control_guidance_start=[0.0, 0.2],
        control_guidance_end=[0.6, 1.0],
    )
    control = [Control(nets[0], maps[0], 0.7, 0.0, 0.6), Control(nets[1], maps[1], 0.5, 0.2, 1.0)]
    close(sd, text_to_image(sd, "a red apple", size=64, control=control, **OPTIONS), reference)


def test_from_a_picture(sd, folders, nets):
    photo, map = smooth_picture(64), picture_of(0)
    reference = theirs("StableDiffusionControlNetImg2ImgPipeline", folders, ["net0"], prompt="a red apple", image=photo,
                       control_image=map, strength=0.7, control_guidance_start=0.2, control_guidance_end=0.8,
                       controlnet_conditioning_scale=0.9)  # fmt: skip
    control = [Control(nets[0], map, 0.9, 0.2, 0.8)]
    close(sd, image_to_image(sd, "a red apple", photo, 0.7, control=control, **OPTIONS), reference)


@pytest.mark.parametrize("model", ["tiny", "nine"])
def test_inpainting(sd, folders, nets, model):
    """Beside a model trained for it the net reads the latents alone."""
    sd = sd if model == "tiny" else tiny_sd(in_channels=9)
    photo, map, mask = smooth_picture(64), picture_of(0), Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    reference = theirs("StableDiffusionControlNetInpaintPipeline", folders, ["net0"], model, prompt="a red apple",
                       image=photo, control_image=map, mask_image=mask, strength=1.0,
                       controlnet_conditioning_scale=1.0)  # fmt: skip  # 0.5 where none is given
    events = inpaint(sd, "a red apple", photo, mask, control=[Control(nets[0], map)], **OPTIONS)
    close(sd, events, reference)


def test_a_map_and_a_mask_lie_under_the_part_that_is_drawn():
    """Of the whole picture, whatever their sizes."""
    photo, mask = smooth_picture(96), Image.new("L", (96, 96))
    mask.paste(255, (48, 40, 60, 52))
    canvas = canvas_of(photo, mask, (64, 64), MaskOptions(padding=10))
    assert canvas.box == (38, 30, 70, 62)
    part = smooth_picture(96).crop(canvas.box).resize((64, 64), Image.Resampling.LANCZOS)
    assert difference(canvas.part_of(photo), part) <= 4 and canvas.part_of(mask.convert("P")).size == (64, 64)
    twice = photo.resize((192, 192), Image.Resampling.LANCZOS)
    assert difference(canvas.part_of(twice), part) <= 8
    assert canvas_of(photo, mask, (64, 64), MaskOptions()).part_of(twice) is twice


def test_with_padding_the_map_follows_the_part(sd, nets, monkeypatch):
    photo, mask, seen = smooth_picture(96), Image.new("L", (96, 96)), []
    mask.paste(255, (48, 40, 60, 52))
    monkeypatch.setattr("plainsd.pictures.drawing.fitted", lambda control, *_: seen.extend(control) or [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the map has the picture's size
        final(inpaint(sd, "a", photo, mask, size=(64, 64), masked_padding=10, steps=1,
                      control=[Control(nets[0], photo), Control(nets[0])]))  # fmt: skip
    canvas = canvas_of(photo, mask, (64, 64), MaskOptions(padding=10))
    assert seen[0].images[0].tobytes() == canvas.part_of(photo).tobytes() and seen[1].image is None


@pytest.mark.parametrize("size", [(64, 64), (72, 64)], ids=str)
def test_the_inpainting_map_is_diffusers(sd, folders, nets, size):
    """What its users hand the pipeline for control_v11p_sd15_inpaint: the picture, -1 under the mask."""
    photo, mask = smooth_picture(72).crop((0, 0, *size)), Image.new("L", size)
    mask.paste(255, (16, 8, 48, 40))
    levels = np.array(photo).astype(np.float32) / 255
    levels[np.array(mask) > 127] = -1
    map = torch.from_numpy(levels).permute(2, 0, 1)[None]
    reference = theirs("StableDiffusionControlNetInpaintPipeline", folders, ["net0"], prompt="a red apple", image=photo,
                       control_image=map, mask_image=mask, strength=1.0, controlnet_conditioning_scale=0.8,
                       width=size[0], height=size[1])  # fmt: skip
    events = inpaint(sd, "a red apple", photo, mask, control=[Control(nets[0], strength=0.8)], **OPTIONS)
    assert events.settings[0].control[0].module == "inpaint"
    close(sd, events, reference)


def test_without_a_map_the_picture_is_read(sd, nets):
    photo, mask = smooth_picture(60), Image.new("L", (60, 60), 255)
    own, given = (
        final(image_to_image(sd, "a", photo, control=[Control(nets[0], map)], **OPTIONS))[0] for map in (None, photo)
    )
    assert difference(own, given) == 0
    for control, task, says in (
        (Control(nets[0]), lambda **more: text_to_image(sd, "a", size=64, **more), "there is no picture to read"),
        (Control(nets[0], module="inpaint"), lambda **more: image_to_image(sd, "a", photo, **more), "and a mask"),
        (Control(nets[0], photo, module="inpaint"), lambda **more: inpaint(sd, "a", photo, mask, **more), "no map of"),
        (Control(nets[0], module="hed"), lambda **more: image_to_image(sd, "a", photo, **more), "unknown preproc"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            task(control=[control])
        assert caught.value.field == "control"


def test_sdxl(xl, folders):
    net, map = plainsd.load_control(folders / "xlnet", xl), picture_of(0)
    reference = theirs("StableDiffusionXLControlNetPipeline", folders, ["xlnet"], "xl", prompt="a red apple", image=map,
                       height=64, width=64, controlnet_conditioning_scale=0.8)  # fmt: skip
    close(xl, text_to_image(xl, "a red apple", size=64, control=[Control(net, map, 0.8)], **OPTIONS), reference)


# --- what each way of weighing does ----------------------------------------------------------------------------------


def test_weights_of_each_mode(sd, nets):
    map = picture_of(0)
    of = lambda **options: Control(nets[0], map, 0.5, **options)  # noqa: E731
    assert of().weights(13) == [0.5] * 13
    logspace = (0.5 * torch.logspace(-1, 0, 13, dtype=torch.float64)).tolist()
    assert np.allclose(of(guess=True).weights(13), logspace, rtol=1e-14)
    for mode in ("prompt", "control"):
        assert of(mode=mode).weights(13) == [0.5 * 0.825 ** (12.0 - k) for k in range(13)]
        assert of(mode=mode).weights(10) == [0.5 * 0.825 ** (12.0 - k) for k in range(10)]  # SDXL's, as A1111 has them
    assert [of(**options).prompted_only for options in ({}, {"guess": True}, {"mode": "prompt"}, {"mode": "control"})] \
        == [False, True, False, True]  # fmt: skip


@pytest.mark.parametrize("start, end", [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.3, 0.31), (0.6, 1.0)])
@pytest.mark.parametrize("steps", [4, 7, 20])
def test_the_steps_that_it_acts_in_are_diffusers(nets, start, end, steps):
    control = Control(nets[0], picture_of(0), start=start, end=end)
    keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]  # its controlnet_keep
    assert [float(control.acts(step, steps)) for step in range(steps)] == keep


def test_rows_without_prompt_are_left_alone(sd, nets, monkeypatch):
    seen = []
    plain = UNet.forward

    def forward(self, *rest, residuals=None, **more):
        seen.append(residuals)
        return plain(self, *rest, residuals=residuals, **more)

    monkeypatch.setattr(UNet, "forward", forward)
    for options, zero in (
        ({}, False),
        ({"guess": True}, True),
        ({"mode": "prompt"}, False),
        ({"mode": "control"}, True),
    ):
        seen.clear()
        final(text_to_image(sd, "a", size=64, control=[Control(nets[0], picture_of(0), **options)], **OPTIONS))
        assert len(seen) == 6
        assert all(bool(each[1].any()) != zero and each[0].any() for step in seen for each in step)


# --- every task ------------------------------------------------------------------------------------------------------


@pytest.fixture
def control(nets):
    return [Control(nets[0], picture_of(0))]


@pytest.mark.parametrize("guess", [False, True])
def test_alone_and_in_a_batch_the_same(sd, nets, guess):
    control = [Control(nets[0], picture_of(0), guess=guess)]
    prompts = ["a red apple", "a green [pear:plum:.5] AND a table", "x " * 90]
    together = final(text_to_image(sd, prompts, "y", size=64, control=control, **OPTIONS))
    for i, prompt in enumerate(prompts):
        alone = final(text_to_image(sd, prompt, "y", size=64, control=control, **OPTIONS | {"seed": 3 + i}))[0]
        assert difference(alone, together[i]) <= 1


def test_again_from_its_settings(sd, control):
    events = text_to_image(sd, ["a", "b"], size=64, control=control, **OPTIONS)
    pictures = final(events)
    assert [len(one.control) for one in events.settings] == [1, 1]
    again = final(batch(sd, events.settings, control=control))
    assert all(difference(a, b) == 0 for a, b in zip(pictures, again, strict=True))


def test_both_passes_of_hires_follow(sd, control, monkeypatch):
    sizes = []
    read = ControlNet.read
    monkeypatch.setattr(
        ControlNet, "read", lambda net, maps, *rest: (sizes.append(maps[0].shape), read(net, maps, *rest))[1]
    )
    size = final(text_to_image(sd, "a", size=64, hires=1.5, control=control, **OPTIONS))[0].size
    assert size == (96, 96) and sizes == [(1, 3, 64, 64), (1, 3, 96, 96)]


def test_each_task_and_sampler_follows(sd, control):
    photo, mask = smooth_picture(60), Image.new("L", (60, 60), 255)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sampler in ("heun", "dpmpp_sde", "unipc", "lcm"):
            options = OPTIONS | {"sampler": sampler, "spacing": None}
            for task in (
                lambda **more: text_to_image(sd, "a", size=64, **more),
                lambda **more: image_to_image(sd, "a", photo, **more),
                lambda **more: inpaint(sd, "a", photo, mask, **more),
                lambda **more: outpaint(sd, "a", photo, 8, 0, 0, 4, **more),
            ):
                plain, followed = (final(task(**options, **more))[0] for more in ({}, {"control": control}))
                assert plain.size == followed.size and difference(plain, followed) > 20


def test_the_deep_cache_follows(sd, control):
    exact = final(text_to_image(sd, "a", size=64, control=control, cache=1, **OPTIONS))[0]
    assert difference(exact, final(text_to_image(sd, "a", size=64, control=control, **OPTIONS))[0]) == 0


def test_a_map_of_another_size_is_scaled_and_said(sd, nets):
    with pytest.warns(UserWarning, match="its map is 32x32 and the picture 64x64; it is scaled"):
        scaled = final(text_to_image(sd, "a", size=64, control=[Control(nets[0], picture_of(0, (32, 32)))], **OPTIONS))
    whole = picture_of(0, (32, 32)).resize((64, 64), Image.Resampling.LANCZOS)
    assert (
        difference(scaled[0], final(text_to_image(sd, "a", size=64, control=[Control(nets[0], whole)], **OPTIONS))[0])
        == 0
    )


def test_maps_are_padded_as_pictures_are(sd, nets):
    (one,) = fitted([Control(nets[0], smooth_picture(61))], (61, 61))
    (map,) = one.maps
    assert map.shape == (1, 3, 64, 64) and 0 <= map.min() and map.max() <= 1
    assert torch.equal(map[..., 61:], map[..., 60:61].expand(-1, -1, -1, 3))


def test_a_map_with_transparent_parts_is_dark_there(sd, nets):
    (one,) = fitted([Control(nets[0], Image.new("RGBA", (64, 64), (255, 255, 255, 0)))], (64, 64))
    assert not one.maps[0].any()


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        ({"strength": -1}, "strength -1 is out of range; choose 0 to 10"),
        ({"strength": math.nan}, "strength nan is out of range"),
        ({"start": 0.5, "end": 0.5}, "act from 0.5 to 0.5"),
        ({"end": 1.5}, "act from 0.0 to 1.5"),
        ({"mode": "promt"}, "unknown control mode 'promt'; did you mean 'prompt'"),
        ({"mode": "prompt", "guess": True}, "guess and mode 'prompt' do not go together"),
        ({"kind": 1}, "kind 1 is for union nets"),
        ({"image": []}, "0 maps is for union nets"),
    ],
    ids=str,
)
def test_wrong_values_are_named(sd, nets, options, says):
    with pytest.raises(UserError, match=says) as caught:
        text_to_image(sd, "a", size=64, control=[Control(**{"net": nets[0], "image": picture_of(0)} | options)])
    assert caught.value.field == "control"


def test_a_net_of_grey_maps_reads_them_grey(sd):
    """diffusers' conditioning_channels 1; pictures have no other count than that and 3."""
    grey, image = tiny_net(sd, hint_channels=1), picture_of(0)
    assert as_map(image, image.size, grey).shape[1] == 1
    drawn = [
        final(text_to_image(sd, "p", size=64, steps=2, control=[Control(grey, one)]))[0]
        for one in (image, image.convert("L"))
    ]
    assert difference(*drawn) == 0
    with pytest.raises(UserError, match="it reads maps of 5 channels, and pictures have 1 or 3"):
        text_to_image(sd, "p", size=64, control=[Control(tiny_net(sd, hint_channels=5), image)])


def test_a_net_of_another_family_is_named(sd, xl, nets):
    with pytest.raises(
        UserError, match="control 'control' does not fit the model: it is for a UNet of widths 32-64 that"
    ) as e:
        text_to_image(xl, "a", size=64, control=[Control(nets[0], picture_of(0))])
    assert e.value.field == "control"
    four = ControlNet(ControlConfig(nets[0].config, (4, 8)))
    with pytest.raises(UserError, match="reads maps 2 times as large as latents, and this model's are 8"):
        text_to_image(sd, "a", size=64, control=[Control(four, picture_of(0))])


def test_a_union_net_wants_kinds(xl):
    net = tiny_net(xl, kinds=3)
    with pytest.raises(UserError, match=r"wants the kind of each map, 0 to 2, and has 1 maps and \[\]"):
        text_to_image(xl, "a", size=64, control=[Control(net, picture_of(0))])
    maps = [picture_of(0), picture_of(1)]
    one, other = (
        final(text_to_image(xl, "a", size=64, control=[Control(net, maps, kind=kinds)], **OPTIONS))[0]
        for kinds in ((0, 1), (0, 2))
    )
    assert difference(one, other) > 5


def test_what_a_map_alone_makes_is_made_once(sd, control, monkeypatch):
    made = []
    read = ControlNet.read
    monkeypatch.setattr(ControlNet, "read", lambda *rest: (made.append(1), read(*rest))[1])
    final(text_to_image(sd, "a", size=64, control=control, **OPTIONS))
    assert len(made) == 1


def test_a_net_keeps_its_numbers_among_models_of_other_dtypes(sd):
    """Two drawings that take turns, and one before and after another model's."""
    net, half = tiny_net(sd), tiny_sd().to(dtype=torch.bfloat16)
    control, options = [Control(net, picture_of(0))], {"steps": 2, "size": 64}
    latents_of = lambda: [*text_to_image(sd, "a", control=control, **options)][-1].latents  # noqa: E731
    before = latents_of()
    drawings = [text_to_image(one, "a", control=control, **options) for one in (sd, half)]
    assert all(type(one) is type(other) for one, other in zip(*drawings, strict=True))
    assert next(net.parameters()).dtype == torch.float32
    assert torch.equal(latents_of(), before)
    rounded = tiny_net(sd).to(torch.bfloat16)
    final(text_to_image(sd, "a", control=[Control(rounded, picture_of(0))], **options))
    assert next(rounded.parameters()).dtype == torch.bfloat16


def test_a_map_of_what_is_drawn_over_is_made_as_asked(sd, nets, monkeypatch):
    seen = []
    monkeypatch.setattr(preprocess, "canny", lambda image, *limits: seen.append((image.size, limits)) or image)
    photo, plain = picture_of(3, (48, 32)), Control(nets[0], None, module="canny")
    for control in (replace(plain, thresholds=(30, 60), resolution=64), plain):
        final(image_to_image(sd, "a", photo, 0.5, steps=2, control=[control]))
    assert seen == [((96, 64), (30, 60)), ((48, 32), (100, 200))]


def test_tiling_reaches_the_nets(sd, nets):
    seen = []
    handle = nets[0].conv_in.register_forward_pre_hook(lambda module, args: seen.append(module.padding_mode))
    for tiling in (True, False):
        final(text_to_image(sd, "a", steps=1, size=64, tiling=tiling, control=[Control(nets[0], picture_of(0))]))
    handle.remove()
    assert seen == ["circular", "zeros"]


def test_networks_that_a_drawing_has_moved_can_be_trained():
    """Weights that are made in inference mode cannot: PyTorch refuses to give them gradients."""
    sd = tiny_sd().to(dtype=torch.bfloat16)
    net = tiny_net(tiny_sd())
    final(text_to_image(sd, "a", steps=1, control=[Control(net, picture_of(0))]))
    assert not any(p.is_inference() for p in net.parameters())
    net.requires_grad_(True)
    with torch.inference_mode():
        assert not any(p.is_inference() for p in moved(sd.unet, "meta").parameters())
        assert all(p.is_inference() for p in sd.vae.to(dtype=torch.float32).parameters())  # what is avoided
