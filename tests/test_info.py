"""What `plainsd info` says, and that it reads no weights to say it."""

import json
import re

import pytest
import torch
from conftest import with_variant
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, model

from plainsd.checkpoint import save, save_vae
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files import tensorfile
from plainsd.reports.info import info


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """Only single numbers, such as a LoRA's alphas, may be read."""
    read = tensorfile._Pages.read

    def watched(pages, start, dtype, shape, wanted=None):
        return read(pages, start, dtype, shape, wanted) if not shape else pytest.fail("weights are read")

    monkeypatch.setattr(tensorfile._Pages, "read", watched)


def test_a_folder(tmp_path):
    save(model("odd"), tmp_path / "m", dtype="float16")
    said = info(tmp_path / "m")
    for part in (
        "a model of sizes of its own (odd), a diffusers folder",
        "v_prediction",
        "zero terminal SNR",
        "64 px",
        "ddim, 12 steps, guidance 3.5",
        "float16",
        "channels 16-24-32, context 16, 12 in",
        "12 latent channels of 1/4, scaling factor 0.61",
    ):
        assert part in said
    numbers = sum(p.numel() for p in model("odd").unet.parameters())
    assert f"{numbers:,} numbers, float16, {2 * numbers / 1e6:,.1f} MB" in said


def test_models_with_less_of_a_middle(tmp_path):
    for name, what in (("ssd-1b", "a middle of one ResBlock"), ("bk-sdm-small", "no middle")):
        save(model(name), tmp_path / name)
        assert what in info(tmp_path / name)


