"""The benchmark takes turns, does the same work on both sides, and refuses to compare what differs."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_XL, tiny_sd
from PIL import Image

import plainsd
from plainsd import allocator
from plainsd.checkpoint import load
from plainsd.cli import main
from plainsd.commands.bench import bars_of, timing_table
from plainsd.errors import UserError
from plainsd.reports import apart, bench, processes, rivals

PLACE = bench.Workbench(None, torch.float32, torch.device("cpu"), 2)


def test_sides_take_turns():
    calls = []
    sides = {name: (lambda name=name: calls.append(name)) for name in ("diffusers", "plainsd")}
    row = bench.race("work", sides, 2)
    assert calls == ["diffusers", "plainsd"] * 3  # the first turn does not count
    assert {side: len(seconds) for side, seconds in row.seconds.items()} == {"diffusers": 2, "plainsd": 2}


def test_other_work_is_not_compared():
    exact = torch.ones(3)
    same = bench.with_distances(bench.Timing("work"), {"plainsd": lambda: exact * 1.01}, exact)
    assert same.errors["plainsd"] == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(UserError, match="diffusers gives another result"):
        bench.with_distances(bench.Timing("work"), {"diffusers": lambda: exact * 2}, exact)


def test_the_table_and_its_ratios():
    row = bench.Timing(
        "work",
        {"diffusers": [2.0, 3.0, 2.5], "plainsd": [1.0, 1.5, 1.25]},
        {"plainsd": 60.0},
        {"plainsd": 0.01},
        {"diffusers": 3 * 10**9},
    )
    other = bench.Timing("training", {"plainsd, memory not kept": [2.0], "plainsd": [1.0]})
    text = timing_table([row, other], bench.machine(PLACE))
    assert "| training | plainsd | 1.000 | 1.000 |  |  |  |  |" in text  # no ratio to diffusers without it
    assert bars_of([row, other]) == [("work: plainsd", 2.0)] and bars_of([other]) == []
    assert "| work | diffusers | 2.000 | 2.500 |  | 1.00 |  | 3.00 GB |" in text
    assert "| work | plainsd | 1.000 | 1.250 | 60.0 | 2.00 | 1.0e-02 |  |" in text
    assert f"torch {version('torch')}" in text and "threads" in text


def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, capsys):
    """And any device has a name."""
    assert bench.machine(PLACE._replace(device=torch.device("mps")))["device"].startswith("mps of ")
    with pytest.raises(UserError, match="decode-memory is about a CPU's memory; give --device cpu"):
        bench.apart_row("decode", PLACE._replace(device=torch.device("cuda")), False)
    for name, variant in (("xl", TINY_XL), ("nine", replace(TINY, unet=replace(TINY.unet, in_channels=9)))):
        plainsd.save(tiny_sd(variant), tmp_path / name)
        assert main(["bench", "unet", "--model", str(tmp_path / name), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert "is of another kind" in error and "timing" not in error
    plainsd.save(tiny_sd(), tmp_path / "one.safetensors")
    assert main(["bench", "unet", "--model", str(tmp_path / "one.safetensors"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "one.safetensors is a single file" in error and "timing" not in error


@pytest.mark.parametrize("side", ["diffusers", "plainsd"])
def test_memory_is_measured_beyond_imports(side, monkeypatch, capsys):
    """What the work itself imports was there before."""
    began = []
    monkeypatch.setattr(apart, "status_bytes", lambda name: began.append(set(sys.modules)) or 0)
    monkeypatch.setitem(apart.READY, "decode", lambda *told: lambda: None)
    monkeypatch.setattr(apart, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    apart.take_turns(side, "decode", ".", "float32")
    wanted = {"plainsd.checkpoint", "plainsd.reports.rivals", "plainsd.speed.model"}
    assert began[0] >= wanted | ({"diffusers", "transformers"} if side == "diffusers" else set())


def test_figures_say_what_limited_the_processor(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    about = bench.machine(PLACE)
    assert about["ATEN_CPU_CAPABILITY"] == "avx2" and "ONEDNN_MAX_CPU_ISA" not in about


@pytest.mark.filterwarnings("ignore")
def test_the_command_on_the_embedded_model(tmp_path, capsys):
    assert (
        main(["bench", "small", "--rounds", "1", "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path)]) == 0
    )
    assert "plainsd --plain" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert list(row["seconds"]) == ["diffusers", "plainsd --plain", "plainsd"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
def test_many_pictures_of_another_model(tmp_path, monkeypatch):
    """The rows for a GPU, of a tiny model with CLIP's tokens, two steps."""
    texts = tuple(replace(text, vocab=49_408, eos=49_407) for text in TINY_XL.text)
    monkeypatch.setitem(rivals.VARIANTS, "sdxl-base", replace(TINY_XL, text=texts))
    row = bench.GPU_BENCHMARKS["sdxl-8"](PLACE._replace(room=tmp_path, rounds=1), False, steps=2)
    assert row.name == "8 pictures of sdxl-base, 64 px, 2 steps of DPM++ 2M"
    assert list(row.seconds) == list(row.first) == ["diffusers", "plainsd --plain", "plainsd"]
    assert {len(seconds) for seconds in row.seconds.values()} == {1}


