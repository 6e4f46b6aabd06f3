"""Prompts to tensors: equal to diffusers' pipelines below 77 tokens, and by A1111's rules for what those lack."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.models.embeddings import Timesteps
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from plainsd.commands.tokens import describe
from plainsd.errors import UserError
from plainsd.files.configs import read_text
from plainsd.files.folder import read_network
from plainsd.files.tensorfile import TensorFile, stored
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.unet import UNetConfig
from plainsd.pictures.conditioning import (
    Conditioning,
    chunked,
    encode_prompts,
    size_vector,
    stack,
    weigh,
)
from plainsd.pictures.plan import encode_prompt
from plainsd.text.prompts import Weighted, parse
from plainsd.text.tokenizer import Tokenizer, find_vocabulary

PROMPT = "a photo of a Cat, it's 100% fluffy! and more"
START, END = 49406, 49407
LATE_STEPS = 10


def spread(network):
    """Random weights away from their defaults, so that each of them matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return network.eval()


def text_pair(width, layers, projection=None, activation="quick_gelu"):
    """transformers' encoder and ours with the same weights."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=projection or 512,
        bos_token_id=START,
        eos_token_id=END,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    theirs = spread(kind(config))
    file = TensorFile("theirs", {name: stored(tensor) for name, tensor in theirs.state_dict().items()}, {})
    settings = read_text(config.to_dict() | {"architectures": [kind.__name__]}, "theirs")
    return theirs, read_network(file, TextEncoder, settings, conv=True).build(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours and transformers', padding with the end token and with `!`."""
    pairs = []
    for pad in ("<|endoftext|>", "!"):
        ours = Tokenizer.from_vocabulary(find_vocabulary(), pad)
        folder = tmp_path_factory.mktemp("tokenizer")
        ours.save(folder)
        pairs.append((ours, CLIPTokenizer.from_pretrained(str(folder))))
    return pairs


def parts(tokenizers, encoders, context="final", vector=None):
    """As much of a StableDiffusion as conditioning looks at."""
    variant = SimpleNamespace(context=context, size=64, force_zeros=True)
    unet = SimpleNamespace(config=UNetConfig(vector=vector))
    return SimpleNamespace(tokenizers=tokenizers, text_encoders=encoders, variant=variant, unet=unet, stage=None)


@pytest.fixture(scope="module")
def sd1(tokenizers):
    theirs, ours = text_pair(16, 3)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=theirs,
        tokenizer=tokenizers[0][1],
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return parts([tokenizers[0][0]], [ours]), pipe


@pytest.fixture(scope="module")
def sdxl(tokenizers):
    first, second = text_pair(16, 3), text_pair(24, 4, 20, "gelu")
    pipe = StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=first[0],
        tokenizer=tokenizers[0][1],
        text_encoder_2=second[0],
        tokenizer_2=tokenizers[1][1],
    )
    encoders = [first[1], second[1]]
    return parts([ours for ours, _ in tokenizers], encoders, "penultimate", 20 + 6 * 256), pipe


def close(ours, theirs):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- parity with diffusers -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sd1_equals_diffusers(sd1):
    sd, pipe = sd1
    expected, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "blurry")
    close(encode_prompts(sd, [PROMPT]).context, expected)
    close(encode_prompts(sd, [PROMPT, "blurry"]).context, torch.cat([expected, negative]))
    encoder, ids = pipe.text_encoder, pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    skipped = encoder.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-2])
    close(encode_prompts(sd, [PROMPT], clip_skip=2).context, skipped)
    assert (skipped - expected).abs().max() > 0.1  # so that one could not pass for the other
    assert encode_prompts(sd, [PROMPT]).vector is None


@torch.no_grad()
def test_sd2_equals_diffusers(tokenizers):
    theirs, ours = text_pair(16, 2, activation="gelu")
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=theirs,
        tokenizer=tokenizers[1][1],
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    expected = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    close(encode_prompts(parts([tokenizers[1][0]], [ours]), [PROMPT]).context, expected)


