"""Image prompts in files and on the command line: told by contents, and what is wrong in one line."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import TINY_XL, seeded, tiny_sd
from safetensors.torch import load_file, save_file
from test_image_prompt import CPU, TOWER, in_a_file, in_groups, picture_of, tiny_adapter, tower_of_transformers

import plainsd
from plainsd.checkpoint import load_tower
from plainsd.errors import UserError
from plainsd.files.image_prompt import open_image_adapter, open_tower, tower_beside
from plainsd.files.names import places
from plainsd.models.image_prompt import ImageAdapter, ImageAdapterConfig
from plainsd.models.vision import VISION_TOWERS, VisionConfig
from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import ControlNote, ImagePromptNote, Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings

TINY_TOWER = VisionConfig(width=32, layers=3, heads=4, mlp=48, patch=7, size=28, projection=24)


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture
def files(tmp_path, sd, capsys):
    """An adapter with its tower beside it, pictures, and what is neither."""
    place = tmp_path / "files"
    tower_of_transformers().save_pretrained(place / "image_encoder")
    save_file(in_a_file(tiny_adapter(sd.unet)), place / "base.safetensors")
    save_file(in_a_file(tiny_adapter(sd.unet, "plus")), place / "plus.safetensors")
    (place / "alone").mkdir()
    save_file(in_a_file(tiny_adapter(sd.unet)), place / "alone" / "base.safetensors")
    save_file(in_a_file(tiny_adapter(sd.unet, states=23)), place / "other.safetensors")
    save_file(in_a_file(tiny_adapter(tiny_sd(TINY_XL).unet)), place / "xl.safetensors")
    plainsd.save(sd, place / "model.safetensors")
    for number in range(2):
        picture_of(number).save(place / f"{number}.png")
    capsys.readouterr()  # transformers' progress bar
    return place


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, its = a.state_dict(), b.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def test_of_the_towers_beside_an_adapter_the_one_that_fits_is_taken(files):
    """As in the published repository, where adapters for SDXL lie beside a tower that some of them do not read."""
    config = json.loads((files / "image_encoder" / "config.json").read_text())
    for folder, width in (("sdxl_models", 40), ("models", config["hidden_size"])):
        (files / folder / "image_encoder").mkdir(parents=True)
        (files / folder / "image_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": width}))
    for name, folder in (("plus", "models"), ("base", "sdxl_models"), ("other", "sdxl_models")):  # which fits neither
        adapter = (files / f"{name}.safetensors").rename(files / "sdxl_models" / f"{name}.safetensors")
        assert tower_beside(adapter) == files / folder / "image_encoder"


# --- towers ----------------------------------------------------------------------------------------------------------


def test_a_tower_in_any_file_is_the_same(files, tmp_path, monkeypatch):
    """A folder, a file of a known size in transformers' names, with and without their prefix, and in OpenCLIP's."""
    tower = load_tower(files / "image_encoder", **CPU)
    assert tower.config == TINY_TOWER
    with pytest.raises(UserError, match="of an unknown size") as caught:
        load_tower(files / "image_encoder" / "model.safetensors")
    assert caught.value.field == "image_encoder"
    monkeypatch.setitem(VISION_TOWERS, "tiny", TINY_TOWER)
    assert same(load_tower(files / "image_encoder" / "model.safetensors", **CPU), tower)
    tensors = load_file(files / "image_encoder" / "model.safetensors")
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    save_file(bare | {"embeddings.position_ids": torch.arange(17)}, tmp_path / "bare.safetensors")
    assert same(load_tower(tmp_path / "bare.safetensors", **CPU), tower)
    own = tower.state_dict()
    openclip = {p.name: p.to_theirs([own[name] for name in p.ours]).contiguous() for p in places(tower, "openclip")}
    assert openclip["visual.proj"].shape == (32, 24) and "visual.transformer.resblocks.2.attn.in_proj_bias" in openclip
    save_file(openclip | {"logit_scale": torch.ones(())}, tmp_path / "open.safetensors")
    assert same(load_tower(tmp_path / "open.safetensors", **CPU), tower)


def test_the_tower_of_a_whole_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config=TOWER,
        projection_dim=24,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 28, 28, generator=seeded(0))
    with torch.no_grad():
        theirs = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        assert torch.allclose(load_tower(tmp_path, **CPU)(pixels).embeds, theirs, atol=1e-5)


LAION_HAS_TOO = ("ViT-B/32", "ViT-B/16", "ViT-L/14")


@pytest.mark.parametrize("name", VISION_TOWERS)
def test_known_towers_are_told_by_their_shapes(name, tmp_path):
    """From names and shapes alone, as of the public files."""
    from plainsd.files.image_prompt import known_tower
    from plainsd.files.stored import empty
    from plainsd.files.tensorfile import Stored, TensorFile
    from plainsd.models.vision import VisionTower

    tower = empty(VisionTower, VISION_TOWERS[name])
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    for naming in ("diffusers", "openclip"):
        stored = {p.name: Stored(torch.float32, shapes[p.ours[0]], lambda: None) for p in places(tower, naming)}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert known_tower(TensorFile(tmp_path, stored, {}), naming) == VISION_TOWERS[name]
        assert [f"taken for OpenAI's {name}" in str(one.message) for one in said] == [True] * (name in LAION_HAS_TOO)
        for weight in [one for one in stored if "position" in one]:
            for damaged in ({}, {weight: Stored(torch.float32, (), lambda: None)}):
                rest = {one: stored[one] for one in stored if one != weight} | damaged
                with pytest.raises(UserError, match="its image encoder lacks its embeddings"):
                    known_tower(TensorFile(tmp_path, rest, {}), naming)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_adapters_as_published(sd, tmp_path, kind):
    """Safetensors, and a pickle of two groups."""
    adapter = tiny_adapter(sd.unet, kind)
    tensors = in_a_file(adapter)
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(in_groups(tensors), tmp_path / "a.bin")
    for name in ("a.safetensors", "a.bin"):
        found = open_image_adapter(tmp_path / name).build(torch.device("cpu"), torch.float32)
        assert replace(found.config, inner=64, layers=4, heads=1, tokens=4) == adapter.config and same(found, adapter)


PUBLIC = {  # names and shapes of ip-adapter_sd15 and ip-adapter-plus_sd15
    "sd15": (ImageAdapterConfig(), 22_319_616, {"image_proj.proj.weight": (3072, 1024)}),
    "plus_sd15": (
        ImageAdapterConfig(kind="plus", states=1280, tokens=16),
        49_087_488,
        {"image_proj.latents": (1, 16, 768), "image_proj.layers.3.0.to_kv.weight": (1536, 768)},
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_sizes_of_the_public_adapters(name):
    config, parameters, shapes = PUBLIC[name]
    with torch.device("meta"):
        adapter = ImageAdapter(config)
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    found = {name: tuple(tensor.shape) for name, tensor in in_a_file(adapter).items()}
    assert found.items() >= shapes.items()
    assert {f"ip_adapter.{n}.to_{x}_ip.weight" for n in range(1, 32, 2) for x in "kv"} <= found.keys()
    assert found["ip_adapter.31.to_k_ip.weight"] == (1280, 768)  # the middle's, last


def test_faceid_is_refused_by_name(sd, tmp_path):
    tensors = in_a_file(tiny_adapter(sd.unet))
    keys = {name: tensor for name, tensor in tensors.items() if name.startswith("ip_adapter.")}
    face = {"image_proj.proj.0.weight": torch.zeros(8, 8), "image_proj.norm.weight": torch.zeros(8)}
    plus = {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(8, 8)}
    lora = tensors | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 8)}
    for more, says in ((keys | face, "FaceID,"), (keys | plus, "FaceID Plus,"), (lora, "FaceID,")):
        save_file(more, tmp_path / "face.safetensors")
        with pytest.raises(UserError, match=f"face.safetensors is an IP-Adapter {says} which reads a face") as caught:
            plainsd.load_image_prompt(tmp_path / "face.safetensors", tmp_path)
        assert caught.value.field == "image_prompt"


@pytest.mark.parametrize("damage", ["missing", "more", "keys", "empty"])
def test_broken_adapters_are_named(sd, tmp_path, damage):
    tensors = in_a_file(tiny_adapter(sd.unet, "plus"))
    if damage == "missing":
        del tensors["image_proj.proj_in.bias"]
    elif damage == "more":
        tensors["image_proj.other"] = torch.zeros(3)
    elif damage == "empty":
        tensors = {name: tensor[:, :0] if "to_k_ip" in name else tensor for name, tensor in tensors.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if "to_k_ip" not in name}
    save_file(tensors, tmp_path / "x.safetensors")
    says = {"missing": "1 names missing", "more": "1 unexpected", "keys": "lacks its projections",
            "empty": "lacks its projections"}[damage]  # fmt: skip
    with pytest.raises(UserError, match=says):
        open_image_adapter(tmp_path / "x.safetensors")


# --- the command line ------------------------------------------------------------------------------------------------


def test_generate_takes_after_a_picture_and_its_text_is_read_back(generate, files):
    flags = ("--image-prompt", f"{files / 'base.safetensors'}:0.7", "--image-prompt-image", files / "0.png",
             "--image-prompt-image", files / "1.png", "--image-prompt-mask", files / "1.png")  # fmt: skip
    code, out, err = generate("a red apple", *flags, "--seed", 4)
    assert code == 0, err
    settings = read_settings(out.strip())
    (note,) = settings.image_prompt
    assert note.model.startswith("base [") and note[1:] == (0.7, 2, 1, 0.0, 1.0)
    code, _, err = generate("--from", out.strip())
    assert code == 2 and "was made with the image prompt 'base [" in err and "--image-prompt-image" in err
    code, again, err = generate("--from", out.strip(), "--image-prompt", files / "base.safetensors", *flags[2:])
    assert code == 0, err
    from PIL import Image

    assert Image.open(out.strip()).tobytes() == Image.open(again.strip()).tobytes()
    assert read_settings(again.strip()) == settings
    code, plain, err = generate("a red apple", "--seed", 4)
    assert Image.open(out.strip()).tobytes() != Image.open(plain.strip()).tobytes()


ONE = ("--image-prompt", "base.safetensors", "--image-prompt-image", "0.png")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--image-prompt", "base.safetensors"], "1 --image-prompt and 0 --image-prompt-image"),
        (["--image-prompt-image", "0.png"], "0 --image-prompt and 1 --image-prompt-image"),
        ([*ONE, *ONE, "--image-prompt-image", "1.png"], "2 --image-prompt and 3 --image-prompt-image"),
        ([*ONE, *["--image-prompt-mask", "1.png"] * 2], "2 --image-prompt-mask and 1 --image-prompt-image"),
        (["--image-encoder", "image_encoder"], "1 --image-encoder and 0 --image-prompt"),
        (["--image-prompt", "base.safetensors:much", *ONE[2:]], "'much' is not a strength"),
        (["--image-prompt", "base.safetensors:-1", *ONE[2:]], "strength -1.0 is out of range"),
        (["--image-prompt", "alone/base.safetensors", *ONE[2:]], "needs its CLIP image encoder"),
        (["--image-prompt", "other.safetensors", *ONE[2:]], "it gives 24 numbers and the adapter reads 23"),
        (["--image-prompt", "xl.safetensors", *ONE[2:]], "is beside texts of 64 numbers, and a UNet of widths 32-64"),
        (["--image-prompt", "model.safetensors", *ONE[2:]], "is not an IP-Adapter"),
        ([*ONE, "--image-encoder", "model.safetensors"], "is not a CLIP image encoder"),
        (["--image-prompt", "nowhere.safetensors", *ONE[2:]], "there is no model at 'nowhere.safetensors'"),
        ([*ONE, *["--image-prompt-range", "0", "1"] * 2], "2 --image-prompt-range and 1 --image-prompt"),
        ([*ONE, "--image-prompt-range", "0.5", "0.5"], "act from 0.5 to 0.5 of the steps"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(generate, files, monkeypatch, flags, says):
    monkeypatch.chdir(files)
    code, out, err = generate("a", *flags)
    assert code == 2 and says in err and err.count("\n") == 1 and not out


# --- what a picture's text says --------------------------------------------------------------------------------------


def test_texts_there_and_back():
    """As units of A1111's ControlNet extension, after those of ControlNets."""
    notes = (ImagePromptNote(), ImagePromptNote("plus [01234567]", 0.3, 3, 1, 0.1, 0.9))
    control = (ControlNote("inpaint", "fill [76543210]"),)
    settings = Settings(prompt="a", control=control, image_prompt=notes, steps=3, seed=1, noise="cpu")
    text = format_settings(settings)
    assert 'ControlNet 0: "Module: inpaint_only, Model: fill [76543210], Weight: 1.0, ' in text
    assert 'ControlNet 2: "Module: ip-adapter-auto, Model: plus [01234567], Weight: 0.3, ' in text
    assert "Guidance Start: 0.1, Guidance End: 0.9, " in text and ', Images: 3, Masks: 1"' in text
    assert parse_settings(text) == settings
    for module in ("inpaint", "inpaint_global_harmonious"):
        assert parse_settings(text.replace("inpaint_only", module)) == settings
    for module in ("ip-adapter_clip_h", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl_plus_vith"):
        assert parse_settings(text.replace("ip-adapter-auto", module)) == settings
    with pytest.raises(UserError, match="'ControlNet 2' has a value that cannot be read"):
        parse_settings(text.replace("0.3", "heavy"))


def test_settings_of_a_tower_are_read_or_refused(files):
    path = files / "image_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_act": "silu"}))
    with pytest.raises(UserError, match="hidden_act 'silu' is not supported"):
        open_tower(files / "image_encoder")
    path.write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(UserError, match="5 attention heads do not divide a width of 32"):
        open_tower(files / "image_encoder")


def test_info_says_what_it_is(files, capsys):
    from diffusers import T2IAdapter

    from plainsd.cli import main

    T2IAdapter(channels=[32, 64]).save_pretrained(files / "t2i")
    capsys.readouterr()
    for name, says in (
        ("base.safetensors", "an IP-Adapter; give it with --image-prompt"),
        ("image_encoder", "a CLIP image encoder; use it as --image-encoder"),
        ("image_encoder/model.safetensors", "a CLIP image encoder; use it as --image-encoder"),
        ("t2i", "a T2I-Adapter; give it with --control"),
        ("t2i/diffusion_pytorch_model.safetensors", "a T2I-Adapter; give it with --control"),
    ):
        assert main(["info", str(files / name)]) == 0
        assert says in capsys.readouterr().out


def test_a_grid_over_models_refuses_an_adapter_that_does_not_fit_one(generate, sd, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr("plainsd.commands.generate.draw", None)
    plainsd.save(tiny_sd(TINY_XL), files / "xl")
    code, out, err = generate("a", *ONE, "--grid", "model=model.safetensors,xl")
    assert code == 2 and "grid model=xl: image prompt 'base [" in err and err.count("\n") == 1 and not out
