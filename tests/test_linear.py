"""Time in proportion to the length: of prompts, of settings as text, of workflows, whatever stands in them.

What is measured is this process's CPU time, for a text and for one eight times as long, the least of several tries.
What grows with the square takes 64 times as long, what grows with the length 8 times; the bound lies between, 2.5 times
for each doubling. Other programs on the machine do not count in CPU time, and slow a memory or a cache for both texts;
a try that is disturbed is repeated. Nothing is asked about how long anything takes.
"""

# ruff: noqa: E501
import gc
import json
import time
from itertools import permutations

import pytest

from plainsd.errors import UserError
from plainsd.pictures.plan import chunked_by_stretch
from plainsd.pictures.texts.a1111 import parse_settings
from plainsd.pictures.texts.comfyui import parse_workflow
from plainsd.pictures.texts.entries import entries, quote
from plainsd.text.prompts import Weighted, alternates, compose, parse, parse_words, schedule, tagged_loras
from plainsd.text.styles import Style, styled
from plainsd.text.tokenizer import CLIP, Tokenizer
from plainsd.text.wildcards import MOST_COMBINATIONS, combinations, settled

LAST = "Steps: 3, Sampler: Euler, Seed: 1"
KEYS = ("Size", "Hires resize", "Sampler", "Schedule type", "Lora hashes", "TI hashes", "Version", "ControlNet 0",
        "Image Prompt 0", "Outpaint", "CFG interval", "Eta", "Embeddings", "SDCPP", "Hires prompt")  # fmt: skip
READERS = {
    "compose": compose,
    "parse": parse,
    "parse_words": parse_words,
    "schedule": lambda text: schedule(text, 4),
    "alternates": alternates,
    "tagged_loras": tagged_loras,
    "settled": lambda text: settled(text, 1),
    "styled": lambda text: styled(text, text, ["a"], {"a": Style("{prompt} x {prompt}", text)}),
    "entries": entries,
    "the prompt of a settings text": lambda text: parse_settings(f"{text}\n{LAST}"),
    "a settings text's last line": lambda text: parse_settings(f"p\n{LAST}, {text}"),
    "each value": lambda text: [reading(parse_settings)(f"p\n{LAST}, {key}: {quote(text)}") for key in KEYS],
}
PARTS = [  # texts made of one part again and again, by what it is repeated
    "a", " ", "1", ",", ":", "(", ")", "[", "]", "|", "<", "{", "}", "_", "\\", '"', "\n", "\r", "\u0301", "\U0001f600",
    "a ", "(b", "b)", "(b:1.1)", "[a:b:5]", "[a|b]", "(a:1", ": ", ":1 ", "[a:(b]", "[a:(b:c]", "(:", "([a:b", "a:b:5]",
    " AND ", "a AND b:1 ", "BREAK ", "BREAK", "\\(", "<lora:", "<lora:a:1>", "{a|b}", "__a", "_a", "1::", " embedding:a",
    'ab:"', 'ab: "x"y, ', "ab: c,", "a-/ ", "Negative prompt: a\n",
]  # fmt: skip
AROUND = [  # one part of a long text, between others
    ("[a:b:", " ", "]"), ("[a:b:1", " ", "x]"), ("[a:b:", "1", ""), ("(a:", "1", ""), ("(a:", " ", "1"), (":", "1", " x"),
    ("a AND b", " ", "x"), ("a AND b", " ", ":1"), ("a AND b:", "1", "x"), (" ", " ", "BREA"), ("x BREAK", " ", "x"),
    ("[", "|", "]"), ("[", ":", "]"), ("<lora:a:", "1", "x>"), ("<lora:a:", " ", ">"), ("{", "|", "}"), ("{", " ", "a}"),
    ("{", "1", "}"), ("{1$$", "$", "}"), ("{99$$a", "|b", "}"), ("__", "a", ""), ('ab: "', "\\", ""), ("", " ", ":x"),
]  # fmt: skip
DEEP = [("(", ")"), ("[", "]"), ("(", ":1.1)"), ("[", ":b:5]"), ("[", "|b]"), ("[a:", ":5]"), ("[(", ")]")]


def reading(reader):
    """That refuses a text or reads it; anything else is an error of the test."""

    def run(text):
        try:
            reader(text)
        except UserError as error:
            assert len(str(error)) <= 300 and "\n" not in str(error)

    return run


def cpu_seconds(run, text, tries):
    least = float("inf")
    gc.disable()  # it looks at all objects of all tests
    for _ in range(tries):
        began = time.process_time()
        run(text)
        least = min(least, time.process_time() - began)
    gc.enable()
    return least


def grows_with_the_length(run, text_of, most=40_000, rounds=5):
    """Whether eight times the length takes at most 2.5^3 times as long, in any of some rounds. `most` characters: what
    takes no time even then is not measured."""
    length = 500
    while length < most and cpu_seconds(run, text_of(length), 1) < 0.002:
        length *= 2
    short, long = text_of(length), text_of(8 * length)
    for _ in range(rounds):
        one = cpu_seconds(run, short, 3)
        if one < 0.0005 or cpu_seconds(run, long, 2) <= 2.5**3 * one:
            return True
    return False


