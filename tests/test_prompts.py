"""The prompt notation. The expected values are A1111's own documented examples and results of its parser."""

import pytest
from hypothesis import given, settings, strategies

from plainsd.errors import UserError
from plainsd.text.prompts import (
    BREAK,
    CONCAT,
    DEEPEST_BRACKET,
    LoraTag,
    Weighted,
    alternates,
    compose,
    escape,
    parse,
    parse_words,
    schedule,
    tagged_loras,
)

MARKS = [*"ab 1.5:,()[]|\\\n", " BREAK ", ":1.2)", ":0.5]"]
PROMPTS = strategies.lists(strategies.sampled_from(MARKS), max_size=40).map("".join)


def pairs(prompt):
    return ["BREAK" if piece is BREAK else (piece.text, pytest.approx(piece.weight)) for piece in parse(prompt)]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((a)) [b] (c:1.3)", [("a", 1.21), (" ", 1), ("b", 1 / 1.1), (" ", 1), ("c", 1.3)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [unbalanced", [("a ", 1), ("unbalanced", 1 / 1.1)]),
        ("unbalanced) and]", [("unbalanced) and]", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"\\(a\\)", [("\\", 1), ("a\\", 1.1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("(a:-0.5)(b:+2)(c:.5)(d: 1.5 )", [("a", -0.5), ("b", 2), ("c", 0.5), ("d", 1.5)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("ratio 16:9, a:1.2)", [("ratio 16:9, a:1.2)", 1)]),
        ("a\\b :\\", [("a\\b :\\", 1)]),
        ("a BREAK b", [("a", 1), "BREAK", ("b", 1)]),
        ("(a BREAK b:1.3)", [("a", 1.3), "BREAK", ("b", 1.3)]),
        ("BREAK BREAK a", ["BREAK", "BREAK", ("a", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
    ],
)
def test_weights(prompt, expected):
    assert pairs(prompt) == expected


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b::0.5] c", [(5, "a b c"), (10, "a  c")]),
        ("a [:b:0.5] c", [(5, "a  c"), (10, "a b c")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:0.29]", [(2, "a"), (10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("a [b:c] (d:e:f)", [(10, "a [b:c] (d:e:f)")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        (r"\[a:b:5\] [c:d:5]", [(5, r"\[a:b:5\] c"), (10, r"\[a:b:5\] d")]),
        ("[x:[a:b]:3]", [(10, "[x:[a:b]:3]")]),
        ("a | b [c:d:5]", [(5, "a | b c"), (10, "a | b d")]),
    ],
)
def test_editing(prompt, expected):
    assert schedule(prompt, 10) == expected


def test_alternation():
    assert schedule("[a|(b:1.1)]", 4) == [(1, "a"), (2, "(b:1.1)"), (3, "a"), (4, "(b:1.1)")]
    assert schedule("[fe|]male", 3) == [(1, "female"), (2, "male"), (3, "female")]
    assert schedule("[fe|||]male", 6) == [(1, "female"), (4, "male"), (5, "female"), (6, "male")]
    assert schedule("[a|[b:c:3]]", 4) == [(1, "a"), (2, "b"), (3, "a"), (4, "c")]
    assert schedule("[[a|b]:3]", 5) == [(3, ""), (4, "b"), (5, "a")]


def test_second_pass_counts_on_from_the_first():
    assert schedule("a [b:.5] c", 10, first_pass=10) == [(10, "a b c")]
    assert schedule("a [b:1.5] c", 10, first_pass=10) == [(5, "a  c"), (10, "a b c")]
    assert schedule("[a:b:12]", 6, first_pass=10) == [(2, "a"), (6, "b")]


@pytest.mark.parametrize("opened, closed", [("(", ""), ("[", ""), ("(", ")"), ("[", "]"), ("[", ":0.5]"), ("[", "|b]")])
def test_nesting_has_an_end(opened, closed):
    """A1111 and ComfyUI have none, and take minutes for long prompts of brackets, or fail."""
    for reader in (parse, parse_words, alternates, lambda text: schedule(text, 3)):
        reader(opened * DEEPEST_BRACKET + "a" + closed * DEEPEST_BRACKET)
    for reader in (parse, alternates, lambda text: schedule(text, 3)):
        with pytest.raises(UserError, match="more than 64 brackets inside each other"):
            reader(opened * 5000 + "a" + closed * 5000)
    with pytest.raises(UserError, match="more than 64 brackets inside each other"):
        parse_words("(" * 65 + "a" + ")" * 65)


@pytest.mark.parametrize("number", ["9" * 400, "10000", "-99999"])
def test_infinite_weights_are_refused(number):
    for reader, prompt in ((compose, f"a AND b:{number}"), (tagged_loras, f"<lora:x:{number}>")):
        with pytest.raises(UserError, match="out of bounds") as error:
            reader(prompt)
        assert error.value.field == "prompt" and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a cat", [("a cat", 1)]),
        ("a cat :2", [("a cat :2", 1)]),
        ("a cat AND a dog", [("a cat", 1), ("a dog", 1)]),
        ("a cat :1.2 AND a dog AND a penguin :2.2", [("a cat", 1.2), ("a dog", 1), ("a penguin", 2.2)]),
        ("a (cat:1.2) AND [b:c:.5]:-.5", [("a (cat:1.2)", 1), ("[b:c:.5]", -0.5)]),
        ("a\ncat:2\nAND b", [("a\ncat", 2), ("b", 1)]),
        ("SAND ANDES and", [("SAND ANDES and", 1)]),
        ("AND a", [("", 1), ("a", 1)]),
    ],
)
def test_composition(prompt, expected):
    assert compose(prompt) == expected


def test_lora_tags():
    prompt, loras = tagged_loras("a cat <lora:my style-v1.2:0.8>, <lora:b> dog<lyco:c:-1><other:d:1>")
    assert prompt == "a cat ,  dog<other:d:1>"
    assert loras == [("my style-v1.2", 0.8, 0.8), ("b", 1.0, 1.0), ("c", -1.0, -1.0)]
    assert tagged_loras("<lora:x:1") == ("<lora:x:1", [])


@pytest.mark.parametrize(
    "tag, strength, text_strength",  # A1111's order is the text encoders, then the UNet
    [
        ("<lora:a:0.5>", 0.5, 0.5),
        ("<lora:a:0.5:0.8>", 0.8, 0.5),
        ("<lora:a:te=0.5:unet=0.8>", 0.8, 0.5),
        ("<lora:a: unet = -1 >", -1, 1),
        ("<lora:a:te=0.5>", 0.5, 0.5),
        ("<lora:a:0:unet=.8>", 0.8, 0),
        ("<lora:a:unet=1e-05:0.5>", 1e-05, 0.5),
    ],
)
def test_two_strengths_of_a_lora(tag, strength, text_strength):
    found = tagged_loras(f"a {tag}b")
    assert found == ("a b", [("a", strength, text_strength)])
    assert tagged_loras(f"a {found[1][0]}b") == found
    assert strength != text_strength or str(found[1][0]) == f"<lora:a:{strength}>"


def test_a_tag_as_it_is_written():
    assert [str(LoraTag("ink", *both)) for both in ((1, 1), (0.1, 0.1), (0.8, 0), (-1, 0.25))] == [
        "<lora:ink:1>", "<lora:ink:0.1>", "<lora:ink:0:0.8>", "<lora:ink:0.25:-1>"]  # fmt: skip


@pytest.mark.parametrize(
    "tag",
    ["<lora::1>", "<lora:a:strong>", "<lora:a:1:0.5:4>", "<lora:>", "<hypernet:a:1>", "<lora:a:1:dyn=4>", "<lora:a:>",
     "<lora:a:0.5:lbw=MIDD>", "<lora:a:0.5:te=0.3>", "<lora:a:te=x>"],
)  # fmt: skip
def test_tags_that_cannot_be_followed(tag):
    with pytest.raises(UserError, match="lora|hypernet") as error:
        tagged_loras(f"a {tag} b")
    assert tag in str(error.value)


# --- ComfyUI's -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kitty", "kitty.pt", "sub/kitty.safetensors", "sub\\kitty.bin"])
def test_a_learned_word_is_called_by_its_file(name):
    assert parse_words(f"a embedding:{name}, b  c") == [
        Weighted("a"), Weighted("kitty", learned=True), Weighted(", b  c")]  # fmt: skip
    assert parse_words(f"(embedding:{name}:1.2)") == [Weighted("kitty", 1.2, learned=True)]
    assert parse_words(f"embedding:{name} embedding:v1.5") == [
        Weighted("kitty", learned=True), Weighted("v1.5", learned=True)]  # fmt: skip


def test_what_calls_no_learned_word():
    for text in ("an,embedding:kitty", "Embedding:kitty", "embedding", "embedding:", "embedding: ", "embedding:,"):
        assert not any(piece.learned for piece in parse_words(text))
    assert parse_words("embedding:") == [Weighted("")]


def test_texts_joined_by_their_encodings():
    joined = CONCAT.join(["a (boat:1.2)", "BREAK", "", "at  sea "])
    found = parse_words(joined)
    assert found == [
        Weighted("a "),
        Weighted("boat", 1.2),
        BREAK,
        Weighted("BREAK"),
        BREAK,
        BREAK,
        Weighted("at  sea "),
    ]
    assert [piece is BREAK for piece in found] == [False, False, True, False, True, True, False]
    assert parse_words("a(b<concat>c:2)") == [
        Weighted("a"),
        Weighted("(b"),
        BREAK,
        Weighted("c:2)"),
    ]  # none goes across
    assert parse_words("a BREAK b") == [Weighted("a BREAK b")]


@settings(derandomize=True)
@given(strategies.text())
def test_escaped_text_is_only_text(text):
    escaped = escape(text)
    assert parse(escaped) == [Weighted(text)]
    assert schedule(escaped, 5) == [(5, escaped)]


@settings(max_examples=300, derandomize=True)
@given(PROMPTS)
def test_no_word_is_lost(prompt):
    """Letters survive parsing, in order; a step's text is made of the prompt's own letters; spans cover all steps."""

    def letters(text):
        return [sign for sign in text.replace("BREAK", "") if sign in "ab,"]

    assert letters("".join(piece.text for piece in parse(prompt) if piece is not BREAK)) == letters(prompt)
    spans = schedule(prompt, 7)
    assert [last for last, _ in spans] == sorted({last for last, _ in spans}) and spans[-1][0] == 7
    assert all(set(letters(text)) <= set(letters(prompt)) for _, text in spans)
    if not any(sign in prompt for sign in ":|"):
        assert spans == [(7, prompt)]
