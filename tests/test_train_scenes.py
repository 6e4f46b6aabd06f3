"""Scenes of emoji as training data: entries, processes that draw ahead, live latents, and whole runs."""

import json
import os
import runpy
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import tiny_sd
from test_emoji_scenes import needs_font

import plainsd
from plainsd.cli import main
from plainsd.emoji import drawing
from plainsd.train.data.ahead import DEPTH, Ahead, pictures_ahead
from plainsd.train.data.folders import Reading
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.live import LiveLatents
from plainsd.train.data.pictures import described, some_texts
from plainsd.train.data.record import picture_digests
from plainsd.train.data.sources import read_source
from plainsd.train.log import read_log
from plainsd.train.order import Order, Pick, random

pytestmark = needs_font
RECIPE = Path(__file__).parents[1] / "recipes" / "emoji" / "data.py"
FAST = ["--device", "cpu", "--dtype", "float32", "--log-every", "1", "--save-dtype", "float32"]
NAMES = ["owl", "fox", "rocket", "red apple", "grapes", "pizza", "key", "ghost", "robot", "castle", "fire", "rose"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("emoji", reason="the emoji package gives the names")
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "names.txt").write_text("\n".join(NAMES))
    build = runpy.run_path(str(RECIPE))["main"]
    options = ["--set", "--size", "32", "--count", "40", "--heldout-count", "6", "--heldout-share", "0.2"]
    assert build([str(folder / "set"), "--names", str(folder / "names.txt"), *options]) == 0
    return folder


def source(made) -> str:
    return f"emoji:{made / 'set' / 'concepts.json'}"


def picks_at(order, positions) -> list[Pick]:
    return [Pick(order(p), p, random(0, 2, p)) for p in positions]


def test_a_source_of_scenes(made, tmp_path):
    pictures = read_source(source(made), 32, tmp_path, Reading())
    held = read_source(source(made), 32, tmp_path, Reading(heldout=True))
    assert (len(pictures), len(held)) == (40, 6)
    assert len(read_source(f"{source(made)}:3", 32, tmp_path, Reading(limit=7))) == 7
    assert read_source(f"{source(made)}:3", 32, tmp_path, Reading()).items[0].repeats == 3
    entry = pictures.items[5]
    assert entry.open().size == entry.size == (32, 32) and len(entry.texts) == 4 and entry.computed
    assert entry.texts == read_source(source(made), 32, tmp_path, Reading()).items[5].texts
    assert pictures.pixels([5, 6]).shape == (2, 3, 32, 32) and not torch.equal(*pictures.pixels([5, 6]))
    assert not {item.texts[0] for item in pictures.items} & {item.texts[0] for item in held.items}
    assert described(pictures).startswith("40 pictures, ") and not any(tmp_path.iterdir())


def test_many_captions_are_counted_by_the_first(made, tmp_path, monkeypatch):
    pictures = read_source(source(made), 32, tmp_path, Reading())
    texts, more = some_texts(pictures.items)
    assert texts == {text for item in pictures.items for text in item.texts} and not more
    monkeypatch.setattr("plainsd.train.data.pictures.SOME_COMPUTED", 3)
    assert some_texts(pictures.items) == ({text for item in pictures.items[:3] for text in item.texts}, True)
    assert " or more captions" in described(pictures)


def test_digests_are_those_of_the_set(made, tmp_path):
    pictures = read_source(source(made), 32, tmp_path, Reading())
    digests = picture_digests(pictures.items, tmp_path)
    assert len(set(digests)) == 40 and not any(tmp_path.iterdir())
    path = made / "set" / "concepts.json"
    content = json.loads(path.read_text())
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content | {"seed": 1}))
    others = picture_digests(read_source(f"emoji:{changed}", 32, tmp_path, Reading()).items, tmp_path)
    assert not set(digests) & set(others)
    content["scenes"]["count"] = 50
    changed.write_text(json.dumps(content))
    longer = picture_digests(read_source(f"emoji:{changed}", 32, tmp_path, Reading()).items, tmp_path)
    assert longer[:40] == digests