def test_a_single_file(tmp_path, small_families):
    sd = model("sd2-768")
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    assert "v_prediction" in info(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.pop("v_pred").shape == (0,)
    tensors |= {"betas": torch.rand(50)}
    save_file(tensors, tmp_path / "b.safetensors", metadata={"modelspec.title": "A \x1b[31mmodel\nof mine"})
    said = info(tmp_path / "b.safetensors")
    assert "the file does not tell" in said and "not used" in said and "50 numbers" in said
    assert "modelspec.title: A  [31mmodel of mine" in said
    less = {key: tensor for key, tensor in tensors.items() if not key.startswith("first_stage_model.")}
    save_file(less, tmp_path / "c.safetensors")
    assert "without VAE (give one with --vae)" in info(tmp_path / "c.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "d.ckpt")
    assert "text_encoder" in info(tmp_path / "d.ckpt")


BESIDE = ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "control_model.input_hint_block.0.weight",
          "embedding_manager.embedder.initial_embeddings")  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_adapters_in_a_checkpoint_do_not_make_it_one(tmp_path, small_families, name):
    save(model("sd1"), tmp_path / "a.safetensors", layout="single-file")
    tensors = load_file(tmp_path / "a.safetensors") | {name: torch.zeros(31)}
    save_file(tensors, tmp_path / "b.safetensors")
    said = info(tmp_path / "b.safetensors")
    assert "b.safetensors: sd1, a single file" in said and re.search("not used +31 numbers", said)
    save_file(tensors | {"stray": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected \(stray\); it seems to be SD 1.x as a single file"):
        info(tmp_path / "c.safetensors")


def lora(width: int) -> dict[str, torch.Tensor]:
    start = "lora_unet_down_blocks_0_attentions_0_"
    return {
        f"{start}proj_in.lora_down.weight": torch.zeros(8, 320, 1, 1),
        f"{start}proj_in.lora_up.weight": torch.zeros(320, 8, 1, 1),
        f"{start}proj_in.alpha": torch.tensor(4.0),
        f"{start}transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(16, width),
        f"{start}transformer_blocks_0_attn2_to_k.lora_up.weight": torch.zeros(320, 16),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.zeros(8, 320, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.zeros(320, 8, 1, 1),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(8, 768),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(3072, 8),
    }


@pytest.mark.parametrize("width,family", [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_a_lora(tmp_path, width, family):
    tags = {"10_cat": {"cat": 10, "grass": 3}, "5_dog": {"dog": 7, "grass": 4}}
    notes = {"ss_network_dim": "16", "ss_learning_rate": "1e-4", "ss_tag_frequency": json.dumps(tags), "empty": "None"}
    save_file(lora(width), tmp_path / "l.safetensors", metadata=notes)
    said = info(tmp_path / "l.safetensors").splitlines()
    assert said[0].endswith("l.safetensors: a LoRA")
    table = {line[2:17].strip(): line[18:] for line in said[1:]}
    assert table["made for"] == family
    assert table["rank"] == "8 (3 modules), 16 (1 modules)" and table["alpha"] == "4"
    assert table["unet"] == "2 linear layers, 1 convolutions" and table["text_encoder"] == "1 linear layers"
    assert "    ss_learning_rate: 1e-4" in said and "    ss_network_dim: 16" in said
    assert "    most frequent tags: cat (10), grass (7), dog (7)" in said
    assert not any("empty" in line for line in said)


AFTER = ", after the file, as in A1111"
WORDS = {  # file, what is in it, the word and the vectors as they are told
    "cat.safetensors": ({"emb_params": torch.zeros(3, 768)}, f"cat{AFTER}", "3 vectors of 768 numbers, SD 1.x"),
    "learned_embeds.safetensors": ({"<cat>": torch.zeros(1024)}, "<cat>", "1 vectors of 1024 numbers, SD 2.x"),
    "xl.safetensors": (
        {"clip_g": torch.zeros(2, 1280), "clip_l": torch.zeros(2, 768)},
        f"xl{AFTER}",
        "2 vectors of 768 and 1280 numbers, SDXL",
    ),
    "cat.pt": (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(4, 20)}, "name": "cat"},
        f"cat{AFTER}",
        "4 vectors of 20 numbers",
    ),
    "renamed.pt": (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(4, 20)}, "name": "ca\nt"},
        f"renamed{AFTER}; diffusers calls it ca t",
        "4 vectors of 20 numbers",
    ),
    "learned_embeds.bin": ({"<cat>": torch.zeros(2, 768)}, "<cat>", "2 vectors of 768 numbers, SD 1.x"),
}


@pytest.mark.parametrize("name", WORDS)
def test_an_embedding(tmp_path, name):
    content, word, said = WORDS[name]
    (save_file if name.endswith(".safetensors") else torch.save)(content, tmp_path / name)
    lines = f"{tmp_path / name}: a textual-inversion embedding\n  the word        {word}\n  made of         {said}"
    assert info(tmp_path / name) == lines
    if name.startswith("learned"):
        assert info(tmp_path) == info(tmp_path / name)


def test_a_lora_in_a_folder(tmp_path):
    save_file(lora(768), tmp_path / "pytorch_lora_weights.safetensors")
    assert info(tmp_path) == info(tmp_path / "pytorch_lora_weights.safetensors")


def test_other_files(tmp_path):
    save_vae(model("sd1").vae, tmp_path / "vae", FAMILIES["sd1"])
    assert "a VAE" in info(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors", metadata={"ss_tag_frequency": "no table"})
    assert "no kind of file known here" in info(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="there is no model at"):
        info(tmp_path / "none")


@pytest.mark.parametrize(
    "kind, factors, rank",
    [
        ("LoHa", {"hada_w1_a": (320, 4), "hada_w1_b": (4, 768), "hada_w2_a": (320, 4), "hada_w2_b": (4, 768)}, "4"),
        ("LoKr", {"lokr_w1": (4, 4), "lokr_w2": (80, 192)}, "none: whole factors"),
    ],
)
def test_lycoris(tmp_path, kind, factors, rank):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{key}.{name}": torch.zeros(shape) for name, shape in factors.items()}, tmp_path / "l.safetensors")
    table = {line[2:17].strip(): line[18:] for line in info(tmp_path / "l.safetensors").splitlines()[1:]}
    assert (table["kind"], table["rank"], table["unet"]) == (kind, rank, "1 linear layers")


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--variant-file", "fp16"], "float16")])
def test_the_files_of_a_variant(tmp_path, capsys, flags, dtype):
    both, _ = with_variant(tmp_path)
    assert main(["info", str(both), *flags]) == 0
    assert set(re.findall(r"float\d+", capsys.readouterr().out)) == {dtype}
