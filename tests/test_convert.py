"""From layout to layout and back, bit for bit; shards, variants, pickles, a VAE from elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_sd, with_variant
from diffusers import AutoencoderTiny, ControlNetModel, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from small_models import BIG, CPU, EACH, FAMILIES, QUICK, model, same_networks, same_tensors, weights

from plainsd.checkpoint import load, load_vae, save, save_vae
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.convert import convert, read
from plainsd.files.folder import file_variant
from plainsd.files.recipe import with_recipe
from plainsd.files.tensorfile import open_tensors
from plainsd.text.tokenizer import Tokenizer, find_vocabulary

# --- from layout to layout -------------------------------------------------------------------------------------------


def public_extras(name: str) -> dict[str, torch.Tensor]:
    """Tensors that public single files of a family hold beside the networks."""
    ids = torch.arange(77)[None]
    if name.startswith("sd1"):
        return {
            "betas": torch.rand(9),
            "alphas_cumprod": torch.rand(9),
            "model_ema.decay": torch.tensor(0.5),
            "posterior_mean_coef1": torch.rand(9),
            "sqrt_recipm1_alphas_cumprod": torch.rand(9),
            "model_ema.diffusion_modelout0weight": torch.rand(3),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": ids,
            "embedding_manager.embedder.initial_embeddings": torch.rand(3),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.rand(3, 3),
            "control_model.input_hint_block.0.weight": torch.rand(3, 3, 3, 3),
        }
    if name.startswith("sd2"):
        block = "cond_stage_model.model.transformer.resblocks.23."
        return {
            "cond_stage_model.model.text_projection": torch.rand(24, 24),
            block + "ln_1.weight": torch.rand(24),
            "cond_stage_model.model.logit_scale": torch.tensor(4.6),
            block + "attn.in_proj_weight": torch.rand(72, 24),
        }
    if name == "sdxl-base":
        return {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": ids,
            "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
            "conditioner.embedders.0.text_projection": torch.rand(16, 16),  # ComfyUI, 2023
            "denoiser.sigmas": torch.rand(9),
        }
    return {"conditioner.embedders.0.model.logit_scale": torch.tensor(4.6)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "odd"])
def test_single_file_to_folder_and_back(tmp_path, name, small_families, monkeypatch):
    """A file as others write it: mixed types, and with the tensors that public files hold beside the networks."""
    sd = model(name)
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)  # in place of CLIP's vocabulary
    save(sd, tmp_path / "a.safetensors", layout="single-file", dtype="float16")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors = {key: t.float() if "out" in key and "attn" not in key else t for key, t in tensors.items()}
    tensors |= public_extras(name)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", family=name)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "single-file")
    assert same_tensors(load_file(tmp_path / "c.safetensors"), tensors)
    assert same_networks(load(tmp_path / "b", **CPU), load(tmp_path / "a.safetensors", family=name, **CPU))
    assert load(tmp_path / "c.safetensors", **CPU).variant == FAMILIES[name]


def test_single_file_with_other_spellings(tmp_path, small_families, monkeypatch):
    """Files of 2022 that were merged by hand have the text encoder's names without `text_model.`."""
    sd = model("sd1")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    tensors = {
        key.replace("transformer.text_model.", "transformer."): t
        for key, t in load_file(tmp_path / "a.safetensors").items()
    }
    tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    assert "text_encoder/text_model.final_layer_norm.bias" in weights(tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c.safetensors", "single-file")
    assert same_tensors(load_file(tmp_path / "c.safetensors"), tensors)
    assert same_networks(load(tmp_path / "a.safetensors", **CPU), sd)


def test_a_projection_that_is_not_transposed(tmp_path, small_families, monkeypatch):
    """diffusers' conversion script of 2023 wrote SDXL's as transformers has it."""
    sd = model("sdxl-base")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    tensors, name = load_file(tmp_path / "a.safetensors"), "conditioner.embedders.1.model.text_projection"
    tensors[f"{name}.weight"] = tensors.pop(name).T.contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    assert same_networks(load(tmp_path / "a.safetensors", family="sdxl-base", **CPU), sd)
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", family="sdxl-base")
    assert same_networks(load(tmp_path / "b", **CPU), sd)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "single-file")
    assert same_tensors(load_file(tmp_path / "c.safetensors"), tensors)


