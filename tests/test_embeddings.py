"""Textual inversion: equal to diffusers' loader in every dialect, there and back, and one line for each bad file."""

import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, tiny_sd
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import nn

import plainsd
from plainsd.adapters.embeddings import (
    add_embedding,
    add_word,
    embedding_in,
    occurs_in,
    save_embedding,
    vectors_of,
)
from plainsd.errors import UserError
from plainsd.pictures.conditioning import encode_prompts
from plainsd.reports.info import info

PROMPT = "a photo of NAME, on a table"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, variant in (("sd", TINY), ("xl", TINY_XL)):
        plainsd.save(tiny_sd(variant), place / name)
    return place


def pipeline(folder):
    if folder.name == "xl":
        return StableDiffusionXLPipeline.from_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


def vectors(count, width=32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def context(sd, prompt):
    with torch.no_grad():
        return encode_prompts(sd, [prompt]).context


def a1111(rows):
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": "cat",
        "step": 10,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


FILES = {  # dialect: file name, what to write there, the word that it makes
    "A1111 .pt": ("kitty.pt", a1111, "kitty"),
    "A1111 .safetensors": ("kitty.safetensors", lambda rows: {"emb_params": rows}, "kitty"),
    "diffusers .bin": ("learned_embeds.bin", lambda rows: {"<kitty>": rows}, "<kitty>"),
    "diffusers .safetensors": ("learned_embeds.safetensors", lambda rows: {"<kitty>": rows}, "<kitty>"),
}


def write(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dialect", FILES)
def test_equal_to_diffusers(folders, tmp_path, dialect, count):
    name, make, word = FILES[dialect]
    path, sd, pipe = write(tmp_path / name, make(vectors(count))), tiny_sd(), pipeline(folders / "sd")
    plain = context(sd, PROMPT.replace("NAME", word))
    assert add_embedding(sd, path) == word
    pipe.load_textual_inversion(tmp_path, weight_name=name, token=word)
    prompt = PROMPT.replace("NAME", word)
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    ours = context(sd, prompt)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)
    assert torch.equal(vectors_of(sd, word)[0], vectors(count))


@pytest.mark.parametrize("name", ["kitty.safetensors", "kitty.pt"])
def test_sdxl_equals_diffusers(folders, tmp_path, name):
    """Each text encoder has vectors of its own; diffusers is given them one by one."""
    content = {"clip_l": vectors(2, seed=1), "clip_g": vectors(2, seed=2)}
    path, sd, pipe = write(tmp_path / name, content), tiny_sd(TINY_XL), pipeline(folders / "xl")
    assert add_embedding(sd, path) == "kitty"
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(content[key], token="kitty", text_encoder=encoder, tokenizer=tokenizer)
    prompt = PROMPT.replace("NAME", "kitty")
    theirs = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    with torch.no_grad():
        ours = encode_prompts(sd, [prompt])
    torch.testing.assert_close(ours.context, theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.vector[:, :16], theirs[2], rtol=1e-5, atol=1e-5)


def test_the_refiner_takes_its_half(tmp_path):
    sd = tiny_sd(TINY_REFINER)
    path = write(tmp_path / "kitty.safetensors", {"clip_l": vectors(2, 24), "clip_g": vectors(2, seed=2)})
    add_embedding(sd, path)
    assert torch.equal(vectors_of(sd, "kitty")[0], vectors(2, seed=2))


def test_other_forms(tmp_path):
    """PyTorch's ParameterDict, as the first programs pickled it; a bare tensor; one vector without its first side."""
    sd, rows = tiny_sd(), vectors(2)
    for name, content, wanted in (
        ("dict", a1111(rows) | {"string_to_param": nn.ParameterDict({"*": nn.Parameter(rows)})}, rows),
        ("bare", rows, rows), ("flat", {"*": rows[0]}, rows[:1]), ("one", {"emp_params": rows}, rows),  # OneTrainer's
    ):  # fmt: skip
        torch.save(content, tmp_path / f"{name}word.pt")
        assert add_embedding(sd, tmp_path / f"{name}word.pt") == f"{name}word"
        assert torch.equal(vectors_of(sd, f"{name}word")[0], wanted)
    for number, key in enumerate(("clip_l", "clip_h")):  # one encoder, whatever the file calls it
        write(tmp_path / f"doggy{number}.safetensors", {key: rows})
        assert add_embedding(sd, tmp_path / f"doggy{number}.safetensors") == f"doggy{number}"
        assert torch.equal(vectors_of(sd, f"doggy{number}")[0], rows)
    write(tmp_path / "learned_embeds.safetensors", {"<a>": rows})
    assert add_embedding(sd, tmp_path) == "<a>" and add_embedding(sd, tmp_path, "<b>") == "<b>"
    assert sd.text_encoders[0].config.vocab == len(sd.text_encoders[0].token.weight) == TINY.text[0].vocab + 15


@pytest.mark.parametrize("variant", [TINY, TINY_XL, TINY_REFINER], ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    "dialect, ending",
    [("a1111", ".pt"), ("a1111", ".safetensors"), ("diffusers", ".bin"), ("diffusers", ".safetensors")],
)
def test_there_and_back(tmp_path, variant, dialect, ending):
    """The word comes back, whatever the file is called; but of SDXL's .pt, of which A1111 takes all for tensors."""
    sd, again, path = tiny_sd(variant), tiny_sd(variant), tmp_path / f"saved{ending}"
    add_word(sd, "<kitty>", [vectors(3, seed=index) for index in range(len(variant.text))])
    save_embedding(sd, "<kitty>", path, dialect)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    bare = ending == ".pt" and variant.unet.vector is not None
    word = "saved" if bare else "<kitty>"
    assert add_embedding(again, path) == word
    for mine, other in zip(vectors_of(sd, "<kitty>"), vectors_of(again, word), strict=True):
        assert torch.equal(mine, other) and mine.shape == (3, 32)
    assert torch.equal(context(again, f"a {word}"), context(sd, "a <kitty>"))
    if bare:  # A1111 1.10.1, textual_inversion.py, create_embedding_from_data
        assert all(rows.detach().ndim == 2 for rows in torch.load(path).values())
    else:
        assert info(path).splitlines()[1] == "  the word        <kitty>"
    assert add_embedding(again, path, "<other>") == "<other>"


@pytest.mark.parametrize("word", ["", " ", "two\nlines", "\x1b[31m"])
def test_a_word_that_cannot_be_written_is_passed_over(tmp_path, word):
    save_file({"emb_params": vectors(1)}, tmp_path / "kitty.safetensors", {"plainsd.word": word})
    assert add_embedding(tiny_sd(), tmp_path / "kitty.safetensors") == "kitty"


@pytest.mark.parametrize("dialect, ending", [("a1111", ".pt"), ("diffusers", ".bin"), ("diffusers", ".safetensors")])
def test_diffusers_loads_our_files(folders, tmp_path, dialect, ending):
    sd, pipe = tiny_sd(), pipeline(folders / "sd")
    add_word(sd, "<kitty>", [vectors(2)])
    save_embedding(sd, "<kitty>", tmp_path / f"kitty{ending}", dialect)
    pipe.load_textual_inversion(tmp_path, weight_name=f"kitty{ending}")
    theirs, _ = pipe.encode_prompt("a <kitty> here", "cpu", 1, False)
    torch.testing.assert_close(context(sd, "a <kitty> here"), theirs, rtol=1e-5, atol=1e-5)


def test_a_word_is_saved_with_the_model(tmp_path):
    sd = tiny_sd(TINY_XL)
    add_word(sd, "<kitty>", [vectors(2, seed=1), vectors(2, seed=2)])
    plainsd.save(sd, tmp_path / "model")
    again = plainsd.load(tmp_path / "model", device="cpu", dtype="float32")
    assert torch.equal(context(again, "a <kitty>!"), context(sd, "a <kitty>!"))
    assert torch.equal(vectors_of(again, "<kitty>")[1], vectors(2, seed=2))


def test_words_that_would_be_read_as_one_are_not_saved(tmp_path):
    """In a folder the vectors of a word are its name, name_1, name_2, ..."""
    sd = tiny_sd()
    add_word(sd, "ink", [vectors(1)])
    add_word(sd, "ink_1", [vectors(1, seed=1)])
    with pytest.raises(UserError, match="the word 'ink_1' would be read as a vector of 'ink'; rename one of them"):
        plainsd.save(sd, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_of_one_number_is_no_embedding_to_info(tmp_path):
    assert embedding_in(write(tmp_path / "a.safetensors", {"emb_params": torch.zeros(())})) is None


def test_an_embedding_of_no_known_form_is_not_told_as_one(tmp_path):
    content = {"clip_l": vectors(2), "clip_l_out": vectors(2)}
    path = write(tmp_path / "a.safetensors", content)
    assert embedding_in(path) is None and info(path).splitlines()[1].split()[:3] == ["tensors", "128", "numbers,"]


def test_words_keep_the_others_vectors_and_precision():
    sd = tiny_sd().to(dtype=torch.bfloat16)
    encoder = sd.text_encoders[0]
    before = encoder.token.weight.detach().clone()
    ids = add_word(sd, "<one>", [vectors(1)]) + add_word(sd, "<two>", [vectors(2, seed=1)])
    assert ids == [len(before), len(before) + 1, len(before) + 2]
    assert torch.equal(encoder.token.weight[: len(before)], before) and encoder.token.weight.dtype == torch.bfloat16
    assert torch.equal(encoder.token.weight[ids[1:]], vectors(2, seed=1).bfloat16())
    assert encoder.token.weight.requires_grad and encoder.token.num_embeddings == len(before) + 3


# --- bad input -------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return print, ("this ran",)


BAD = {
    "of SD 1, for another width": (
        ".safetensors",
        {"emb_params": torch.zeros(2, 768)},
        r"768 numbers for SD 1.x.* \(tiny\) needs 32",
    ),
    "of SDXL": (
        ".safetensors",
        {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
        "768 and 1280 numbers for SDXL.*needs 32",
    ),
    "of SDXL, of our width": (
        ".safetensors",
        {"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 32)},
        "32 and 32.*needs 32",
    ),
    "no vectors": (".safetensors", {"emb_params": torch.zeros(0, 32)}, "has 0 vectors"),
    "too many": (".safetensors", {"emb_params": torch.zeros(76, 32)}, "has 76 vectors.*1 to 75"),
    "no numbers": (".safetensors", {"emb_params": torch.zeros(0, 0)}, "no usable vectors"),
    "a single number": (".safetensors", {"emb_params": torch.zeros(())}, "no usable vectors"),
    "not a number of 8 bits": (
        ".safetensors",
        {"emb_params": torch.full((1, 32), float("nan")).to(torch.float8_e4m3fn)},
        "no usable vectors",
    ),
    "three sides": (".safetensors", {"emb_params": torch.zeros(1, 2, 32)}, "no usable vectors"),
    "not a number": (".safetensors", {"emb_params": torch.full((1, 32), float("nan"))}, "no usable vectors"),
    "whole numbers": (".safetensors", {"emb_params": torch.zeros(1, 32, dtype=torch.int64)}, "no usable vectors"),
    "a LoRA": (
        ".safetensors",
        {f"lora_unet_x.lora_{end}.weight": torch.zeros(2) for end in ("up", "down")},
        "no textual-inversion embedding: it seems to be a LoRA",
    ),
    "two words": (
        ".pt",
        a1111(None) | {"string_to_param": dict.fromkeys("*+", torch.zeros(1, 32))},
        "holds a textual-inversion embedding in a form that is not supported, .*; known are string_to_param with one",
    ),
    "OneTrainer's outputs beside": (
        ".safetensors",
        {"clip_l": torch.zeros(1, 32), "clip_l_out": torch.zeros(1, 32), "clip_g_out": torch.zeros(1, 32)},
        "outputs of text encoders, which are not supported, 'clip_g_out', 'clip_l_out'; take another",
    ),
    "OneTrainer's outputs alone": (
        ".safetensors",
        {"emp_params_out": torch.zeros(1, 32)},
        "outputs of text encoders, which are not supported, 'emp_params_out'; take another",
    ),
    "a list": (".pt", [1, 2], "no textual-inversion"),
    "a trap": (".pt", {"string_to_param": Trap()}, "could run code"),
    "a module": (".pt", {"string_to_param": nn.Linear(2, 2)}, "could run code"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, capsys, case):
    ending, content, message = BAD[case]
    path, sd = write(tmp_path / f"kitty{ending}", content), tiny_sd()
    rows, known = len(sd.text_encoders[0].token.weight), len(sd.tokenizers[0])
    with pytest.raises(UserError, match=message) as caught:
        add_embedding(sd, path)
    assert "\n" not in str(caught.value) and "kitty" in str(caught.value)
    assert "this ran" not in capsys.readouterr().out
    assert len(sd.text_encoders[0].token.weight) == rows and len(sd.tokenizers[0]) == known


def test_sdxl_wants_both(tmp_path):
    for content in ({"emb_params": vectors(1)}, {"clip_g": vectors(1)}):
        with pytest.raises(UserError, match="needs 32 and 32"):
            add_embedding(tiny_sd(TINY_XL), write(tmp_path / "a.safetensors", content))
    with pytest.raises(UserError, match="1 and 2 vectors"):
        add_embedding(tiny_sd(TINY_XL), write(tmp_path / "a.safetensors", {"clip_l": vectors(1), "clip_g": vectors(2)}))


def test_bad_calls(tmp_path):
    sd = tiny_sd()
    add_word(sd, "<kitty>", [vectors(1)])
    calls = {
        "has '<kitty>' already": lambda: add_word(sd, "<kitty>", [vectors(1)]),
        "cannot read": lambda: add_embedding(sd, tmp_path / "none.safetensors"),
        "is a folder without": lambda: add_embedding(sd, tmp_path),
        "'a' is not a learned word": lambda: save_embedding(sd, "a", tmp_path / "a.pt"),
        "'<kitty> <kitty>' is not a learned word": lambda: save_embedding(sd, "<kitty> <kitty>", tmp_path / "a.pt"),
        "did you mean 'a1111'": lambda: save_embedding(sd, "<kitty>", tmp_path / "a.pt", "a111"),
        "or .bin; give it that ending": lambda: save_embedding(sd, "<kitty>", tmp_path / "a.pt", "diffusers"),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for ending in ("pt", "safetensors"):
        with pytest.raises(UserError, match="cannot write"):
            save_embedding(sd, "<kitty>", tmp_path / "file" / f"a.{ending}")
    sd.text_encoders[0].token.weight = nn.Parameter(torch.zeros(9, 32))
    with pytest.raises(UserError, match="belong to different models"):
        add_word(sd, "<dog>", [vectors(1)])


WORDS = ("kitty", "<kitty>", "bad-hands-5", "Größe", "two words", "k_1", "<k", "k>", "猫", "Cafe\u0301")
PROMPTS = ("{}", "a {} b", "a{}b", "{}s", "({}:1.2), c", "{}_2", "{}-2", "-{}-", "{}\u0301", "{}½", "a\n{}",
           "[a:{}:0.5]", "s{} {}", "ab")  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_occurs_where_the_tokenizer_finds_it(word):
    tokenizer = tiny_sd().tokenizers[0]
    added = tokenizer.add(word, 1)
    for prompt in PROMPTS:
        for form in (word, word.upper(), word.lower(), word.replace(" ", "\n ")):
            text = prompt.replace("{}", form)
            assert occurs_in(word, text) == (added in tokenizer.units(text)), text
    assert not occurs_in("", "a")
