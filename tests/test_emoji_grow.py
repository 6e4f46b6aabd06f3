"""recipes/emoji/grow.py: an autoencoder with one more level, near the old one from the start."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plainsd
from plainsd.checkpoint import load_vae
from plainsd.pictures.images import to_pil
from plainsd.train.methods.vae import psnr

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
spec = importlib.util.spec_from_file_location("grow", RECIPE / "grow.py")
grow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grow)
EMBEDDED = Path(grow.__file__).parents[2] / "src" / "plainsd" / "assets" / "emoji"
DESCRIPTION = RECIPE / "model128-grown.json"  # of the embedded model
OLD = json.loads(DESCRIPTION.read_text())["vae"]["latent_channels"]
NEW = OLD + 4


def wider() -> dict:
    """The description with more latent channels."""
    described = json.loads(DESCRIPTION.read_text())
    described["vae"]["latent_channels"] = described["unet"]["in_channels"] = described["unet"]["out_channels"] = NEW
    return described


def pictures(count: int, seed: int, side: int = 256) -> torch.Tensor:
    """Discs of one colour on another, with soft edges: (count, 3, side, side) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, side)], indexing="ij")
    centres, radii = 0.3 + 0.4 * draw(count, 2, 1, 1), 0.1 + 0.2 * draw(count, 1, 1)
    away = ((x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2).sqrt()
    disc = torch.sigmoid((radii - away) * side)[:, None]
    front, back = draw(2, count, 3, 1, 1) * 2 - 1
    return disc * front + (1 - disc) * back


@pytest.fixture(scope="module")
def old():
    return load_vae(EMBEDDED, device="cpu", dtype="float32")


@torch.no_grad()
def test_it_begins_near_the_old_one(old):
    torch.manual_seed(0)
    new, seen = grow.grown(old, pictures(8, seed=0)), pictures(8, seed=1)
    assert new.config == replace(old.config, channels=(16, *old.config.channels))
    halved = F.avg_pool2d(seen, 2)
    latents = old.encode(halved).mean
    assert (new.encode(seen).mean - latents).norm() < 0.1 * latents.norm()
    enlarged = F.interpolate(old.decode(latents), scale_factor=2, mode="bicubic")
    assert psnr(new.decode(latents), seen).mean() > psnr(enlarged, seen).mean() - 1
    assert psnr(new.decode(new.encode(seen).mean), seen).mean() > psnr(enlarged, seen).mean() - 2


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_found_again(stride):
    torch.manual_seed(0)
    known, found = (nn.Conv2d(3, 5, 3, stride=stride).double() for _ in range(2))
    x = torch.randn(4, 3, 16, 16).double()
    grow.fit(found, x, known(x))
    torch.testing.assert_close(found.weight, known.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bias, known.bias, rtol=0, atol=1e-5)


def put_down(pixels: torch.Tensor, folder: Path) -> str:
    """The pictures as a folder with captions."""
    folder.mkdir()
    for number, picture in enumerate(to_pil(pixels)):
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a disc")
    return str(folder)


def test_the_command(tmp_path, old, capsys):
    folder = put_down(pictures(4, seed=2), tmp_path / "data")
    described = json.loads(DESCRIPTION.read_text()) | {"size": 256}
    described["vae"]["channels"].insert(0, 16)
    (tmp_path / "model.json").write_text(json.dumps(described))
    asked = [str(EMBEDDED), str(tmp_path / "vae"), "--data", folder, "--size", "256", "--count", "4", "--description"]
    assert grow.main([*asked, str(tmp_path / "model.json"), "--heldout", folder]) == 0
    said = re.fullmatch(r"latents (.*)% from .*; (.*) dB, .* (.*) dB\n", capsys.readouterr().out)
    apart, after, before = map(float, said.groups())
    assert apart < 10 and after > before - 2  # the numbers of the test above
    written = load_vae(tmp_path / "vae", device="cpu", dtype="float32")
    assert written.config.channels == (16, *old.config.channels)
    assert written.config.scaling_factor == old.config.scaling_factor  # the UNet's latents are the same
    assert grow.main([*asked, str(DESCRIPTION)]) == 2
    assert "the grown autoencoder has channels (16, 16, 16, 32, 64, 128)" in capsys.readouterr().err
    assert grow.main([str(tmp_path / "nothing"), *asked[1:], str(tmp_path / "model.json")]) == 2


@torch.no_grad()
def test_wider_latents_begin_with_the_same_pictures(tmp_path, old, capsys):
    """The old channels are as before, the new ones carry something that the decoder can learn from."""
    (tmp_path / "model.json").write_text(json.dumps(wider()))
    asked = [str(EMBEDDED), str(tmp_path / "vae"), "--latents", str(NEW), "--description"]
    assert grow.main([*asked, str(tmp_path / "model.json")]) == 0
    new, seen = load_vae(tmp_path / "vae", device="cpu", dtype="float32"), pictures(4, seed=3, side=128)
    before, after = old.encode(seen), new.encode(seen)
    torch.testing.assert_close(after.mean[:, :OLD], before.mean)
    torch.testing.assert_close(after.logvar[:, :OLD], before.logvar)
    torch.testing.assert_close(new.decode(after.mean), old.decode(before.mean))
    added = after.mean[:, OLD:]
    assert added.std((0, 2, 3)).min() > 2 * after.logvar[:, OLD:].max().mul(0.5).exp()  # above its noise
    assert grow.main([*asked, str(DESCRIPTION)]) == 2
    assert f"latents of {NEW}: " in capsys.readouterr().err
    for few in (str(OLD), "0"):
        assert grow.main([*asked[:3], few, *asked[4:], str(tmp_path / "model.json")]) == 2
        assert f"--latents {few} is no more than the {OLD} channels" in capsys.readouterr().err
    assert grow.main([*asked[:2], "--description", str(tmp_path / "model.json")]) == 2
    assert "--data is missing" in capsys.readouterr().err


@torch.no_grad()
def test_a_model_on_wider_latents_begins_as_the_old_one(tmp_path, capsys):
    """The old channels' prediction, and what a text means, are as before, under other token numbers; a new token is the
    mean of the old ones that its text had; new channels are predicted as far as they follow from the old ones."""
    data = put_down(pictures(16, seed=4, side=128), tmp_path / "data")
    before = plainsd.load(EMBEDDED, device="cpu", dtype="float32")
    described = wider()
    described["text"][0]["positions"] = 20
    described["unet"]["depth"][-1] += 1
    described["unet"]["mid_depth"] += 1
    (tmp_path / "model.json").write_text(json.dumps(described))
    shutil.copytree(EMBEDDED / "tokenizer", tmp_path / "tokenizer")
    symbols = ["redgreen</w>", *before.tokenizers[0].vocabulary]
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    described = ["--description", str(tmp_path / "model.json")]
    assert grow.main([str(EMBEDDED), str(tmp_path / "vae"), "--latents", str(NEW), *described]) == 0
    asked = [str(EMBEDDED), str(tmp_path / "new"), "--vae", str(tmp_path / "vae"), *described]
    asked += ["--data", data, "--count", "16"]
    assert grow.main(asked) == 2 and "belong together" in capsys.readouterr().err
    assert grow.main([*asked, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    after = plainsd.load(tmp_path / "new", device="cpu", dtype="float32")
    assert after.text_encoders[0].config.positions == 20
    (a, b), text = (sd.tokenizers[0] for sd in (before, after)), "a red apple on a yellow background"
    ids = [[t.start, *t.encode(text), t.end] for t in (a, b)]
    assert ids[0] != ids[1]
    contexts = [sd.text_encoders[0](torch.tensor([each])).final for sd, each in zip((before, after), ids, strict=True)]
    torch.testing.assert_close(*contexts)
    torch.manual_seed(0)
    x = torch.randn(2, NEW, 8, 8)
    predicted = after.unet(x, torch.tensor(500.0), contexts[1].expand(2, -1, -1))
    expected = before.unet(x[:, :OLD], torch.tensor(500.0), contexts[0].expand(2, -1, -1))
    torch.testing.assert_close(predicted[:, :OLD], expected, rtol=1e-3, atol=1e-3)
    seen = pictures(8, seed=5, side=128)
    latents = [sd.vae.encode(seen).mean.movedim(1, -1).flatten(0, -2) for sd in (before, after)]
    outward = grow.linear_map(*latents)
    torch.testing.assert_close(outward[:OLD], torch.eye(OLD), rtol=0, atol=1e-3)
    unexplained = (latents[1] - latents[1].mean(0)) - (latents[0] - latents[0].mean(0)) @ outward.T
    assert unexplained.square().mean(0).div(latents[1].var(0))[OLD:].mean() < 0.9
    assert predicted[:, OLD:].std() > 0
    rows = [sd.text_encoders[0].token.weight for sd in (before, after)]
    torch.testing.assert_close(rows[1][b.vocabulary["redgreen</w>"]], rows[0][a.encode("redgreen")].mean(0))
    described = json.loads((tmp_path / "model.json").read_text())
    described["unet"]["channels"] = [96, 240]
    (tmp_path / "model.json").write_text(json.dumps(described))
    assert grow.main([*asked, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "differs from the old model's in more than its latents and depth: " in capsys.readouterr().err
    described["unet"]["channels"] = [96, 160]
    described["text"][0]["layers"] = 2
    (tmp_path / "model.json").write_text(json.dumps(described))
    assert grow.main([*asked, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "differs from the old model's in more than its vocabulary and positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--latents", "12", "--data", "pictures"], "--data has no effect with --latents; leave it out"),
        (["--latents", "12", "--heldout", "pictures"], "--heldout has no effect with --latents"),
        (
            ["--vae", "vae", "--tokenizer", "words", "--data", "x", "--heldout", "y"],
            "--heldout has no effect with --vae",
        ),
        (
            ["--vae", "vae", "--tokenizer", "words", "--data", "x", "--latents", "9"],
            "--latents has no effect with --vae",
        ),
    ],
)
def test_what_it_would_not_use_is_refused(tmp_path, capsys, flags, said):
    described = ["--description", str(DESCRIPTION)]
    assert grow.main([str(tmp_path / "none"), str(tmp_path / "out"), *described, *flags]) == 2
    assert said in capsys.readouterr().err


def test_its_description_is_the_first_stages_but_for_the_autoencoder():
    new, now = (json.loads((RECIPE / name).read_text()) for name in ("model128-grown.json", "model.json"))
    assert new.pop("size") == 2 * now.pop("size")
    assert new["vae"].pop("channels") == [16, *now["vae"].pop("channels")]
    assert new == now
