"""Adapters under ComfyUI's and OneTrainer's names, as LoraSave writes them, and words that come with a LoRA."""

import pytest
import torch
from conftest import TINY_XL, tiny_sd
from safetensors.torch import save_file
from torch import nn

import plainsd
from plainsd.adapters.baking import baked
from plainsd.adapters.embeddings import vectors_of
from plainsd.adapters.lora import add_lora, attached, merge, save_lora
from plainsd.adapters.names import adaptable_networks, modules_by_name
from plainsd.errors import UserError
from plainsd.files.convert import read
from plainsd.pictures.conditioning import size_vector
from plainsd.reports.info import info

CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
IDS = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(1))
SIZES = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)


@pytest.fixture(params=["sd", "xl"])
def pair(request):
    """Two models of the same kind."""
    variant = {} if request.param == "sd" else {"variant": TINY_XL}
    return [tiny_sd(**variant, seed=seed).to(dtype=torch.float64) for seed in (0, 1)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def outputs(sd):
    config = sd.unet.config
    vector = size_vector(randn(2, 16, seed=2), SIZES) if config.vector else None
    out = [sd.unet(randn(2, 4, 8, 8), 500.0, randn(2, 5, config.context, seed=1), vector)]
    for encoder in sd.text_encoders:
        out += [encoder(IDS).final, encoder(IDS).pooled]
    return out


def same(one, other, rel):
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= rel * b.norm()


def comfy(part, module):
    return (
        f"diffusion_model.{module.original}"
        if part == "unet"
        else f"text_encoders.{CLIPS[part]}.transformer.{module.diffusers}"
    )


def one_trainer(part, module):
    return f"unet.{module.original}" if part == "unet" else f"{CLIPS[part]}.{module.diffusers}"


def lora_save(pair, name_of, *, whole):
    """What ComfyUI's LoraSave makes of two models' difference, with biases: all of it, or its singular vectors."""
    tensors = {}
    for part, network in adaptable_networks(pair[0]).items():
        for ours, module in modules_by_name(network).items():
            one, other = (adaptable_networks(sd)[part].get_submodule(ours) for sd in pair)
            change, key = (other.weight - one.weight).detach(), name_of(part, module)
            if whole or change.ndim < 2:
                tensors[f"{key}.diff"] = change
            else:
                u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
                up, down = u * s, vh.unflatten(1, change.shape[1:])
                tensors[f"{key}.lora_up.weight"] = up if change.ndim == 2 else up[:, :, None, None]
                tensors[f"{key}.lora_down.weight"] = down
            if getattr(one, "bias", None) is not None:
                tensors[f"{key}.diff_b"] = (other.bias - one.bias).detach()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize("name_of", [comfy, one_trainer])
@pytest.mark.parametrize("whole", [True, False], ids=["full_diff", "standard"])
def test_the_difference_of_two_models(pair, tmp_path, name_of, whole):
    """Layers, norms, tables of tokens and of positions, and all biases: the one becomes the other."""
    tensors = lora_save(pair, name_of, whole=whole)
    tensors["text_encoders.clip_l.transformer.text_projection.diff"] = randn(32, 32)  # ComfyUI's, which nothing reads
    save_file(tensors, tmp_path / "it.safetensors")
    sd, wanted = pair
    bare, right = outputs(sd), outputs(wanted)
    lora = add_lora(sd, tmp_path / "it.safetensors")
    kinds = {type(adaptable_networks(sd)[part].get_submodule(name)).__bases__[1] for part, name in lora.adapters}
    assert kinds == {nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding}
    same(outputs(sd), right, 1e-11)
    assert not any(torch.allclose(one, other) for one, other in zip(bare, right, strict=True))
    lora.set_strength(0)
    same(outputs(sd), bare, 1e-12)
    lora.set_strength(1)
    merge([lora])
    same(outputs(sd), right, 1e-11)
    for one, other in zip(adaptable_networks(sd).values(), adaptable_networks(wanted).values(), strict=True):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


def test_a_norm_of_another_size(tmp_path):
    sd = tiny_sd()
    save_file({"lora_unet_conv_norm_out.w_norm": torch.zeros(64)}, tmp_path / "it.safetensors")
    with pytest.raises(UserError, match=r"w_norm' has shape \[64\]"):
        add_lora(sd, tmp_path / "it.safetensors")
    save_file({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b": torch.zeros(64)},
              tmp_path / "it.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"diff_b' has shape \[64\]"):  # which has no bias
        add_lora(sd, tmp_path / "it.safetensors")
    assert not attached(sd)


# --- words that come along -------------------------------------------------------------------------------------------

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def with_words(path, words, width=32):
    factors = {f"{KEY}.lora_down.weight": torch.zeros(4, width), f"{KEY}.lora_up.weight": torch.zeros(32, 4)}
    save_file(factors | {f"bundle_emb.{name}": vectors for name, vectors in words.items()}, path)
    return path


@pytest.mark.parametrize("key", ["clip_l", "emb_params", "string_to_param.*"])
def test_a_word_comes_along(tmp_path, key):
    sd, vectors = tiny_sd(), randn(3, 32).float()
    path = with_words(tmp_path / "it.safetensors", {f"<my.cat>.{key}": vectors, f"dog.{key}": vectors[0].clone()})
    lora = add_lora(sd, path)
    assert torch.equal(vectors_of(sd, "<my.cat>")[0], vectors) and torch.equal(vectors_of(sd, "dog")[0], vectors[:1])
    assert "words           <my.cat>, dog" in info(path)
    lora.remove()
    add_lora(sd, with_words(path, {f"<my.cat>.{key}": 2 * vectors}))  # the word is there, and gets the new vectors
    assert torch.equal(vectors_of(sd, "<my.cat>")[0], 2 * vectors)
    assert not sd.text_encoders[0](torch.tensor([sd.tokenizers[0].encode("a <my.cat>")])).final.isnan().any()


def test_a_word_for_both_encoders_of_sdxl(tmp_path):
    sd, one, two = tiny_sd(TINY_XL), randn(2, 32).float(), randn(2, 32, seed=1).float()
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{key}.lora_down.weight": torch.zeros(4, 64), f"{key}.lora_up.weight": torch.zeros(64, 4)}
    words = {"bundle_emb.cat.clip_l": one, "bundle_emb.cat.clip_g": two}
    save_file(factors | words, tmp_path / "it.safetensors")
    add_lora(sd, tmp_path / "it.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(vectors_of(sd, "cat"), (one, two), strict=True))


def test_a_checkpoint_holds_no_words(tmp_path):
    path = with_words(tmp_path / "it.safetensors", {"cat.clip_l": torch.zeros(1, 32)})
    plainsd.save(tiny_sd(), tmp_path / "model")
    contents = read(tmp_path / "model")
    with pytest.raises(UserError, match="brings words along, which a checkpoint cannot hold.*--lora-partial"):
        baked(contents, [(path, 1.0)])
    baked(contents, [(path, 1.0)], partial_fit=True)


def test_biases_are_saved_with_a_lora(tmp_path):
    """In kohya's naming alone."""
    sd, fresh = (tiny_sd().to(dtype=torch.float64) for _ in range(2))
    key = "lora_unet_conv_in"
    factors = {f"{key}.lora_down.weight": randn(2, 4, 3, 3), f"{key}.lora_up.weight": randn(32, 2, 1, 1)}
    save_file(factors | {f"{key}.diff_b": randn(32)}, tmp_path / "it.safetensors")
    add_lora(sd, tmp_path / "it.safetensors")
    save_lora(sd, tmp_path / "again.safetensors")
    add_lora(fresh, tmp_path / "again.safetensors")
    same(outputs(fresh), outputs(sd), 1e-12)
    with pytest.raises(UserError, match="cannot tell"):
        save_lora(sd, tmp_path / "no.safetensors", "peft")


@pytest.mark.parametrize(
    "words, message",
    [
        ({"cat.clip_l_out": torch.zeros(1, 32)}, "not supported, 'bundle_emb.cat.clip_l_out'; known are"),
        ({"cat.clip_l": torch.zeros(1, 768)}, "holds vectors of 768 numbers for SD 1.x, and this model"),
        ({"cat.clip_l": torch.zeros(1, 32), "cat.clip_g": torch.zeros(1, 32)}, "holds vectors of 32 and 32"),
        ({"cat.clip_l": torch.full((1, 32), float("nan"))}, "not finite"),
        ({"a.clip_l": torch.zeros(1, 32)}, "the vocabulary has"),
    ],
)
def test_words_that_do_not_fit(tmp_path, words, message):
    sd = tiny_sd()
    with pytest.raises(UserError, match=message):
        add_lora(sd, with_words(tmp_path / "it.safetensors", words))
    assert not attached(sd)