OLD_ATTENTION = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))


def older(folder: Path, name: str) -> dict:
    """A folder as public ones are: old names of attention in the VAE, position_ids, or text encoders without prefix."""
    for path in sorted(folder.glob("*/*.safetensors")):
        tensors = load_file(path)
        for new, old in OLD_ATTENTION:
            if path.parent.name == "vae" and name.startswith("sd1"):
                tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
        if path.parent.name.startswith("text_encoder"):
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            if name == "sd2-base":
                tensors = {key.replace("text_model.", ""): tensor for key, tensor in tensors.items()}
        save_file(tensors, path)
    return weights(folder)


@EACH
def test_folder_to_single_file_and_back(tmp_path, name):
    sd = model(name)
    save(sd, tmp_path / "a")
    before = older(tmp_path / "a", name)
    assert ("vae/encoder.mid_block.attentions.0.query.weight" in before) == name.startswith("sd1")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "single-file")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    assert same_tensors(weights(tmp_path / "c"), before)
    for path in sorted((tmp_path / "a").rglob("*.*")):  # settings and tokenizers come back as they were
        if path.suffix != ".safetensors":
            assert (tmp_path / "c" / path.relative_to(tmp_path / "a")).read_text("utf-8") == path.read_text("utf-8")
    for folder in ("a", "c"):
        assert same_networks(load(tmp_path / folder, **CPU), sd)
    if not sd.unet.config.vector and sd.unet.config.in_channels != 9:
        StableDiffusionPipeline.from_pretrained(tmp_path / "c")


def test_converting_can_cast(tmp_path):
    save(model("sd1"), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "diffusers", dtype="float16")
    assert {t.dtype for t in weights(tmp_path / "b").values()} == {torch.float16}


def test_clip_vocabulary_is_not_stored_in_a_single_file(tmp_path):
    """A file with CLIP's own tokens needs none: they are found; with `!` as padding for OpenCLIP's encoders."""
    clip = Tokenizer.from_vocabulary(find_vocabulary())
    sd = tiny_sd(
        replace(
            FAMILIES["sdxl-base"],
            text=(replace(QUICK, vocab=49_408, eos=49_407), replace(BIG, vocab=49_408, eos=49_407)),
        )
    )
    sd.tokenizers = [clip, Tokenizer.from_vocabulary(find_vocabulary(), pad="!")]
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    assert "vocab.json" not in open_tensors(tmp_path / "a.safetensors").metadata["plainsd.files"]
    with pytest.warns(UserWarning, match="a.safetensors has no tokenizer: CLIP's own stands in$"):
        again = load(tmp_path / "a.safetensors", **CPU)
    assert [t.pad for t in again.tokenizers] == [49_407, 0]
    assert again.tokenizers[0].encode("a photo of a cat") == clip.encode("a photo of a cat")
    clip.save(tmp_path / "tokenizer")
    with pytest.warns(UserWarning, match="no tokenizer: .*tokenizer, which is beside it, stands in$"):
        load(tmp_path / "a.safetensors", **CPU)


# --- files of many shapes --------------------------------------------------------------------------------------------


def test_pickled_checkpoint(tmp_path, small_families, monkeypatch):
    sd = model("sd1")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    torch.save({"state_dict": load_file(tmp_path / "a.safetensors"), "global_step": 7}, tmp_path / "a.ckpt")
    again = load(tmp_path / "a.ckpt", **CPU)
    assert same_networks(again, sd)
    with open(tmp_path / "a.ckpt", "r+b") as file:
        file.write(bytes((tmp_path / "a.ckpt").stat().st_size))  # nothing of the model is left in the file
    assert same_networks(again, sd)


