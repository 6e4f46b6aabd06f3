"""Image prompts: image encoders beside transformers', adapters and whole pipelines beside diffusers', in every task."""

import math
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from conftest import TINY_XL, difference, pipeline, seeded, smooth_picture, tiny_sd
from PIL import Image
from safetensors.torch import save_file
from test_models import DTYPES, TOLERANCE, error, ours, unet_inputs, unet_reference

import plainsd
from plainsd import ImagePrompt
from plainsd.checkpoint import load_tower
from plainsd.errors import UserError
from plainsd.files.configs import read_unet
from plainsd.files.names import places
from plainsd.generate import batch, final, image_to_image, inpaint, outpaint, text_to_image
from plainsd.models.image_prompt import ImageAdapter, ImageAdapterConfig
from plainsd.models.layers import Beside
from plainsd.models.unet import UNet
from plainsd.models.vision import VISION_TOWERS, VisionTower
from plainsd.pictures.image_prompt import ImagePrompts, ImageReader, by_block, clip_pixels, widths_of
from plainsd.pictures.sampling import decode

CPU = {"device": "cpu", "dtype": "float32"}
OPTIONS = {"sampler": "ddim", "spacing": "leading", "steps": 4, "seed": 3, "guidance": 4.0}
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7, "projection_dim": 24,
}  # fmt: skip


def tower_of_transformers(act: str = "quick_gelu", dtype=torch.float32, seed: int = 0):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER, hidden_act=act)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def picture_of(seed: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


# --- the tower -------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_a_tower_equals_transformers(tmp_path, act, dtype):
    reference = tower_of_transformers(act, dtype)
    reference.save_pretrained(tmp_path)
    tower = load_tower(tmp_path, "cpu", dtype)
    assert tower.config.activation == act
    pixels = torch.randn(2, 3, 28, 28, generator=seeded(1)).to(dtype)
    states, its = tower(pixels), reference(pixels, output_hidden_states=True)
    assert len(states.hidden) == len(its.hidden_states) == 4
    for own, theirs in zip([*states.hidden, states.embeds], [*its.hidden_states, its.image_embeds], strict=True):
        assert error(own, theirs) < TOLERANCE[dtype]


def test_of_a_strip_only_what_is_seen_is_scaled(monkeypatch):
    sizes, real = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *more: sizes.append(size) or real(image, size, *more)
    )
    for shape in ((1, 50_000), (50_000, 2), (64, 1), (2, 128)):
        assert clip_pixels(Image.new("RGB", shape, "red"), 28).shape == (1, 3, 28, 28)
    assert max(max(size) for size in sizes) == 64 * 28


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (123, 457), (28, 31), (17, 90)], ids=str)
@pytest.mark.parametrize("side", [28, 224])
def test_pixels_are_those_of_transformers(size, side):
    from transformers import CLIPImageProcessor

    image = picture_of(5, size)
    theirs = CLIPImageProcessor(size=side, crop_size=side)(image, return_tensors="pt").pixel_values
    assert torch.allclose(clip_pixels(image, side), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, parameters",
    [("ViT-L/14", 303_966_208), ("ViT-H/14", 632_076_800), ("ViT-bigG/14", 1_844_907_264)],
)
def test_sizes_of_the_public_towers(name, parameters):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    own = VISION_TOWERS[name]
    config = CLIPVisionConfig(
        hidden_size=own.width, intermediate_size=own.mlp, num_hidden_layers=own.layers, num_attention_heads=own.heads,
        patch_size=own.patch, image_size=own.size, projection_dim=own.projection,
    )  # fmt: skip
    with torch.device("meta"):
        tower, reference = VisionTower(own), CLIPVisionModelWithProjection(config)
    assert sum(p.numel() for p in tower.parameters()) == parameters
    assert sum(p.numel() for p in reference.parameters()) == parameters
    names = {place.name: place for place in places(tower, "transformers")}
    assert set(names) == set(reference.state_dict()) and len(names) == len(tower.state_dict())


# --- the adapter, beside diffusers -----------------------------------------------------------------------------------


