"""Models from files and back: both layouts, every family, and what a user gets wrong."""

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import TINY, VOCABULARY, tiny_sd
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import plainsd.detect
from plainsd.checkpoint import choose_device, choose_dtype, convert, load, load_vae, save, save_vae
from plainsd.configs import read_unet, read_variant
from plainsd.detect import detect, probe
from plainsd.errors import UserError
from plainsd.folder import whole_folder
from plainsd.models.clip import TextConfig
from plainsd.models.unet import UNetConfig
from plainsd.models.vae import VAEConfig
from plainsd.tensorfile import TensorFile, open_tensors, write_safetensors
from plainsd.variants import VARIANTS, ScheduleConfig, Variant

CPU = {"device": "cpu", "dtype": "float32"}
QUICK = TextConfig(vocab=len(VOCABULARY), width=16, layers=2, heads=2, mlp=24, eos=len(VOCABULARY) - 1)
GELU = replace(QUICK, activation="gelu", width=24)
BIG = replace(GELU, projection=24)
SMALL_VAE = VAEConfig(channels=(8, 16), layers=1, groups=4)
SMALL_UNET = UNetConfig(channels=(16, 32), depth=(1, 0), heads=(2, 2), layers=1, context=16, groups=8)
XL_UNET = replace(SMALL_UNET, depth=(0, 2), mid_depth=2, context=40, vector=24 + 6 * 256)

FAMILIES = {                          # one of each kind, in sizes for a test
    "sd1": Variant("sd1", SMALL_UNET, SMALL_VAE, (QUICK,), size=32),
    "sd1-inpainting": Variant("sd1-inpainting", replace(SMALL_UNET, in_channels=9), SMALL_VAE, (QUICK,), size=32),
    "sd1-lcm": Variant("sd1-lcm", replace(SMALL_UNET, guidance_dim=12), SMALL_VAE, (QUICK,), size=32, sampler="lcm"),
    "sd2-base": Variant("sd2-base", replace(SMALL_UNET, context=24, heads=(1, 4)), SMALL_VAE, (GELU,), size=32,
                        conv_projections=False),
    "sd2-768": Variant("sd2-768", replace(SMALL_UNET, context=24, heads=(1, 4)), SMALL_VAE, (GELU,), size=48,
                       conv_projections=False, prediction="v_prediction"),
    "sdxl-base": Variant("sdxl-base", XL_UNET, SMALL_VAE, (QUICK, BIG), size=64, conv_projections=False,
                         context="penultimate", guidance=5.0),
    "sdxl-refiner": Variant("sdxl-refiner", replace(XL_UNET, context=24, vector=24 + 5 * 256), SMALL_VAE, (BIG,),
                            size=64, conv_projections=False, context="penultimate"),
    "odd": Variant("odd", UNetConfig(channels=(16, 24, 32), depth=(0, 1, 1), heads=(1, 3, 4), context=16, in_channels=12,
                                     out_channels=12, groups=8, layers=1),
                   VAEConfig(channels=(8, 8, 16), layers=1, groups=4, latent_channels=12, scaling_factor=0.61),
                   (replace(QUICK, positions=24),), ScheduleConfig(zero_terminal_snr=True), "v_prediction", size=64,
                   guidance=3.5, sampler="ddim", steps=12, spacing="trailing"),
}
EACH = pytest.mark.parametrize("name", FAMILIES)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def small_families(monkeypatch):
    """The table of known models, in sizes for a test: for files without notes of ours."""
    monkeypatch.setattr(plainsd.detect, "VARIANTS", FAMILIES)


def model(name: str):
    sd = tiny_sd(FAMILIES[name])
    for tokenizer, text in zip(sd.tokenizers, sd.variant.text, strict=True):
        tokenizer.max_length = text.positions
    return sd


def same_networks(a, b) -> bool:
    pairs = zip([a.unet, a.vae, *a.text_encoders], [b.unet, b.vae, *b.text_encoders], strict=True)
    return all(same_tensors(x.state_dict(), y.state_dict()) for x, y in pairs)


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and torch.equal(x, b[name]) for name, x in a.items())


def weights(folder: Path) -> dict:
    """All tensors of a folder."""
    return {f"{path.parent.name}/{name}": tensor for part in PARTS for path in sorted(folder.glob(f"{part}/*.safetensors"))
            for name, tensor in load_file(path).items()}


