"""The tokenizer against transformers' CLIPTokenizer: ids equal on generated text, from every kind of file."""

import hashlib
import json
import logging
import random
import shutil

import pytest
from transformers import CLIPTokenizer

from plainsd.errors import UserError
from plainsd.text.tokenizer import CLIP, END, START, VOCABULARY, Tokenizer, byte_symbols, find_vocabulary

logging.getLogger("transformers").setLevel(logging.ERROR)

SCRIPTS = [
    0x100,
    0x370,
    0x400,
    0x530,
    0x590,
    0x600,
    0x900,
    0xE00,
    0x1100,
    0x13A0,
    0x2000,
    0x2200,
    0x3040,
    0x4E00,
    0xAC00,
    0xFB00,
    0xFF00,
    0x10000,
    0x12000,
    0x1D400,
    0x1F300,
    0x1F600,
    0xE0000,
]
WORDS = [
    "it's",
    "DON'T",
    "we'LL",
    "'s",
    START,
    END,
    "<|StartOfText|>",
    "!",
    "!!!",
    "a",
    "cat",
    "ﬁ",
    "İstanbul",
    "ß",
    "é",
    "e\u0301",
    "한국",
    "漢字",
    "ไทย",
    "العربية",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "\t",
    "\x00",
    "\x07",
    "\u200b",
    "\u3000",
    "\r\n",
    "1234",
    "½",
    "²",
    "(a:1.2)",
    "&amp;",
    "“quoted”",
    "a,b",
    "...",
    "x" * 40,
    "Σς",
    "ſ",
    "\u212b",
]


def generated(count: int, seed: int) -> list[str]:
    """Texts from six sources: ASCII, all of Unicode, one script, Latin with controls, awkward words, apostrophes."""
    rng = random.Random(seed)
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    sources = [
        lambda: [chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(150))],
        lambda: [chr(rng.choice(every)) for _ in range(rng.randrange(30))],
        lambda: [chr(base + rng.randrange(0x100)) for base in [rng.choice(SCRIPTS)] for _ in range(rng.randrange(40))],
        lambda: [chr(rng.randrange(0x250)) for _ in range(rng.randrange(60))],
        lambda: [rng.choice(WORDS) + rng.choice(["", " ", " ", "  "]) for _ in range(rng.randrange(100))],
        lambda: [rng.choice("'`\"sSdDmMlLtTrReEvV \n<|>/w") for _ in range(rng.randrange(50))],
    ]
    return ["", " ", "a " * 200, *("".join(rng.choice(sources)()) for _ in range(count - 3))]


def flags(content: str, normalized: bool = True) -> dict:
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


