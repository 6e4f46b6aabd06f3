"""The emoji set, its folder, and the scorer. Parts that draw with the font are skipped where it is not installed."""

import json
import runpy
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from plainsd import generate
from plainsd.emoji import drawing, evaluate
from plainsd.emoji.scorer import Drawn, Scorer, best_errors, border_colour, nearest_name
from plainsd.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "emoji" / "data.py"
needs_font = pytest.mark.skipif(
    not drawing.FONT.is_file(), reason=f"no font at {drawing.FONT} (fonts-noto-color-emoji)"
)


def shape(kind: str, colour: str, size: tuple[int, int] = (100, 80)) -> Image.Image:
    """A glyph made without a font."""
    glyph = Image.new("RGBA", size)
    getattr(ImageDraw.Draw(glyph), kind)((0, 0, size[0] - 1, size[1] - 1), fill=colour)
    return glyph


SHAPES = [
    shape("ellipse", "crimson"),
    shape("rectangle", "crimson"),
    shape("ellipse", "navy"),
    shape("ellipse", "crimson", (50, 120)),
    shape("rectangle", "gold", (120, 60)),
]
CONCEPTS = {
    "concepts": [{"name": name, "character": "?"} for name in ("red apple", "owl", "grapes", "bread", "unicorn")],
    "backgrounds": {name: list(colour) for name, colour in drawing.BACKGROUNDS.items()},
    "templates": list(drawing.TEMPLATES),
    "size": 64,
    "heldout": [["owl", "red"], ["bread", "blue"], ["grapes", "white"]],
}


# ---- words and pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("red apple", "a red apple"),
        ("orange", "an orange"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("hourglass", "an hourglass"),
        ("x-ray", "an x-ray"),
        ("octopus", "an octopus"),
        ("grapes", "grapes"),
        ("french fries", "french fries"),
        ("bread", "bread"),
        ("glass of milk", "a glass of milk"),
        ("dress", "a dress"),
        ("rhinoceros", "a rhinoceros"),
        ("skis", "skis"),
    ],
)
def test_articles(name, phrase):
    assert drawing.Concept(name, "?").phrase == phrase


def test_captions_say_article_and_colour():
    made = [drawing.caption(template, drawing.Concept("owl", "?"), "orange") for template in drawing.TEMPLATES]
    assert made[0] == "an owl on an orange background"
    assert "owl, orange background" in made and made[-1] == "an owl"
    assert len(set(made)) == len(made)


def test_backgrounds_lie_well_apart():
    colours = [np.asarray(colour) for colour in drawing.BACKGROUNDS.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]) > 97


@pytest.mark.parametrize("concepts, backgrounds", [(400, 12), (11, 12), (24, 12), (7, 3)])
def test_split_is_whole_even_and_fixed(concepts, backgrounds):
    seen, held = drawing.split_pairs(concepts, backgrounds, 0.1, seed=3)
    assert len(held) == round(0.1 * concepts * backgrounds)
    assert set(seen) | set(held) == {(i, j) for i in range(concepts) for j in range(backgrounds)}
    assert not set(seen) & set(held)
    for axis, count in ((0, concepts), (1, backgrounds)):
        assert {pair[axis] for pair in seen} == set(range(count))
        hits = Counter(pair[axis] for pair in held)
        assert max(hits.values()) - min(hits[i] for i in range(count)) <= 1 + (axis == 1)
    assert drawing.split_pairs(concepts, backgrounds, 0.1, seed=3) == (seen, held)
    _, other = drawing.split_pairs(concepts, backgrounds, 0.1, seed=4)
    assert len(set(held) & set(other)) <= 0.5 * len(held)  # a tenth of them on average


def test_places_lie_inside_and_depend_on_the_key_alone():
    places = [drawing.random_place(f"0:picture:{i}", (120, 60), 128) for i in range(500)]
    for place in places:
        assert 0 <= place.left <= 128 - place.width and 0 <= place.top <= 128 - place.height
        assert round(0.6 * 128) <= place.width <= round(0.95 * 128) and abs(place.width - 2 * place.height) <= 1
    assert min(p.left for p in places) == 0 and max(p.left + p.width for p in places) == 128
    assert places[7] == drawing.random_place("0:picture:7", (120, 60), 128)
    assert len(set(places)) > 450


