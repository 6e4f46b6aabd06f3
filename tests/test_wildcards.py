"""Choices and wildcards in prompts, beside what the dynamicprompts library makes of them."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plainsd.errors import UserError
from plainsd.pictures.images import read_settings
from plainsd.text import wildcard_files
from plainsd.text.prompts import Weighted, parse
from plainsd.text.styles import read_styles, styled, without_style_loras
from plainsd.text.wildcard_files import Wildcards
from plainsd.text.wildcards import MOST_COMBINATIONS, combinations, has_choices, settled, template_of

# what CombinatorialPromptGenerator of dynamicprompts 0.31.0 makes of them
KNOWN = {
    "{a|b} {c|d}": ["a c", "a d", "b c", "b d"],
    "{2$$a|b|c}": ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"],
    "{1-2$$a|b|c}": ["a", "b", "c", "a,b", "a,c", "b,a", "b,c", "c,a", "c,b"],
    "{2$$ and $$a|b|c}": ["a and b", "a and c", "b and a", "b and c", "c and a", "c and b"],
    "{0.5::a|2::b}": ["a", "b"],
    "{a|{b|c}}": ["a", "b", "c"],
    "{a|}x": ["ax", "x"],
    "{-2$$a|b}": ["a", "b", "a,b", "b,a"],
    "{a}": ["a"],
    "{3$$a|b}": ["a,b", "b,a"],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "colours.txt").write_text("red\n\n# no colour\n  blue  \n", encoding="utf-8")
    (tmp_path / "clothes").mkdir()
    (tmp_path / "clothes" / "hats.txt").write_text("a {tall|flat} hat\n", encoding="utf-8")
    (tmp_path / "clothes" / "coats.txt").write_text("\ufeffa __colours__ coat\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("prompt", KNOWN)
def test_combinations_are_those_of_dynamicprompts(prompt):
    assert combinations(prompt) == KNOWN[prompt]
    assert {settled(prompt, seed) for seed in range(200)} == set(KNOWN[prompt])
    assert has_choices(prompt)


def test_wildcards_are_lines_of_files(folder):
    assert combinations("a __colours__ car", folder) == ["a red car", "a blue car"]
    hats = ["a tall hat", "a flat hat"]
    assert combinations("__clothes/*__", folder) == ["a red coat", "a blue coat", *hats]
    assert combinations("__clothes/hats__, __~colours__", folder)[:2] == ["a tall hat, red", "a tall hat, blue"]
    assert {settled("__clothes/hats__", seed, folder) for seed in range(50)} == set(hats)
    assert combinations("{__colours__|green}", folder) == ["red", "blue", "green"]


def test_the_seed_settles_the_prompt(folder):
    prompt = "{a|b|c|d} {e|f|g|h} __colours__"
    assert len({settled(prompt, 7, folder) for _ in range(5)}) == 1
    assert len({settled(prompt, seed, folder) for seed in range(40)}) > 20


def test_weights_are_chances():
    count = Counter(settled("{3::a|b|0::c}", seed) for seed in range(4000))
    assert count["c"] == 0 and 0.70 < count["a"] / 4000 < 0.80
    pairs = Counter(settled("{2$$10::a|b|c}", seed).count("a") for seed in range(1000))
    assert pairs[1] / 1000 > 0.95  # 1 - 2/12 * 1/11


@pytest.mark.parametrize(("prompt", "becomes"), [
    ("{0::a|b}", {"b"}), ("{2$$0::a|b|c}", {"b,c", "c,b"}), ("{3$$0::a|b}", {"b"}), ("{0-2$$0::a|b}", {"", "b"}),
    ("{1000000000::a|1000000000::b}", {"a", "b"}), ("{." + "0" * 400 + "1::a|b}", {"b"}),
])  # fmt: skip
def test_an_option_of_weight_0_is_none(prompt, becomes):
    assert {*combinations(prompt)} == {settled(prompt, seed) for seed in range(50)} == becomes


def test_signs_stand_for_themselves():
    prompt = r"a \{smile\} [b|c] \| __ _x_ a__b (d:1.2)"
    assert not has_choices(prompt) and settled(prompt, 0) == prompt and combinations(prompt) == [prompt]
    assert parse(r"\{a\} \| \(b\)") == [Weighted("{a} | (b)")]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a {b|c", "'{' without its partner near 'a {b|c'"),
        ("a} b", r"'}' without its partner near 'a} b' in the prompt; write \}"),
        ("{2-1$$a|b}", "asks for 2 to 1 of its options"),
        ("{@a|b}", "leave '@' out"),
        ("__colors__", "__colors__ is a wildcard, and there is no folder"),
        ("{" * 30 + "}" * 30, "choices are more than 20 deep"),
        ("{" + "9" * 400 + "::a|b}", "the weight inf of an option is out of bounds; choose 0 to 1e+09"),
        ("{a|1e308::b|2000000000::c}", "the weight 2e+09 of an option is out of bounds"),
        ("{0::a|0.0::b}", "every option of a choice has weight 0"),
        ("{a|b|c|d|e|f|g|h|i|j}" * 5, f"more than {MOST_COMBINATIONS} combinations"),
    ],
)
def test_what_cannot_be_read_is_one_line(prompt, says):
    with pytest.raises(UserError) as caught:
        combinations(prompt)
    assert says in str(caught.value) and caught.value.field == "prompt" and "\n" not in str(caught.value)


def test_what_the_folder_lacks_is_one_line(folder):
    (folder / "loop.txt").write_text("a __loop__\n", encoding="utf-8")
    (folder / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, says in (
        ("colors", "did you mean 'colours'"),
        ("../colours", "unknown wildcard '../colours'"),
        ("loop", "is one of them in its own lines?"),
        ("empty", "has no lines; write a choice a line into empty.txt"),
        ("latin", "latin.txt is not UTF-8"),
    ):
        for make in (lambda prompt: settled(prompt, 0, folder), lambda prompt: combinations(prompt, folder)):
            with pytest.raises(UserError, match=None) as caught:
                make(f"__{name}__")
            assert says in str(caught.value)


def test_weights_in_a_file_are_checked_too(folder):
    (folder / "heavy.txt").write_text("{" + "9" * 400 + "::a|b}\n", encoding="utf-8")
    for make in (lambda: settled("__heavy__", 1, folder), lambda: combinations("__heavy__", folder)):
        with pytest.raises(UserError, match="the weight inf of an option is out of bounds"):
            make()


def test_a_file_is_read_once_for_all_prompts_of_a_request(folder, monkeypatch):
    read, original = [], wildcard_files.content_of_wildcard
    monkeypatch.setattr(wildcard_files, "content_of_wildcard", lambda path: (read.append(path.name), original(path))[1])
    shared, prompt = Wildcards(folder), "__colours__ __colours__ __clothes/*__"
    made = [settled(prompt, seed, shared) for seed in range(9)]
    assert sorted(read) == ["coats.txt", "colours.txt", "hats.txt"]
    assert made == [settled(prompt, seed, folder) for seed in range(9)] and len({*made}) > 3


@pytest.mark.parametrize("prompt", [
    "__long__" * 12, "__wide__", "{99$$" + " " * 9000 + "$$" + "a|" * 2000 + "}" , "{999$$" + "|" * 3000 + "}",
    "__branch__",
])  # fmt: skip
def test_choices_and_wildcards_have_a_budget(folder, prompt, monkeypatch):
    """Lines, files, joined options, draws of options, and lines that name each other."""
    monkeypatch.setattr(wildcard_files, "WILDCARD_WORK", 100_000)
    (folder / "long.txt").write_text("a " * 5000, encoding="utf-8")
    (folder / "wide.txt").write_text("a\n" * 60_000, encoding="utf-8")
    (folder / "branch.txt").write_text("__leaf__ " * 3000, encoding="utf-8")
    (folder / "leaf.txt").write_text("{a|b}" * 10, encoding="utf-8")
    with pytest.raises(UserError, match="take more than 100000 characters; use fewer or shorter ones") as caught:
        settled(prompt, 1, folder)
    assert caught.value.field == "prompt"
    shared = Wildcards(folder)
    with pytest.raises(UserError, match="take more than"):  # together, where one alone may
        for seed in range(9):
            settled("__long__" * 2, seed, shared)
    assert settled("__long__" * 2, 1, folder)


def test_a_wildcard_that_cannot_be_read_is_one_line(folder, monkeypatch):
    def refused(path, **more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UserError, match=r"^cannot read colours.txt \(Permission denied\); make it readable"):
        settled("__colours__", 1, folder)
    with pytest.raises(UserError, match="unknown wildcard"):
        settled("__" + "\u00e9" * 200 + "__", 1, folder)  # longer than a file's name can be


@given(st.text(alphabet="ab{}|$_:2\\ ", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        template_of(text)
        assert settled(text, 1) in {*combinations(text)} or "$$" in text
    except UserError as error:
        assert "\n" not in str(error).replace(repr(text), "")


# --- styles, and the command line ------------------------------------------------------------------------------------


@pytest.fixture
def styles(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text('name,prompt,negative_prompt\nink,"{prompt}, ink drawing",colour\nsoft,soft light,\n,,\n', "utf-8")
    return path


def test_styles_lie_around_the_prompt(styles):
    found = read_styles(styles)
    assert list(found) == ["ink", "soft"]
    assert styled("a cat ", "bad", ["soft", "ink"], found) == ("a cat, soft light, ink drawing", "bad, colour")
    assert styled("", "", ["soft"], found) == ("soft light", "")
    with pytest.raises(UserError, match="unknown style 'inc'; did you mean 'ink'"):
        styled("a", "", ["inc"], found)


@pytest.mark.parametrize("text", [
    'name, prompt, negative_prompt\nfoo, "a, b", "c, d"\n#off, x, y\n',
    'name,text,negative_prompt\nfoo,"a, b","c, d"\n',
])  # fmt: skip
def test_styles_are_read_as_a1111_reads_them(tmp_path, text):
    """Blanks after commas, the first name of the column, comments."""
    (tmp_path / "a.csv").write_text(text, "utf-8")
    assert read_styles(tmp_path / "a.csv") == {"foo": ("a, b", "c, d")}


def test_bad_files_of_styles_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("what,ever\n1,2\n", "utf-8")
    (tmp_path / "b.csv").write_bytes(b"name,prompt\n\xff,x\n")
    for path, says in (("a.csv", "should read name,prompt"), ("b.csv", "save it as CSV"), ("c.csv", "cannot read")):
        with pytest.raises(UserError, match=says):
            read_styles(tmp_path / path)


def test_the_command_line_settles_each_picture(generate, tmp_path, folder, styles):
    steps = ("--steps", 1, "--wildcards", folder)
    assert generate("a __colours__ {car|cat}", *steps, "--count", 3, "--seed", 4)[0] == 0
    made = [read_settings(path).prompt for path in sorted((tmp_path / "out").glob("*.png"))]
    assert made == [settled("a __colours__ {car|cat}", seed, folder) for seed in (4, 5, 6)]
    assert generate("{a|b} {c|d}", "--combinations", *steps, "--style", "ink", "--styles", styles)[0] == 0
    every = [read_settings(path) for path in sorted((tmp_path / "out").glob("*.png"))[3:]]
    assert [one.prompt for one in every] == [f"{text}, ink drawing" for text in ("a c", "a d", "b c", "b d")]
    assert {one.negative for one in every} == {"colour"} and [one.seed for one in every] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "flags", [("--like", "comfyui"), ("--noise", "comfyui"), ("--variation-seed", 9, "--variation-strength", 0.5)]
)
def test_the_seed_settles_it_where_another_number_is_counted(generate, tmp_path, flags):
    prompt = "{a|b|c|d|e|f|g|h} {a|b|c|d|e|f|g|h}"
    for seed in (4, 5):
        out = tmp_path / f"{seed}"
        assert generate(prompt, "--steps", 1, "--seed", seed, "--count", 2, "--out", out, *flags)[0] == 0
        made = [read_settings(path).prompt for path in out.glob("*.png")]
        assert made == [settled(prompt, seed)] * 2
    assert settled(prompt, 4) != settled(prompt, 5) != settled(prompt, 9)


def test_a_picture_of_a_settled_prompt_comes_back(generate, tmp_path):
    assert generate(r"\{a\} {b|c}", "--steps", 1)[0] == 0
    (first,) = (tmp_path / "out").glob("*.png")
    assert read_settings(first).prompt in (r"\{a\} b", r"\{a\} c")
    assert generate("--from", first)[0] == 0
    (again,) = {*(tmp_path / "out").glob("*.png")} - {first}
    assert again.read_bytes() == first.read_bytes()


def test_the_command_line_settles_each_text_of_each_picture(generate, tmp_path):
    texts = dict.fromkeys(("negative", "hires_prompt", "hires_negative"), "{red|blue|green} {car|cat}")
    flags = [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]
    assert generate("x", *flags, "--steps", 2, "--hires", 1.5, "--count", 4, "--seed", 4)[0] == 0
    made = [read_settings(path) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len({one.negative for one in made}) > 1
    for one in made:
        assert {getattr(one, name) for name in texts} == {settled(texts["negative"], one.seed)}
    assert generate("x", *flags, "--steps", 2, "--hires", 1.5, "--seed", 6)[0] == 0
    assert read_settings(max((tmp_path / "out").glob("*.png"))).negative == made[2].negative


def test_styles_lie_around_the_texts_of_the_second_pass(generate, tmp_path, styles):
    flags = ("--style", "ink", "--styles", styles, "--steps", 2, "--hires", 1.5)
    assert generate("a cat", *flags, "--hires-prompt", "a dog", "--hires-negative", "bad")[0] == 0
    (path,) = (tmp_path / "out").glob("*.png")
    one = read_settings(path)
    assert (one.hires_prompt, one.hires_negative) == ("a dog, ink drawing", "bad, colour")
    assert generate("a cat", *flags)[0] == 0
    one = read_settings(max((tmp_path / "out").glob("*.png")))
    assert (one.hires_prompt, one.hires_negative) == (None, None)  # those of the first pass, which have it
    assert without_style_loras("a dog <lora:ink:1>", "a dog") == "a dog "
    assert without_style_loras("a <lora:a:1> dog <lora:ink:1>", "a <lora:a:1> dog") == "a <lora:a:1> dog <lora:ink:1>"


def test_choices_in_a_style_are_made_around_the_texts_of_a_picture(generate, tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text('name,prompt,negative_prompt\nink,"{prompt}, {red|blue} ink",{pale|dull}\n', "utf-8")
    assert generate(r"\{a|b\}", "--steps", 1, "--negative", "c")[0] == 0
    (first,) = (tmp_path / "out").glob("*.png")
    assert generate("--from", first, "--style", "ink", "--styles", path, "--seed", 5)[0] == 0
    one = read_settings(max((tmp_path / "out").glob("*.png")))
    assert one.prompt in (rf"\{{a|b\}}, {colour} ink" for colour in ("red", "blue"))
    assert one.negative in ("c, pale", "c, dull")


def test_the_command_line_says_what_is_missing(generate):
    for arguments, says in (
        (("a __colours__",), "give one with --wildcards"),
        (("a", "--wildcards", "nowhere"), "--wildcards 'nowhere': no such folder"),
        (("a", "--style", "ink"), "cannot read styles.csv"),
        (("{a|b}", "--combinations", "--grid", "steps=1,2"), "a single prompt"),
    ):
        code, _, err = generate(*arguments)
        assert code == 2 and says in err