@pytest.mark.parametrize("size", [32, 16])
def test_pictures_drawn_ahead_are_those_drawn_when_wanted(made, tmp_path, size):
    pictures, order = read_source(source(made), size, tmp_path, Reading()), Order(40, seed=3)
    with pictures_ahead(pictures, order, 0) as plain, pictures_ahead(pictures, order, 2) as ahead:
        assert isinstance(ahead, Ahead) and not isinstance(plain, Ahead)
        for start in (0, 20, 40, 60, 61, 10, 12):  # in a row, with another stride, and back
            picks = picks_at(order, range(start, start + 20))
            assert torch.equal(ahead(picks), plain(picks))
            assert len([key for key, _ in ahead.coming if key > start]) == len(ahead.coming) >= DEPTH


def test_what_follows_is_drawn_before_it_is_asked_for(made, tmp_path):
    pictures, order = read_source(source(made), 32, tmp_path, Reading()), Order(40, seed=3)
    with Ahead(pictures, order, 1) as ahead:
        ahead(picks_at(order, range(8, 12)))
        assert sorted(ahead.coming) == [(12 + 4 * i, 4) for i in range(DEPTH)]
        ahead(picks_at(order, range(16, 20)))  # every second part, as with two processes that train
        assert [key for key in sorted(ahead.coming) if key[0] > 20] == [(24 + 8 * i, 4) for i in range(DEPTH)]


@pytest.mark.parametrize("when", ["between calls", "in a call"])
def test_a_process_that_dies_costs_time_alone(made, tmp_path, when):
    """This process draws the batch, others the next ones."""
    pictures, order = read_source(source(made), 32, tmp_path, Reading()), Order(40, seed=3)
    with Ahead(pictures, order, 1) as ahead, pictures_ahead(pictures, order, 0) as plain:
        ahead(picks_at(order, range(2)))
        dead = ahead.pool
        ending = dead.submit(os._exit, 1)
        if when == "between calls":
            with pytest.raises(BrokenProcessPool):
                ending.result(timeout=60)
        with pytest.warns(UserWarning, match="a process that draws pictures has ended, .* fewer --workers"):
            for start in (2, 30, 4):  # what was drawn before is there still; the others are not
                picks = picks_at(order, range(start, start + 2))
                assert torch.equal(ahead(picks), plain(picks))
        assert ahead.pool is not dead
        picks = picks_at(order, range(6, 8))
        assert torch.equal(ahead(picks), plain(picks)) and ahead.coming


def test_live_latents_are_the_cached_ones(made, tmp_path):
    vae, order = tiny_sd().vae, Order(40, seed=3)
    pictures = read_source(source(made), 32, tmp_path, Reading(limit=8))
    order = Order(8, seed=3)
    with pictures_ahead(pictures, order, 0) as pixels:
        live = LiveLatents(vae, pictures, pixels, torch.float32)
        cached = cache_latents(vae, pictures, tmp_path / "cache")
        one, two = (each.draw(picks_at(order, range(8))) for each in (live, cached))
        assert (
            live.shapes == cached.shapes and live.masks([]) is None and live.choose(picks_at(order, range(2))) == [0, 0]
        )
    assert torch.allclose(one, two, rtol=2**-9, atol=2**-9)  # the cache has half precision


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(made):
    described = {
        "name": "tiny",
        "size": 32,
        "prediction": "v_prediction",  # whose target has the latents in it
        "vae": {"channels": [8, 8], "layers": 1, "groups": 2},
        "unet": {"channels": [32, 32], "depth": [0, 1], "heads": [2, 2], "layers": 1, "context": 16},
        "text": [{"width": 16, "layers": 1, "heads": 2, "mlp": 32, "positions": 40}],
    }
    (made / "model.json").write_text(json.dumps(described))
    return made / "model.json"


def run(made, model, method, out, *more) -> int:
    data = ["--model", str(model), "--data", source(made), "--heldout", source(made), "--batch", "4", *FAST]
    return main(["train", "--method", method, "--out", str(out), *data, *more])


@pytest.fixture(scope="module")
def vae(made, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("vae") / "run"
    assert run(made, model, "vae", out, "--steps", "3", "--workers", "1") == 0
    return out


def test_an_autoencoder_learns_from_scenes(vae, made, model, tmp_path, capsys):
    lines = read_log(vae / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3] and "psnr" in lines[-1]
    assert len(json.loads((vae / "data.json").read_text())["pictures"]) == 40
    assert run(made, model, "vae", tmp_path / "run", "--steps", "3", "--workers", "0") == 0
    told = capsys.readouterr().out
    assert "40 pictures" in told and "is trained on too" not in told and "held-out pictures: PSNR" in told
    others = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["loss"] for line in others if "loss" in line] == [line["loss"] for line in lines if "loss" in line]