def without_notes(path: Path) -> Path:
    """A single file as others write it."""
    other = path.with_name("bare-" + path.name)
    save_file(load_file(path), other)
    return other


# --- saved and loaded ------------------------------------------------------------------------------------------------

@EACH
def test_a_folder_holds_the_whole_model(tmp_path, name):
    sd = model(name)
    save(sd, tmp_path / "m")
    again = load(tmp_path / "m", **CPU)
    assert again.variant == sd.variant and again.prediction == sd.prediction and again.path == tmp_path / "m"
    assert same_networks(sd, again)
    assert torch.equal(sd.schedule.alphas_cumprod, again.schedule.alphas_cumprod)
    assert [t.encode("Hello, world") for t in again.tokenizers] == [t.encode("Hello, world") for t in sd.tokenizers]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@EACH
def test_a_single_file_holds_the_whole_model(tmp_path, name):
    sd = model(name)
    save(sd, tmp_path / "m.safetensors", layout="single-file")
    again = load(tmp_path / "m.safetensors", **CPU)
    assert again.variant == sd.variant and same_networks(sd, again)
    assert [t.encode("Hello, world") for t in again.tokenizers] == [t.encode("Hello, world") for t in sd.tokenizers]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["sd1", "sd2-base", "odd"])
@torch.no_grad()
def test_diffusers_opens_what_we_save(tmp_path, name, caplog):
    """And its networks compute the same."""
    sd = model(name)
    save(sd, tmp_path / "m")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "m", safety_checker=None)
    assert "not expected" not in caplog.text
    x, context = torch.randn(2, sd.unet.config.in_channels, 8, 8), torch.randn(2, 7, sd.unet.config.context)
    timesteps = torch.tensor([7, 700])
    theirs = pipeline.unet(x, timesteps, context).sample
    assert torch.allclose(sd.unet(x, timesteps, context), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())
    latents = x[:, : sd.vae.config.latent_channels]
    assert torch.allclose(sd.vae.decode(latents), pipeline.vae.decode(latents).sample, rtol=1e-4, atol=1e-5)
    ids = pipeline.tokenizer("hello a", padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == sd.text_encoders[0].config.positions
    assert torch.allclose(sd.text_encoders[0](ids).final, pipeline.text_encoder(ids)[0], rtol=1e-4, atol=1e-5)
    assert pipeline.vae.config.scaling_factor == sd.vae.config.scaling_factor
    assert pipeline.scheduler.config.prediction_type == sd.prediction
    assert pipeline.scheduler.config.rescale_betas_zero_snr == sd.variant.schedule.zero_terminal_snr
    assert torch.allclose(pipeline.scheduler.alphas_cumprod[:-1].double(), sd.schedule.alphas_cumprod[:-1], rtol=1e-4)


@torch.no_grad()
def test_diffusers_opens_sdxl(tmp_path):
    sd = model("sdxl-base")
    save(sd, tmp_path / "m")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[512, 5, 9, 513] + [513] * 73])
    first, second = pipeline.text_encoder(ids, output_hidden_states=True), pipeline.text_encoder_2(
        ids, output_hidden_states=True)
    mine = [encoder(ids) for encoder in sd.text_encoders]
    assert torch.allclose(mine[0].hidden[-2], first.hidden_states[-2], atol=1e-5)
    assert torch.allclose(mine[1].hidden[-2], second.hidden_states[-2], atol=1e-5)
    assert torch.allclose(mine[1].pooled, second.text_embeds, atol=1e-5)
    x, context, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 40), torch.randn(1, 24)
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]])
    theirs = pipeline.unet(x, 5, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    from plainsd.conditioning import size_vector
    assert torch.allclose(sd.unet(x, 5, context, size_vector(pooled, ids.float())), theirs, rtol=1e-3, atol=1e-4)


def test_types_are_kept_or_cast(tmp_path):
    sd = model("sd1")
    save(sd, tmp_path / "half", dtype="float16")
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.float16}
    assert load(tmp_path / "half", device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    sd.to(dtype=torch.bfloat16)
    save(sd, tmp_path / "own.safetensors", layout="single-file")
    assert {t.dtype for t in load_file(tmp_path / "own.safetensors").values()} == {torch.bfloat16}


def test_saving_replaces_a_model_whole(tmp_path):
    save(model("sd1"), tmp_path / "m")
    (tmp_path / "m" / "unet" / "old.txt").write_text("x")
    save(model("odd"), tmp_path / "m")
    assert load(tmp_path / "m", **CPU).variant.name == "odd" and not (tmp_path / "m" / "unet" / "old.txt").exists()


def test_a_failed_save_leaves_things_as_they_were(tmp_path, monkeypatch):
    save(model("sd1"), tmp_path / "m")
    before = weights(tmp_path / "m")
    calls = []

    def fail(*args, **named):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write_safetensors(*args, **named)

    monkeypatch.setattr("plainsd.folder.write_safetensors", fail)
    monkeypatch.setattr("plainsd.single.write_safetensors", fail)
    for target in ("m", "new"):
        calls.clear()
        with pytest.raises(UserError, match="No space left"):
            save(model("odd"), tmp_path / target)
    calls[:] = [None, None]
    with pytest.raises(UserError, match="No space left"):
        save(model("odd"), tmp_path / "m.safetensors", layout="single-file")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert same_tensors(weights(tmp_path / "m"), before)


# --- from layout to layout -------------------------------------------------------------------------------------------

def public_extras(name: str) -> dict[str, torch.Tensor]:
    """Tensors that public single files of a family hold beside the networks."""
    ids = torch.arange(77)[None]
    if name.startswith("sd1"):
        return {"betas": torch.rand(9), "alphas_cumprod": torch.rand(9), "model_ema.decay": torch.tensor(0.5),
                "posterior_mean_coef1": torch.rand(9), "sqrt_recipm1_alphas_cumprod": torch.rand(9),
                "model_ema.diffusion_modelout0weight": torch.rand(3),
                "cond_stage_model.transformer.text_model.embeddings.position_ids": ids}
    if name.startswith("sd2"):
        block = "cond_stage_model.model.transformer.resblocks.23."
        return {"cond_stage_model.model.text_projection": torch.rand(24, 24), block + "ln_1.weight": torch.rand(24),
                block + "attn.in_proj_weight": torch.rand(72, 24), "cond_stage_model.model.logit_scale": torch.tensor(4.6)}
    if name == "sdxl-base":
        return {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": ids,
                "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6), "denoiser.sigmas": torch.rand(9)}
    return {"conditioner.embedders.0.model.logit_scale": torch.tensor(4.6)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "odd"])
def test_single_file_to_folder_and_back(tmp_path, name, small_families, monkeypatch):
    """A file as others write it: mixed types, and with the tensors that public files hold beside the networks."""
    sd = model(name)
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)      # in place of CLIP's vocabulary
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


