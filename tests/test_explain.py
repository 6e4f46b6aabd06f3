"""`plainsd explain`: maps beside diffusers' own, the same picture to the bit, and a page that asks nobody."""

import math

import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, tiny_sd

import plainsd
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.errors import UserError
from plainsd.generate import Pictures, text_to_image
from plainsd.models.unet import UNet
from plainsd.pictures.conditioning import encode_prompts
from plainsd.reports import watching
from plainsd.reports.explain import read_prompt

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def embedded():
    return plainsd.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def explained(embedded):
    return plainsd.explain(embedded, PROMPT, seed=7, steps=4)


# --- the data --------------------------------------------------------------------------------------------------------


class Scores:
    """An attention processor of diffusers that keeps its maps, mean over heads."""

    def __init__(self):
        self.maps: list[tuple[bool, torch.Tensor]] = []  # cross-attention or not, (1, N, M)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **other):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (attn.head_to_batch_dim(each) for each in (q, k, v))
        scores = attn.get_attention_scores(q, k)
        self.maps.append((encoder_hidden_states is not None, scores.mean(0, keepdim=True)))
        out = attn.batch_to_head_dim(torch.bmm(scores, v))
        return attn.to_out[1](attn.to_out[0](out))


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
@torch.no_grad()
def test_maps_equal_diffusers(variant, tmp_path):
    """At the second of three steps, of a picture that is not square."""
    from diffusers import UNet2DConditionModel

    sd = tiny_sd(variant)
    plainsd.save(sd, tmp_path / "model")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet")
    scores = Scores()
    theirs.set_attn_processor(scores)
    seen = plainsd.explain(sd, PROMPT, seed=3, steps=3, size=(96, 64), guidance=3.0)
    told = encode_prompts(sd, [PROMPT], size=(96, 64))
    x = seen.noisy[1:2] / math.sqrt(1 + seen.sigmas[1] ** 2)
    more = {}
    if told.vector is not None:
        pooled = told.vector[:, : -6 * 256]
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([[64, 96, 0, 0, 64, 96]])}}
    theirs(x, seen.timesteps[1], told.context, **more)
    for cross, ours in ((True, seen.cross_attention), (False, seen.self_attention)):
        layers = [scores for is_cross, scores in scores.maps if is_cross == cross]
        assert len(layers) == sum(seen.layers.values())
        for size, maps in ours.items():
            same = [one[0] for one in layers if one.shape[1] == math.prod(size)]
            assert len(same) == seen.layers[size]
            wanted = torch.stack(same).mean(0)
            wanted = wanted.T.unflatten(1, size) if cross else wanted
            torch.testing.assert_close(maps[1], wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_picture_is_the_same_to_the_bit(variant, guidance):
    """Tokens of two chunks beside an empty negative prompt go through the network in calls of their own."""
    sd, prompt = tiny_sd(variant), "red " * 30
    choices = dict(seed=5, steps=3, guidance=guidance)
    *steps, last = text_to_image(sd, prompt, **choices)
    seen = plainsd.explain(sd, prompt, **choices)
    assert isinstance(last, Pictures) and seen.image.tobytes() == last.images[0].tobytes()
    assert torch.equal(seen.noisy[1:], torch.cat([step.x for step in steps]))
    assert torch.equal(seen.denoised, torch.cat([step.denoised for step in steps]))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in sd.unet.modules())
    assert len(seen.tokens) == 154 and seen.words == ["red"] * 30
    assert (seen.uncond is None) == (guidance == 1)


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
def test_maps_add_up_to_one(variant):
    seen = plainsd.explain(tiny_sd(variant), PROMPT, steps=2)
    sizes = {(8, 8), (4, 4)} if variant is TINY else {(4, 4)}  # XL's first level has none
    assert seen.cross_attention.keys() == seen.self_attention.keys() == seen.layers.keys() == sizes
    for maps in seen.cross_attention.values():
        torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]), atol=1e-5, rtol=0)
    for maps in seen.self_attention.values():
        torch.testing.assert_close(maps.sum(2), torch.ones_like(maps[..., 0]), atol=1e-5, rtol=0)
    everything = seen.heat(range(len(seen.tokens)), size=(20, 30))
    torch.testing.assert_close(everything, torch.ones(20, 30), atol=1e-5, rtol=0)


def test_a_words_heat_is_that_of_its_tokens(explained):
    seen = explained
    assert seen.words == ["a", "red", "apple"]
    assert seen.positions("apple") == [3] and seen.tokens[3].text == "apple</w>"
    by_hand = sum(
        seen.layers[size] * torch.nn.functional.interpolate(maps[2, 3][None, None], (8, 8), mode="bilinear")
        for size, maps in seen.cross_attention.items()
    ) / sum(seen.layers.values())
    torch.testing.assert_close(seen.heat("apple", steps=2), by_hand[0, 0])
    with pytest.raises(UserError, match="unknown word 'aple'; did you mean 'apple'"):
        seen.heat("aple")


def test_words_of_several_tokens_and_learned_ones():
    sd = tiny_sd()
    learned = sd.tokenizers[0].add("<cat>")
    tokens, words = read_prompt(sd, "ab <cat>c, (d:1.5)", 4)
    assert words == ["ab", "<cat>", "c", ",", "d"]
    assert [token.word for token in tokens[:8]] == [None, 0, 0, 1, 2, 3, 4, None]
    assert tokens[3].ids == tuple(learned) and tokens[6].weight == 1.5


def test_estimates_make_the_guided_one(explained):
    mixed = explained.uncond + explained.settings.guidance * (explained.cond - explained.uncond)
    torch.testing.assert_close(mixed, explained.denoised, atol=1e-5, rtol=1e-5)
    assert {name: len(pictures) for name, pictures in explained.decoded.items()} == {
        "denoised": 4,
        "cond": 4,
        "uncond": 4,
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_watched_where_its_steps_begin(embedded, sampler):
    seen = plainsd.explain(embedded, PROMPT, steps=3, sampler=sampler)
    levels = [embedded.schedule.timestep(sigma) for sigma in seen.sigmas[:-1]]
    assert seen.timesteps == pytest.approx(levels, abs=0.51)
    assert seen.noisy.shape[0] == len(seen.timesteps) + 1 == len(seen.sigmas)


def test_large_self_attention_is_left_out(embedded, monkeypatch):
    monkeypatch.setattr(watching, "SELF_POSITIONS", 20)
    seen = plainsd.explain(embedded, PROMPT, steps=1)
    assert seen.self_attention.keys() == {(4, 4)} and seen.cross_attention.keys() == {(8, 8), (4, 4)}


def test_what_cannot_be_watched_is_said(embedded):
    for prompt in ("a [red|green] apple", "a cat AND a dog"):
        with pytest.raises(UserError, match="explain one of its texts"):
            plainsd.explain(embedded, prompt)
    sd = tiny_sd()
    sd.unet.mid.attn.blocks[0].cross_attn = torch.nn.Identity()  # as packing puts layers of its own there
    with pytest.raises(UserError, match="load it anew"):
        plainsd.explain(sd, PROMPT)
    sd = tiny_sd()
    sd.refiner = tiny_sd(TINY_REFINER)
    with pytest.raises(UserError, match="leave the refiner out"):
        plainsd.explain(sd, PROMPT)


def test_hooks_go_when_the_drawing_fails(monkeypatch):
    sd = tiny_sd()
    monkeypatch.setattr(UNet, "forward", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plainsd.explain(sd, PROMPT)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in sd.unet.modules())