@torch.no_grad()
def test_sdxl_equals_diffusers(sdxl):
    sd, pipe = sdxl
    context, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, negative_prompt="blurry")
    close(encode_prompts(sd, [PROMPT, "blurry"]).context, torch.cat([context, negative]))
    numbers = torch.tensor([[480, 640, 8, 16, 512, 768]])
    sizes = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(numbers.flatten()).reshape(1, -1)
    ours = encode_prompts(sd, [PROMPT, "blurry"], size=(768, 512), original=(640, 480), crop=(16, 8)).vector
    close(ours, torch.cat([torch.cat([pooled, negative_pooled]), sizes.repeat(2, 1)], dim=1))
    square = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    close(encode_prompts(sd, [PROMPT]).vector, size_vector(pooled, square))
    skipped = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, clip_skip=1)[0]
    close(encode_prompts(sd, [PROMPT], clip_skip=3).context, skipped)  # diffusers' 0 is the penultimate
    assert torch.equal(encode_prompts(sd, [PROMPT], clip_skip=2).context, encode_prompts(sd, [PROMPT]).context)


@torch.no_grad()
def test_sdxl_base_reads_zeros_for_an_empty_negative(sdxl):
    sd, pipe = sdxl
    _, negative, _, negative_pooled = pipe.encode_prompt(PROMPT)
    planned = encode_prompt(sd, PROMPT, "", 4).negative(0)
    close(planned.context, negative)
    close(planned.vector[:, :20], negative_pooled)
    assert not negative.any() and encode_prompt(sd, PROMPT, "blurry", 4).negative(0).context.any()
    assert encode_prompt(sd, "", "", 4).positive(0)[0][0].context.any()
    edited = encode_prompt(sd, PROMPT, "[:ugly:0.5]", 4, like="a1111")  # which looks at all its texts at once
    assert (
        edited.negative(0).context.any()
        and not encode_prompt(sd, PROMPT, "", 4, like="a1111").negative(0).context.any()
    )


@torch.no_grad()
def test_refiner_equals_diffusers(tokenizers):
    theirs, ours = text_pair(24, 4, 20, "gelu")
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=theirs,
        tokenizer_2=tokenizers[1][1],
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    context, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT)
    sd = parts([tokenizers[1][0]], [ours], "penultimate", 20 + 5 * 256)
    planned = encode_prompt(sd, PROMPT, "", 4, size=(96, 64))
    for one, states, pool, score in (
        (planned.positive(0)[0][0], context, pooled, 6.0),
        (planned.negative(0), negative, negative_pooled, 2.5),
    ):
        close(one.context, states)
        close(one.vector, size_vector(pool, torch.tensor([[64, 96, 0, 0, score]])))


def test_encoders_and_unet_of_different_models(tokenizers):
    sd = parts([tokenizers[0][0]], [text_pair(16, 2)[1]], "final", 2816)
    with pytest.raises(UserError, match="different models"):
        encode_prompts(sd, ["a"])


@pytest.mark.parametrize("skip", [0, 4, -1])
def test_clip_skip_out_of_bounds(sd1, skip):
    with pytest.raises(UserError, match="clip skip"):
        encode_prompts(sd1[0], ["a"], clip_skip=skip)


def test_gradients_reach_the_text_encoder(sd1):
    encode_prompts(sd1[0], ["a (cat:1.2)", "b"]).context.square().sum().backward()
    gradient = sd1[0].text_encoders[0].token.weight.grad
    assert gradient[2368].any() and gradient.isfinite().all()


# --- chunks ----------------------------------------------------------------------------------------------------------


def sizes(tokenizer, prompt, room=75):
    chunks = chunked(tokenizer, parse(prompt), room)
    words = [piece.text for piece in parse(prompt) if piece.weight]
    assert [key for chunk in chunks for key, _ in chunk] == [key for text in words for key in tokenizer.encode(text)]
    return [len(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a " * 180, [75, 75, 30]),
        ("a " * 55 + ", " + "b " * 30, [56, 30]),  # 20 positions back: what follows the comma moves on
        ("a " * 54 + ", " + "b " * 30, [75, 10]),  # 21: too far
        ("a " * 55 + ", " + "b " * 19, [75]),  # nothing follows: nothing moves
        ("a " * 74 + ", b", [75, 1]),
        ("a " * 75 + ", b", [75, 2]),
        ("a " * 60 + ", " + "b " * 5 + ", " + "c " * 90, [67, 75, 15]),
        ("a BREAK b c", [1, 2]),
        ("a " * 80 + "BREAK b", [75, 5, 1]),
        ("BREAK a BREAK BREAK b", [0, 1, 0, 1]),
        ("a BREAK", [1]),
    ],
)
def test_cutting(tokenizers, prompt, expected):
    assert sizes(tokenizers[0][0], prompt) == expected


def test_cutting_for_a_shorter_encoder(tokenizers):
    assert sizes(tokenizers[0][0], "a " * 50, room=22) == [22, 22, 6]


