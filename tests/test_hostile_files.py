"""Files that ask for more than they hold: one line each, in little time and memory. All of them are made here."""

import json
import random
import re
import struct

import pytest
import torch
from conftest import tiny_sd
from hypothesis import example, given, settings, strategies

from plainsd.adapters.embeddings import read_vectors
from plainsd.adapters.patterns import BadPattern, Patterns
from plainsd.errors import UserError
from plainsd.files.tensorfile import open_pickle, open_safetensors
from plainsd.json_reader import MOST_VALUES, BadJSON, ValueCounter, check_values, parsed_json
from plainsd.text.tokenizer import Tokenizer

# --- JSON ------------------------------------------------------------------------------------------------------------

TOO_MUCH = {
    "depth": ("[" * 101 + "]" * 101, "100 deep"),
    "depth of tables": ('{"a":' * 101 + "1" + "}" * 101, "100 deep"),
    "depth beyond Python's": ("[" * 100_000, "100 deep"),
    "digits": ("[" + "1" * 41 + "]", "number of 41 digits"),
    "digits beyond Python's": ("9" * 5000, "number of 5000 digits"),
    "values": ("[" + "[]," * MOST_VALUES + "1]", "more than 1000000 values"),
    "length": (" " * (2**25 + 1), "33554433 characters"),
    "half a character": ('{"\\ud800": 1}', "half a character"),
    "no JSON": ("{", "Expecting property name"),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
@pytest.mark.parametrize("form", [str, str.encode])
def test_json_has_bounds(kind, form):
    text, why = TOO_MUCH[kind]
    with pytest.raises(BadJSON, match=why) as error:
        parsed_json(form(text))
    assert len(str(error.value)) <= 120


def test_what_is_within_the_bounds_is_read():
    for text in (
        "[" * 100 + "]" * 100,
        "[" + "1" * 40 + "]",
        '"\\ud83d\\ude00"',
        "[1e999, NaN]",
        '{"a": {"b": [null]}}',
    ):
        assert repr(parsed_json(text)) == repr(json.loads(text)) == repr(parsed_json(text.encode()))
    commas = json.dumps({"a": ',[{\\"' * MOST_VALUES})  # in a string they are no values
    assert parsed_json(commas) == json.loads(commas)
    with pytest.raises(BadJSON, match="utf-8"):
        parsed_json(b'"\xff"')


def test_a_string_that_never_ends_is_looked_through_once():
    from test_linear import grows_with_the_length

    for start in ('"', '"' + "a" * 9 + "\\"):
        assert grows_with_the_length(
            lambda text: refused(text, most=3), lambda length, start=start: "[[[[" + start + '\\"' * (length // 2)
        )


@given(
    strategies.lists(
        strategies.sampled_from(['"', "\\", ",", "[", "{", "a", '\\"', '"a",', "\\\\", '{"a": [']), max_size=60
    ),
    strategies.lists(strategies.integers(1, 9), min_size=1),
    strategies.integers(0, 40),
)
def test_a_text_in_pieces_holds_as_many_values_as_whole(parts, lengths, most):
    text, counter, at = "".join(parts).encode(), ValueCounter(most), 0
    try:
        for length in [*lengths, len(text)]:
            counter.add(text[at : at + length])
            at += length
        within = True
    except BadJSON as error:
        within = False
        assert f"more than {most} values" in str(error)
    try:
        check_values(text, most)
        assert within or text.count(b'"') > 2 * most + 2
    except BadJSON:
        assert not within


def test_a_text_of_many_strings_is_given_up():
    """Which are no values, as no JSON has them without signs between."""
    counter = ValueCounter(3)
    with pytest.raises(BadJSON, match="more than 3 values"):
        counter.add(b'""' * 9)
    ValueCounter(3).add(b'{"a": "b", "c": "d", "e": "f"}')


def refused(text: str, most: int) -> None:
    for form in (text, text.encode()):
        with pytest.raises(BadJSON, match="more than 3 values"):
            check_values(form, most)


# --- safetensors -----------------------------------------------------------------------------------------------------


def headed(path, header: str | dict, content: bytes = b"") -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content)


def entry(shape, begin=0, end=0, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "deep": '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "huge integers": '{"a": {"dtype": "F32", "shape": [' + "9" * 4000 + '], "data_offsets": [0, 4]}}',
    "long integers": {"a": entry([10**39], 0, 4)},
    "an impossible shape": {"a": entry([0, 2**40, 2**40])},
    "many sides": {"a": entry([1] * 100, 0, 4)},
    "a type that is none": {"a": entry([1], 0, 4, kind=["F32"])},
    "a long type": {"a": entry([1], 0, 4, kind="F" * 900_000)},
    "a long name": {"a" * 900_000: entry([3], 0, 4)},
    "a long name at a wrong place": {"a" * 900_000: entry([1], 4, 8)},
    "two many values": '{"a": [' + "[]," * MOST_VALUES + "1]}",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_ask_for_too_much(tmp_path, kind):
    headed(tmp_path / "a.safetensors", HEADERS[kind], bytes(4))
    with pytest.raises(UserError, match="is damaged") as error:
        open_safetensors(tmp_path / "a.safetensors")
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


# --- pickles ---------------------------------------------------------------------------------------------------------


def cycle(length: int) -> dict:
    first: dict = {}
    last = first
    for _ in range(length - 1):
        last["state_dict"] = last = {}
    last["state_dict"] = first
    return first


def looped_list() -> list:
    looped: list = [1]
    looped.append(looped)
    return looped


PICKLED = {
    "a dict that holds itself": (lambda: cycle(1), "holds no tensors by name"),
    "two that hold each other": (lambda: cycle(2), "holds no tensors by name"),
    "a list that holds itself": (looped_list, "holds no tensors by name"),
    "a sparse tensor": (lambda: {"a": torch.eye(3).to_sparse()}, "holds a sparse or nested tensor"),
    "compressed rows": (lambda: {"a": torch.eye(3).to_sparse_csr()}, "holds a sparse or nested tensor"),
    "a quantised tensor": (lambda: {"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, "quantised"),
    "a tensor without numbers": (lambda: {"a": torch.empty(3, device="meta")}, "without numbers"),
    "one number ten thousand million times": (lambda: {"a": torch.ones(1).expand(10**10)}, "more numbers than are"),
    "strides over one another": (lambda: {"a": torch.ones(10).as_strided((5, 5), (1, 1))}, "more numbers than are"),
    "deep inside": (lambda: {"a": torch.ones(1), "b": [({"c": torch.ones(1).expand(10**10)},)]}, "'b.0.0.c'"),
    "complex numbers": (lambda: {"a": torch.ones(2, dtype=torch.complex64)}, "the type torch.complex64"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of kinds that are new or old
@pytest.mark.parametrize("kind", PICKLED)
@pytest.mark.parametrize("old", [False, True])
def test_pickles_that_are_not_plain_numbers(tmp_path, kind, old):
    make, why = PICKLED[kind]
    torch.save(make(), tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match=why):
        open_pickle(tmp_path / "a.ckpt")


@pytest.mark.parametrize("old", [False, True])
def test_plain_views_are_read(tmp_path, old):
    whole = torch.arange(12.0)
    tensors = {"rows": whole.view(3, 4), "columns": whole.view(3, 4).t(), "some": whole[3:7], "none": torch.empty(0)}
    torch.save({"state_dict": {"state_dict": tensors}}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    found = open_pickle(tmp_path / "a.ckpt").tensors
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items()) and len(found) == 4


def zipped(path, kind: int = 0, claims: int | None = None) -> None:
    """A saved tensor, compressed by `kind`, or with a directory that claims `claims` bytes for its first record."""
    import zipfile

    torch.save({"a": torch.zeros(10_000)}, path)
    with zipfile.ZipFile(path) as old:
        records = {one.filename: old.read(one) for one in old.infolist()}
    with zipfile.ZipFile(path, "w", kind) as new:
        for name, content in records.items():
            new.writestr(name, content)
    if claims:
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02") + 20
        content[at : at + 8] = struct.pack("<II", claims, claims)
        path.write_bytes(content)


@pytest.mark.parametrize(("how", "why"), [({"kind": 8}, "compressed"), ({"claims": 2**31}, "claims records")])
def test_archives_that_grow(tmp_path, how, why):
    zipped(tmp_path / "a.ckpt", **how)
    with pytest.raises(UserError, match=why):
        open_pickle(tmp_path / "a.ckpt")


def test_an_embedding_is_checked_too(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(1, 1).expand(10**5, 10**5)}}, tmp_path / "e.pt")
    with pytest.raises(UserError, match="more numbers than are stored"):
        read_vectors(tmp_path / "e.pt")


# --- tokenizers ------------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "an id that is a text": {"vocab.json": '{"a": "1"}'},
    "an id below 0": {"vocab.json": '{"a": -1}'},
    "a huge id": {"vocab.json": '{"a": 4294967295}'},
    "an id that is true": {"vocab.json": '{"a": true}'},
    "a list": {"vocab.json": "[1]"},
    "a merge of three": {"merges.txt": "a b c" + "d" * 10_000},
    "a model that is a list": {"tokenizer.json": '{"model": [1]}'},
    "a vocabulary that is a list": {"tokenizer.json": '{"model": {"vocab": [1], "merges": []}}'},
    "merges that are numbers": {"tokenizer.json": '{"model": {"vocab": {}, "merges": [1, 2]}}'},
    "a merge that is a number": {"tokenizer.json": '{"model": {"vocab": {"a": 1}, "merges": [["a", 1]]}}'},
    "tokens that are numbers": {"tokenizer.json": '{"model": {"vocab": {}, "merges": []}, "added_tokens": [1]}'},
    "a token without a text": {"tokenizer_config.json": '{"bos_token": {"lstrip": true}}'},
    "a token that is a number": {"tokenizer_config.json": '{"bos_token": 3}'},
    "a flag that is a text": {"tokenizer_config.json": '{"bos_token": {"content": "a", "lstrip": "x"}}'},
    "a length that is a text": {"tokenizer_config.json": '{"model_max_length": "77"}'},
    "ids that are no numbers": {"tokenizer_config.json": '{"added_tokens_decoder": {"x": "y"}}'},
    "tokens in a list": {"tokenizer_config.json": '{"added_tokens_decoder": ["y"]}'},
    "roles that are numbers": {"special_tokens_map.json": '{"pad_token": [1]}'},
    "ids that are lists": {"added_tokens.json": '{"<a>": [1], "<b>": 2}'},
}


@pytest.fixture(scope="module")
def texts():
    return tiny_sd().tokenizers[0].to_texts()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_of_wrong_types(texts, kind):
    without = {"tokenizer_config.json"} if "special" in str(TOKENIZERS[kind]) or "added_tokens.json" in str(
        TOKENIZERS[kind]) else set()  # fmt: skip
    kept = {name: text for name, text in texts.items() if name not in without}
    with pytest.raises(UserError, match="the place") as error:
        Tokenizer.from_texts(kept | TOKENIZERS[kind], "the place")
    assert len(str(error.value)) <= 300


# --- patterns --------------------------------------------------------------------------------------------------------

NAMES = ["down_blocks.1.resnets.0.conv1", "mid_block.attentions.0.to_q", "to_q", "", "a.b", "ab.ab", "x" * 30]
ATOMS = ["a", "b", r"\.", ".", "[ab]", "[^a.]", r"\d", r"\w", "to_q"]
GROUPS = ["(a|b)", "(?:ab)", r"(\.\d+\.)", "(down|mid)_block"]
COUNTS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "{2,}", "{,2}"]


def some_pattern(chance: random.Random) -> str:
    if chance.random() < 0.2:
        name = chance.choice(["to_q", "resnets.0.conv1", r"resnets\.0\.conv1", "down_blocks.1", "a.b"])
        return chance.choice(["", "^"]) + name + chance.choice(["", "$"])
    found = "".join(
        chance.choice(GROUPS) + chance.choice(["", "?"])
        if chance.random() < 0.25
        else chance.choice(ATOMS) + chance.choice(COUNTS)
        for _ in range(chance.randint(1, 5))
    )
    found += f"|{chance.choice(ATOMS)}" if chance.random() < 0.3 else ""
    found = f"({found}){chance.choice(['', '?'])}" if chance.random() < 0.2 else found
    return chance.choice(["", "", "^"]) + found + chance.choice(["", "", "$"])


@settings(deadline=None, max_examples=300)
@given(strategies.integers(0, 2**32))
@example(0)
def test_patterns_fit_what_pythons_fit(seed):
    chance = random.Random(seed)
    pattern = some_pattern(chance)
    try:
        wanted = re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return
    for name in [*NAMES, "".join(chance.choice("ab.q1") for _ in range(8))]:
        assert Patterns().fits_end(pattern, name) == bool(wanted.match(name)), (pattern, name)


NO_PATTERNS = ["(", "a)", "[", "*", "a**", "(?=a)", r"\1", r"\Z", "a{300}", "a{2,1}", "^*", "[b-a]", "a" * 1001 + "+"]
REPEATED_GROUPS = ["(a*)*b", "(a|a)*b", "((a+)+)+b", "(.*a){15}b"]


@pytest.mark.parametrize("pattern", [*NO_PATTERNS, *REPEATED_GROUPS])
def test_what_is_no_pattern_here(pattern):
    with pytest.raises(BadPattern):
        Patterns().fits_end(pattern, "a")


@pytest.mark.parametrize("pattern", ["a?" * 40 + "b", "(a|a)" * 40 + "b", ".*a" * 8 + "b", "a{2,9}" * 8 + "b"])
def test_patterns_that_can_be_tried_in_too_many_ways(pattern):
    """With Python's matcher these take longer than anyone waits."""
    with pytest.raises(BadPattern, match="too long"):
        Patterns().fits_end(pattern, "a" * 200)


def test_the_patterns_of_a_file_have_a_budget():
    patterns = Patterns()
    with pytest.raises(BadPattern, match="too long"):
        for number in range(1000):
            patterns.fits_end(rf".*attn{number}.*to_q.*", "down_blocks." + "a" * 150)
    assert Patterns().fits_end(r"(.*\.)?to_q", "x" * 5000 + ".to_q") is False  # no module has such a name
