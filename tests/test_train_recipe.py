"""The recipe of recipes/finetune: its drawings, and its picture of before and after."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_sd
from PIL import Image

import plainsd

RECIPE = Path(__file__).parents[1] / "recipes" / "finetune"


def script(name):
    found = importlib.util.spec_from_file_location(f"finetune_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    data, folder = script("data"), tmp_path_factory.mktemp("recipe")
    if not data.FONT.is_file():
        pytest.skip("needs Debian's fonts-symbola")
    (folder / "model").mkdir()
    things = {"octopus": "🐙", "rocket": "🚀", "red apple": "🍎", "cat": "🐈", "nothing": "\U0010fffe"}
    rows = [{"name": name, "character": character} for name, character in things.items()]
    (folder / "model" / "concepts.json").write_text(json.dumps({"concepts": rows}))
    for out in ("one", "two"):
        assert (
            data.main([str(folder / out), "--model", str(folder / "model"), "--views", "2", "--heldout-share", "0"])
            == 0
        )
    return folder


def test_drawings_are_black_on_white_with_captions(drawings):
    files = sorted(path.name for path in (drawings / "one" / "drawings").iterdir())
    assert files == [
        f"{name}-{view}.{ending}" for name in ("cat", "red-apple") for view in (0, 1) for ending in ("png", "txt")
    ]
    for path in (drawings / "one" / "drawings").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape == (128, 128, 3) and np.ptp(pixels, axis=-1).max() == 0  # gray alone
        assert pixels.min() == 0 and pixels.max() == 255 and (pixels > 128).mean() > 0.5
    caption = (drawings / "one" / "drawings" / "red-apple-0.txt").read_text()
    assert caption == "a red apple, line drawing\na line drawing of a red apple\n"


def test_what_is_asked_for_unseen_is_held_out_and_what_the_font_lacks_left_out(drawings):
    assert {path.stem for path in (drawings / "one" / "heldout").iterdir()} == {"octopus-0", "rocket-0"}


def test_the_same_files_each_time(drawings):
    one, two = (
        {path.relative_to(drawings / out): path.read_bytes() for path in (drawings / out).rglob("*.*")}
        for out in ("one", "two")
    )
    assert one == two and len({one[path] for path in one if path.suffix == ".png"}) == 6


def test_drawn_again_nothing_of_before_is_left_and_nothing_of_others_goes(drawings, capsys):
    data, out = script("data"), drawings / "again"
    flags = [str(out), "--model", str(drawings / "model"), "--heldout-share", "0"]
    assert data.main([*flags, "--views", "2"]) == 0
    (out / "drawings" / "IMG-1234.png").write_text("mine")
    assert data.main([*flags, "--views", "1"]) == 0
    assert {path.name for path in (out / "drawings").glob("*.png")} == {"cat-0.png", "red-apple-0.png", "IMG-1234.png"}
    (out / "drawings" / "cat-1.png").write_text("mine")
    assert data.main([*flags, "--views", "2"]) == 2
    assert "cat-1.png is not of this recipe; give another folder" in capsys.readouterr().err
    assert (out / "drawings" / "cat-1.png").read_text() == "mine" and (out / "drawings" / "cat-0.txt").is_file()


def test_a_font_that_is_not_there(tmp_path, capsys):
    assert script("data").main([str(tmp_path), "--font", str(tmp_path / "none.ttf")]) == 2
    assert "apt-get install fonts-symbola" in capsys.readouterr().err


def test_before_and_after(tmp_path, capsys):
    picture, run = script("picture"), tmp_path / "full"
    plainsd.save(tiny_sd(), tmp_path / "base")
    plainsd.save(tiny_sd(seed=1), run / "full")
    log = ({"step": 0, "validation": 0.5}, {"step": 3, "loss": 1}, {"step": 4, "validation": 0.25})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "prompts.txt").write_text("colour 1\ncolour 2\n")
    assert (
        picture.main(
            [
                str(tmp_path / "out.png"),
                str(run),
                "--base",
                str(tmp_path / "base"),
                "--prompts",
                str(tmp_path / "prompts.txt"),
            ]
        )
        == 0
    )
    assert "full: validation loss 0.5000 at step 0, 0.2500 at step 4" in capsys.readouterr().out
    shown, step = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")), picture.SHOWN + picture.GAP
    assert shown.shape == (picture.LABEL + 2 * step, picture.LEFT + 2 * step, 3)
    before, after = (
        shown[picture.LABEL + row * step :, picture.LEFT :][: picture.SHOWN, : picture.SHOWN] for row in (0, 1)
    )
    assert not np.array_equal(before, after)
