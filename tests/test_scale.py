"""Prompts drawn by several processes: all of them, once, under numbers of their own, and as one process draws them."""

import subprocess
import sys

import pytest
from PIL import Image, ImageChops

from plainsd.cli import main
from plainsd.commands.setup import DrawingSetup
from plainsd.commands.torchrun import ProcessShare, share_of_torchrun
from plainsd.errors import UserError
from plainsd.pictures.images import read_settings
from plainsd.pictures.memory import LEAST
from plainsd.pictures.model import Saving
from plainsd.speed.int8 import int8

PROMPTS = ["a red apple", "a blue fish", "a green tree", "a dog", "a sun"]
OPTIONS = ["--steps", "2", "--seed", "3", "--device", "cpu", "--dtype", "float32", "--batch", "2"]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_whole_and_even(count, size):
    parts = [ProcessShare(rank, size).part(count) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_place_is_torchruns(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert share_of_torchrun() == ProcessShare() and ProcessShare().alone and ProcessShare().agreed(7) == 7
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert share_of_torchrun() == ProcessShare(5, 8, 1)
    monkeypatch.delenv("LOCAL_RANK")  # one process a pod, as Kubernetes operators start them
    assert share_of_torchrun() == ProcessShare(5, 8, 0)
    monkeypatch.delenv("WORLD_SIZE")
    assert share_of_torchrun() == ProcessShare()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ProcessShare(3, 4, 1).device("auto") == "cuda:1" and ProcessShare(3, 4, 1).device("cpu") == "cpu"
    assert ProcessShare().device("auto") == "auto"
    with pytest.raises(UserError, match="3 or more processes on a machine with 2 GPUs"):
        ProcessShare(2, 4, 2).device("cuda")


def test_two_processes_draw_what_one_draws(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = ["generate", "--prompts", str(tmp_path / "prompts.txt"), *OPTIONS]
    assert main([*asked, "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "two").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "two" / "00007-0.png")  # files go on from there
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "plainsd"]
    done = subprocess.run([*torchrun, *asked, "--out", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (sorted((tmp_path / name).glob("*.png")) for name in ("one", "two"))
    assert [path.name for path in one] == [f"0000{i + 1}-{i + 3}.png" for i in range(5)]
    assert [path.name for path in two[1:]] == [f"{i + 8:05d}-{i + 3}.png" for i in range(5)]
    for a, b in zip(one, two[1:], strict=True):
        assert read_settings(a) == read_settings(b)
        with Image.open(a) as first, Image.open(b) as second:
            assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 1


@pytest.mark.parametrize("flag", [["--grid", "steps=1,2"], ["--server", "http://127.0.0.1:1"]])
def test_what_is_for_one_process_says_so(flag, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["generate", "a", *flag]) == 2
    assert f"{flag[0]} runs in one process; start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--low-memory"], ["--cache", "2"], ["--int8"]])
def test_flags_of_memory_and_speed_draw(flags, tmp_path, monkeypatch):
    if flags == ["--int8"]:
        pytest.importorskip("torchao")
    ready, drawing, quantized = DrawingSetup.ready, [], []

    def watched(setup, model):
        found = ready(setup, model)
        drawing.append(found[0])
        return found

    monkeypatch.setattr(DrawingSetup, "ready", watched)
    monkeypatch.setattr("plainsd.speed.int8.int8", lambda sd: quantized.append(int8(sd)))
    assert main(["generate", "a red apple", *OPTIONS, *flags, "--out", str(tmp_path / "x.png")]) == 0
    assert read_settings(tmp_path / "x.png").cache == (2 if "--cache" in flags else None)
    (sd,) = drawing
    assert sd.saving == (LEAST if "--low-memory" in flags else Saving())
    assert quantized == ([sd] if "--int8" in flags else [])


@pytest.mark.parametrize("flag", ["--int8", "--plain"])
def test_what_does_not_go_together_with_compile(flag, capsys):
    assert main(["generate", "a", flag, "--compile"]) == 2
    assert f"{flag} cannot be combined with --compile; leave one of them out" in capsys.readouterr().err
