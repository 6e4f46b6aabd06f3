"""recipes/emoji/train.py: stages, plan, shards; and the whole way at 32 pixels. And of data.py, compare.py and
recipes/control what they refuse, and what a second run leaves."""

import importlib.util
import itertools
import json
import os
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

RECIPES = Path(__file__).parents[1] / "recipes"
FOLDER = RECIPES / "emoji"


def script(name: str):
    """A recipe as a module: `emoji/train`."""
    known = name.replace("/", "_")
    found = importlib.util.spec_from_file_location(known, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[known] = module  # dataclasses look themselves up
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return script("emoji/train")


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


TIMES = itertools.count()


def fake_run(recipe, monkeypatch, rate: float, stops: bool = False, unwritten: int | None = None):
    """plainsd train that writes a log and a result; the steps that were asked for. `unwritten`: the exit code of a run
    that is stopped after its last step, before its result; not of a probe."""
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
        if unwritten is not None and steps > recipe.PROBE:
            return unwritten
        if not stops:
            result = out / ("vae/config.json" if method == "vae" else f"{out.name}/model_index.json")
            result.parent.mkdir(exist_ok=True)
            result.write_text("{}")
            os.utime(result, (0, next(TIMES)))  # each later than the one before, however fast this is
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
    plan = {"vae": round(vae), "scratch": round(scratch)}  # killed after the probe; or finished, by an older version
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    assert recipe.main(options) == 0 and asked == [*plan.items()]
    asked.clear()
    assert recipe.main(options) == 0 and asked == []


@pytest.mark.parametrize("code", [130, 0], ids=["Ctrl-C", "SIGTERM"])
def test_a_stage_that_is_stopped_at_its_very_end_is_not_done(recipe, monkeypatch, tmp_path, capsys, code):
    """Its log has the last step, and there is a result: the probe's."""
    options = ["--preset", "cpu", "--minutes", "100", "--out", str(tmp_path / "out"), "--device", "cpu"]
    vae = ("vae", round(40 * 60 * 25 / 16))
    asked = fake_run(recipe, monkeypatch, rate=40.0, unwritten=code)
    assert recipe.main(options) == 130 and recipe.main(options) == 130
    assert asked == [("vae", 60), vae, vae]
    said = capsys.readouterr().out
    assert "done before" not in said.partition("set: done before")[2]
    assert said.count("autoencoder: stopped; the same command goes on from there") == (0 if code else 2)
    asked = fake_run(recipe, monkeypatch, rate=40.0)
    assert recipe.main(options) == 0 and asked[0] == vae and asked[-1] == "eval"


def test_other_minutes_do_not_change_a_plan_and_that_is_said(recipe, monkeypatch, tmp_path, capsys):
    options = ["--preset", "cpu", "--out", str(tmp_path / "out"), "--device", "cpu", "--minutes"]
    fake_run(recipe, monkeypatch, rate=40.0, unwritten=130)
    assert recipe.main([*options, "100"]) == 130
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == {"vae": 3750, "minutes": {"vae": 100}}
    capsys.readouterr()
    asked = fake_run(recipe, monkeypatch, rate=40.0)
    assert recipe.main([*options, "50"]) == 0
    assert asked == [("vae", 3750), ("scratch", 60), ("scratch", round(40 * 60 * 34 / 64)), "eval"]
    assert "vae: 3750 steps, as planned with --minutes 100, not 50\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--minutes", "0"], "--minutes 0 is out of range; give a number above 0"),
        (["--minutes", "nan"], "--minutes nan is out of range"),
        (["--minutes", "inf"], "--minutes inf is out of range"),
        (["--shards", "-1"], "--shards -1 is out of range; give a number above 0"),
        (["--shards", "0"], "--shards 0 is out of range"),
        (["--workers", "-1"], "--workers -1 is out of range; give 0 or more"),
        (["--prompts", "1"], "--prompts 1 is out of range; give at least 2"),
        (["--preset", "tiny", "--minutes", "5"], "--minutes 5: --preset tiny counts steps, not time; leave it out"),
    ],
)
def test_numbers_out_of_range_are_refused_at_the_door(recipe, monkeypatch, tmp_path, capsys, flags, said):
    asked = fake_run(recipe, monkeypatch, rate=40.0)
    assert recipe.main(["--preset", "cpu", "--out", str(tmp_path / "out"), "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert asked == [] and not (tmp_path / "out").exists()


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
    compare = script("emoji/compare")
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


def test_one_picture_is_no_set_to_compare(monkeypatch, capsys):
    compare = script("emoji/compare")
    monkeypatch.setattr(compare, "report", lambda *_: print("KID nan"))
    assert compare.main(["some/model", "--prompts", "1"]) == 2
    assert "--prompts 1 is out of range; give at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, asked, function",
    [
        ("emoji/train", ["--preset", "cpu"], "make"),
        ("emoji/data", ["out"], "build"),
        ("emoji/compare", ["model"], "report"),
        ("emoji/grow", ["model", "out", "--description", "model.json"], "read_description"),
        ("finetune/data", ["out"], "build"),
        ("finetune/picture", ["out.png", "run"], "read_prompts"),
        ("control/data", ["out"], "build"),
        ("control/measure", ["data", "--control", "net"], "measure"),
    ],
)
def test_what_the_disk_refuses_is_one_line(name, asked, function, monkeypatch, tmp_path, capsys):
    def refused(*_):
        raise OSError(28, "No space left on device", "out/x")

    module = script(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, function, refused)
    assert module.main(asked) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out/x: No space left on device; choose another path" in error


# ---- data.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(monkeypatch):
    """The recipe, whose pictures are empty files."""
    module = script("emoji/data")

    def write_pictures(folder, kind, count, pairs, *_):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / "images" / f"{i:06d}.png").write_text(kind)
        (folder / "metadata.jsonl").write_text(f"{len(pairs)}\n")

    monkeypatch.setattr(module, "write_pictures", write_pictures)
    return module