def texts():
    for part in PARTS:
        yield repr(part), lambda n, part=part: part * (n // len(part))
    for before, part, after in AROUND:
        yield f"{before}{part}..{after}", lambda n, b=before, p=part, a=after: b + p * (n // len(p)) + a
    for left, right in DEEP:
        block = left * 20 + "a" + right * 20
        yield f"{left}{left}..{right}{right}", lambda n, block=block: block * (n // len(block) + 1)


@pytest.mark.full
@pytest.mark.parametrize("name", READERS)
def test_reading_takes_time_in_proportion_to_the_length(name):
    run = reading(READERS[name])
    assert [what for what, text_of in texts() if not grows_with_the_length(run, text_of)] == []


SLOW = {  # what took longest before
    "parse": (parse, lambda n: " " * n), "parse of brackets": (parse, lambda n: "(b" * 60 + ")b" * n),
    "parse of digits": (parse, lambda n: ":" + "1" * n), "compose": (compose, lambda n: "a AND b" + " " * n + "x"),
    "schedule": (lambda text: schedule(text, 4), lambda n: "[" + "|" * n + "]"),
    "tagged_loras": (tagged_loras, lambda n: "<lora:a:" + "1" * n + "x>"),
    "settings": (parse_settings, lambda n: "a" * n + f"\n{LAST}, " + "b" * n + ": c"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_what_was_slow(name):
    reader, text_of = SLOW[name]
    assert grows_with_the_length(reading(reader), text_of, most=4000)


def test_the_measure_sees_a_square():
    def square(text):
        for at in range(0, len(text), 50):
            text[at:].count("a")

    assert grows_with_the_length(list, "a".__mul__)
    assert not grows_with_the_length(square, "ab".__mul__)


def workflow(**nodes):
    return json.dumps({name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()})


def sampler(latent):
    return ("KSampler", {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
                         "positive": ["text", 0], "latent_image": latent})  # fmt: skip


WORKFLOWS = {
    "many that save one chain": lambda n: workflow(
        text=("CLIPTextEncode", {"text": "a"}), k=sampler(["c0", 0]), c0=("EmptyLatentImage", {"width": 8, "height": 8}),
        **{f"c{i}": ("LatentBlend", {"samples": [f"c{i - 1}", 0] if i > 1 else ["k", 0]}) for i in range(1, n)},
        **{f"s{i}": ("SaveImage", {"images": [f"c{n - 1}", 0]}) for i in range(n)}),
    "many samplers": lambda n: workflow(
        text=("CLIPTextEncode", {"text": "a"}), **{f"k{i}": sampler([f"k{i - 1}", 0]) for i in range(n)}),
    "a text of one word": lambda n: workflow(text=("CLIPTextEncode", {"text": "embedding:" * (20 * n)}), k=sampler(None)),
    "an editor's node with many inputs": lambda n: json.dumps(
        {"nodes": [{"id": 1, "type": "x", "mode": 4, "inputs": [{"name": f"i{i}", "type": f"t{i}", "link": i}
                                                                 for i in range(n)],
                    "outputs": [{"type": f"t{i}"} for i in range(n)]},
                   {"id": 2, "type": "KSampler", "inputs": [{"name": f"o{i}", "link": n + i} for i in range(n)]}],
         "links": [[n + i, 1, i, 2, i, "x"] for i in range(n)]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_take_time_in_proportion_to_their_nodes(name):
    assert grows_with_the_length(reading(parse_workflow), lambda n: WORKFLOWS[name](n // 4), most=4000)


def test_tokens_take_time_in_proportion_to_the_length():
    tokenizer = Tokenizer.from_vocabulary(CLIP)
    for part in ("a", "a ", ",", "\u6f22", "\U0001f600", "a\u0301", "'s", "1"):
        run = lambda text: chunked_by_stretch(tokenizer, [Weighted(text)])  # noqa: E731
        assert grows_with_the_length(run, lambda n, part=part: part * n, most=4000)


@pytest.mark.parametrize("prompt", ["{a|b}" * 60, "{a|a}" * 60 + "{b|c}" * 60, "{40$$" + "|".join(map(str, range(60))) + "}",
                                    "{2$$" + "{a|b}" * 60 + "|c}"])  # fmt: skip
def test_combinations_without_end_are_refused(prompt):
    with pytest.raises(UserError, match=f"more than {MOST_COMBINATIONS} combinations"):
        combinations(prompt)
    assert len(combinations("{a|a}" * 60)) == 1 and settled(prompt, 1)


def test_combinations_keep_their_order():
    assert combinations("{2$$a|b|c}") == [",".join(two) for two in permutations("abc", 2)]


def test_styles_do_not_double_without_end():
    with pytest.raises(UserError, match="more than 1000000 characters"):
        styled("a" * 100, "", ["a"] * 60, {"a": Style("{prompt} {prompt}", "")})