FOLDERS = {  # special_tokens_map.json and tokenizer_config.json as public folders have them
    "sd1": (
        {"bos_token": flags(START), "eos_token": flags(END), "unk_token": flags(END), "pad_token": END},
        {
            "bos_token": {"__type": "AddedToken"} | flags(START),
            "eos_token": {"__type": "AddedToken"} | flags(END),
            "unk_token": {"__type": "AddedToken"} | flags(END),
            "pad_token": END,
            "model_max_length": 77,
        },
    ),
    "sd2": (
        {"bos_token": flags(START), "eos_token": flags(END), "unk_token": flags(END), "pad_token": "!"},
        {"pad_token": END, "model_max_length": 77},
    ),
    "sdxl second": (
        {"bos_token": flags(START), "eos_token": flags(END, False), "unk_token": flags(END, False), "pad_token": "!"},
        {
            "added_tokens_decoder": {
                "0": flags("!", False) | {"special": True},
                "49406": flags(START) | {"special": True},
                "49407": flags(END, False) | {"special": True},
            },
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": "!",
            "model_max_length": 77,
        },
    ),
    "plain": ({"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}, {}),
    "bare": (None, None),
}


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.from_vocabulary(find_vocabulary())


def write_folder(clip, folder, style):
    clip.save(folder)
    for name, content in zip(("special_tokens_map.json", "tokenizer_config.json"), FOLDERS[style], strict=True):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def assert_same_ids(ours, theirs, texts):
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    different = [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]
    assert not different, f"{len(different)} of {len(texts)} texts differ, first {different[0]!r}"
    assert (ours.start, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert len(ours) == len(theirs)


def test_ten_thousand_texts_have_the_ids_of_transformers(clip, tmp_path):
    theirs = CLIPTokenizer.from_pretrained(str(write_folder(clip, tmp_path, "sd1")))
    texts = generated(10_000, seed=0)
    assert_same_ids(Tokenizer.from_folder(tmp_path), theirs, texts)
    assert_same_ids(clip, theirs, texts)


@pytest.mark.parametrize("style", FOLDERS)
def test_every_kind_of_folder_is_read_and_saved_as_transformers_does(clip, tmp_path, style):
    texts = generated(800, seed=1)
    theirs = CLIPTokenizer.from_pretrained(str(write_folder(clip, tmp_path / "given", style)))
    ours = Tokenizer.from_folder(tmp_path / "given")
    assert_same_ids(ours, theirs, texts)
    assert ours.max_length == 77
    ours.save(tmp_path / "ours")
    assert_same_ids(ours, CLIPTokenizer.from_pretrained(str(tmp_path / "ours")), texts)
    assert_same_ids(Tokenizer.from_folder(tmp_path / "ours"), theirs, texts)
    theirs.save_pretrained(tmp_path / "theirs")  # tokenizer.json only
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    assert_same_ids(Tokenizer.from_folder(tmp_path / "theirs"), theirs, texts)


def test_padding_with_the_exclamation_mark(clip, tmp_path):
    second = Tokenizer.from_vocabulary(find_vocabulary(), pad="!")
    assert (clip.pad, second.pad) == (49407, 0)
    assert clip.encode("go!") == [861, 256]
    assert second.encode("go!") == [861, 0]
    theirs = CLIPTokenizer.from_pretrained(str(write_folder(clip, tmp_path, "sd2")))
    assert_same_ids(second, theirs, generated(800, seed=2))


def test_the_exclamation_mark_as_a_word(clip, tmp_path):
    """As A1111 and ComfyUI read texts for the encoders that pad with it: by the first encoder's tokenizer."""
    texts = ["wow!", "no!!!", "a!b", "!", START, *generated(800, seed=3)]
    for second in (Tokenizer.from_vocabulary(find_vocabulary(), pad="!"),
                   Tokenizer.from_folder(write_folder(clip, tmp_path, "sdxl second"))):  # fmt: skip
        plain = second.reading_pad_as_word()
        assert (second.encode("wow!"), plain.encode("wow!")) == ([2781, 0], [2781, 256])
        assert [plain.encode(text) for text in texts] == [clip.encode(text) for text in texts]
        assert (plain.start, plain.end, plain.pad, len(plain)) == (49406, 49407, 0, len(second))
        assert second.reading_pad_as_word() is plain
        ids = second.add("<wow>", 2)
        assert second.reading_pad_as_word().units("a <wow>!") == [[320], ids, [256]]
        assert second.units("a <wow>!") == [[320], ids, [0]] and second.has_learned("<WOW>")
        (key,) = second.add("<oh!>")
        assert second.reading_pad_as_word().units("<oh!> <wow>") == [[key], ids]
    assert clip.reading_pad_as_word() is clip and not clip.has_learned("wow") and not clip.has_learned("")


def test_saved_files_come_back_the_same(clip, tmp_path):
    clip.save(tmp_path / "one")
    Tokenizer.from_folder(tmp_path / "one").save(tmp_path / "two")
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_small_vocabulary_without_all_bytes(tmp_path):
    symbols = list("abcdeilprt")
    joined = ["re", "red</w>", "ap", "app", "le</w>", "apple</w>"]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *joined, START, END]
    (tmp_path / "vocab.json").write_text(json.dumps({word: key for key, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\na p\nap p\nl e</w>\napp le</w>\n")
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.start, ours.end, ours.pad, len(ours)) == (26, 27, 27, 28)
    assert ours.pieces(ours.encode("a red apple")) == ["a</w>", "red</w>", "apple</w>"]
    assert_same_ids(ours, CLIPTokenizer.from_pretrained(str(tmp_path)), ["red z", "漢 re", *generated(500, seed=3)])


def test_pieces_are_readable(clip):
    assert clip.pieces(clip.encode("Photographing a 🍎 é!")) == [
        "photographing</w>",
        "a</w>",
        "🍎</w>",
        "é</w>",
        "!</w>",
    ]
    assert "".join(clip.pieces(clip.encode("𐎠"))).startswith("\\xf0")
    assert clip.pieces([clip.start, clip.end]) == [START, END]
    assert len(set(byte_symbols())) == 256


def test_learned_tokens(tmp_path):
    tokenizer = Tokenizer.from_vocabulary(find_vocabulary())
    assert tokenizer.add("<cat>", 3) == [49408, 49409, 49410]
    assert tokenizer.add("easyneg") == [49411]
    text = "a <CAT>s, EasyNeg easynegs"
    ids = tokenizer.encode(text)
    assert ids[1:4] == [49408, 49409, 49410]
    assert ids.count(49411) == 1  # a bare name only as a whole word
    assert tokenizer.units("a <cat>") == [[320], [49408, 49409, 49410]]
    assert tokenizer.pieces([49409]) == ["<cat>_1"]
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode(text) == ids and len(again) == len(tokenizer) == 49412
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert theirs("<cat> <cat>_1 <cat>_2", add_special_tokens=False).input_ids == tokenizer.encode("<cat>")
    two = tokenizer.add("<two>", 2)
    tokenizer.save(tmp_path)
    assert two == [49412, 49413] == Tokenizer.from_folder(tmp_path).encode("<two>")


@pytest.mark.parametrize(("said", "length"), [(24, 24), (77, 77), (10**30, 77), (None, 77)])
def test_a_saved_length_comes_back(clip, tmp_path, said, length):
    """Encoders of other lengths say so; transformers writes a huge number where nothing was said."""
    clip.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.pop("model_max_length") == 77
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | ({"model_max_length": said} if said else {})))
    again = Tokenizer.from_folder(tmp_path)
    assert again.max_length == length
    again.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == length


@pytest.mark.parametrize("name, count", [("cat", 1), ("<seen>", 1), ("", 1), (" ", 2), ("<new>", 0)])
def test_a_name_that_cannot_be_learned(name, count):
    tokenizer = Tokenizer.from_vocabulary(find_vocabulary())
    tokenizer.add("<seen>")
    with pytest.raises(UserError, match="cannot learn"):
        tokenizer.add(name, count)
    assert len(tokenizer) == 49409


def test_text_that_is_no_text(clip):
    with pytest.raises(UserError, match="UTF-8"):
        clip.encode("a \udcff")


def test_vocabulary_is_found_beside_a_checkpoint_first(clip, tmp_path):
    beside = tmp_path / "model.safetensors"
    assert find_vocabulary(beside) == find_vocabulary() == CLIP
    clip.save(tmp_path / "tokenizer")
    assert find_vocabulary(beside) == tmp_path / "tokenizer"
    assert Tokenizer.from_vocabulary(tmp_path / "tokenizer").encode("a cat") == clip.encode("a cat")
    shutil.copy(CLIP, tmp_path)
    assert find_vocabulary(beside) == tmp_path / VOCABULARY


def test_the_bundled_vocabulary_is_openai_s(clip):
    """Byte for byte as in github.com/openai/CLIP, with the licence, and where it is from, beside it."""
    digest = hashlib.sha256(CLIP.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert digest in (CLIP.parent / "README.md").read_text("utf-8")
    assert "Copyright (c) 2021 OpenAI" in (CLIP.parent / "LICENSE").read_text("utf-8")
    assert (len(clip), len(clip.merges), clip.encode("a photo of a cat")) == (
        49_408,
        48_894,
        [320, 1125, 539, 320, 2368],
    )


def test_texts_are_those_of_the_files(clip, tmp_path):
    clip.save(tmp_path)
    texts = clip.to_texts()
    assert texts == {path.name: path.read_bytes().decode("utf-8") for path in tmp_path.iterdir()}
    again = Tokenizer.from_texts(texts, "here")
    assert again.to_texts() == texts and again.encode("a red Apple!") == clip.encode("a red Apple!")
    with pytest.raises(UserError, match="^here has no merges.txt, which a tokenizer needs"):
        Tokenizer.from_texts({"vocab.json": texts["vocab.json"]}, "here")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", "{", "not JSON"),
        ("vocab.json", "[1]", "holds a list"),
        ("vocab.json", '{"a": 0}', "do not fit"),
        ("merges.txt", "#version: 0.2\ni n\nbroken\n", "not a pair"),
        ("merges.txt", b"\xff\xfe", "merges.txt is damaged: it is not text"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "byte-pair"),
        ("vocab.json", None, "has no vocab.json"),
    ],
)
def test_damaged_folders(clip, tmp_path, name, content, message):
    clip.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_damaged_vocabulary_file(tmp_path):
    (tmp_path / VOCABULARY).write_bytes(find_vocabulary().read_bytes()[:5000])
    with pytest.raises(UserError, match="download"):
        Tokenizer.from_vocabulary(tmp_path / VOCABULARY)