FEW = ["--emoji", "5", "--count", "3", "--heldout-count", "2"]


@needs_font
@pytest.mark.parametrize("name", ["metadata.jsonl", "heldout/metadata.jsonl"])
def test_captions_of_others_are_not_replaced(data, tmp_path, capsys, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert data.main([str(tmp_path / "out"), *FEW]) == 2 and file.read_text() == "mine"
    assert f"{file} is not of this recipe, which would replace it; give another folder" in capsys.readouterr().err


@needs_font
def test_a_second_set_in_a_folder_leaves_nothing_of_the_first(data, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    assert data.main([str(out), *FEW, "--vocabulary", "514"]) == 0
    assert len(json.loads((out / "tokenizer" / "vocab.json").read_text("utf-8"))) == 514
    assert len(list(out.rglob("metadata.jsonl"))) == 2 and len(list(out.rglob("*.png"))) == 5
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_tokenizer", stopped)
        assert data.main([str(out), *FEW]) == 130
    assert not list(out.rglob("metadata.jsonl"))  # it does not look whole
    assert data.main([str(out), *FEW]) == 0 and (out / "heldout" / "metadata.jsonl").is_file()
    assert data.main([str(out), *FEW, "--heldout-share", "0"]) == 0
    assert (out / "metadata.jsonl").is_file() and not (out / "heldout").exists()
    assert data.main([str(out), *FEW]) == 0
    (out / "heldout" / "own.txt").write_text("mine")
    assert data.main([str(out), *FEW, "--heldout-share", "0"]) == 0
    assert [path.name for path in (out / "heldout").iterdir()] == ["own.txt"]


@needs_font
def test_a_set_of_scenes_that_cannot_be_scored_is_refused(data, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("owl\nfox\nred apple\nrocket\n")
    assert data.main([str(tmp_path / "set"), "--set", "--names", str(tmp_path / "names.txt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "among 4 emoji there is no held-out pair of objects; take more" in error
    assert not (tmp_path / "set").exists()


@needs_font
@pytest.mark.parametrize(
    "flags, said",
    [
        (["--names", "empty.txt"], "empty.txt names no emoji; write one name a line"),
        (["--heldout-share", ".995"], "--heldout-share 0.995 leaves no pair of emoji and background to train on"),
        (["--vocabulary", "513"], "--vocabulary 513 is out of range; give 514 or more"),
        (["--vocabulary", "0"], "--vocabulary 0 is out of range"),
        (["--vocabulary", "-1"], "--vocabulary -1 is out of range"),
    ],
)
def test_sets_out_of_range_are_refused_before_anything_is_written(data, monkeypatch, tmp_path, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    assert data.main(["out", *FEW, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not Path("out").exists()


@pytest.mark.parametrize("flag", ["--workers", "--emoji"])
def test_options_of_drawn_pictures_are_refused_with_scenes(data, monkeypatch, tmp_path, capsys, flag):
    monkeypatch.setattr(data, "build_set", lambda options: None)
    assert data.main([str(tmp_path / "out"), "--set", flag, "2"]) == 2
    assert f"{flag} has no effect with --set, " in capsys.readouterr().err


@needs_font
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_way_is_one_line(data, monkeypatch, tmp_path, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert data.main([out, *FEW]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"data.py: {out}: ")


# ---- recipes/control -------------------------------------------------------------------------------------------------


KNOWN = {
    "concepts": [{"name": "owl", "character": "\U0001f989"}],
    "backgrounds": {"navy": [16, 24, 96], "red": [214, 40, 40]},
    "templates": ["{name} over {background}"],
    "heldout": [["owl", "red"]],
    "size": 64,
}


@pytest.fixture
def edges(monkeypatch, tmp_path):
    """The recipe with maps that need no OpenCV: `edges(flags, ...)` runs it for a model of one emoji on two colours."""
    module = script("control/data")
    monkeypatch.setattr(module, "canny", lambda image: image)
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()

    def run(*flags, out="out", **changes):
        Path("model", "concepts.json").write_text(json.dumps(KNOWN | changes))
        return module.main([out, "--model", "model", "--count", "2", "--heldout", "1", *flags])

    return run


@needs_font
def test_maps_have_the_colours_and_captions_of_the_model(edges):
    assert edges() == 0
    assert sorted(path.name for path in Path("out").glob("*.*")) == [
        f"00000{i}.{end}" for i in (0, 1) for end in ("cond.png", "png", "txt")
    ]
    assert Path("out/000001.txt").read_text("utf-8") == "owl over navy\n"
    assert Path("out/heldout/000000.txt").read_text("utf-8") == "owl over red\n"
    for place, colour in (("out", (16, 24, 96)), ("out/heldout", (214, 40, 40))):
        picture = Image.open(f"{place}/000000.png")
        assert max(picture.getcolors(2**14))[1] == colour


@needs_font
@pytest.mark.parametrize(
    "flags, changes, said",
    [
        ([], {"heldout": []}, "the model has no held-out pairs of emoji and background; give --heldout 0"),
        ([], {"heldout": [["owl", "red"], ["owl", "navy"]]}, "the model has no pairs of emoji and background to train"),
        (["--count", "0"], {}, "--count 0 is out of range; give 1 or more"),
        (["--heldout", "-1"], {}, "--heldout -1 is out of range; give 0 or more"),
        ([], {"concepts": [{"name": "owl", "character": "\U0010fffe"}]}, "the font has no picture of 'owl'"),
        ([], {"heldout": None}, "concepts.json is damaged"),
    ],
)
def test_maps_that_cannot_be_made_are_one_line(edges, capsys, flags, changes, said):
    assert edges(*flags, **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not Path("out").exists()


@needs_font
def test_maps_without_held_out_pairs_can_be_had(edges):
    assert edges("--heldout", "0", heldout=[]) == 0
    assert len(list(Path("out").rglob("*.png"))) == 4


@needs_font
def test_maps_are_not_mixed_with_what_is_there(edges, capsys):
    assert edges() == 0 and edges("--count", "1") == 2
    assert "out is not empty; remove it, or give another folder" in capsys.readouterr().err
    assert len(list(Path("out").glob("*.txt"))) == 2
    for place in ("out/000000.txt", "out/000000.txt/below"):
        assert edges(out=place) == 2
        assert capsys.readouterr().err.startswith(f"data.py: {place}: ")


@needs_font
def test_a_lack_of_opencv_is_said_before_anything_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert script("control/data").main([str(tmp_path / "out")]) == 2
    assert "pip install 'plainsd[control]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