def older(folder: Path, name: str) -> dict:
    """A folder as public ones are: old names of attention in the VAE, position_ids, or text encoders without prefix."""
    for path in sorted(folder.glob("*/*.safetensors")):
        tensors = load_file(path)
        for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
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
    for path in sorted((tmp_path / "a").rglob("*.*")):                    # settings and tokenizers come back as they were
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
    from plainsd.tokenizer import Tokenizer, find_vocabulary
    clip = Tokenizer.from_vocabulary(find_vocabulary())
    sd = tiny_sd(replace(FAMILIES["sdxl-base"], text=(replace(QUICK, vocab=49_408, eos=49_407),
                                                      replace(BIG, vocab=49_408, eos=49_407))))
    sd.tokenizers = [clip, Tokenizer.from_vocabulary(find_vocabulary(), pad="!")]
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    assert "vocab.json" not in open_tensors(tmp_path / "a.safetensors").metadata["plainsd.files"]
    again = load(tmp_path / "a.safetensors", **CPU)
    assert [t.pad for t in again.tokenizers] == [49_407, 0]
    assert again.tokenizers[0].encode("a photo of a cat") == clip.encode("a photo of a cat")


# --- files of many shapes --------------------------------------------------------------------------------------------

def test_pickled_checkpoint(tmp_path, small_families, monkeypatch):
    sd = model("sd1")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    torch.save({"state_dict": load_file(tmp_path / "a.safetensors"), "global_step": 7}, tmp_path / "a.ckpt")
    assert same_networks(load(tmp_path / "a.ckpt", **CPU), sd)


