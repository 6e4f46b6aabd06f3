"""Scoring scenes: what is found in a picture, what is right, and the tables and sheets."""

import json
import runpy
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_emoji import SHAPES, LosslessVAE
from test_emoji_scenes import RECIPE, needs_font, scene_of, small_set

from plainsd import generate
from plainsd.cli import main
from plainsd.emoji import drawing, evaluate, protocol
from plainsd.emoji.painting import Painter, background_pixels
from plainsd.emoji.scenes import PATTERNS, TASKS, SceneObject, describe_set, make_scene, moved_scene, read_set
from plainsd.emoji.spotting import (
    PartBox,
    Spotted,
    Spotter,
    averaged,
    connected_parts,
    fitted_background,
    without_lines,
)
from plainsd.emoji.tables import framed_sheet, score_table
from plainsd.emoji.words import COLOURS

# ---- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_background_is_found_at_the_border(pattern, size):
    a, b = COLOURS["teal"], COLOURS["teal" if pattern == "plain" else "lime"]
    pixels = background_pixels(pattern, a, b, size)
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = (250, 0, 0)
    pixels[: size // 10, : size // 10] = (0, 0, 0)  # a corner that is wrong
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    for one in (pixels, noisy):
        found, first, second, error = fitted_background(one)
        assert found == pattern and (error < 0.6 if one is pixels else 2 < error < 8)
        assert np.abs(np.array(first) - a).max() <= 8 and np.abs(np.array(second) - b).max() <= 8


def test_connected_parts_are_boxes_to_the_pixel():
    mask = np.zeros((128, 128), bool)
    mask[10:31, 20:50], mask[60:64, 60:90], mask[64:100, 90:95], mask[120, 5] = True, True, True, True
    assert set(connected_parts(mask)) == {
        PartBox(20, 10, 50, 31),
        PartBox(60, 60, 95, 100),
    }  # corners touch; a dot is noise
    assert PartBox(0, 0, 4, 4).gap(PartBox(9, 2, 12, 5)) == 5 and PartBox(0, 0, 4, 4).gap(PartBox(2, 2, 12, 5)) < 0
    assert PartBox(0, 3, 4, 4).around(PartBox(2, 1, 9, 2)) == PartBox(0, 1, 9, 4)


def test_opening_takes_thin_lines_and_leaves_the_rest():
    mask = np.zeros((20, 20), bool)
    mask[:, 2:4], mask[6:12, 8:15] = True, True
    kept = np.zeros_like(mask)
    kept[6:12, 8:15] = True
    assert (without_lines(mask) == kept).all()


def test_boxes_are_averaged_exactly():
    rows = np.random.default_rng(0).random((2, 40, 3, 1))
    found = averaged(rows, np.array([4, 0]), np.array([36, 24]))
    assert np.allclose(found[0], rows[0, 4:36].reshape(16, 2, 3, 1).mean(1))
    assert np.allclose(found[1, 1], (rows[1, 1] * 0.5 + rows[1, 2]) / 1.5)  # 1.5 rows each


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    pytest.importorskip("emoji", reason="the emoji package gives the names")
    out = tmp_path_factory.mktemp("set")
    assert runpy.run_path(str(RECIPE))["main"]([str(out), "--set"]) == 0
    return read_set(out / "concepts.json")


def is_right(made_of, scene, spotted) -> bool:
    return not protocol.is_failure(protocol.SceneQuestion("", scene, True), spotted, made_of.size)


@needs_font
@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.full)])
def test_true_scenes_are_found_among_all_emoji(made_of, count):
    painter = Painter(made_of)
    spotter, scenes = Spotter(painter), [make_scene(made_of, "test", i) for i in range(count)]
    found = [spotter(painter(scene)) for scene in scenes]
    assert sum(is_right(made_of, scene, one) for scene, one in zip(scenes, found, strict=True)) >= 0.9 * count
    near = [
        max(abs(a.left - b.left), abs(a.top - b.top), abs(a.side - b.side)) <= 2
        for scene, one in zip(scenes, found, strict=True)
        for a in scene.objects
        for b in one.objects
        if a.concept == b.concept and len(scene.objects) == 1
    ]
    assert sum(near) >= 0.95 * len(near) > 0
    soft = [spotter(painter(scene).filter(ImageFilter.GaussianBlur(1))) for scene in scenes[:12]]
    assert sum(is_right(made_of, scene, one) for scene, one in zip(scenes, soft, strict=False)) >= 0.75 * 12