def test_shards_variants_and_pickles_in_a_folder(tmp_path):
    sd = model("sd1")
    save(sd, tmp_path / "m")
    unet = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    unet.unlink()
    names = sorted(tensors)
    shards = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[:50],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[50:],
    }
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, unet.parent / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (unet.parent / f"{unet.name}.index.json").write_text(json.dumps(index))
    first, second = shards
    save_file({key: tensors[key] for key in [*shards[second], names[0]]}, unet.parent / second)
    with pytest.raises(UserError, match=f"'{names[0]}' is in another file of the same model too"):
        load(tmp_path / "m", **CPU)
    for shard in (first, second):
        save_file({key: tensors[key] for key in shards[shard]} | {"": torch.zeros(1)}, unet.parent / shard)
    with pytest.raises(UserError, match="'' is in another file of the same model too"):
        load(tmp_path / "m", **CPU)
    for shard in (first, second):
        save_file({key: tensors[key] for key in shards[shard]}, unet.parent / shard)
    vae = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    text = tmp_path / "m" / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    assert same_networks(load(tmp_path / "m", **CPU), sd)
    with pytest.raises(UserError, match="no weights of the variant 'fp16'.*it holds config.json, diffusion_py"):
        load(tmp_path / "m", variant_file="fp16", **CPU)
    save(sd, tmp_path / "h", dtype="float16")
    for path in (tmp_path / "h").glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert load(tmp_path / "h", variant_file="fp16", device="cpu", dtype="float16").dtype == torch.float16
    read = "unet/diffusion_pytorch_model.fp16.safetensors, vae/.*fp16.safetensors, text_encoder/model.fp16.safetensors"
    with pytest.warns(UserWarning, match=f"has no plain files of weights: read {read}"):
        half = load(tmp_path / "h", device="cpu", dtype="float16")
    assert same_networks(half, load(tmp_path / "h", variant_file="fp16", device="cpu", dtype="float16"))
    vae = tmp_path / "h" / "vae"
    (vae / "diffusion_pytorch_model.fp16.safetensors").rename(vae / "diffusion_pytorch_model.non_ema.safetensors")
    save_file({"x": torch.zeros(1)}, vae / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model.bf16.safetensors does not fit its settings"):
        load(tmp_path / "h", **CPU)


@pytest.mark.parametrize("name", ["sd1", "sdxl-base"])
def test_diffusers_draws_with_a_half_folder_that_it_is_told_nothing_of(tmp_path, name):
    """transformers computes in what the settings or the file say, diffusers in float32: the parts must agree."""
    save(model(name), tmp_path / "m", dtype="float16")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "m")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    latents = pipe("a", num_inference_steps=1, output_type="latent", height=32, width=32).images
    assert latents.isfinite().all() and latents.dtype == torch.float32
    half = DiffusionPipeline.from_pretrained(tmp_path / "m", torch_dtype=torch.float16)
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}
    half.save_pretrained(tmp_path / "theirs")
    assert '"float16"' in (tmp_path / "theirs" / "text_encoder" / "config.json").read_text()
    convert(tmp_path / "theirs", tmp_path / "again", dtype="bfloat16")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert {again.unet.dtype, again.vae.dtype, again.text_encoder.dtype} == {torch.float32}


@pytest.mark.parametrize(
    "name,kind",
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json", None),
        ("config.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("pytorch_model.non_ema.bin", "non_ema"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
    ],
)
def test_variants_by_the_names_of_files(name, kind):
    assert file_variant(name) == kind