def test_a_model_learns_from_scenes_with_cached_and_with_live_latents(vae, made, model, tmp_path, capsys):
    networks = ["--vae", str(vae / "vae"), "--tokenizer", str(made / "set" / "tokenizer")]
    carried = ["--carry", str(made / "set" / "concepts.json")]
    losses = []
    for name, more in (("cached", ()), ("live", ("--live-latents", "--workers", "1"))):
        assert run(made, model, "scratch", tmp_path / name, "--steps", "3", *networks, *carried, *more) == 0
        lines = read_log(tmp_path / name / "log.jsonl")
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert "validation" in lines[-1] and (tmp_path / name / name / "concepts.json").is_file()
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]
    assert "are longer than what is read" not in capsys.readouterr().out
    assert plainsd.load(tmp_path / "live" / "live", device="cpu").variant.size == 32


def test_a_signal_to_all_processes_saves(made, model, tmp_path, monkeypatch):
    """As a shell or a cluster sends it: those that draw end at once, the one that trains after its step."""
    draw, calls = Ahead.__call__, []

    def ended(self, picks):
        calls.append(picks)
        if len(calls) == 2:
            others = list(self.pool._processes.values())
            for number in (os.getpid(), *(process.pid for process in others)):
                os.kill(number, signal.SIGTERM)
            for process in others:
                process.join()
        return draw(self, picks)

    monkeypatch.setattr(Ahead, "__call__", ended)
    assert run(made, model, "vae", tmp_path / "run", "--steps", "4", "--workers", "1") == 0
    assert [place.name for place in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(made, model, "vae", tmp_path / "run", "--steps", "4", "--workers", "1") == 0 and len(calls) == 4


def test_a_run_goes_on_bit_for_bit_and_says_when_the_set_is_another(vae, made, model, tmp_path, capsys):
    networks = ["--vae", str(vae / "vae"), "--tokenizer", str(made / "set" / "tokenizer"), "--live-latents"]
    for out, parts in (("once", ("4",)), ("twice", ("2", "4"))):
        for steps in parts:
            more = ("--steps", steps, "--decline", "constant", "--workers", "1")
            assert run(made, model, "scratch", tmp_path / out, *networks, *more) == 0
    once, twice = (
        torch.load(tmp_path / out / "checkpoints" / "step-00000004" / "state.pt") for out in ("once", "twice")
    )
    assert all(torch.equal(a, b) for a, b in zip(once["parameters"], twice["parameters"], strict=True))
    assert "are not those" not in capsys.readouterr().out
    path = made / "set" / "concepts.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"seed": 9}))
        more = ("--steps", "5", "--decline", "constant", "--workers", "0")
        assert run(made, model, "scratch", tmp_path / "once", *networks, *more) == 0
    finally:
        path.write_text(before)
    assert "the pictures are not those that" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, more, message",
    [
        ("scratch", ("--flip",), "captions of emoji scenes say where things are"),
        ("scratch", ("--caption", "a cat"), "scenes are drawn with their captions"),
        ("lora", ("--live-latents",), "--live-latents is for method scratch"),
    ],
)
def test_options_that_do_not_go_with_scenes(vae, made, model, tmp_path, capsys, method, more, message):
    networks = ["--vae", str(vae / "vae"), "--tokenizer", str(made / "set" / "tokenizer")]
    networks = networks if method == "scratch" else []
    assert run(made, model, method, tmp_path / "run", *networks, "--steps", "1", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run" / "run.toml").exists()


def test_a_set_that_is_not_there_or_of_another_font_is_one_line(made, model, tmp_path, capsys, monkeypatch):
    options = ["--model", str(model), "--out", str(tmp_path / "run"), "--steps", "1", *FAST]
    assert main(["train", "--method", "vae", "--data", f"emoji:{tmp_path / 'no.json'}", *options]) == 2
    assert "no.json" in capsys.readouterr().err
    (tmp_path / "Other.ttf").write_bytes(drawing.FONT.read_bytes() + b"\0")
    monkeypatch.setenv("PLAINSD_EMOJI_FONT", str(tmp_path / "Other.ttf"))
    assert main(["train", "--method", "vae", "--data", source(made), *options]) == 2
    error = capsys.readouterr().err
    assert "another font than the set was made with" in error and len(error.strip().splitlines()) == 1