@needs_font
def test_an_emoji_of_several_parts_is_one(made_of):
    painter = Painter(made_of)
    names = [noun.name for noun in made_of.nouns]
    for name in ("sparkles", "musical notes", "bikini", "eyes"):
        scene = scene_of("one", (names.index(name),), None, "plain", ("teal",))
        scene = replace(scene, objects=(replace(scene.objects[0], left=14, top=20, side=90),))
        found = Spotter(painter)(painter(scene))
        assert [names[one.concept] for one in found.objects] == [name]


@needs_font
def test_an_empty_picture_has_no_objects(made_of):
    found = Spotter(Painter(made_of))(Image.new("RGB", (128, 128), COLOURS["coral"]))
    assert found == Spotted("plain", ("coral",), (), ())


# ---- what is asked, and what is right --------------------------------------------------------------------------------


def test_questions_are_half_held_out_and_of_every_task():
    asked = protocol.scene_questions(small_set(), 64, seed=2)
    assert [question.seen for question in asked] == [True, False] * 32
    for seen in (True, False):
        assert {q.scene.task for q in asked if q.seen == seen} == set(TASKS)
    assert (
        asked == protocol.scene_questions(small_set(), 64, seed=2) != protocol.scene_questions(small_set(), 64, seed=3)
    )
    for question in asked[:8]:
        assert all(
            small_set().nouns[one.concept].name.split(" ")[0][:3] in question.prompt for one in question.scene.objects
        )


def spotted(*objects: tuple[int, int, int], pattern="plain", colours=("red",)) -> Spotted:
    return Spotted(pattern, colours, tuple(SceneObject(c, x, y, 40) for c, x, y in objects), (0.0,) * len(objects))


DOTTED = scene_of("one", (3,), None, "dots", ("red", "blue"))


def test_a_set_is_asked_for_what_it_describes():
    """CLIPScore's prompts too are those of scenes."""
    content = describe_set(small_set())
    assert evaluate.asked_of(content, 8, 3) == protocol.scene_questions(small_set(), 8, 3)
    single = {key: value for key, value in content.items() if key != "scenes"}
    assert evaluate.asked_of(single, 8, 3) == evaluate.questions(content, 8, 3)
    one_each = describe_set(replace(small_set(), single=True))  # is judged as the embedded model is
    assert evaluate.asked_of(one_each, 8, 3) == evaluate.questions(content, 8, 3)


def test_a_single_set_is_asked_for_single_objects():
    made_of = replace(small_set(), single=True, cells=8)
    asked = protocol.scene_questions(made_of, 32)
    assert {q.scene.task for q in asked} == {"one"} and sum(q.seen for q in asked) == 16
    right = [Spotted(q.scene.pattern, q.scene.colours, q.scene.objects, (0.0,)) for q in asked]
    lines = protocol.scene_table({"all": protocol.scene_summary(asked, right, made_of.size)})
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {name}, {part}"
        for name in ("single object", "counts 1 to 4", "background, colours and pattern")
        for part in ("seen", "held out")
    ]
    assert all("| 100.0 (" in line for line in lines[2:])