def test_shards_variants_and_pickles_in_a_folder(tmp_path):
    sd = model("sd1")
    save(sd, tmp_path / "m")
    unet = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    unet.unlink()
    names = sorted(tensors)
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[:50],
              "diffusion_pytorch_model-00002-of-00002.safetensors": names[50:]}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, unet.parent / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (unet.parent / f"{unet.name}.index.json").write_text(json.dumps(index))
    vae = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    text = tmp_path / "m" / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    assert same_networks(load(tmp_path / "m", **CPU), sd)
    with pytest.raises(UserError, match="no weights of the variant 'fp16'.*it holds config.json, diffusion_pytorch_model-0"):
        load(tmp_path / "m", variant_file="fp16", **CPU)
    save(sd, tmp_path / "h", dtype="float16")
    for path in (tmp_path / "h").glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert load(tmp_path / "h", variant_file="fp16", device="cpu", dtype="float16").dtype == torch.float16
    with pytest.raises(UserError, match="holds no weights"):
        load(tmp_path / "h", **CPU)


def test_another_vae(tmp_path):
    sd, other = model("sd1"), model("sd1").vae
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.config = replace(other.config, scaling_factor=0.5)
    save(sd, tmp_path / "m")
    save_vae(other, tmp_path / "vae", sd.variant)
    original = {key.removeprefix("first_stage_model."): t for key, t in _single(sd, other, tmp_path).items()
                if key.startswith("first_stage_model.")}
    save_file(original | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}, tmp_path / "o.safetensors")
    for place, scale in (("vae", 0.5), ("o.safetensors", 0.18215), ("vae/diffusion_pytorch_model.safetensors", 0.18215)):
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
    with pytest.raises(UserError, match="names missing .first_stage_model.encoder.conv_in.weight"):
        load(tmp_path / "a.safetensors", **CPU)
    assert same_networks(load(tmp_path / "a.safetensors", vae=tmp_path / "vae", **CPU), sd)


# --- which family ----------------------------------------------------------------------------------------------------

def header_of(variant: Variant) -> TensorFile:
    """A single file of a full-size model, without its numbers."""
    from plainsd.contents import empty, parts, place_shape
    from plainsd.layouts import places
    from plainsd.single import prefixes
    from plainsd.tensorfile import Stored
    tensors = {}
    for name, (kind, config) in parts(variant).items():
        bare = empty(kind, config)
        shapes = {key: tensor.shape for key, tensor in bare.state_dict().items()}
        prefix, layout = prefixes(variant)[name]
        for place in places(bare, layout, conv=variant.conv_projections):
            tensors[prefix + place.name] = Stored(torch.float16, tuple(place_shape(place, shapes)), None)
    return TensorFile(Path("any-name.safetensors"), tensors, {})


@pytest.mark.parametrize("name", ["sd1", "sd1-inpainting", "sd1-lcm", "sd2-inpainting", "sdxl-base", "sdxl-inpainting",
                                  "sdxl-lcm", "sdxl-refiner"])
def test_family_by_shapes(name):
    assert detect(header_of(VARIANTS[name])) == (VARIANTS[name], True)


def test_family_where_shapes_cannot_tell():
    file = header_of(VARIANTS["sd2-768"])
    variant, certain = detect(file)
    assert variant.name == "sd2-base" and not certain
    assert detect(file, "sd2-768") == (VARIANTS["sd2-768"], True)
    assert detect(file, "sd2-turbo")[0].steps == 1
    noted = replace(file, metadata={"modelspec.prediction_type": "v"})
    assert detect(noted) == (VARIANTS["sd2-768"], True)
    with pytest.raises(UserError, match="does not fit the family sdxl-base.*seems to be SD 2.x"):
        detect(file, "sdxl-base")
    with pytest.raises(UserError, match="unknown model family 'sd3'; .*choose from sd1"):
        detect(file, "sd3")


def test_sdxl_with_v_prediction_says_so_by_empty_tensors():
    file = header_of(VARIANTS["sdxl-base"])
    marked = replace(file, tensors=file.tensors | {"v_pred": None, "ztsnr": None})
    variant, certain = detect(marked)
    assert certain and variant.prediction == "v_prediction" and variant.schedule.zero_terminal_snr
    assert variant.spacing == "trailing" and variant.name == "sdxl-base"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_a_network_predicts_is_asked_of_it(prediction):
    """A network that gives back the noise it sees, and one that gives mostly something else."""
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.conv_in = UNetConfig(), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x, timestep, context):
            picture = torch.linspace(-1, 1, 32).expand(1, 4, 32, 32)
            return x + 0.3 * picture if prediction == "epsilon" else 0.07 * x - picture

    assert probe(Network()) == prediction


