"""Prompts as A1111 and ComfyUI read them, against their published formulas on a small random encoder."""

import json

import pytest
import torch
from conftest import TINY_XL, tiny_sd
from diffusers import StableDiffusionXLPipeline

import plainsd
from plainsd.errors import UserError
from plainsd.pictures.conditioning import encode_prompts
from plainsd.pictures.plan import chunked_by_stretch, encode_prompt, weigh_from_empty, weigh_together
from plainsd.text.prompts import BREAK, Weighted, alternates, parse_words

pytestmark = pytest.mark.usefixtures("sd")


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


def test_one_mean_for_the_whole_batch():
    """z w mean(z) / mean(z w) over all rows of the batch, first chunks and second ones each by themselves."""
    states = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)) + 1  # two prompts of two chunks
    weights = [[1.0, 1.3, 1, 1, 1], [1.0] * 5, [1.0, 1, 0.5, 1, 1], [1.0] * 5]
    firsts = states[::2] * torch.tensor(weights[::2])[..., None]
    expected = states.clone()
    expected[::2] = firsts * (states[::2].mean() / firsts.mean())
    torch.testing.assert_close(weigh_together(states, weights, 2), expected)
    assert weigh_together(states, [[1.0] * 5] * 4, 2) is states


def test_weights_are_measured_from_an_empty_text():
    states = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(2))  # two chunks and the empty one
    weights = [[1.0, 1.5, 1, 1], [1.0, 1, -0.5, 1], [1.0] * 4]
    found = weigh_from_empty(states, weights, 1)
    empty = states[2]
    torch.testing.assert_close(found[0, 1], empty[1] + 1.5 * (states[0, 1] - empty[1]))
    torch.testing.assert_close(found[1, 2], empty[2] - 0.5 * (states[1, 2] - empty[2]))
    assert torch.equal(found[0, [0, 2, 3]], states[0, [0, 2, 3]]) and torch.equal(found[2], empty)


@torch.no_grad()
def test_a_short_negative_stays_short_beside_a_long_prompt(sd):
    for like in (None, "a1111"):
        planned = encode_prompt(sd, "a BREAK b", "c", 4, like=like)
        short = encode_prompts(sd, ["c"]).context
        assert planned.positive(0)[0][0].context.shape[1] == 2 * short.shape[1]
        torch.testing.assert_close(planned.negative(0).context, short)


@torch.no_grad()
def test_parts_of_unlike_length_repeat_the_last_state_in_a1111(sd):
    planned = encode_prompt(sd, "a BREAK b AND c", "", 4, like="a1111")
    (long, _), (short, _) = planned.positive(2)
    alone = encode_prompts(sd, ["c"]).context
    count = alone.shape[1]
    assert short.context.shape == long.context.shape
    torch.testing.assert_close(short.context[:, :count], alone)
    assert torch.equal(short.context[:, count:], alone[:, -1:].expand(-1, count, -1).to(short.context))
    assert planned.positive(3)[1][0] is short  # the same tensor each step
    apart = encode_prompt(sd, "a BREAK b AND c", "", 4)
    assert apart.positive(2)[1][0].context.shape[1] == count


@torch.no_grad()
def test_variants_share_their_mean_in_a1111_alone(sd):
    """An alternation counts each call, an edit each of its texts once."""
    alone = encode_prompt(sd, "[(a:1.5)|b]", "", 4).positive(1)[0][0].context
    torch.testing.assert_close(alone, encode_prompts(sd, ["b"]).context)
    together = encode_prompt(sd, "[(a:1.5)|b]", "", 4, like="a1111").positive(2)[0][0].context
    assert not torch.allclose(together, alone)
    ratio = together / alone  # b is scaled as a is
    assert ratio.std() < 1e-3 * ratio.abs().mean()
    assert alternates("[a|b]") and alternates("[[a|b]:c:0.5]") and not alternates("[a:b:2] (c|d)")