@pytest.mark.parametrize(
    "scene, found, right",
    [
        (scene_of("one", (3,)), spotted((3, 10, 10)), True),
        (scene_of("one", (3,)), spotted((4, 10, 10)), False),
        (scene_of("one", (3,)), spotted((3, 10, 10), (3, 80, 80)), False),
        (scene_of("one", (3,)), spotted((3, 10, 10), colours=("blue",)), False),
        (DOTTED, spotted((3, 10, 10), pattern="dots", colours=("red", "blue")), True),
        (DOTTED, spotted((3, 10, 10), pattern="stripes", colours=("red", "blue")), False),
        (scene_of("one", (3,), "left"), spotted((3, 10, 44)), True),
        (scene_of("one", (3,), "left"), spotted((3, 70, 44)), False),
        (scene_of("one", (3,), "bottom"), spotted((3, 44, 80)), True),
        (scene_of("one", (3,), "bottom"), spotted((3, 44, 10)), False),
        (scene_of("one", (3,), "middle"), spotted((3, 50, 40)), True),
        (scene_of("one", (3,), "middle"), spotted((3, 80, 44)), False),
        (scene_of("one", (3,), "small"), spotted((3, 44, 44)), True),
        (scene_of("one", (3,), "big"), spotted((3, 44, 44)), False),
        (scene_of("two", (3, 4), "left"), spotted((3, 10, 40), (4, 80, 40)), True),
        (scene_of("two", (3, 4), "left"), spotted((4, 10, 40), (3, 80, 40)), False),
        (scene_of("two", (3, 4), "above"), spotted((4, 44, 80), (3, 44, 10)), True),
        (scene_of("two", (3, 4), "above"), spotted((4, 44, 10), (3, 44, 80)), False),
        (scene_of("two", (3, 4)), spotted((4, 10, 10), (3, 80, 80)), True),
        (scene_of("two", (3, 4)), spotted((4, 10, 10)), False),
        (scene_of("count", (3, 3, 3)), spotted((3, 10, 10), (3, 80, 10), (3, 10, 80)), True),
        (scene_of("count", (3, 3, 3)), spotted((3, 10, 10), (3, 80, 10)), False),
        (scene_of("many", (3, 4, 5)), spotted((5, 10, 10), (4, 80, 10), (3, 10, 80)), True),
        (scene_of("many", (3, 4, 5)), spotted((5, 10, 10), (4, 80, 10), (4, 10, 80)), False),
    ],
)  # fmt: skip
def test_right_and_wrong(scene, found, right):
    assert protocol.is_failure(protocol.SceneQuestion("", scene, True), found, 128) is not right


def test_each_rule_counts_its_own_scenes():
    asked = [
        protocol.SceneQuestion("", scene_of("one", (3,), "left"), True),
        protocol.SceneQuestion("", scene_of("count", (3, 3)), True),
        protocol.SceneQuestion("", scene_of("two", (3, 4), "left"), False),
    ]
    found = [spotted((3, 80, 10)), spotted((4, 10, 10), (4, 80, 10)), spotted((3, 10, 10), (4, 80, 10))]
    rows = protocol.scene_summary(asked, found, 128)

    def row(name):
        return [(rows[name][part]["right"], rows[name][part]["count"]) for part in ("seen", "heldout")]

    assert row("single object") == [(1, 1), (0, 0)]
    assert row("place of one object") == [(0, 1), (0, 0)]
    assert row("counts 1 to 4") == [(2, 2), (0, 0)]
    assert row("counting, object and number right") == [(0, 1), (0, 0)]
    assert row("two objects, both right") == row("position of two objects") == [(0, 0), (1, 1)]
    assert row("background, colours and pattern") == [(2, 2), (1, 1)]
    lines = protocol.scene_table({"model": rows})
    assert "| single object, seen | 100.0 (20.7 to 100.0) |" in lines and "| single object, held out | - |" in lines


def test_a_moved_scene_says_the_same():
    made = small_set()
    for i in range(200):
        scene = make_scene(made, "train", i)
        other = moved_scene(made, scene, "again", i)
        assert other != scene and other == replace(scene, objects=other.objects)
        assert [one.concept for one in other.objects] == [one.concept for one in scene.objects]
        if scene.said:
            found = Spotted(scene.pattern, scene.colours, other.objects, ())
            assert is_right(made, scene, found)


# ---- the whole -------------------------------------------------------------------------------------------------------


class FewEmoji(Painter):
    """Draws with shapes, for sets without a font."""

    def __init__(self, made_of, font=None):
        self.made_of = made_of

    def glyph(self, concept):
        return SHAPES[concept % len(SHAPES)].convert("RGBa")