@torch.no_grad()
def tiny_adapter(unet: UNet, kind: str = "base", seed: int = 0, states: int | None = None) -> ImageAdapter:
    """One that changes pictures much."""
    torch.manual_seed(seed)
    width = TOWER["projection_dim" if kind == "base" else "hidden_size"]
    config = ImageAdapterConfig(
        widths_of(unet), kind, unet.config.context, states or width, tokens=4, inner=64, layers=4, heads=1
    )
    adapter = ImageAdapter(config).eval()
    for name, parameter in adapter.named_parameters():
        torch.nn.init.normal_(parameter, std=0.4 if name.startswith(("k.", "v.")) else 0.3)
    return adapter


def in_a_file(adapter: ImageAdapter) -> dict[str, torch.Tensor]:
    own = adapter.state_dict()
    return {
        place.name: place.to_theirs([own[name] for name in place.ours]).contiguous()
        for place in places(adapter, "diffusers")
    }


def in_groups(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    return groups


@DTYPES
@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_a_unet_with_adapters_equals_diffusers(name, kind, dtype):
    """Two adapters, the first with two pictures, at two strengths; every row with embeddings of its own."""
    reference = unet_reference(name, dtype)
    config, conv = read_unet(dict(reference.config), name)
    unet = ours(UNet, config, reference, conv=conv)
    adapters = [tiny_adapter(unet, kind, seed).to(dtype) for seed in (0, 1)]
    mine, theirs = unet_inputs(config, (8, 8), dtype)
    reference._load_ip_adapter_weights([in_groups(in_a_file(one)) for one in adapters], low_cpu_mem_usage=False)
    reference.to(dtype)
    strengths = (0.7, 0.4)
    for processor in reference.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(strengths)
    shape = (adapters[0].config.states,) if kind == "base" else (5, adapters[0].config.states)
    embeds = [torch.randn(3, pictures, *shape, generator=seeded(2)).to(dtype) for pictures in (2, 1)]
    theirs["added_cond_kwargs"] = (theirs.get("added_cond_kwargs") or {}) | {"image_embeds": embeds}
    its = reference(**theirs).sample
    layers = [[] for _ in adapters[0].k]
    for adapter, each, strength in zip(adapters, embeds, strengths, strict=True):
        tokens = adapter.reader(each.flatten(0, 1)).unflatten(0, (3, -1)).flatten(1, 2)
        for layer, (k, v) in zip(layers, adapter(tokens), strict=True):
            layer.append(Beside(k, strength * v))
    own = unet(**mine, beside=by_block(unet, layers))
    assert error(own, its) < TOLERANCE[dtype]
    assert error(unet(**mine), its) > 0.01


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def xl():
    return tiny_sd(TINY_XL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sd, xl):
    """Two models, adapters of every kind, a tower."""
    place = tmp_path_factory.mktemp("models")
    plainsd.save(sd, place / "sd")
    plainsd.save(xl, place / "xl")
    tower_of_transformers().save_pretrained(place / "image_encoder")
    for name, model in (("sd", sd), ("xl", xl)):
        for kind in ("base", "plus", "full"):
            save_file(in_a_file(tiny_adapter(model.unet, kind)), place / f"{name}-{kind}.safetensors")
    save_file(in_a_file(tiny_adapter(sd.unet, "plus", 1)), place / "sd-plus-1.safetensors")
    return place


def reader_of(folder, name: str) -> ImageReader:
    return plainsd.load_image_prompt(folder / f"{name}.safetensors", **CPU)


def theirs(kind: str, folder, adapters: list[str], images, scales, **options) -> torch.Tensor:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    made = pipeline(kind, folder / adapters[0][:2], "DDIMScheduler")
    tower = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    made.register_modules(image_encoder=tower, feature_extractor=CLIPImageProcessor(size=28, crop_size=28))
    made.load_ip_adapter(str(folder), subfolder="", weight_name=[f"{name}.safetensors" for name in adapters])
    made.set_ip_adapter_scale(scales)
    more = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"} | options
    return torch.from_numpy(made(generator=seeded(3), ip_adapter_image=images, **more).images[0])


def close(sd, events, reference: torch.Tensor) -> None:
    *_, last = events
    with torch.no_grad():
        own = ((decode(sd, last.latents)[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1)
    assert own.shape == reference.shape and own.std() > 0.05
    assert (own - reference).abs().max() < 3e-5, (own - reference).abs().max()


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("model", ["sd", "xl"])
@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_from_text(request, folder, model, kind, guidance):
    sd, image = request.getfixturevalue(model), picture_of(0)
    name = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}[model]
    reference = theirs(name, folder, [f"{model}-{kind}"], image, 0.6, prompt="a red apple", height=64, width=64,
                       guidance_scale=guidance)  # fmt: skip
    prompt = ImagePrompt(reader_of(folder, f"{model}-{kind}"), image, 0.6)
    more = OPTIONS | {"size": 64, "guidance": guidance}
    close(sd, text_to_image(sd, "a red apple", image_prompt=[prompt], **more), reference)
    plain = final(text_to_image(sd, "a red apple", **more))[0]
    assert (torch.from_numpy(np.asarray(plain) / 255) - reference).abs().max() > 0.1


def test_two_adapters_and_several_pictures(sd, folder):
    images = [picture_of(0), picture_of(1), picture_of(2, (30, 30))]
    reference = theirs("StableDiffusionPipeline", folder, ["sd-base", "sd-plus"], [images[:2], images[2]], [0.5, 0.8],
                       prompt="a red apple", height=64, width=72)  # fmt: skip
    prompts = [
        ImagePrompt(reader_of(folder, "sd-base"), images[:2], 0.5),
        ImagePrompt(reader_of(folder, "sd-plus"), images[2], 0.8),
    ]
    close(sd, text_to_image(sd, "a red apple", size=(72, 64), image_prompt=prompts, **OPTIONS), reference)


def test_an_image_prompt_goes_from_model_to_model(folder):
    """Adapter and tower keep their own numbers."""
    prompt, drawn = ImagePrompt(reader_of(folder, "sd-base"), picture_of(0), 0.6), []
    models = {dtype: tiny_sd().to(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        drawn += final(text_to_image(models[dtype], "a", steps=2, seed=3, image_prompt=[prompt]))
    assert difference(drawn[0], drawn[2]) == 0 and 0 < difference(drawn[0], drawn[1]) < 100


def test_a_mask_is_padded_as_its_picture_is(sd, folder):
    """36 pixels are drawn as 40: a mask that is light from column 18 on acts from there."""
    prompt = ImagePrompt(reader_of(folder, "sd-base"), picture_of(0), 0.6)
    half, wider = Image.new("L", (36, 36)), Image.new("L", (40, 40))
    half.paste(255, (18, 0, 36, 36))
    wider.paste(255, (18, 0, 40, 40))
    found = [
        ImagePrompts(sd, [replace(prompt, mask=mask)], (40, 40), 4, shown).each[0]
        for mask, shown in ((half, (36, 36)), (wider, None))
    ]
    for (one,), (other,) in zip(*found, strict=True):
        assert torch.equal(one.where, other.where) and 0 < one.where.mean() < 1


def test_the_steps_that_it_acts_in(sd, folder):
    """What diffusers draws when its strength is set to 0 after half of the steps; and two adapters, one after the
    other, are not both at once."""
    image = picture_of(0)

    def off(made, step, timestep, tensors):
        if step == 1:
            made.set_ip_adapter_scale(0.0)
        return tensors

    reference = theirs("StableDiffusionPipeline", folder, ["sd-plus"], image, 0.6, prompt="a red apple", height=64,
                       width=64, callback_on_step_end=off)  # fmt: skip
    reader, more = reader_of(folder, "sd-plus"), OPTIONS | {"size": 64}
    close(
        sd, text_to_image(sd, "a red apple", image_prompt=[ImagePrompt(reader, image, 0.6, end=0.5)], **more), reference
    )
    first, second, both, last = (
        final(text_to_image(sd, "a", image_prompt=[ImagePrompt(reader, image, 0.6, start=a, end=b) for a, b in spans],
                            **more))[0]
        for spans in ([(0, 0.5)], [(0, 0.5), (0.5, 1)], [(0, 1)], [(0.9, 1)])
    )  # fmt: skip
    assert difference(second, both) == 0 and difference(first, both) > 0
    assert difference(last, final(text_to_image(sd, "a", **more))[0]) == 0  # no whole step lies in it


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_from_a_picture(request, folder, model):
    sd, photo, image = request.getfixturevalue(model), smooth_picture(64), picture_of(0)
    name = {"sd": "StableDiffusionImg2ImgPipeline", "xl": "StableDiffusionXLImg2ImgPipeline"}[model]
    reference = theirs(name, folder, [f"{model}-plus"], image, 0.6, prompt="a red apple", image=photo, strength=0.75)
    prompt = ImagePrompt(reader_of(folder, f"{model}-plus"), image, 0.6)
    close(sd, image_to_image(sd, "a red apple", photo, 0.75, image_prompt=[prompt], **OPTIONS), reference)


def test_inpainting(sd, folder):
    photo, image, mask = smooth_picture(64), picture_of(0), Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    reference = theirs("StableDiffusionInpaintPipeline", folder, ["sd-base"], image, 0.9, prompt="a red apple",
                       image=photo, mask_image=mask, strength=1.0, height=64, width=64)  # fmt: skip
    prompt = ImagePrompt(reader_of(folder, "sd-base"), image, 0.9)
    close(sd, inpaint(sd, "a red apple", photo, mask, image_prompt=[prompt], **OPTIONS), reference)


def halves(size: tuple[int, int]) -> list[Image.Image]:
    """The left half, and a round part of the right one."""
    y, x = np.mgrid[: size[1], : size[0]]
    right = (x - 0.75 * size[0]) ** 2 + (y - 0.5 * size[1]) ** 2 < (0.2 * size[0]) ** 2
    return [Image.fromarray((part * 255).astype(np.uint8)) for part in (x < size[0] / 2, right)]


@pytest.mark.parametrize("size", [(64, 64), (96, 64)], ids=str)
def test_masks(sd, folder, size):
    """One a picture; an adapter without one is everywhere."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    images, masks = [picture_of(0), picture_of(1)], halves(size)
    read = IPAdapterMaskProcessor().preprocess(masks, height=size[1], width=size[0])  # (2, 1, H, W)
    for given, own in (
        ([read.reshape(1, 2, size[1], size[0])], masks),
        ([read[:1].reshape(1, 1, size[1], size[0])], masks[0]),
    ):
        some = images if own is masks else images[:1]
        more = {"cross_attention_kwargs": {"ip_adapter_masks": given}, "height": size[1], "width": size[0]}
        reference = theirs("StableDiffusionPipeline", folder, ["sd-plus"], [some], 0.7, prompt="a red apple", **more)
        prompt = ImagePrompt(reader_of(folder, "sd-plus"), some, 0.7, own)
        close(sd, text_to_image(sd, "a red apple", size=size, image_prompt=[prompt], **OPTIONS), reference)


# --- every task ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompt(folder):
    return [ImagePrompt(reader_of(folder, "sd-plus"), [picture_of(0), picture_of(1)], 0.8)]


def test_alone_and_in_a_batch_the_same(sd, prompt):
    prompts = ["a red apple", "a green [pear:plum:.5] AND a table", "x " * 90]
    together = final(text_to_image(sd, prompts, "y", size=64, image_prompt=prompt, **OPTIONS))
    for i, text in enumerate(prompts):
        alone = final(text_to_image(sd, text, "y", size=64, image_prompt=prompt, **OPTIONS | {"seed": 3 + i}))[0]
        assert difference(alone, together[i]) <= 1


def test_again_from_its_settings(sd, prompt):
    events = text_to_image(sd, ["a", "b"], size=64, image_prompt=prompt, **OPTIONS)
    pictures = final(events)
    assert [len(one.image_prompt) for one in events.settings] == [1, 1]
    again = final(batch(sd, events.settings, image_prompt=prompt))
    assert all(difference(a, b) == 0 for a, b in zip(pictures, again, strict=True))


def test_each_task_takes_after_it(sd, prompt):
    photo, mask = smooth_picture(60), Image.new("L", (60, 60), 255)
    masked = [replace(prompt[0], mask=mask)]
    for sampler in ("heun", "dpmpp_sde"):
        options = OPTIONS | {"sampler": sampler, "spacing": None}
        for task in (
            lambda **more: text_to_image(sd, "a", size=64, **more),
            lambda **more: text_to_image(sd, "a", size=64, hires=1.5, **more),
            lambda **more: text_to_image(sd, "a", size=64, perturbed=2.0, **more),
            lambda **more: image_to_image(sd, "a", photo, **more),
            lambda **more: inpaint(sd, "a", photo, mask, **more),
            lambda **more: outpaint(sd, "a", photo, 8, 0, 0, 4, **more),
        ):
            plain, after, light = (final(task(**options, **more))[0]
                                   for more in ({}, {"image_prompt": prompt}, {"image_prompt": masked}))  # fmt: skip
            assert plain.size == after.size and difference(plain, after) > 20
            assert difference(after, light) <= 1  # a light mask counts everywhere


def test_at_strength_0_and_under_a_dark_mask_nothing_changes(sd, prompt):
    plain = final(text_to_image(sd, "a", size=64, **OPTIONS))[0]
    for change in ({"strength": 0.0}, {"mask": Image.new("L", (64, 64))}):
        same = final(text_to_image(sd, "a", size=64, image_prompt=[replace(prompt[0], **change)], **OPTIONS))[0]
        assert difference(plain, same) == 0


def test_pictures_are_read_once(sd, folder, monkeypatch):
    made, forward = count(), VisionTower.forward
    monkeypatch.setattr(VisionTower, "forward", lambda *rest: (next(made), forward(*rest))[1])
    prompt = [ImagePrompt(reader_of(folder, "sd-base"), picture_of(0))]
    for _ in range(2):
        final(text_to_image(sd, "a", size=64, image_prompt=prompt, **OPTIONS))
    assert next(made) == 1
    other = [replace(prompt[0], image=picture_of(1))]
    pictures = [final(text_to_image(sd, "a", size=64, image_prompt=one, **OPTIONS))[0] for one in (prompt, other)]
    assert next(made) == 3 and difference(*pictures) > 20  # counting itself


def test_the_deep_cache_and_packed_layers_take_after_it(sd, prompt):
    from plainsd.device import can_pack
    from plainsd.speed.model import pack

    options = OPTIONS | {"size": 64, "image_prompt": prompt}
    exact = final(text_to_image(sd, "a", **options))[0]
    assert difference(exact, final(text_to_image(sd, "a", cache=1, **options))[0]) == 0
    seldom = [final(text_to_image(sd, "a", cache=2, **options | more))[0] for more in ({}, {"image_prompt": []})]
    assert difference(*seldom) > 20
    if can_pack(torch.float32):
        fast = tiny_sd()
        pack(fast)
        assert difference(exact, final(text_to_image(fast, "a", **options))[0]) <= 1


@pytest.mark.parametrize(
    "options, says",
    [
        ({"strength": -1}, "strength -1 is out of range; choose 0 to 10"),
        ({"strength": math.nan}, "strength nan is out of range"),
        ({"image": []}, "has no picture"),
        ({"mask": [Image.new("L", (8, 8))] * 3}, "has 3 masks and 2 pictures"),
    ],
    ids=["strength", "nan", "no picture", "masks"],
)
def test_wrong_values_are_named(sd, prompt, options, says):
    with pytest.raises(UserError, match=says) as caught:
        text_to_image(sd, "a", size=64, image_prompt=[replace(prompt[0], **options)])
    assert caught.value.field == "image_prompt"


def test_what_does_not_fit_is_named(sd, xl, folder, prompt):
    with pytest.raises(UserError, match="'image prompt' does not fit the model: it is beside texts of 32") as caught:
        text_to_image(xl, "a", size=64, image_prompt=prompt)
    assert caught.value.field == "image_prompt"
    other = tiny_sd(channels=(32, 64), layers=2)
    with pytest.raises(UserError, match="it has 7 pairs of projections, and .* asks for 11 of other widths"):
        text_to_image(other, "a", size=64, image_prompt=prompt)
    with pytest.raises(
        UserError, match="gives 32 numbers and the adapter reads 1280; choose OpenCLIP's ViT-H"
    ) as caught:
        ImageReader(tiny_adapter(sd.unet, "plus", states=1280), prompt[0].adapter.tower)
    assert caught.value.field == "image_encoder"
