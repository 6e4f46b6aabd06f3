"""bench/compatibility.py without the other programs' code: its tables, what it says of what is missing, its chapter."""

import re
import sys
from pathlib import Path

import pytest
import torch

from plainsd.errors import UserError
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.labels import SAMPLER_LABELS

ROOT = Path(__file__).parents[1]
A1111 = (  # all that version 1.10.1 has
    *("ddim", "ddim_cfg_pp", "dpm2", "dpm2_a", "dpm_adaptive", "dpm_fast", "dpmpp_2m", "dpmpp_2m_sde"),
    *("dpmpp_2m_sde_heun", "dpmpp_2s_a", "dpmpp_3m_sde", "dpmpp_sde", "euler", "euler_a", "heun", "lcm", "lms"),
    *("plms", "restart", "unipc"),
)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import compatibility

    return compatibility


def stand_in(folders, only):
    """A program that draws as plainsd does but for one latent."""
    from oracles.comparing import compared, drawn, small_model

    sd = small_model()
    for sampler in ("euler", "heun"):
        for steps in (2, 3):
            settings = Settings(prompt="a pear", size=(64, 64), steps=steps, sampler=sampler)
            off = torch.zeros(1, 4, 8, 8)
            off[0, 1, 2, 3] = 0.5 if sampler == "heun" else 0
            row = "stand-in", sampler, f"{steps} steps"
            yield compared(row, lambda s=settings, off=off: drawn(sd, s) + off, lambda s=settings: drawn(sd, s))
    settings = Settings(prompt="a pear", size=(64, 64), steps=2, sampler="eular")
    yield compared(("stand-in", "eular", "2 steps"), lambda: off, lambda: drawn(sd, settings))


def test_every_cell_stands_in_a_table(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PARTS", {"stand-in": ((), stand_in)})
    monkeypatch.setattr(sys, "argv", ["compatibility.py"])
    assert bench.main() == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "| stand-in | 2 steps | 3 steps |",
        "|---|---|---|",
        "| euler | 0 | 0 |",
        "| heun | 5e-01 | 5e-01 |",
        "| eular | — |  |",
    ]
    assert shown.err.startswith("stand-in, eular, 2 steps: unknown sampler 'eular'")


def test_a_folder_that_is_missing_is_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--k-diffusion", ".", "--only", "none of them"])
    assert bench.main() == 0
    shown = capsys.readouterr()
    assert not shown.out.strip()
    assert shown.err.split("\n")[:2] == [
        "A1111: left out; give --a1111 FOLDER",
        "ComfyUI: left out; give --comfyui FOLDER",
    ]


def test_reasons_are_counted(bench):
    found = [
        bench.Cell("t", "a", "b", None, "no"),
        bench.Cell("t", "a", "c", None, "no"),
        bench.Cell("t", "x", "b", 0.0),
    ]
    assert bench.reasons(found) == ["t, a, b and 1 more: no"]


def test_errors_of_either_side_are_cells(bench):
    from oracles.comparing import compared

    def wrong():
        raise UserError("steps 0 is out of range; choose 1 to 1000")

    assert compared(("t", "r", "c"), lambda: torch.zeros(1), wrong).why.startswith("steps 0")
    assert compared(("t", "r", "c"), lambda: torch.zeros(1).reshape(3), wrong).why.startswith("RuntimeError")


def test_the_table_goes_between_its_marks(bench, monkeypatch, tmp_path, capsys):
    chapter = tmp_path / "chapter.md"
    chapter.write_text(f"before\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\nafter\n")
    monkeypatch.setattr(bench, "CHAPTER", chapter)
    monkeypatch.setattr(bench, "PARTS", {"x": ((), lambda folders, only: [bench.Cell("t", "r", "c", 2e-6)])})
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--write"])
    assert bench.main() == 0
    table = "| t | c |\n|---|---|\n| r | 2e-06 |"
    assert chapter.read_text() == f"before\n{bench.MARKS[0]}\n{table}\n{bench.MARKS[1]}\nafter\n"


def test_the_chapter_has_every_sampler_of_the_web_ui(bench):
    table = bench.CHAPTER.read_text("utf-8").partition(bench.MARKS[0])[2].partition(bench.MARKS[1])[0]
    rows = set(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE))
    assert {SAMPLER_LABELS[name] for name in A1111} <= rows