def test_an_unmarked_sd2_file_is_asked_what_it_predicts(tmp_path, small_families, monkeypatch):
    sd = model("sd2-768")
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    monkeypatch.setattr("plainsd.single.probe", lambda unet: "v_prediction")
    again = load(without_notes(tmp_path / "a.safetensors"), **CPU)
    assert again.variant == sd.variant and again.prediction == "v_prediction"


PUBLIC = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8,
          "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "sample_size": 64}


@pytest.mark.parametrize("setting,value", [
    ("act_fn", "gelu"), ("class_embed_type", "timestep"), ("dual_cross_attention", True), ("conv_in_kernel", 5),
    ("layers_per_block", [1, 2, 2, 2]), ("block_out_channels", [320]), ("addition_embed_type", "image"),
    ("mid_block_type", None), ("down_block_types", ["AttnDownBlock2D"] * 4), ("transformer_layers_per_block", [[1], 2]),
    ("cross_attention_dim", [768, 1, 1, 1]), ("attention_head_dim", 0), ("reverse_transformer_layers_per_block", [1, 2]),
])
def test_settings_that_we_cannot_compute_are_refused(setting, value):
    assert read_unet(PUBLIC, "x")[0] == UNetConfig()
    with pytest.raises(UserError) as error:
        read_unet(PUBLIC | {setting: value}, "x/config.json")
    assert str(error.value).startswith("x/config.json: ") and "\n" not in str(error.value)


def test_public_settings_are_known_by_name():
    """The settings files of public folders, as far as they matter, give the table's own entries."""
    from plainsd.configs import write_variant
    for name, variant in VARIANTS.items():
        files = {path: json.loads(text) for path, text in write_variant(variant).items()}
        del files["model_index.json"]["_plainsd"]
        for path in files:
            if "text_encoder" in path:
                files[path] |= {"eos_token_id": 2, "bos_token_id": 0}          # as in the public files
        assert read_variant(files.__getitem__, "x") == replace(variant, spacing=variant.spacing), name


# --- where models lie ------------------------------------------------------------------------------------------------

