"""ControlNets in files: every form there and back, told by contents, and what is wrong in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_XL, tiny_sd
from diffusers import ControlNetModel, ControlNetUnionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_control_pictures import HINT, picture_of, tiny_net

import plainsd
from plainsd.cli import main
from plainsd.commands.control import asked_controls, chosen_controls, map_of
from plainsd.commands.flags import GenerateFlags
from plainsd.errors import UserError
from plainsd.files.control import XL_MID, XL_SMALL, is_control, known_unets, open_control
from plainsd.files.convert import convert
from plainsd.files.names import places
from plainsd.files.stored import empty
from plainsd.models.control import ControlConfig, ControlNet, way_down
from plainsd.models.unet import UNet
from plainsd.models.variants import SD1_UNET, SD2_UNET, XL_UNET
from plainsd.pictures.control import fitted
from plainsd.pictures.images import to_tensor
from plainsd.pictures.masks import resized
from plainsd.pictures.settings import ControlNote, Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def xl():
    return tiny_sd(TINY_XL)


@pytest.fixture
def tiny_known(monkeypatch, sd, xl):
    """The tiny models in the table of known ones: for files without notes of ours."""
    monkeypatch.setattr("plainsd.files.detect.VARIANTS", {v.name: v for v in (sd.variant, xl.variant)})


def same(a: ControlNet, b: ControlNet) -> bool:
    mine, its = a.state_dict(), b.state_dict()
    return a.control == b.control and mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)


@pytest.fixture(params=["sd1", "xl", "union"])
def net(request, sd, xl):
    if request.param == "sd1":
        return tiny_net(sd)
    return tiny_net(xl, kinds=4 if request.param == "union" else 0)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net", "net.safetensors"])
def test_there_and_back(net, tmp_path, name):
    plainsd.save_control(net, tmp_path / name)
    assert is_control(tmp_path / name) and same(plainsd.load_control(tmp_path / name, **CPU), net)


def test_a_folder_is_diffusers_own(net, tmp_path):
    plainsd.save_control(net, tmp_path / "net")
    kind = ControlNetUnionModel if net.control.kinds else ControlNetModel
    theirs = kind.from_pretrained(tmp_path / "net")
    written = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == theirs.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path / "again")
    assert same(plainsd.load_control(tmp_path / "again", **CPU), net)


@pytest.mark.parametrize("form", ["control_model.", "", "pth", "diffusers"])
def test_files_from_elsewhere_are_told_by_their_shapes(net, tmp_path, tiny_known, form):
    """Without notes of ours: the original's names under their prefix and bare, a pickle, diffusers' names."""
    plainsd.save_control(net, tmp_path / "net")
    plainsd.save_control(net, tmp_path / "own.safetensors")
    tensors = load_file(tmp_path / "own.safetensors")
    if form == "diffusers":
        tensors = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    elif form in ("", "pth"):
        tensors = {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}
    path = tmp_path / ("x.pth" if form == "pth" else "x.safetensors")
    torch.save({"state_dict": tensors}, path) if form == "pth" else save_file(tensors, path)
    assert is_control(path) and same(plainsd.load_control(path, **CPU), net)


def test_a_shuffle_net_is_told_by_its_name_and_said(sd, tmp_path, tiny_known):
    plainsd.save_control(tiny_net(sd, pooled=True), tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "control_v11e_sd15_shuffle.safetensors")
    with pytest.warns(UserWarning, match="by its name its residuals are means"):
        found = plainsd.load_control(tmp_path / "control_v11e_sd15_shuffle.safetensors", **CPU)
    assert found.control.pooled


def original(sd, net, path) -> tuple[dict, dict]:
    """The net's tensors in the original's names without prefix, and those of the UNet that it is for."""
    plainsd.save_control(net, path / "own.safetensors")
    tensors = load_file(path / "own.safetensors")
    plainsd.save(sd, path / "model.safetensors")
    start = "model.diffusion_model."
    base = {name.removeprefix(start): tensor for name, tensor in load_file(path / "model.safetensors").items()
            if name.startswith(start)}  # fmt: skip
    return {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}, base


def test_a_net_in_a_whole_checkpoint(sd, tmp_path, tiny_known):
    """As the first were published. Where a model is asked for, the file is that."""
    net = tiny_net(sd)
    tensors, _ = original(sd, net, tmp_path)
    whole = load_file(tmp_path / "model.safetensors") | {f"control_model.{name}": t for name, t in tensors.items()}
    torch.save({"state_dict": whole}, tmp_path / "control_sd15_canny.pth")
    assert same(plainsd.load_control(tmp_path / "control_sd15_canny.pth", **CPU), net)
    assert not is_control(tmp_path / "control_sd15_canny.pth")
    convert(tmp_path / "control_sd15_canny.pth", tmp_path / "m", family=sd.variant.name)
    assert (tmp_path / "m" / "unet").is_dir()


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_differences_are_added_to_the_base(sd, tmp_path, tiny_known, prefix):
    """What does not differ is left out of such files."""
    net = tiny_net(sd)
    tensors, base = original(sd, net, tmp_path)
    changes = {name: tensor - base[name] if name in base else tensor for name, tensor in tensors.items()}
    left = next(name for name in base if name in changes)
    del changes[left]
    save_file(
        {prefix + n: t for n, t in changes.items()} | {"difference": torch.tensor(1.0)}, tmp_path / "d.safetensors"
    )
    found = plainsd.load_control(tmp_path / "d.safetensors", sd)
    expected = tensors | {left: base[left]}
    plainsd.save_control(found, tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    assert all((whole["control_model." + name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())
    with pytest.raises(UserError, match="is a ControlNet's difference to a base, and needs the model that it is for"):
        plainsd.load_control(tmp_path / "d.safetensors", **CPU)
    with pytest.raises(UserError, match="give that to load_control with base=, and the result to save_control"):
        convert(tmp_path / "d.safetensors", tmp_path / "folder")


@pytest.mark.parametrize("which", ["sd1", "xl"])
def test_a_control_lora_is_its_base_and_products(sd, xl, tmp_path, tiny_known, which):
    sd = sd if which == "sd1" else xl
    tensors, base = original(sd, tiny_net(sd), tmp_path)
    generator, low, expected = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in tensors.items():
        if name not in base:
            low[name] = expected[name] = tensor
        elif name.endswith(".weight") and tensor.ndim > 1:
            rows, columns = tensor.shape[0], tensor[0].numel()
            up = torch.randn(rows, 2, *[1] * (tensor.ndim - 2), generator=generator)
            down = torch.randn(2, *tensor.shape[1:], generator=generator)
            low |= {name.replace(".weight", ".up"): up, name.replace(".weight", ".down"): down}
            expected[name] = base[name] + (up.reshape(rows, 2) @ down.reshape(2, columns)).view(tensor.shape)
        elif name.endswith(".bias"):
            expected[name] = base[name]
        else:
            low[name] = expected[name] = tensor
    save_file(low | {"lora_controlnet": torch.tensor([])}, tmp_path / "lora.safetensors")
    found = plainsd.load_control(tmp_path / "lora.safetensors", sd)
    plainsd.save_control(found, tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    assert whole.keys() == {"control_model." + name for name in expected}
    assert all((whole["control_model." + name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())


@pytest.mark.parametrize(
    "unet", [SD1_UNET, SD2_UNET, XL_UNET, XL_MID, XL_SMALL], ids=["sd1", "sd2", "xl", "mid", "small"]
)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_tables_are_bijections_over_the_public_nets(unet, layout):
    """Every tensor of ours has one name there, and none is left over."""
    net = empty(ControlNet, ControlConfig(way_down(unet)))
    found = places(net, layout)
    assert sorted(name for place in found for name in place.ours) == sorted(net.state_dict())
    assert len({place.name for place in found}) == len(found)
    assert way_down(unet) in known_unets()
    names = {place.name for place in found}
    if layout == "original":
        last = len(net.zero) - 2
        assert {"zero_convs.0.0.weight", f"zero_convs.{last}.0.bias", "input_hint_block.14.bias",
                "middle_block_out.0.weight", "input_blocks.0.0.weight"} <= names  # fmt: skip
        assert f"zero_convs.{last + 1}.0.weight" not in names
    else:
        theirs = ControlNetModel.from_config(json.loads(json.dumps(_written(net)))).state_dict()
        assert names == theirs.keys()


def _written(net) -> dict:
    from plainsd.files.configs_out import write_control

    return write_control(net.control, conv=net.config.vector is None)


# --- commands --------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main([*map(str, arguments)])
    return code, *capsys.readouterr()


def test_info_says_what_it_is(net, tmp_path, capsys):
    for name in ("net", "net.safetensors"):
        plainsd.save_control(net, tmp_path / name)
        code, out, _ = run(capsys, "info", tmp_path / name)
        kinds = ", for 4 kinds of maps" if net.control.kinds else ""
        assert code == 0 and f"{tmp_path / name}: a ControlNet{kinds}" in out
        assert f"{sum(p.numel() for p in net.parameters()):,} numbers" in out


def test_a_net_without_a_middle_is_not_for_diffusers(tmp_path, sd):
    net = tiny_net(replace(sd, unet=UNet(replace(sd.unet.config, mid_depth=None))))
    with pytest.warns(UserWarning, match="diffusers has no ControlNets of models without a middle"):
        plainsd.save_control(net, tmp_path / "net")
    assert same(plainsd.load_control(tmp_path / "net", **CPU), net)


def test_convert_goes_both_ways(net, tmp_path, capsys):
    plainsd.save_control(net, tmp_path / "net")
    assert run(capsys, "convert", tmp_path / "net", tmp_path / "x.safetensors")[0] == 0
    assert run(capsys, "convert", tmp_path / "x.safetensors", tmp_path / "back")[0] == 0
    assert same(plainsd.load_control(tmp_path / "back", **CPU), net)
    half = tmp_path / "half.safetensors"
    assert run(capsys, "convert", tmp_path / "net", half, "--dtype", "float16")[0] == 0
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}


def test_generate_follows_and_its_text_is_read_back(sd, generate, tmp_path, model):
    net, map = tiny_net(sd), picture_of(0)
    plainsd.save_control(net, tmp_path / "net.safetensors")
    map.save(tmp_path / "map.png")
    flags = ("--control", f"{tmp_path / 'net.safetensors'}:0.7", "--control-image", tmp_path / "map.png",
             "--control-range", 0, 0.6)  # fmt: skip
    code, out, err = generate("a red apple", *flags, "--seed", 4)
    assert code == 0, err
    from plainsd.pictures.images import open_picture, read_settings

    settings = read_settings(out.strip())
    (note,) = settings.control
    assert note.model.startswith("net [") and (note.weight, note.start, note.end) == (0.7, 0.0, 0.6)
    code, again, err = generate("--from", out.strip())
    assert code == 2 and "was made with the ControlNet 'net [" in err and "--control-image" in err
    code, again, err = generate("--from", out.strip(), "--control", tmp_path / "net.safetensors", "--control-image",
                                tmp_path / "map.png")  # fmt: skip
    assert code == 0, err
    first, second = (torch.tensor(list(open_picture(p.strip()).tobytes())) for p in (out, again))
    assert torch.equal(first, second) and read_settings(again.strip()) == settings


def test_an_inpainting_net_reads_picture_and_mask(sd, generate, tmp_path):
    from PIL import Image

    from plainsd.pictures.images import open_picture, read_settings

    plainsd.save_control(tiny_net(sd), tmp_path / "net.safetensors")
    picture_of(0).save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    over = (
        "--image",
        tmp_path / "photo.png",
        "--mask",
        tmp_path / "mask.png",
        "--control",
        tmp_path / "net.safetensors",
    )
    code, out, err = generate("a red apple", *over)
    assert code == 0, err
    (note,) = read_settings(out.strip()).control
    assert note.module == "inpaint"
    code, again, err = generate("--from", out.strip(), *over)
    assert code == 0, err
    assert open_picture(out.strip()).tobytes() == open_picture(again.strip()).tobytes()
    code, _, err = generate("a", *over, "--control-image", tmp_path / "photo.png", "--preprocess", "inpaint")
    assert code == 2 and "give one image for each without --preprocess inpaint" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--control", "NET"], "1 --control and 0 --control-image"),
        (["--control-image", "MAP"], "0 --control and 1 --control-image"),
        (["--guess"], "--guess and --control-mode need a ControlNet"),
        (["--control", "NET:much", "--control-image", "MAP"], "'much' is not a strength"),
        (["--control", "NET", "--control-image", "nowhere.png"], "picture 'nowhere.png' does not exist"),
        (["--control", "NET", "--control-image", "MAP", "--preprocess", "hed"], "unknown preprocessor 'hed'"),
        (["--control", "MAP", "--control-image", "MAP"], "map.png"),
        (["--control", "MODEL", "--control-image", "MAP"], "is not a ControlNet"),
        (["--control", "NET", "--control-image", "MAP", *["--control-range", "0", "1"] * 2], "2 --control-range for 1"),
        (["--control", "NET", "--control-image", "MAP", "--control-range", "0.7", "0.2"], "act from 0.7 to 0.2"),
        (["--control", "NET", "--control-image", "MAP", "--control-mode", "ballanced"], "unknown control mode"),
        (["--control", "NET", "--control-image", "MAP", "--control-kind", "1"], "is for union nets"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(sd, generate, tmp_path, flags, says):
    plainsd.save_control(tiny_net(sd), tmp_path / "net.safetensors")
    plainsd.save(sd, tmp_path / "model.safetensors")
    picture_of(0).save(tmp_path / "map.png")
    files = {"NET": tmp_path / "net.safetensors", "MAP": tmp_path / "map.png", "MODEL": tmp_path / "model.safetensors"}
    real = [
        str(files[f.partition(":")[0]]) + f[len(f.partition(":")[0]) :] if f.partition(":")[0] in files else f
        for f in flags
    ]
    code, out, err = generate("a", *real)
    assert code == 2 and says in err and err.count("\n") == 1 and not out


def test_canny_makes_the_map(sd, generate, tmp_path, photo):
    cv2 = pytest.importorskip("cv2")
    import numpy as np
    from PIL import Image

    from plainsd.pictures.preprocess import canny, preprocessed

    picture = Image.open(photo)
    edges = np.asarray(canny(picture, 50, 120))
    assert np.array_equal(edges[..., 0], cv2.Canny(np.asarray(picture), 50, 120)) and edges.shape == (40, 52, 3)
    assert preprocessed(picture, "canny", resolution=80).size == (104, 80)
    with pytest.raises(UserError, match="canny thresholds 200 and 100"):
        canny(picture, 200, 100)
    plainsd.save_control(tiny_net(sd), tmp_path / "net")
    code, out, err = generate("a", "--control", tmp_path / "net", "--control-image", photo, "--preprocess", "canny")
    assert code == 0 and "its map is 52x40 and the picture 64x64; it is scaled" in err


# --- what a picture's text says --------------------------------------------------------------------------------------

EXTENSION = (
    'ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 0.75, '
    "Resize Mode: Crop and Resize, Processor Res: 512, Threshold A: 100.0, Threshold B: 200.0, Guidance Start: 0.1, "
    'Guidance End: 0.9, Pixel Perfect: True, Control Mode: ControlNet is more important"'
)


def test_the_extensions_text_is_read():
    text = f"a\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, {EXTENSION}, Version: v1.10.1"
    (note,) = parse_settings(text).control
    assert note == ControlNote("canny", "control_v11p_sd15_canny [d14c016b]", 0.75, 0.1, 0.9, "control", resize="crop")
    text = text.replace("Pixel Perfect: True", "Pixel Perfect: False").replace("A: 100.0", "A: 30.0")
    (own,) = parse_settings(text).control
    assert own == note._replace(thresholds=(30.0, 200.0), resolution=512)
    (none,) = parse_settings(text.replace("Module: canny", "Module: none")).control
    assert (none.thresholds, none.resolution) == (None, None)


@pytest.mark.parametrize(
    ("said", "how"), [("Just Resize", "stretch"), ("Crop and Resize", "crop"), ("Scale to Fit (Inner Fit)", "crop"),
                      ("Resize and Fill", "fill"), ("Unheard of", "stretch")],
)  # fmt: skip
def test_a_map_of_another_shape_is_resized_as_its_text_says(sd, tmp_path, said, how):
    text = f"a\nSteps: 20, Seed: 1, {EXTENSION}".replace("Crop and Resize", said).replace("canny,", "none,")
    (note,) = parse_settings(text).control
    plainsd.save_control(tiny_net(sd), tmp_path / "net")
    map = picture_of(0).resize((64, 32))
    map.save(tmp_path / "map.png")
    flags = GenerateFlags(control=(str(tmp_path / "net"),), control_image=(tmp_path / "map.png",))
    (control,) = chosen_controls(flags, sd, [note])
    assert note.resize == control.note.resize == how
    ((shown,),) = (one.maps for one in fitted([control], (64, 64)))
    assert torch.allclose(shown, to_tensor(resized(map, (64, 64), how)) / 2 + 0.5, atol=1e-6)


@pytest.mark.parametrize("module", ["canny", "none"])
def test_a_map_is_made_again_as_it_was(monkeypatch, module):
    """With the thresholds and the resolution that a text has, unless another preprocessor is asked for."""
    seen = []
    monkeypatch.setattr("plainsd.pictures.preprocess.canny", lambda image, *levels: seen.append((image.size, levels)))
    recorded = [ControlNote("canny", thresholds=(30.0, 60.0), resolution=128)]
    asked = () if module == "canny" else ("none",)
    flags = GenerateFlags(control=("net",), control_image=(Path("map.png"),), preprocess=asked)
    ((_, _, note),) = asked_controls(flags, recorded)
    monkeypatch.setattr("plainsd.pictures.images.open_picture", lambda *_, **__: Image.new("RGB", (64, 96)))
    map = map_of(Path("map.png"), note)
    assert seen == ([((128, 192), (30.0, 60.0))] if module == "canny" else []) and (map is None or map.size == (64, 96))


NOTES = (
    ControlNote(),
    ControlNote("canny", "net [01234567]", 0.3, 0.25, 0.5, "prompt"),
    ControlNote(guess=True, model="x"),
    ControlNote(kinds=(0, 3), model="union [89abcdef]"),
    ControlNote("canny", "net [01234567]", thresholds=(30.0, 60.5), resolution=128),
    ControlNote("canny", "net [01234567]", thresholds=(0.0, 60.0)),
    ControlNote(resize="fill"),
)


def test_texts_there_and_back():
    settings = Settings(prompt="a", control=NOTES, steps=3, seed=1, noise="cpu")
    text = format_settings(settings)
    assert (
        parse_settings(text) == settings
        and 'ControlNet 3: "Module: none, Model: union [89abcdef], Weight: 1.0, ' in text
    )


def test_a_broken_unit_is_named():
    with pytest.raises(UserError, match="'ControlNet 0' has a value that cannot be read"):
        parse_settings('a\nSteps: 20, Seed: 1, Size: 8x8, ControlNet 0: "Module: none, Weight: heavy"')


@pytest.mark.parametrize("damage", ["missing", "more", "shape", "config", "note", "size", "kinds"])
def test_broken_nets_are_named(sd, tmp_path, damage):
    net = tiny_net(sd)
    plainsd.save_control(net, tmp_path / "net")
    path = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    tensors, config = load_file(path), json.loads((tmp_path / "net" / "config.json").read_text())
    if damage == "missing":
        del tensors["controlnet_mid_block.bias"]
    elif damage == "more":
        tensors["controlnet_down_blocks.9.bias"] = torch.zeros(3)
    elif damage == "shape":
        tensors["conv_in.bias"] = torch.zeros(3)
    save_file(tensors, path)
    if damage == "config":
        (tmp_path / "net" / "config.json").write_text(json.dumps(config | {"class_embed_type": "timestep"}))
    where = tmp_path / "net"
    if damage == "note":
        where = tmp_path / "x.safetensors"
        save_file(tensors, where, {"plainsd.control": "{"})
    elif damage in ("size", "kinds"):
        where = tmp_path / "x.safetensors"
        save_file(tensors | ({"task_embedding": torch.tensor(1.0)} if damage == "kinds" else {}), where)
    says = {"missing": "1 names missing", "more": "1 unexpected", "shape": "conv_in.bias", "config": "class_embed_type",
            "note": "is not JSON", "size": "of an unknown size",
            "kinds": "of an unknown size"}[damage]  # fmt: skip
    with pytest.raises(UserError, match=says):
        plainsd.load_control(where, **CPU)


def test_the_hint_of_a_public_file_is_read_off_its_shapes(tmp_path, sd, tiny_known):
    plainsd.save_control(tiny_net(sd), tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "x.safetensors")
    assert open_control(tmp_path / "x.safetensors").config.hint == HINT


# --- grids over models -----------------------------------------------------------------------------------------------


@pytest.fixture
def models(sd, tmp_path, monkeypatch):
    """Two models of one family, and one that no net here fits."""
    plainsd.save(sd, tmp_path / "first")
    plainsd.save(tiny_sd(seed=1), tmp_path / "second")
    plainsd.save(tiny_sd(channels=(32, 32)), tmp_path / "narrow")
    plainsd.save_control(tiny_net(sd), tmp_path / "net.safetensors")
    picture_of(0).save(tmp_path / "map.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_grid_over_models_refuses_a_net_that_does_not_fit_one_before_it_draws(generate, models, monkeypatch):
    drawn = []
    monkeypatch.setattr("plainsd.commands.generate.draw", lambda *given, **more: drawn.append(1))
    for order in ("first,narrow", "second,first,narrow"):
        code, out, err = generate("a", "--control", "net.safetensors", "--control-image", "map.png", "--grid",
                                  f"model={order}")  # fmt: skip
        assert code == 2 and err.count("\n") == 1 and not out and not drawn, err
        assert "grid model=narrow: control 'net [" in err and "does not fit it" in err


def test_in_a_grid_over_models_each_net_is_made_of_its_own_model(generate, sd, models, monkeypatch, tiny_known):
    """Differences are added to the weights of the model that is drawn with."""
    tensors, base = original(sd, tiny_net(sd), models)
    changes = {name: tensor - base[name] if name in base else tensor for name, tensor in tensors.items()}
    save_file(changes | {"difference": torch.tensor(1.0)}, models / "delta.safetensors")
    sheets = []
    monkeypatch.setattr("plainsd.commands.generate.sheet", lambda images, axes: sheets.append(images) or images[0])
    flags = ("--control", "delta.safetensors", "--control-image", "map.png", "--steps", 3, "--grid")
    for values in ("first,second", "first", "second"):
        code, _, err = generate("a", *flags, f"model={values}")
        assert code == 0, err
    (one, two), (first,), (second,) = sheets
    assert one.tobytes() == first.tobytes() and two.tobytes() == second.tobytes() != one.tobytes()