def test_places_in_cells_are_whole_cells():
    """Squares of 6, 7 and 8 cells of 16 pixels, less 4 pixels on each side, the glyph in their middle."""
    places = {drawing.random_place(f"0:picture:{i}", (120, 60), 128, 8) for i in range(500)}
    expected = {
        drawing.GlyphBox(4 + 16 * x, 4 + 16 * y + side // 4, side, side // 2)
        for side, spare in ((120, 0), (104, 1), (88, 2))
        for x in range(spare + 1)
        for y in range(spare + 1)
    }
    assert places == expected
    assert drawing.scale_range(8) == (88 / 128, 120 / 128)
    assert {drawing.random_place(str(i), (10, 10), 8, 1).width for i in range(20)} == {4}  # one cell: one size


@pytest.mark.parametrize("cells", [0, -1, 65, 8.0, True, "8"])
def test_cells_that_are_none_are_refused(cells):
    with pytest.raises(UserError, match="write a whole number from 1 to 64, or leave it out"):
        evaluate.read_concepts(CONCEPTS | {"cells": cells})


# ---- the scorer ------------------------------------------------------------------------------------------------------


def test_border_colour_ignores_a_glyph_on_two_sides():
    pixels = np.full((128, 128, 3), 0.25, np.float32)
    pixels[:121, :121] = 1.0
    assert np.allclose(border_colour(pixels), 0.25)


def test_nearest_name():
    assert nearest_name(np.array([0.9, 0.1, 0.1]), drawing.BACKGROUNDS) == "red"
    assert nearest_name(np.array([0.95, 0.97, 0.95]), drawing.BACKGROUNDS) == "white"


def test_search_error_equals_the_error_written_out():
    """Every place tried one by one, with the composed picture itself, against the correlation."""
    generator = torch.Generator().manual_seed(0)
    scorer = Scorer([SHAPES[3]], drawing.BACKGROUNDS, 32)
    glyph = drawing.scaled_glyph(SHAPES[3], 22)
    scaled = torch.from_numpy(np.asarray(glyph, np.float32) / 255)
    picture, ground = torch.rand(3, 32, 32, generator=generator), torch.tensor([0.2, 0.5, 0.7])
    least = float("inf")
    for top in range(32 - glyph.height + 1):
        for left in range(32 - glyph.width + 1):
            drawn = ground[:, None, None].repeat(1, 32, 32)
            here = (slice(None), slice(top, top + glyph.height), slice(left, left + glyph.width))
            alpha = scaled[..., 3]
            drawn[here] = scaled[..., :3].permute(2, 0, 1) * alpha + drawn[here] * (1 - alpha)
            least = min(least, float(((picture - drawn) ** 2).mean()))
    drawn = scorer.draw(SHAPES[3], 22, 32)
    found = best_errors((picture - ground[:, None, None])[None], ground, drawn, 32)
    assert isinstance(drawn, Drawn) and found.item() == pytest.approx(least, rel=1e-4)


def test_scorer_finds_synthetic_shapes():
    scorer = Scorer(SHAPES, drawing.BACKGROUNDS, 64)
    for k in range(40):
        concept, name = k % len(SHAPES), ["white", "green", "cyan", "black"][k % 4]
        place = drawing.random_place(f"test:{k}", SHAPES[concept].size, 64)
        score = scorer(drawing.draw_picture(SHAPES[concept], drawing.BACKGROUNDS[name], 64, place))
        assert (score.background, score.objects[0]) == (name, concept)
        assert sorted(score.objects) == list(range(len(SHAPES))) and score.error < 8e-3


def test_scorer_sees_a_wrong_object_and_a_wrong_background():
    asked = evaluate.questions(CONCEPTS, 12)
    scorer = Scorer(SHAPES, drawing.BACKGROUNDS, 64)
    right = evaluate.real_pictures(asked, SHAPES, CONCEPTS, 0)
    wrong = right[3:] + right[:3]
    good, bad = (evaluate.summary(asked, [scorer(p) for p in pictures]) for pictures in (right, wrong))
    assert good["seen"]["background"] == good["heldout"]["background"] == 1
    assert bad["seen"]["background"] < 0.7 and bad["seen"]["top1"] < good["seen"]["top1"]
    assert bad["seen"]["top5"] == 1  # of five emoji, every one is among the first five


# ---- questions and the whole evaluation ------------------------------------------------------------------------------


def test_questions_are_half_held_out_and_name_both():
    asked = evaluate.questions(CONCEPTS, 40, seed=1)
    assert [question.seen for question in asked] == [True, False] * 20
    names = [entry["name"] for entry in CONCEPTS["concepts"]]
    for question in asked:
        assert question.background in question.prompt and names[question.concept] in question.prompt
        assert question.seen == ([names[question.concept], question.background] not in CONCEPTS["heldout"])
    assert asked == evaluate.questions(CONCEPTS, 40, seed=1)
    other = evaluate.questions(CONCEPTS, 40, seed=2)
    assert sum(one == two for one, two in zip(asked, other, strict=True)) < 20


def test_no_question_comes_twice_before_every_template_was_asked():
    """Six templates name the background of each pair."""
    folder = resources.files("plainsd") / "assets" / "emoji"
    concepts = json.loads((folder / "concepts.json").read_text("utf-8"))
    pairs = len(concepts["heldout"])
    asked = evaluate.questions(concepts, 2 * pairs * 6 + 2)
    heldout = [question.prompt for question in asked if not question.seen]
    assert len(set(heldout[:-1])) == pairs * 6 and heldout[-1] == heldout[0]


def test_questions_refuse_a_set_without_held_out_pairs():
    with pytest.raises(UserError, match="no held-out pairs"):
        evaluate.questions(CONCEPTS | {"heldout": []}, 4)
    with pytest.raises(UserError, match="lacks templates"):
        evaluate.questions({key: value for key, value in CONCEPTS.items() if key != "templates"}, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"templates": []},
        {"templates": ["{name}"]},
        {"templates": ["{thing} on {background}"]},
        {"concepts": []},
        {"concepts": [{"character": "?"}]},
        {"concepts": ["owl"]},
        {"size": "64"},
        {"size": 0},
        {"size": True},
        {"backgrounds": {"red": [1, 2]}},
        {"backgrounds": {"red": [1, 2, 999]}},
        {"backgrounds": {"red": "red"}},
        {"font": None},
        {"backgrounds": ["red"]},
        {"heldout": ["owl"]},
        {"heldout": [["owl", "no colour"]]},
    ],
    ids=str,
)
def test_a_damaged_concepts_json_is_one_line(change):
    with pytest.raises(UserError, match="concepts.json is damaged: .*write it with recipes/emoji/data.py") as caught:
        evaluate.questions(CONCEPTS | change, 4)
    assert "\n" not in str(caught.value)