def test_the_files_of_a_variant(tmp_path, monkeypatch):
    both, alone = with_variant(tmp_path)
    assert main(["convert", str(both), str(tmp_path / "half"), "--variant-file", "fp16"]) == 0
    assert same_tensors(weights(tmp_path / "half"), weights(alone))
    assert main(["convert", str(both), str(tmp_path / "plain")]) == 0
    assert same_networks(load(tmp_path / "plain", **CPU), tiny_sd())
    verified = []
    monkeypatch.setattr("plainsd.reports.verify.verify", lambda *given, **named: verified.append((given, named)) or ())
    assert main(["verify", str(both), "--variant-file", "fp16"]) == 0
    assert verified[0][0] == (str(both),) and verified[0][1]["variant_file"] == "fp16"


def test_parts_that_are_not_written_are_not_named(tmp_path):
    """Public folders of SD 1.x have a safety checker, and name it; diffusers would look for it in a folder of ours."""
    save(model("sd1"), tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"],
              "controlnet": ["diffusers", "ControlNetModel"],
              "_class_name": "StableDiffusionControlNetPipeline"}  # fmt: skip
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    convert(tmp_path / "m", tmp_path / "other", "diffusers")
    written = json.loads((tmp_path / "other" / "model_index.json").read_text())
    assert written["safety_checker"] == written["feature_extractor"] == written["controlnet"] == [None, None]
    assert written["_class_name"] == "StableDiffusionPipeline" and written["scheduler"][0] == "diffusers"
    (tmp_path / "m" / "controlnet").mkdir()
    (tmp_path / "m" / "controlnet" / "config.json").write_text("{}")
    convert(tmp_path / "m", tmp_path / "m", "diffusers")
    assert (tmp_path / "m" / "controlnet" / "config.json").is_file()  # in place it is not lost
    assert written["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_leftovers_of_an_overwritten_model_go(tmp_path):
    save(model("sd1"), tmp_path / "a.safetensors")
    tensors, own = load_file(tmp_path / "a.safetensors"), dict(open_tensors(tmp_path / "a.safetensors").metadata)
    save_file(tensors | {"model_ema.decay": torch.tensor(0.5)}, tmp_path / "a.safetensors", own)
    convert(tmp_path / "a.safetensors", tmp_path / "m")
    assert (tmp_path / "m" / "leftovers.safetensors").is_file()
    save(model("sd1"), tmp_path / "m")
    assert not (tmp_path / "m" / "leftovers.safetensors").exists()


def test_another_vae(tmp_path):
    sd, other = model("sd1"), model("sd1").vae
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.config = replace(other.config, scaling_factor=0.5)
    save(sd, tmp_path / "m")
    save_vae(other, tmp_path / "vae", sd.variant)
    original = {
        key.removeprefix("first_stage_model."): t
        for key, t in _single(sd, other, tmp_path).items()
        if key.startswith("first_stage_model.")
    }
    beside = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    save_file(original | beside, tmp_path / "o.safetensors")
    alone = "vae/diffusion_pytorch_model.safetensors"
    for place, scale in (("vae", 0.5), ("o.safetensors", 0.18215), (alone, 0.18215)):
        again = load(tmp_path / "m", vae=tmp_path / place, **CPU)
        assert same_tensors(again.vae.state_dict(), other.state_dict())
        assert again.vae.config.scaling_factor == again.variant.vae.scaling_factor == scale
    assert same_tensors(load_vae(tmp_path / "m", **CPU).state_dict(), sd.vae.state_dict())


def _single(sd, vae, folder: Path) -> dict:
    save(replace(sd, vae=vae), folder / "s.safetensors", layout="single-file")
    return load_file(folder / "s.safetensors")


def test_single_file_without_vae(tmp_path, small_families, monkeypatch):
    sd = model("sd1")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    save_vae(sd.vae, tmp_path / "vae", sd.variant)
    tensors = {key: t for key, t in _single(sd, sd.vae, tmp_path).items() if not key.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["tokens", "a", "--model", str(tmp_path / "a.safetensors")]) == 0  # which reads no weights
    with pytest.raises(UserError, match=r"a.safetensors holds no autoencoder \(VAE\); give one with --vae, or put"):
        load(tmp_path / "a.safetensors", **CPU)
    assert same_networks(load(tmp_path / "a.safetensors", vae=tmp_path / "vae", **CPU), sd)
    with pytest.raises(UserError, match="a.safetensors is SD 1.x as a single file and holds no autoencoder"):
        load(tmp_path / "a.safetensors", vae=tmp_path / "a.safetensors", **CPU)


def test_a_copy_beside_a_tokenizers_files_is_left(tmp_path):
    """A file manager's `vocab copy.json` has no name in a single file."""
    save(tiny_sd(), tmp_path / "m")
    (tmp_path / "m" / "tokenizer" / "vocab copy.json").write_text("{}")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "m.safetensors")]) == 0
    assert same_networks(load(tmp_path / "m.safetensors", **CPU), load(tmp_path / "m", **CPU))