def in_cache(folder: Path, name: str, sd) -> Path:
    """A hub cache that holds a model."""
    repository = folder / f"models--{name.replace('/', '--')}"
    save(sd, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    return repository / "snapshots" / "0123abcd"


def test_hub_name_from_the_cache_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sd = model("sd1")
    where = in_cache(tmp_path, "somebody/small-model", sd)
    again = load("somebody/small-model", **CPU)
    assert same_networks(again, sd) and again.path == where
    with pytest.raises(UserError, match="cache does not hold it, and the hub cannot be reached"):
        load("somebody/another-model", **CPU)
    save(sd, where / "one.safetensors", layout="single-file")
    assert same_networks(load("somebody/small-model/one.safetensors", **CPU), sd)


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/no/such/place", "../x/y", "what ever/it is"])
def test_no_model_there(name):
    with pytest.raises(UserError, match="there is no model at") as error:
        load(name)
    assert "\n" not in str(error.value)


def test_devices_and_types():
    assert choose_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    assert choose_dtype("auto", torch.device("meta")) == torch.float32
    with pytest.raises(UserError, match="unknown dtype 'floot16'; did you mean 'float16'"):
        choose_dtype("floot16", torch.device("cpu"))
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        choose_device("gpu")
    assert choose_device("cpu") == torch.device("cpu")


# --- what goes wrong -------------------------------------------------------------------------------------------------

def damage(folder: Path, change) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(tensors: dict) -> None:
    for name in sorted(tensors)[:7]:
        tensors["x." + name] = tensors.pop(name)


def narrow(tensors: dict) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()


WRONG = {
    "missing and unexpected names": (
        lambda m: damage(m, rename), r"7 names missing \((\S+, ){5}\.\.\.\), 7 unexpected \(x\.conv_in.bias, (\S+, ){4}\.\.\."),
    "wrong shape": (lambda m: damage(m, narrow), r"'conv_in.weight' has shape \[16, 3, 3, 3\].*call for \[16, 4, 3, 3\]"),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), r"cannot read .*vae/config.json.*needs this file"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "has no folder 'tokenizer'"),
    "no weights": (lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
    "no index": (lambda m: (m / "model_index.json").unlink(), "cannot read .*model_index.json"),
    "index is no JSON": (lambda m: (m / "model_index.json").write_text("{"), "model_index.json is damaged: it is not JSON"),
    "index is a list": (lambda m: (m / "model_index.json").write_text("[]"), "not a table of settings"),
    "settings are no text": (lambda m: (m / "unet" / "config.json").write_bytes(b"\xff\xfe"), "it is not text"),
    "a LoRA as UNet": (lambda m: save_file({"lora_unet_x.lora_down.weight": torch.zeros(2)},
                                           m / "unet" / "diffusion_pytorch_model.safetensors"), "seems to be a LoRA"),
    "the VAE as UNet": (lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").replace(
        m / "unet" / "diffusion_pytorch_model.safetensors"), "seems to be a VAE"),
    "truncated weights": (lambda m: os.truncate(m / "vae" / "diffusion_pytorch_model.safetensors", 5000), "is damaged"),
    "index of shards is damaged": (lambda m: [
        (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        (m / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": [1]}')], "lists no files"),
    "unknown scheduler": (lambda m: (m / "scheduler" / "scheduler_config.json").write_text(
        '{"beta_schedule": "sigmoid"}'), "beta_schedule 'sigmoid'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_bad_folders(tmp_path, kind):
    save(model("sd1"), tmp_path / "m")
    change, message = WRONG[kind]
    change(tmp_path / "m")
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "m", **CPU)
    assert "\n" not in str(error.value)


def test_bad_single_files(tmp_path, small_families):
    save(model("sd1"), tmp_path / "a.safetensors", layout="single-file")
    tensors = load_file(without_notes(tmp_path / "a.safetensors"))
    name = "model.diffusion_model.out.2.weight"
    save_file({key: t for key, t in tensors.items() if key != name} | {"strange": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=rf"1 names missing \({name}\), 1 unexpected \(strange\); it seems to be SD 1.x"):
        load(tmp_path / "b.safetensors", **CPU)
    for content, what in (({"lora_te_x.lora_up.weight": torch.zeros(1)}, "a LoRA"),
                          ({"double_blocks.0.x": torch.zeros(1)}, "FLUX"), ({"x": torch.zeros(1)}, "no kind of file known")):
        save_file(content, tmp_path / "c.safetensors")
        with pytest.raises(UserError, match=f"is no single-file checkpoint: it seems to be {what}"):
            load(tmp_path / "c.safetensors", **CPU)
    save_file(tensors, tmp_path / "d.safetensors", metadata={"plainsd.files": "[1"})
    with pytest.raises(UserError, match="the note 'plainsd.files' in its metadata is not JSON"):
        load(tmp_path / "d.safetensors", **CPU)
    save_file(tensors, tmp_path / "d.safetensors", metadata={"plainsd.files": '{"unet/config.json": "{}"}'})
    with pytest.raises(UserError, match="settings 'model_index.json' in its metadata are incomplete"):
        load(tmp_path / "d.safetensors", **CPU)


def test_places_that_cannot_be_written(tmp_path):
    sd = model("sd1")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x")
    for target, message in ((tmp_path / "file" / "m", "cannot write"), (tmp_path / "other", "no folder of a model"),
                            (tmp_path / "file", "no folder of a model")):
        with pytest.raises(UserError, match=message):
            save(sd, target)
    with pytest.raises(UserError, match="cannot write"):
        save(sd, tmp_path / "file" / "m.safetensors", layout="single-file")
    with pytest.raises(UserError, match="written as .safetensors"):
        save(sd, tmp_path / "m.ckpt", layout="single-file")
    with pytest.raises(UserError, match="unknown layout 'difusers'; did you mean 'diffusers'"):
        save(sd, tmp_path / "m", layout="difusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_an_interrupted_folder_vanishes(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "m") as folder:
        (folder / "x").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# --- full size -------------------------------------------------------------------------------------------------------

@pytest.mark.full
def test_memory_while_loading():
    """SD 1.x in float32 loaded as bfloat16: the networks, a small share on top, and one tensor as it stands in the file."""
    spec = importlib.util.spec_from_file_location("load_memory", Path(__file__).parents[1] / "bench" / "load_memory.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    peak, size, largest = bench.measure("sd1", "float32", "bfloat16")
    assert size == 2 * (859_520_964 + 83_653_863 + 123_060_480)
    assert size < peak < 1.15 * size + largest