@pytest.mark.full  # eight processes that import torch
@pytest.mark.filterwarnings("ignore")
def test_from_the_shell_to_a_picture(monkeypatch):
    written, run = [], processes.subprocess.run

    def watched(command, **options):
        run(command, **options)
        path = Path(command[-1] if "--plain" not in command else command[-2])
        if path.suffix == ".png":
            with Image.open(path) as picture:
                written.append(picture.size)
            path.unlink()

    monkeypatch.setattr(processes.subprocess, "run", watched)
    row = bench.first_row(PLACE._replace(rounds=1), False)
    assert list(row.seconds) == ["import torch", "diffusers", "plainsd --plain", "plainsd"]
    assert written == 6 * [(128, 128)]


@pytest.mark.filterwarnings("ignore")
def test_loading_in_new_processes(tmp_path):
    place = PLACE._replace(folder=load(device="cpu").path, rounds=1)
    row = bench.load_row(place, False)
    assert [len(seconds) for seconds in row.seconds.values()] == [1, 1]
    weights = sum(file.stat().st_size for file in place.folder.rglob("*.safetensors"))
    assert all(peak > weights for peak in row.peaks.values())  # kept in float16, loaded as float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(allocator.glibc() is None, reason="malloc is not glibc's")
def test_each_side_with_freed_memory_kept_and_without():
    """In processes that take turns. What keeping it gains: test_allocator.py; this model's maps are small."""
    row = bench.ALLOCATOR_BENCHMARKS["decode-memory"](PLACE._replace(folder=load(device="cpu").path, rounds=1), False)
    assert list(row.seconds) == ["diffusers", "diffusers, memory kept", "plainsd, memory not kept", "plainsd"]
    assert {len(seconds) for seconds in row.seconds.values()} == {1}
    assert all(peak > 1e6 for peak in row.peaks.values())
    assert row.faults.keys() == row.seconds.keys() and all(faults >= 0 for faults in row.faults.values())


def test_a_process_that_ends_is_named():
    side = apart.SideProcess("diffusers", "no-such-work", PLACE)
    try:
        with pytest.raises(UserError, match="diffusers: the process ended .*no-such-work"):
            side.turn()
    finally:
        side.end()


def test_an_unknown_row(capsys):
    assert main(["bench", "smal"]) == 2
    assert "did you mean 'small'" in capsys.readouterr().err


def test_no_rounds(capsys):
    assert main(["bench", "--rounds", "0"]) == 2
    assert "rounds 0" in capsys.readouterr().err


@pytest.mark.full
def test_the_gpu_script_rehearsed_with_tiny_networks(tmp_path):
    script = [sys.executable, "bench/gpu.py", "parity", "waiting", "sd1-1", "sdxl-8", "train"]
    command = [*script, "--device", "cpu", "--dtype", "float32", "--tiny", "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    parts = {name: result["found"] for name, result in json.loads(file.read_text())["parts"].items()}
    assert max(error for family in parts["parity"].values() for error in family.values()) < 1e-4
    assert set(parts["sdxl-8"]["seconds"]) == {"diffusers", "plainsd --plain", "plainsd"}
    assert len(parts["train"]) == 5 and all(case["seconds"] > 0 for case in parts["train"].values())


def test_the_gpu_script_says_what_it_left_out(tmp_path):
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny", "--seconds", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and "sdxl-8: left out: no time was left" in done.stdout, done.stderr
    (file,) = tmp_path.glob("*.json")
    assert {"left out": "no time was left"} in json.loads(file.read_text())["parts"].values()
