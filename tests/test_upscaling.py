"""Upscalers of ESRGAN's kind: tiles beside the whole, in hires, on the command line, and files that are none."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import noise_picture, tiny_sd
from PIL import Image

import plainsd
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.pictures import upscaling
from plainsd.pictures.images import PictureFile, read_settings, to_tensor
from plainsd.pictures.upscaling import load_upscaler, spans, upscaled


@pytest.fixture(scope="module", autouse=True)
def spandrel():
    """The library, with a stand-in for torchvision where that is not installed: two of the forty networks ask for it,
    and not these."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    absent = importlib.util.find_spec("torchvision") is None
    if absent:
        for name in names:
            sys.modules[name] = ModuleType(name)
        last = sys.modules[names[-1]]
        last.InterpolationMode = last.rotate = last.normalize = object
    import spandrel

    for name in names if absent else ():
        del sys.modules[name]
    return spandrel


@pytest.fixture(scope="module")
def network(spandrel, tmp_path_factory):
    """An ESRGAN of a few thousand weights that enlarges twice, as people have it: a .pth under `params_ema`."""
    torch.manual_seed(0)
    net = importlib.import_module("spandrel.architectures.ESRGAN.__arch.RRDB").RRDBNet(
        num_filters=8, num_blocks=2, scale=2
    )
    path = tmp_path_factory.mktemp("nets") / "2x_Tiny.pth"
    torch.save({"params_ema": net.state_dict()}, path)
    return path


def test_tiles_add_up_to_the_whole(network, monkeypatch):
    upscaler = load_upscaler(network)
    assert (upscaler.name, upscaler.scale) == ("2x_Tiny", 2)
    pixels = to_tensor(noise_picture(150, 100))
    with torch.inference_mode():
        whole = upscaler(pixels)
        assert whole.shape == (1, 3, 200, 300)
        direct = upscaler.model(pixels / 2 + 0.5) * 2 - 1
        assert (whole - direct).abs().max() < 1e-6
        monkeypatch.setattr(upscaling, "TILE", 64)
        assert (upscaler(pixels) - whole).abs().max() < 0.05 * 2 / 255  # of 256 levels
        monkeypatch.setattr(upscaling, "OVERLAP", 2)
        monkeypatch.setattr(upscaling, "EDGE", 0)
        assert (upscaler(pixels) - whole).abs().max() > 2 / 255  # too little shows


@pytest.mark.parametrize("length", [1, 191, 192, 193, 352, 353, 1000])
def test_weights_of_tiles_add_to_one(length):
    total = torch.zeros(length)
    for start, stop, weight in spans(length):
        assert 0 <= start < stop <= length and stop - start <= upscaling.TILE and weight.min() >= 0
        total[start:stop] += weight
    assert (total - 1).abs().max() < 1e-6


def test_it_is_scaled_to_the_size_that_is_wanted(network):
    upscaler, image = load_upscaler(network), noise_picture(20, 10)
    assert upscaled(image, upscaler).size == (40, 20)
    (large,) = [upscaled(image, upscaler)]
    small = upscaled(image, upscaler, (30, 15))
    assert small.tobytes() == large.resize((30, 15), Image.Resampling.LANCZOS).tobytes()
    with pytest.raises(UserError, match="larger than 16384"):
        upscaled(Image.new("RGB", (9000, 8)), upscaler)


def test_hires_draws_on_what_it_makes(network):
    sd = tiny_sd()
    sd.upscaler = load_upscaler(network)
    choices = {"steps": 2, "hires": 1.5, "size": 64}
    events = plainsd.text_to_image(sd, "a", upscaler="2x_tiny", **choices)  # in any capitals, as a text may have it
    images, settings = plainsd.final(events), events.settings
    assert images[0].size == (96, 96) and settings[0].upscaler == "2x_Tiny"
    other = plainsd.final(plainsd.text_to_image(sd, "a", upscaler="lanczos", **choices))
    assert images[0].tobytes() != other[0].tobytes()
    with pytest.raises(UserError, match="unknown upscaler '4x'; choose .* 2x_Tiny") as caught:
        plainsd.text_to_image(sd, "a", upscaler="4x", **choices)
    assert caught.value.field == "upscaler"


def test_on_the_command_line(network, generate, tmp_path, capsys):
    hires = ("--steps", 2, "--hires", 2, "--upscaler", network)
    assert generate("a", *hires)[0] == 0
    (made,) = (tmp_path / "out").glob("*.png")
    assert read_settings(made).upscaler.lower() == "2x_tiny"
    code, _, err = generate("--from", made)
    assert code == 2 and "give a network's file with --upscaler" in err
    assert generate("--from", made, "--upscaler", network)[0] == 0
    (again,) = {*(tmp_path / "out").glob("*.png")} - {made}
    assert again.read_bytes() == made.read_bytes()
    code, _, err = generate("a", "--upscaler", network)
    assert code == 2 and "needs --hires; give that too, or use plainsd upscale" in err
    capsys.readouterr()
    command = ["upscale", str(made), "--with", str(network), "--out", str(tmp_path / "large.png")]
    assert main(command) == 0
    before, after = Image.open(made), Image.open(tmp_path / "large.png")
    assert after.size == (2 * before.width, 2 * before.height)
    settings = read_settings(tmp_path / "large.png")
    assert settings.prompt == "a" and ("Postprocess upscaler", "2x_Tiny") in settings.other
    assert main([*command[:-1], str(tmp_path / "more"), "--times", "1.5"]) == 0
    (small,) = (tmp_path / "more").glob("*.png")
    assert Image.open(small).size == (before.width * 3 // 2, before.height * 3 // 2)
    assert main([*command[:2], str(made), *command[2:]]) == 2
    assert "one file for 2 pictures" in capsys.readouterr().err


def test_what_would_be_too_large_is_said_before_any_work(network, tmp_path, monkeypatch, capsys):
    """And a photo that is enlarged gets no settings of a drawing."""
    upscaler = load_upscaler(network)
    with pytest.raises(UserError, match="4000x1 enlarged to 64000x16 is larger than 16384 on a side"):
        upscaled(Image.new("RGB", (4000, 1)), upscaler, (64000, 16))
    for name, side in (("x.webp", 16_384), ("x.jpg", 65_501)):
        with pytest.raises(UserError, match="write a .png"):
            PictureFile.of(Image.new("RGB", (side, 1)), Path(name).suffix)
    Image.new("RGB", (8192, 1)).save(tmp_path / "long.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    command = ["upscale", str(tmp_path / "photo.png"), str(tmp_path / "long.png"), "--with", str(network), "--out"]
    with monkeypatch.context() as patched:
        patched.setattr("plainsd.pictures.upscaling.upscaled", lambda *more: pytest.fail("it began"))
        assert main([*command, str(tmp_path / "out"), "--times", "4"]) == 2
    assert "8192x1 enlarged to 32768x4" in capsys.readouterr().err
    assert (
        main(["upscale", str(tmp_path / "photo.png"), "--with", str(network), "--out", str(tmp_path / "big.png")]) == 0
    )
    assert (
        Image.open(tmp_path / "big.png").size == (16, 16) and "parameters" not in Image.open(tmp_path / "big.png").info
    )


def test_what_is_no_upscaler_is_one_line(network, tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name, says in (
        ("a.pth", "is not an upscaler that spandrel knows"),
        ("list.pth", "holds no tensors by name"),
        ("text.pth", "is neither a PyTorch nor a safetensors file"),
        ("none.pth", "there is no file"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            load_upscaler(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UserError, match=r"pip install 'plainsd\[upscale\]'"):
        load_upscaler(network)