def test_vectors_of_a_learned_token_stay_together():
    tokenizer = Tokenizer.from_vocabulary(find_vocabulary())
    tokenizer.add("<style>", 8)
    assert sizes(tokenizer, "a " * 70 + "<style> b") == [70, 9]
    assert sizes(tokenizer, "a " * 60 + ", " + "b " * 11 + "<style> " + "c " * 80) == [72, 75, 13]
    with pytest.raises(UserError, match="<style>.*8 vectors"):
        chunked(tokenizer, parse("<style>"), 7)


@torch.no_grad()
def test_chunks_are_encoded_one_by_one(sd1):
    sd, _ = sd1
    whole = encode_prompts(sd, ["a cat BREAK b", "c"]).context
    assert whole.shape == (2, 2 * 77, 16)
    alone = [encode_prompts(sd, [text]).context for text in ("a cat", "b", "c", "")]
    close(whole, torch.cat([torch.cat(alone[:2], dim=1), torch.cat(alone[2:], dim=1)]))


@torch.no_grad()
def test_pooled_state_is_the_first_chunks(sdxl):
    sd, _ = sdxl
    close(encode_prompts(sd, ["a cat BREAK b"]).vector, encode_prompts(sd, ["a cat"]).vector)


@torch.no_grad()
def test_stack_fills_up_with_encoded_empty_chunks(sdxl):
    sd, _ = sdxl
    long, short, blank = (encode_prompts(sd, [text]) for text in ("a BREAK b BREAK c", "d", ""))
    both = stack([long, short], blank)
    expected = encode_prompts(sd, ["a BREAK b BREAK c", "d"])
    close(both.context, expected.context)
    close(both.vector, expected.vector)
    with pytest.raises(ValueError, match="empty"):
        stack([long, short])
    doubled = stack([short, short]).repeat(2)
    assert doubled.context.shape == (4, 77, 40) and doubled.concat is None
    assert torch.equal(doubled.row(3).vector, short.vector)


def test_stack_keeps_the_pictures_to_inpaint():
    one = Conditioning(torch.zeros(1, 77, 4), None, torch.ones(1, 5, 8, 8))
    assert stack([one, one]).concat.shape == (2, 5, 8, 8)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_multiply_and_the_mean_is_restored():
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = [[1, 1.5, 1, 0.5, 1], [1, 1, 1, 1, 1], [1, 1, 2, 1, 1]]
    weighted = weigh(states, weights)
    assert torch.equal(weighted[1], states[1])
    close(weighted.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    factors = (weighted / states)[0, :, 0]
    close(factors / factors[0], torch.tensor(weights[0]))
    times = states[0] * torch.tensor(weights[0])[:, None]
    close(weighted[0], times * states[0].mean() / times.mean())
    half = states.bfloat16()
    assert torch.equal(weigh(half, weights), weigh(half.float(), weights).bfloat16())


def test_weights_where_the_mean_says_nothing():
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    states -= states.mean(dim=2, keepdim=True)  # as after a final norm that was hardly trained
    weights = torch.tensor([1, 1.2, 1, 0.9, 1.5, 1])
    for noise in (0, 1e-7, -1e-7):
        weighted = weigh(states + noise, [weights.tolist()])
        scale = (weighted / ((states + noise) * weights[:, None])).mean()
        assert 1 / 1.5 <= scale <= 1.5


@torch.no_grad()
def test_weights_of_a_prompt(sd1):
    sd, _ = sd1
    plain = encode_prompts(sd, ["a cat b"]).context
    assert torch.equal(encode_prompts(sd, ["a (cat:1.0) b"]).context, plain)
    factors = (encode_prompts(sd, ["a (cat:1.3) b"]).context / plain)[0].mean(dim=1)
    close(factors / factors[0], torch.tensor([1, 1, 1.3, *[1] * 74]))  # start, a, cat, b, end, ...
    assert torch.equal(
        encode_prompts(sd, [[Weighted("a (cat:1.3) b")]]).context, encode_prompts(sd, [r"a \(cat:1.3\) b"]).context
    )


@pytest.mark.parametrize("weight", ["9" * 400, "-20000"])
def test_weights_out_of_bounds(sd1, weight):
    with pytest.raises(UserError, match="out of bounds"):
        encode_prompts(sd1[0], [f"a (cat:{weight})"])


# --- plans -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plan_encodes_each_text_once(sd1, monkeypatch):
    sd, _ = sd1
    seen = []
    forward = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, ids: seen.append(len(ids)) or forward(self, ids))
    planned = encode_prompt(sd, "[a|b] cat AND [:BREAK d:5]:0.5", "[x:y:0.2]", LATE_STEPS)
    assert seen == [5, 2]  # five texts of one chunk in one call, one of two chunks in another
    monkeypatch.undo()
    cats = {text: encode_prompts(sd, [f"{text} cat"]).context for text in "ab"}
    for step in range(LATE_STEPS):
        (first, one), (second, half) = planned.positive(step)
        assert (one, half) == (1.0, 0.5)
        close(first.context, cats["ab"[step % 2]])
        assert first.context.shape == planned.negative(step).context.shape == (1, 77, 16)
        assert second.context.shape == (1, 77 if step < 5 else 154, 16)  # as many chunks as its text needs
        assert second is planned.positive(0 if step < 5 else 9)[1][0]
        assert planned.negative(step) is planned.negative(0 if step < 2 else 9)
    assert planned.negative(1) is not planned.negative(2)
    close(planned.positive(9)[1][0].context, encode_prompts(sd, ["BREAK d"]).context)