class LosslessVAE(torch.nn.Module):
    """Stands for a VAE that keeps everything."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, pixels):
        return SimpleNamespace(mean=pixels)

    def decode(self, latents):
        return latents


def test_evaluate_writes_rows_table_and_sheet(monkeypatch, tmp_path):
    """A model that paints the right picture when guided, and only the background when not."""
    asked = evaluate.questions(CONCEPTS, 70)
    real = evaluate.real_pictures(asked, SHAPES, CONCEPTS, 0)
    calls = []

    def paint(sd, prompts, *, seed, guidance, steps, sampler):
        calls.append((len(prompts), seed, guidance))
        assert prompts == [question.prompt for question in asked[seed : seed + len(prompts)]]
        grounds = [Image.new("RGB", (64, 64), drawing.BACKGROUNDS[q.background]) for q in asked]
        return (real if guidance > 1 else grounds)[seed : seed + len(prompts)]

    monkeypatch.setattr(evaluate, "draw_all", lambda concepts, font: SHAPES)
    monkeypatch.setattr(drawing, "font_identity", lambda font: {"file": "none", "sha256": "0"})
    monkeypatch.setattr(generate, "text_to_image", paint, raising=False)
    monkeypatch.setattr(generate, "final", lambda events: events, raising=False)
    model = SimpleNamespace(vae=LosslessVAE(), variant=SimpleNamespace(guidance=3.0, size=64, sampler="ddim"))
    told = []
    result = evaluate.evaluate(model, CONCEPTS, prompts=70, out=tmp_path, progress=lambda *news: told.append(news))
    rows = result["rows"]
    assert list(rows) == [
        "real pictures",
        "real pictures through the VAE",
        "generated, no guidance",
        "generated, guidance 3",
    ]
    assert rows["real pictures"] == rows["real pictures through the VAE"] == rows["generated, guidance 3"]
    assert rows["real pictures"]["heldout"]["background"] == rows["generated, no guidance"]["seen"]["background"] == 1
    assert rows["generated, no guidance"]["seen"]["top1"] < 0.5 < rows["real pictures"]["seen"]["top1"]
    assert calls == [(32, 0, 0.0), (32, 32, 0.0), (6, 64, 0.0), (32, 0, 3.0), (32, 32, 3.0), (6, 64, 3.0)]
    assert told[-1] == ("generated, guidance 3", 70, 70)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    text = (tmp_path / "scores.txt").read_text()
    assert text == evaluate.score_table(result) and "| real pictures | 100.0 / 100.0 |" in text
    assert "may differ" not in text and "may differ" in evaluate.score_table(result | {"same_font": False})
    assert Image.open(tmp_path / "contact-sheet.png").size == (8 * 140, 8 * 176)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact-sheet.png", "scores.json", "scores.txt"]
    assert [one["prompt"] for one in result["answers"]] == [question.prompt for question in asked]
    assert all(one["right"] and "shown" not in one for one in result["answers"])
    assert "| - | - |" not in text and "| - | - |" in evaluate.score_table(result | {"prompts": 55})

    calls.clear()  # with CFG++ guidance 1 is not off
    several = evaluate.evaluate(model, CONCEPTS, prompts=4, sampler="euler_cfg_pp", guidance=1.0, about={"model": "m"})
    assert list(several["rows"])[2:] == ["generated, no guidance", "generated, guidance 1"] and several["model"] == "m"
    assert [scale for _, _, scale in calls] == [0.0, 1.0]
    assert several["answers"][0]["shown"].endswith(f", {asked[0].background}")

    def full(content, path):
        if path.suffix == ".png":
            raise OSError("no space left on device")
        return write_file(content, path)

    write_file = evaluate.write_file
    monkeypatch.setattr(evaluate, "write_file", full)
    with pytest.raises(OSError, match="no space"):
        evaluate.evaluate(model, CONCEPTS, prompts=4, out=tmp_path / "full")
    kept = ["scores.json", "scores.txt"]
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == kept


def test_evaluate_refuses_one_prompt_and_an_unwritable_place(tmp_path):
    with pytest.raises(UserError, match="prompts is 1"):
        evaluate.evaluate(SimpleNamespace(), CONCEPTS, prompts=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        evaluate.write_file("text", tmp_path / "file" / "scores.txt")


def test_missing_and_wrong_font_are_one_line_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="no emoji font at .*fonts-noto-color-emoji"):
        drawing.open_font(tmp_path / "none.ttf")
    (tmp_path / "text.ttf").write_text("not a font")
    with pytest.raises(UserError, match="is not the bitmap Noto Color Emoji font"):
        drawing.open_font(tmp_path / "text.ttf")


# ---- with the font ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen():
    pytest.importorskip("emoji", reason="the emoji package gives the names")
    return drawing.choose(drawing.open_font(), 400)


@needs_font
def test_chosen_set_has_what_people_ask_for_and_leaves_the_rest_out(chosen):
    names = [concept.name for concept in chosen]
    assert len(set(names)) == len({concept.character for concept in chosen}) == 400
    assert {"red apple", "green apple", "dog", "cat", "pizza", "rocket", "rose", "ghost"} <= set(names)
    for name in names:
        assert len(name.split(" ")) <= 3 and name == name.lower() and ":" not in name and "_" not in name
        assert not {"button", "flag", "arrow", "o'clock", "moon", "aries"} & set(name.split(" "))
    thumbnails = [
        drawing.thumbnail_of(drawing.draw_glyph(drawing.open_font(), concept.character)) for concept in chosen[::8]
    ]
    nearest = min(drawing.distance(a, b) for i, a in enumerate(thumbnails) for b in thumbnails[:i])
    assert nearest >= drawing.DUPLICATE_DISTANCE


@needs_font
def test_choose_refuses_more_than_there_are(monkeypatch):
    pytest.importorskip("emoji", reason="the emoji package gives the names")
    monkeypatch.setattr(drawing, "GROUPS", (("fruit", 1.0, "1f347-1f353"),))
    with pytest.raises(UserError, match="asked for 14 emoji, the rule finds 13 "):
        drawing.choose(drawing.open_font(), 14)


@needs_font
@pytest.mark.parametrize("count", [40, pytest.param(512, marks=pytest.mark.full)])
def test_scorer_knows_real_pictures_among_400(chosen, count):
    seen, held = drawing.split_pairs(len(chosen), len(drawing.BACKGROUNDS))
    names = list(drawing.BACKGROUNDS)
    concepts = CONCEPTS | {
        "concepts": [{"name": c.name, "character": c.character} for c in chosen],
        "size": 128,
        "heldout": [[chosen[i].name, names[j]] for i, j in held],
    }
    glyphs = evaluate.draw_all(concepts, None)
    scorer, asked = Scorer(glyphs, drawing.BACKGROUNDS, 128), evaluate.questions(concepts, count)
    scores = [scorer(picture) for picture in evaluate.real_pictures(asked, glyphs, concepts, 0)]
    assert sum(q.background == s.background for q, s in zip(asked, scores, strict=True)) == count
    assert sum(q.concept == s.objects[0] for q, s in zip(asked, scores, strict=True)) >= 0.99 * count


@needs_font
def test_recipe_writes_the_folder_twice_the_same(tmp_path):
    pytest.importorskip("emoji", reason="the emoji package gives the names")
    options = ["--count", "30", "--heldout-count", "5", "--emoji", "20", "--size", "64", "--workers", "2"]
    for name in ("one", "two"):
        done = subprocess.run([sys.executable, RECIPE, tmp_path / name, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 30 + 5 + 2 + 4 + 1
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    lines = [json.loads(line) for line in (one / "metadata.jsonl").read_text().splitlines()]
    described = json.loads((one / "concepts.json").read_text())
    held = {tuple(pair) for pair in described["heldout"]}
    assert len(lines) == 30 and not held & {(line["concept"], line["background"]) for line in lines}
    outside = [json.loads(line) for line in (one / "heldout" / "metadata.jsonl").read_text().splitlines()]
    assert {(line["concept"], line["background"]) for line in outside} <= held
    for line in lines:
        picture = Image.open(one / line["file_name"])
        assert picture.mode == "RGB" and picture.size == (64, 64)
        assert nearest_name(border_colour(np.asarray(picture) / 255), drawing.BACKGROUNDS) == line["background"]
        assert line["concept"] in line["text"][0] and line["background"] in line["text"][0]
    check_tokenizer(one / "tokenizer", [text for line in lines for text in line["text"]])


def test_recipe_breaks_ties_between_merges_the_same_way_each_time():
    merges = runpy.run_path(str(RECIPE))["train_merges"]
    captions = ["ox fox box", "taco on a cyan background", "a pie, a pear", "yarn zebra quince", "kiwi lemon"]
    assert all(merges(captions, 600) == merges(captions, 600) for _ in range(5))


def check_tokenizer(folder: Path, captions: list[str]) -> None:
    """transformers reads it, and every text comes back from its ids."""
    tokenizer = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))) and len(vocabulary) <= 2000
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"] and list(vocabulary)[256] == "!</w>"
    for text in [*captions[:40], "piñata", "日本語 \U0001f600", "\x01 ~`"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == vocabulary["<|startoftext|>"] and ids[-1] == vocabulary["<|endoftext|>"]
        assert all(0 <= i < len(vocabulary) - 2 for i in ids[1:-1])
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    whole = tokenizer("a red background")["input_ids"]
    assert len(whole) == 5  # the common words are one token each


def test_recipe_says_what_is_missing(tmp_path, capsys):
    main = runpy.run_path(str(RECIPE))["main"]
    assert main([str(tmp_path / "out"), "--font", str(tmp_path / "none.ttf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "fonts-noto-color-emoji" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--heldout-share", "1"], "--heldout-share 1 is out of range; give a share from 0 up to below 1"),
        (["--heldout-share", "nan"], "--heldout-share nan is out of range"),
        (["--count", "-3"], "--count -3 is out of range; give 1 or more"),
        (["--workers", "0"], "--workers 0 is out of range"),
        (["--size", "8"], "--size 8 is out of range; give 16 or more"),
        (["--set", "--names", "missing.txt"], "cannot read --names missing.txt"),
        (["--set", "--heldout-share", "0"], "the set has no held-out pairs of emoji and colour"),
    ],
)
@needs_font
def test_recipe_refuses_numbers_out_of_range_before_it_writes(tmp_path, capsys, flags, said):
    pytest.importorskip("emoji", reason="the emoji package gives the names")
    main = runpy.run_path(str(RECIPE))["main"]
    assert main([str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not (tmp_path / "out").exists()