def test_a_whole_checkpoint_as_vae(tmp_path):
    """Its own autoencoder is used; where the file notes a scaling factor, with that."""
    sd, other = model("sd1"), model("sd1")
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 1
    other.vae.config = replace(other.vae.config, scaling_factor=0.5)
    save(sd, tmp_path / "m")
    save(other, tmp_path / "o.safetensors")
    tensors = load_file(tmp_path / "o.safetensors")
    save_file(tensors | {"first_stage_model.loss.logvar": torch.zeros(1)}, tmp_path / "bare.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "o.ckpt")
    for name, scale in (("o.safetensors", 0.5), ("bare.safetensors", 0.18215), ("o.ckpt", 0.18215)):
        again = load(tmp_path / "m", vae=tmp_path / name, **CPU)
        assert same_tensors(again.vae.state_dict(), other.vae.state_dict()) and again.latent_rgb is None
        assert again.vae.config.scaling_factor == again.variant.vae.scaling_factor == scale
        assert same_tensors(again.unet.state_dict(), sd.unet.state_dict())


def test_convert_with_another_vae(tmp_path):
    sd, other = model("sd1"), model("sd1")
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 1
    other.vae.config = replace(other.vae.config, scaling_factor=0.5)
    save(sd, tmp_path / "m")
    save(other, tmp_path / "o")
    for target in ("n", "n.safetensors"):
        command = ["convert", str(tmp_path / "m"), str(tmp_path / target), "--vae", str(tmp_path / "o")]
        assert main(command) == 0
        again = load(tmp_path / target, **CPU)
        assert same_networks(again, replace(sd, vae=other.vae)) and again.variant.vae.scaling_factor == 0.5
    (tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # not wanted, so it may be missing
    assert main([*command[:3], "--vae", str(tmp_path / "o")]) == 0


# --- what a single file has to keep ----------------------------------------------------------------------------------


CLIP_SD1 = (replace(QUICK, vocab=49_408, eos=49_407),)


def shifted(tokenizer):
    """CLIP's tokenizer with all ids moved on by two, start and end first."""
    last = ("<|startoftext|>", "<|endoftext|>")
    words = [*last, *(word for word in sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.get) if word not in last)]
    return Tokenizer({word: number for number, word in enumerate(words)}, tokenizer.merges)


@pytest.mark.parametrize("case", ["other ids", "other padding", "another length"])
def test_a_tokenizer_that_no_stand_in_equals_is_kept(tmp_path, case):
    own = Tokenizer.from_vocabulary(find_vocabulary(), pad="!" if case == "other padding" else "<|endoftext|>")
    own = shifted(own) if case == "other ids" else own
    own.max_length = 40 if case == "another length" else 77
    sd = tiny_sd(replace(FAMILIES["sd1"], text=(replace(CLIP_SD1[0], eos=own.end),)))
    sd.tokenizers = [own]
    save(sd, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b")
    for again in (load(tmp_path / name, **CPU).tokenizers[0] for name in ("a.safetensors", "b")):
        assert again.encode("a red apple") == own.encode("a red apple")
        assert (again.start, again.end, again.pad, again.max_length) == (own.start, own.end, own.pad, own.max_length)


def test_numbers_beyond_float16_are_refused_and_nothing_is_written(tmp_path, capsys):
    sd = model("sd1")
    with torch.no_grad():
        sd.unet.conv_in.weight[0, 0, 0, 0] = 1e5
    save(sd, tmp_path / "a")
    save(sd, tmp_path / "a.safetensors")
    before = sorted(tmp_path.iterdir())
    for source in ("a", "a.safetensors"):
        for target in ("b", "b.safetensors"):
            assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--dtype", "float16"]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and ".weight has numbers that float16 cannot hold" in said
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(
        UserError, match="has numbers that float16 cannot hold"
    ):  # loading, which a CPU does not in float16
        read(tmp_path / "a").networks["unet"].build(torch.device("cpu"), torch.float16)


def test_the_index_names_the_class_of_another_vae(tmp_path):
    tiny = tmp_path / "tiny"
    save(model("sd1"), tmp_path / "m")
    sizes = {f"{way}_block_out_channels": (8, 8) for way in ("encoder", "decoder")}
    sizes |= {f"num_{way}_blocks": (1, 1) for way in ("encoder", "decoder")}
    AutoencoderTiny(latent_channels=4, **sizes).save_pretrained(tiny)
    convert(tmp_path / "m", tmp_path / "n", vae=tiny)
    index, config = (
        json.loads((tmp_path / "n" / name).read_text()) for name in ("model_index.json", "vae/config.json")
    )
    assert index["vae"] == ["diffusers", config["_class_name"]] == ["diffusers", "AutoencoderTiny"]


@pytest.mark.parametrize(
    "option, named",
    [({"vae": "nowhere"}, "--vae"), ({"prediction": "epsilon"}, "--prediction"), ({"change": lambda c: c}, "--lora")],
)
def test_options_of_whole_models_are_refused_for_a_controlnet(tmp_path, option, named):
    net = ControlNetModel(
        block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(8, 8, 8, 8),
    )  # fmt: skip
    net.save_pretrained(tmp_path / "net")
    with pytest.raises(UserError, match=f"is a ControlNet, and {named} change"):
        convert(tmp_path / "net", tmp_path / "other", **option)
    assert not (tmp_path / "other").exists()


def test_what_other_programs_noted_stays(tmp_path):
    save(model("sd1"), tmp_path / "a.safetensors")
    tensors, own = load_file(tmp_path / "a.safetensors"), dict(open_tensors(tmp_path / "a.safetensors").metadata)
    said = {
        "modelspec.title": "Owls",
        "modelspec.license": "MIT",
        "sd_merge_recipe": "{}",
        "modelspec.hash_sha256": "0x1",
        "modelspec.predict_key": "v",  # ComfyUI's word for what is written anew
    }
    save_file(tensors, tmp_path / "a.safetensors", own | said)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="bfloat16")
    found = open_tensors(tmp_path / "b.safetensors").metadata
    anew = dict.fromkeys(("modelspec.hash_sha256", "modelspec.predict_key"))
    assert {name: found.get(name) for name in said} == said | anew
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", change=lambda c: with_recipe(c, {"type": "x"}, {}))
    changed = open_tensors(tmp_path / "c.safetensors").metadata
    assert "modelspec.title" not in changed and json.loads(changed["sd_merge_recipe"]) == {"type": "x"}


def test_zero_snr_is_read_with_the_family_told_too(tmp_path, small_families):
    """`ztsnr` counts for v-prediction, whoever says that it is v."""
    save(model("sdxl-base"), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors") | {"ztsnr": torch.empty(0)}
    save_file(tensors, tmp_path / "a.safetensors")
    for family in (None, "sdxl-base"):
        variant = read(tmp_path / "a.safetensors", None, family, prediction="v_prediction").variant
        assert variant.prediction == "v_prediction" and variant.schedule.zero_terminal_snr, family
        assert variant.spacing == "trailing"