def test_plan_of_a_second_pass(sd1):
    planned = encode_prompt(sd1[0], "[a:b:1.5]", "x AND y", LATE_STEPS, first_pass=20)
    assert planned.parts == ((1.0, ("a",) * 5 + ("b",) * 5),)
    assert set(planned.negatives) == {"x AND y"}  # a negative prompt has no parts


# --- as other programs read them -------------------------------------------------------------------------------------


def positive(sd, prompt, like, **options):
    return encode_prompt(sd, prompt, "", 4, like=like, **options).positive(0)[0][0]


@torch.no_grad()
def test_joined_texts_are_encoded_apart(sdxl):
    """ComfyUI's ConditioningConcat: along the tokens, with the vector of the first; each text weighs by itself."""
    sd, _ = sdxl
    texts = ["a (boat:1.4), " + "a " * 80, "(at:0.5) sea", "BREAK"]
    whole = positive(sd, " <concat> ".join(texts), "comfyui")
    alone = [positive(sd, text, "comfyui") for text in texts]
    close(whole.context, torch.cat([one.context for one in alone], dim=1))
    close(whole.vector, alone[0].vector)
    assert whole.context.shape[1] == 4 * 77 and positive(sd, "a BREAK b", "comfyui").context.shape[1] == 77
    assert positive(sd, "a <concat> b", "a1111").context.shape[1] == 77
    assert describe(sd, "a <concat> b BREAK", like="comfyui").splitlines() == [
        "chunk 1 of 2: 1 of 75 tokens", "   1.000  a</w>", "chunk 2 of 2: 2 of 75 tokens", "   1.000  b</w> break</w>"
    ]  # fmt: skip


@torch.no_grad()
def test_the_exclamation_mark_is_a_word_in_a1111_and_comfyui(sdxl, monkeypatch):
    sd, _ = sdxl
    seen = []
    forward = TextEncoder.forward
    monkeypatch.setattr(
        TextEncoder, "forward", lambda self, ids: seen.append(ids[0, :5].tolist()) or forward(self, ids)
    )
    for like, mark in (("a1111", 256), ("comfyui", 256), ("diffusers", 0), (None, 0)):
        seen.clear()
        positive(sd, "wow!", like)
        assert seen[:2] == [[START, 2781, 256, END, END], [START, 2781, mark, END, 0]]  # padded as ever
    monkeypatch.undo()
    for like in ("a1111", "comfyui"):
        assert describe(sd, "go!", like=like).splitlines() == ["chunk 1 of 1: 2 of 75 tokens", "   1.000  go</w> !</w>"]


@torch.no_grad()
def test_clip_skip_as_each_program_counts_it(sd1, sdxl, tokenizers):
    """A1111 skips layers of OpenAI's encoder alone; ComfyUI counts the last layer of SD 2's, which is not stored."""
    sd2 = parts([tokenizers[1][0]], [text_pair(16, 3, activation="gelu")[1]])
    refiner = parts([tokenizers[1][0]], [text_pair(24, 4, 20, "gelu")[1]], "penultimate", 20 + 5 * 256)

    def context(sd, like, skip):
        return positive(sd, "a cat", like, clip_skip=skip).context

    own = [{skip: context(sd, None, skip) for skip in (1, 2, 3)} for sd in (sd1[0], sd2, sdxl[0], refiner)]
    assert all((layers[3] - layers[1]).abs().max() > 0.1 for layers in own)  # so that one could not pass for the other
    expected = {  # the skips of diffusers' that 1, 2 and 3 are
        "a1111": [(1, 2, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)],
        "comfyui": [(1, 2, 3), (1, 1, 2), (1, 2, 3), (1, 2, 3)],
    }
    for like, skips in expected.items():
        for sd, layers, same in zip((sd1[0], sd2, sdxl[0], refiner), own, skips, strict=True):
            for skip, ours in enumerate(same, 1):
                close(context(sd, like, skip), layers[ours])


