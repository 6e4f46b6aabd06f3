"""recipes/emoji/train.py: stages, plan, shards; and the whole way at 32 pixels."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_sd
from PIL import Image
from test_emoji_scenes import needs_font

import plainsd
from plainsd.files.described import read_description
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE

FOLDER = Path(__file__).parents[1] / "recipes" / "emoji"


@pytest.fixture(scope="module")
def recipe():
    found = importlib.util.spec_from_file_location("emoji_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["emoji_train"] = module  # dataclasses look themselves up
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file, factor", [("model128.json", 8), ("model-all.json", 16)])
def test_models_of_128_pixels_fit_into_48_megabytes(file, factor):
    variant = read_description(FOLDER / file)
    with torch.device("meta"):
        networks = UNet(variant.unet), VAE(variant.vae), TextEncoder(variant.text[0])
    assert 2 * sum(p.numel() for network in networks for p in network.parameters()) <= 48e6
    assert (variant.size, variant.vae.factor) == (128, factor)
    assert (variant.prediction, variant.spacing) == ("v_prediction", "trailing")
    assert variant.schedule.zero_terminal_snr


def test_shards_are_small_and_read_as_the_whole(recipe, tmp_path):
    plainsd.save(tiny_sd(), tmp_path / "model")
    before = plainsd.load(tmp_path / "model", device="cpu", dtype="float32")
    recipe.shard_weights(tmp_path / "model", 2**18)
    files = sorted((tmp_path / "model" / "unet").glob("*"))
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert len(shards) > 2 and all("-of-" in path.name for path in shards)
    largest = max(p.numel() * p.element_size() for p in before.unet.parameters())
    assert max(path.stat().st_size for path in shards) <= max(2**18, largest + 2**17)
    index = json.loads((tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    after = plainsd.load(tmp_path / "model", device="cpu", dtype="float32")
    for one, other in ((before.unet, after.unet), (before.vae, after.vae)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    recipe.shard_weights(tmp_path / "model", 2**18)  # again changes nothing
    assert sorted((tmp_path / "model" / "unet").glob("*")) == files


def fake_run(recipe, monkeypatch, rate: float, stops: bool = False):
    """plainsd train that writes a log and a result; the steps that were asked for."""
    asked = []

    def command(options):
        if options[0] == "eval":
            out = Path(options[options.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            (out / "scores.json").write_text("{}")
            asked.append("eval")
            return 0
        out, method = Path(options[options.index("--out") + 1]), options[options.index("--method") + 1]
        steps = int(options[options.index("--steps") + 1])
        asked.append((method, steps))
        out.mkdir(parents=True, exist_ok=True)
        done = 7 if stops else steps
        (out / "log.jsonl").write_text(json.dumps({"step": done, "loss": 1.0, "samples_per_s": rate}) + "\n")
        if not stops:
            result = out / ("vae/config.json" if method == "vae" else f"{out.name}/model_index.json")
            result.parent.mkdir(exist_ok=True)
            result.write_text("{}")
        return 0

    monkeypatch.setattr(recipe, "plainsd", command)
    monkeypatch.setattr(recipe, "make_set", lambda one: (one.out.mkdir(exist_ok=True), one.network.write_text("{}")))
    return asked


def test_steps_fill_the_share_of_the_time_and_stages_are_done_once(recipe, monkeypatch, tmp_path, capsys):
    asked = fake_run(recipe, monkeypatch, rate=40.0)
    options = ["--preset", "cpu", "--minutes", "100", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert recipe.main(options) == 0
    vae, scratch = 40 * 60 * 25 / 16, 40 * 60 * 68 / 64  # rate, seconds of the share, batch
    assert asked == [("vae", 60), ("vae", round(vae)), ("scratch", 60), ("scratch", round(scratch)), "eval"]
    told = capsys.readouterr().out
    assert "40.0 pictures a second" in told and told.startswith("cpu, ")
    asked.clear()
    assert recipe.main(options) == 0 and asked == []
    assert capsys.readouterr().out.count("done before") == 4
    (tmp_path / "out" / "vae" / "log.jsonl").write_text('{"step": 60, "loss": 1.0}\n')  # killed after the probe
    assert recipe.main(options) == 0 and asked == [("vae", round(vae))]


def test_a_stopped_stage_is_said_and_goes_on(recipe, monkeypatch, tmp_path, capsys):
    asked = fake_run(recipe, monkeypatch, rate=40.0, stops=True)
    options = ["--preset", "cpu", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert recipe.main(options) == 130 and asked == [("vae", 60)]
    assert "autoencoder: stopped; the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(recipe, "plainsd", lambda options: 2)
    assert recipe.main(options) == 2  # what a command says is handed on


def test_a_folder_belongs_to_one_preset(recipe, monkeypatch, tmp_path, capsys):
    fake_run(recipe, monkeypatch, rate=40.0)
    assert recipe.main(["--preset", "cpu", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert recipe.main(["--preset", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "was begun with --preset cpu; give that again" in capsys.readouterr().err
    assert recipe.main(["--preset", "cpu", "--out", str(tmp_path / "two"), "--minutes", "0"]) == 2


def test_the_machine_is_said(recipe, monkeypatch):
    monkeypatch.setattr("plainsd.device.choose_dtype", lambda name, device: torch.bfloat16)
    for has, word in ((True, "bfloat16 (AMX)"), (False, "bfloat16 (no AMX")):
        monkeypatch.setattr("plainsd.speed.kernels.amx", lambda has=has: has)
        assert recipe.machine_text("cpu").startswith(f"cpu, {word}")
    monkeypatch.setattr("plainsd.device.choose_dtype", lambda name, device: torch.float32)
    assert recipe.machine_text("cpu").startswith("cpu, float32 (no AMX")


@needs_font
@pytest.mark.full
def test_the_whole_way_at_32_pixels(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--preset", "tiny", "--out", str(out), "--device", "cpu"]
    assert recipe.main([*options, "--shards", "0.05"]) == 0
    assert len((out / "scores" / "scores.txt").read_text().splitlines()) > 20
    assert Image.open(out / "scores" / "sheet.png").size == (8 * 38, 2 * 38)
    assert plainsd.load(out / "emoji" / "emoji", device="cpu").variant.size == 32
    assert recipe.main(options) == 0 and capsys.readouterr().out.count("done before") == 4


def test_presets_say_what_their_time_is_for(recipe):
    for preset in recipe.PRESETS.values():
        assert sum(preset.shares) <= 0.95 and preset.workers >= 1
        assert preset.vae[0] == preset.scratch[0] == "--batch"  # read by position
    assert recipe.PRESETS["gpu"].minutes == 12 and "--live-latents" in recipe.PRESETS["gpu"].scratch


@needs_font
def test_models_are_compared_at_the_same_sizes(capsys):
    found = importlib.util.spec_from_file_location("emoji_compare", FOLDER / "compare.py")
    compare = importlib.util.module_from_spec(found)
    found.loader.exec_module(compare)
    emoji = Path(plainsd.__file__).parent / "assets" / "emoji"
    assert compare.main([str(emoji), "--prompts", "4", "--sides", "32,128"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    ratios = [float(number) for number in re.findall(r"([\d.]+) at", first)]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] > 20 and ratios[-1] > 10
    assert 0.1 < float(first.split()[-1]) < 0.6  # noise has 1
    assert [row.split(":")[0].strip() for row in rows] == [
        "autoencoder, 32 pixels", "autoencoder, 128 pixels", "guidance 4, 32 pixels", "guidance 4, 128 pixels",
    ]  # fmt: skip
    sharp = [float(re.search(r"sharpness ([\d.]+)", row)[1]) for row in rows]
    assert sharp[0] > sharp[1] and sharp[2] > sharp[3]  # blur shows at the larger size
    assert compare.main(["/no/such/folder"]) == 2