@torch.no_grad()
def test_comfyui_knows_no_edits(sd):
    planned = encode_prompt(sd, "[a:b:0.5] AND c BREAK d", "", 4, like="comfyui")
    assert planned.parts == ((1.0, ("[a:b:0.5] AND c BREAK d",)),)
    assert torch.equal(planned.positive(0)[0][0].context, planned.positive(3)[0][0].context)
    plain = encode_prompts(sd, [[Weighted("[a:b:0.5] AND c BREAK d")]]).context
    torch.testing.assert_close(planned.positive(0)[0][0].context, plain)


@pytest.mark.parametrize(
    "prompt, expected",  # as ComfyUI's own functions gave them
    [
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("((a:1.3):2)", [("a", 1.3)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2)]),
        (r"\(a\) [b]", [("(a) [b]", 1)]),
        ("(a:b) (c:)", [("a:b", 1.1), (" ", 1), ("c:", 1.1)]),
        ("(a", [("(a", 1)]),
        ("a) (b)", [("a) (b)", 1)]),
        ("a embedding:cat, b", [("a", 1), ("cat", 1), (", b", 1)]),
        ("a BREAK b", [("a BREAK b", 1)]),
        ("", [("", 1)]),
    ],
)
def test_comfyuis_notation(prompt, expected):
    found = parse_words(prompt)
    assert [(piece.text, pytest.approx(piece.weight)) for piece in found] == expected and BREAK not in found


def test_brackets_without_end():
    with pytest.raises(UserError, match="more than 64 brackets inside each other"):
        parse_words("(" * 5000 + "a" + ")" * 5000)


class Letters:
    """One token a letter."""

    def units(self, text):
        return [[ord(sign)] for sign in text]


def test_short_stretches_are_not_parted():
    def chunks(*texts):
        found = chunked_by_stretch(Letters(), [Weighted(text) for text in texts], room=10)
        return ["".join(chr(key) for key, _ in chunk) for chunk in found]

    assert chunks("abcdef", "ghijklm") == ["abcdef", "ghijklm"]  # 7 tokens go on together
    assert chunks("abcdef", "ghijklmn") == ["abcdefghij", "klmn"]  # 8 are parted
    assert chunks("a" * 25) == ["a" * 10, "a" * 10, "a" * 5]
    assert chunks() == [""]
    parted = chunked_by_stretch(Letters(), [Weighted("ab"), BREAK, BREAK, Weighted("BREAK")], room=10)
    assert [len(chunk) for chunk in parted] == [2, 0, 5]


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False, None])
def test_an_empty_negative_of_sdxl_is_what_its_folder_says(tmp_path, zeros):
    """As in diffusers, whose default is zeros. A1111 and ComfyUI do not look."""
    plainsd.save(tiny_sd(TINY_XL), tmp_path / "xl")
    index = json.loads((tmp_path / "xl/model_index.json").read_text())
    assert index.pop("force_zeros_for_empty_prompt") is True
    index |= {} if zeros is None else {"force_zeros_for_empty_prompt": zeros}
    (tmp_path / "xl/model_index.json").write_text(json.dumps(index))
    _, theirs, _, pooled = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl").encode_prompt("a")
    sd = plainsd.load(tmp_path / "xl", device="cpu", dtype="float32")
    ours = encode_prompt(sd, "a", "", 2).negative(0)
    assert bool(theirs.any()) is bool(ours.context.any()) is (zeros is False)
    torch.testing.assert_close(ours.context, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.vector[:, :16], pooled, rtol=1e-5, atol=1e-5)
    assert not encode_prompt(sd, "a", "", 2, like="a1111").negative(0).context.any()
    assert encode_prompt(sd, "a", "", 2, like="comfyui").negative(0).context.any()
    for name in ("again", "again.safetensors"):
        plainsd.save(sd, tmp_path / name)
        again = plainsd.load(tmp_path / name, device="cpu", dtype="float32")
        assert again.variant.force_zeros is (zeros is not False) and again.variant == sd.variant


def test_a_flag_that_is_none(tmp_path):
    plainsd.save(tiny_sd(TINY_XL), tmp_path / "xl")
    index = json.loads((tmp_path / "xl/model_index.json").read_text()) | {"force_zeros_for_empty_prompt": "no"}
    (tmp_path / "xl/model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="force_zeros_for_empty_prompt is 'no', and must be true or false"):
        plainsd.load(tmp_path / "xl")