def test_evaluate_scores_scenes(monkeypatch, tmp_path):
    """A model that draws what was asked, but for every fourth picture."""
    content = describe_set(
        replace(small_set(), nouns=small_set().nouns[:5], heldout=frozenset({(0, "red"), (1, "blue")}))
    )
    monkeypatch.setattr(evaluate, "Painter", FewEmoji)
    monkeypatch.setattr(drawing, "font_identity", lambda font: {"file": "none", "sha256": "0" * 64})
    asked = evaluate.scene_exam(content, 32, 0, None)

    def paint(sd, prompts, *, seed, guidance, steps, sampler):
        assert guidance == 3 and prompts == [question.prompt for question in asked.asked[seed : seed + len(prompts)]]
        return [Image.new("RGB", (128, 128)) if k % 4 == 3 else asked.real[k] for k in range(seed, seed + len(prompts))]

    monkeypatch.setattr(generate, "text_to_image", paint, raising=False)
    monkeypatch.setattr(generate, "final", lambda events: events, raising=False)
    model = SimpleNamespace(vae=LosslessVAE(), variant=SimpleNamespace(guidance=3.0, size=128, sampler="ddim"))
    result = evaluate.evaluate(model, content, prompts=32, out=tmp_path, sheet=tmp_path / "sheet.png")
    rows = result["rows"]
    assert list(rows) == ["real pictures", "real pictures through the VAE", "generated, guidance 3"]
    assert rows["real pictures"] == rows["real pictures through the VAE"]
    for name, _, _ in protocol.RULES:
        for part in ("seen", "heldout"):
            true, drawn = (rows[row][name][part] for row in ("real pictures", "generated, guidance 3"))
            assert true["right"] == true["count"] == drawn["count"]
            assert drawn["right"] <= true["right"] - (part == "heldout" and name.startswith("background"))
    quality = result["quality"]
    assert quality["real pictures through the VAE"]["heldout_psnr"] == 100 and quality["real pictures"]["fd"] > 0
    assert quality["real pictures through the VAE"]["sharpness"] == pytest.approx(1)
    text = score_table(result)
    assert text == (tmp_path / "scores.txt").read_text() and "32 prompts of scenes, 5 emoji" in text
    assert "| 100.00 / 100.00 |" in text and json.loads((tmp_path / "scores.json").read_text()) == result
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4 * 134, 8 * 134, 3)
    red = [tuple(sheet[k // 8 * 134, k % 8 * 134]) == (255, 0, 0) for k in range(32)]
    assert red == [k % 4 == 3 for k in range(32)]


def test_a_framed_sheet_has_64_pictures_at_most():
    pictures = [Image.new("RGB", (20, 20), "blue")] * 70
    sheet = framed_sheet(pictures, [k == 1 for k in range(70)])
    assert sheet.size == (8 * 26, 8 * 26) and sheet.getpixel((27, 1)) == (255, 0, 0) == sheet.getpixel((51, 25))
    assert sheet.getpixel((1, 1)) == (255, 255, 255) and sheet.getpixel((30, 4)) == (0, 0, 255)


@needs_font
def test_the_embedded_model_keeps_its_table(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    count = len(json.loads((resources.files("plainsd") / "assets" / "emoji" / "concepts.json").read_text())["concepts"])
    assert main(["eval", "--prompts", "2", "--steps", "2", "--sheet", str(sheet), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"2 prompts, {count} emoji, 2 steps of")
    assert lines[2:5] == [
        "| pictures | background | object, top 1 | object, top 5 |",
        "|---|---|---|---|",
        "| real pictures | 100.0 / 100.0 | 100.0 / 100.0 | 100.0 / 100.0 |",
    ]
    assert "| real pictures | 20.7 to 100.0 / 20.7 to 100.0 |" in "\n".join(lines)
    assert Image.open(sheet).size == (8 * 134, 134)


def test_eval_refuses_flags_before_it_draws(tmp_path, capsys):
    assert main(["eval", "--sheet", "sheet.jpg"]) == 2
    assert "call it sheet.png" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    (tmp_path / "sheet.png").mkdir()
    assert main(["eval", "--sheet", str(tmp_path / "sheet.png"), "--prompts", "1000000"]) == 2
    assert "is a folder; give a file in it" in capsys.readouterr().err
    for flags in (["--out", tmp_path / "file"], ["--sheet", tmp_path / "file" / "sheet.png"]):
        assert main(["eval", *map(str, flags), "--prompts", "1000000"]) == 2
        assert "cannot write into" in capsys.readouterr().err
    by_clip = ["--clip-score", "clip"]
    for flags, said in (
        ([*by_clip, "--sheet", "sheet.png"], "--sheet is for scores of emoji"),
        ([*by_clip, "--font", "font.ttf"], "--font is for scores of emoji"),
        ([*by_clip, "--pictures", "x", "--concepts", "c.json"], "--concepts is for scores of emoji"),
        ([*by_clip, "--prompts", "0"], "0 prompts; give at least 1"),
        (["--prompts", "1"], "1 prompts; give at least 2"),
        (["--batch", "3"], "--batch needs --clip-score"),
        (["--clip-prefix", "X"], "--clip-prefix needs --clip-score"),
    ):
        assert main(["eval", *flags]) == 2 and said in capsys.readouterr().err
