"""recipes/emoji/words.py: the vectors of a name's tokens add up to how its emoji looks."""

import importlib.util
from pathlib import Path

import pytest
import torch

import plainsd
from plainsd.emoji import drawing
from plainsd.emoji.words import Noun
from plainsd.errors import UserError

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


words = recipe("words")
EMBEDDED = RECIPE.parents[1] / "src" / "plainsd" / "assets" / "emoji"


@torch.no_grad()
def test_the_vectors_of_a_name_add_up_to_its_code():
    torch.manual_seed(0)
    sd = plainsd.load(EMBEDDED, device="cpu", dtype="float32")
    encoder, tokenizer = sd.text_encoders[0], sd.tokenizers[0]
    before = encoder.token.weight.clone()
    nouns = [Noun("apple", "1", ()), Noun("red apple", "2", ("red fruit",)), Noun("owl", "3", ())]
    wanted = torch.randn(3, 16)
    turn = words.spelled(encoder, tokenizer, nouns, wanted)
    torch.testing.assert_close(turn @ turn.T, torch.eye(16))
    change = encoder.token.weight - before
    sums = torch.stack([change[tokenizer.encode(noun.name)].sum(0) for noun in nouns]) @ turn.T
    likeness = torch.cosine_similarity(sums[:, None], wanted, dim=2)
    assert likeness.diagonal().min() > 0.95
    named = {piece for noun in nouns for name in (noun.name, *noun.synonyms) for piece in tokenizer.encode(name)}
    others = [piece for piece in range(len(tokenizer)) if piece not in named]
    assert not change[others].any() and change[sorted(named)].any(dim=1).all()


@torch.no_grad()
def test_a_quieted_encoder_is_near_its_vectors():
    encoder = plainsd.load(EMBEDDED, device="cpu", dtype="float32").text_encoders[0]
    ids = torch.randint(encoder.config.vocab, (4, 16), generator=torch.Generator().manual_seed(0))
    words.quieted(encoder, share=0.0)
    hidden = encoder(ids).hidden
    torch.testing.assert_close(hidden[-1], hidden[0])


def has_font() -> bool:
    try:
        drawing.font_path(None)
    except UserError:
        return False
    return True


@pytest.mark.skipif(not has_font(), reason="needs the emoji font")
def test_the_command(tmp_path, capsys):
    made = recipe("data").main(
        [str(tmp_path / "set"), "--set", "--single", "--cells", "8", "--names", str(RECIPE / "names.txt")]
    )
    assert not made
    asked = [str(EMBEDDED), str(tmp_path / "out"), "--set", str(tmp_path / "set" / "concepts.json")]
    for width in ("0", "136"):
        assert words.main([*asked, "--width", width]) == 2
        assert f"--width {width}: give 1 to 135" in capsys.readouterr().err
    described = Path(asked[-1]).read_text()
    other = tmp_path / "other.json"
    other.write_text(described.replace('"white"', '"chalk"'))
    assert words.main([*asked[:3], str(other), "--width", "100"]) == 2
    assert "other.json has no colour white" in capsys.readouterr().err
    assert words.main([*asked, "--width", "135"]) == 0
    assert "135 components hold 100.0%" in capsys.readouterr().out
    assert words.main([*asked, "--width", "100"]) == 0
    assert "100 components hold 9" in capsys.readouterr().out
    before, after = (plainsd.load(path, device="cpu", dtype="float32") for path in (EMBEDDED, tmp_path / "out"))
    (x, y) = (sd.unet.state_dict() for sd in (before, after))
    assert all(torch.allclose(x[name], y[name], atol=1e-3) for name in x)
    assert not torch.equal(before.text_encoders[0].token.weight, after.text_encoders[0].token.weight)