@torch.no_grad()
def test_a_learned_word_by_its_file(sd1):
    tokenizer = Tokenizer.from_vocabulary(find_vocabulary())
    encoder = spread(TextEncoder(TextConfig(vocab=49410, width=8, layers=1, heads=1, mlp=8)))
    sd = parts([tokenizer], [encoder])
    tokenizer.add("mykitty", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [positive(sd, f"a embedding:{name}, b", "comfyui").context
                 for name in ("mykitty", "mykitty.pt", "sub/MyKitty.safetensors")]  # fmt: skip
    assert all(torch.equal(one, found[0]) for one in found)
    close(found[0], encode_prompts(sd, ["a mykitty, b"]).context)
    with pytest.warns(UserWarning, match="the model has no embedding 'dog', and the prompt is read without it"):
        without = positive(sd, "a (embedding:dog.pt:1.3) b", "comfyui").context
    close(without, encode_prompts(sd, ["a b"]).context)


# --- what `plainsd tokens` prints ------------------------------------------------------------------------------------


def test_describe(sd1):
    text = describe(sd1[0], "a (red:1.2) cat <lora:x:0.5>BREAK [b|c] AND d:2", steps=4)
    assert text.splitlines() == [
        "LoRA x, strength 0.5",
        "part 1 of 2, weight 1",
        "steps 1, 3 of 4",
        "chunk 1 of 2: 3 of 75 tokens",
        "   1.000  a</w>",
        "   1.200  red</w>",
        "   1.000  cat</w>",
        "chunk 2 of 2: 1 of 75 tokens",
        "   1.000  b</w>",
        "steps 2, 4 of 4",
        "chunk 1 of 2: 3 of 75 tokens",
        "   1.000  a</w>",
        "   1.200  red</w>",
        "   1.000  cat</w>",
        "chunk 2 of 2: 1 of 75 tokens",
        "   1.000  c</w>",
        "part 2 of 2, weight 2",
        "chunk 1 of 1: 1 of 75 tokens",
        "   1.000  d</w>",
    ]
    assert "steps 1-5 of 10" in describe(sd1[0], "[a:b:.5]", steps=10)
    assert "steps 1-6 of 10" in describe(sd1[0], "[a:b:.5]", steps=10, like="a1111")
    words = describe(sd1[0], "((a:0.5)) [b:c:.5] AND d", like="comfyui")
    assert "part" not in words and "steps" not in words and "   0.500  a</w>" in words and "and</w> d</w>" in words
    with pytest.raises(UserError, match="unknown like 'comfy'"):
        describe(sd1[0], "a", like="comfy")
    assert describe(sd1[0], "cat " * 200).count("cat</w>") == 200


def test_describe_shows_two_tokenizers_only_where_they_differ(sdxl):
    assert describe(sdxl[0], "a cat").splitlines() == ["chunk 1 of 1: 2 of 75 tokens", "   1.000  a</w> cat</w>"]
    assert describe(sdxl[0], "go!").splitlines() == [
        "text encoder 1",
        "chunk 1 of 1: 2 of 75 tokens",
        "   1.000  go</w> !</w>",
        "text encoder 2",
        "chunk 1 of 1: 2 of 75 tokens",
        "   1.000  go</w> !",
    ]


def test_learned_tokens_are_read_by_the_encoder(tokenizers):
    tokenizer = Tokenizer.from_vocabulary(find_vocabulary())
    config = TextConfig(vocab=49410, width=8, layers=1, heads=1, mlp=8)
    sd = parts([tokenizer], [spread(TextEncoder(config))])
    assert tokenizer.add("<cat>", 2) == [49408, 49409]
    with torch.no_grad():
        before = encode_prompts(sd, ["a <cat>"]).context
        sd.text_encoders[0].token.weight[49409] *= -1
        change = (encode_prompts(sd, ["a <cat>"]).context - before)[0].abs().sum(dim=1)
    assert (change[:3] == 0).all() and (change[3:] > 0).all()  # start, a, first vector; the second and later
