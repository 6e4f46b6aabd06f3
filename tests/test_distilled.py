"""Turbo, Lightning, Hyper, LCM: known by a title or a name, drawn with their own settings, and said."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_models import CPU, FAMILIES, model, same_tensors, without_notes

from plainsd.checkpoint import load, save
from plainsd.files.configs import read_variant
from plainsd.files.configs_out import write_variant
from plainsd.files.convert import convert
from plainsd.files.distilled import distillation_named, with_distilled_settings
from plainsd.files.folder import public_name
from plainsd.files.names import places
from plainsd.files.renumbered import without_gaps
from plainsd.files.stored import empty
from plainsd.files.tensorfile import TensorFile
from plainsd.models.unet import UNet
from plainsd.models.variants import VARIANTS
from plainsd.reports.info import info

KINDS = {
    "sd_xl_turbo_1.0_fp16": "Turbo",
    "DreamShaperXL_Turbo_v2_1": "Turbo",
    "sdxl_lightning_4step": "Lightning",
    "dreamshaperXL_lightningDPMSDE": "Lightning",
    "RealVisXL_V4.0_Lightning": "Lightning",
    "realisticVisionV60B1_v51HyperVAE": "Hyper",
    "Hyper-SDXL-1step-Unet": "Hyper",
    "epicrealismXL_hyper": "Hyper",
    "juggernautXL_v10-hyper8steps": "Hyper",
    "dreamshaper_8LCM": "LCM",
    "LCM_Dreamshaper_v7": "LCM",
    "dmd2_sdxl_4step_unet": "DMD2",
    "realisticVisionV60B1_v51HyperInpaintVAE": "Hyper",
    "Juggernaut_XL_-_Hyper_by_RunDiffusion": "Hyper",
    "realisticVision_hyper_inpainting": "Hyper",
    "hyperRealism_v30": None,
    "Hyper_Realistic": None,
    "epic_hyper_realistic": None,
    "photoHyperRealism_v2": None,
    "some_hyperreal": None,
    "hyperMix_v1": None,
    "v1-5-pruned-emaonly": None,
    "turbulence": None,
    "sd_xl_base_1.0": None,
    "": None,
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_by_name(name):
    assert distillation_named(name) == KINDS[name]


def drawn(variant) -> tuple:
    return variant.name, variant.sampler, variant.steps, variant.guidance, variant.spacing, variant.size


@pytest.mark.parametrize(
    "base,names,settings",
    [
        ("sdxl-base", ["sd_xl_turbo_1.0_fp16"], ("sdxl-turbo", "euler_a", 1, 1.0, "trailing", 512)),
        ("sd2-base", ["sd_turbo"], ("sd2-turbo", "euler_a", 1, 1.0, "trailing", 512)),
        ("sdxl-base", ["Stable Diffusion XL Turbo", "x"], ("sdxl-turbo", "euler_a", 1, 1.0, "trailing", 512)),
        ("sdxl-base", ["", "turbovisionXL"], ("sdxl-base", "dpmpp_2m", 20, 5.0, None, 1024)),
        ("sdxl-base", ["", "DreamShaperXL_Turbo_v2_1"], ("sdxl-base", "dpmpp_sde", 6, 2.0, "karras", 1024)),
        ("sdxl-base", ["sdxl_lightning_8step"], ("sdxl-base", "euler", 8, 1.0, "trailing", 1024)),
        ("sdxl-base", ["My Lightning", "a_2step"], ("sdxl-base", "euler", 4, 1.0, "trailing", 1024)),
        ("sd1", ["x_HyperVAE"], ("sd1", "ddim", 8, 1.0, "trailing", 512)),
        ("sd1", ["dreamshaper_8LCM"], ("sd1", "lcm", 4, 1.5, None, 512)),
        ("sdxl-lcm", ["LCM_XL"], ("sdxl-lcm", "lcm", 4, 8.5, None, 1024)),
        ("sdxl-base", ["sd_xl_base_1.0"], ("sdxl-base", "dpmpp_2m", 20, 5.0, None, 1024)),
    ],
)
def test_settings_by_name(base, names, settings):
    variant, said = with_distilled_settings(VARIANTS[base], names)
    assert drawn(variant) == settings
    assert (said is None) == (variant == VARIANTS[base])
    if said:
        assert f"{settings[1]}, {settings[2]} steps, guidance {settings[3]:g}" in said


def test_a_single_file_by_its_title_or_its_name(tmp_path, small_families, monkeypatch):
    sd = model("sd1")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    save(sd, tmp_path / "m.safetensors", layout="single-file")
    tensors = load_file(tmp_path / "m.safetensors")
    save_file(tensors, tmp_path / "titled.safetensors", metadata={"modelspec.title": "A Lightning 2-step"})
    save_file(tensors, tmp_path / "x_lightning.safetensors")
    for name, steps in (("titled", 2), ("x_lightning", 4)):
        with pytest.warns(UserWarning, match=rf"distilled \(Lightning\): drawn with euler, {steps} steps"):
            again = load(tmp_path / f"{name}.safetensors", **CPU)
        assert drawn(again.variant)[1:5] == ("euler", steps, 1.0, "trailing")
        said = info(tmp_path / f"{name}.safetensors")
        assert f"euler, {steps} steps, guidance 1, spacing trailing" in said and "distilled (Lightning)" in said
    assert load(tmp_path / "x_lightning.safetensors", family="sd1", **CPU).variant == FAMILIES["sd1"]
    (tmp_path / "m.safetensors").rename(tmp_path / "m_turbo.safetensors")  # ours notes its settings
    assert load(tmp_path / "m_turbo.safetensors", **CPU).variant.steps == sd.variant.steps


def test_the_lightning_of_one_step_gives_x0(tmp_path, small_families, monkeypatch):
    """Its name alone says it; whoever knows better is believed."""
    sd = model("sdxl-base")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    monkeypatch.setattr("plainsd.files.predicted.probe", lambda unet: pytest.fail("it was asked"))
    save(sd, tmp_path / "a.safetensors")
    file = without_notes(tmp_path / "a.safetensors").rename(tmp_path / "sdxl_lightning_1step_x0.safetensors")
    with pytest.warns(UserWarning, match="euler, 1 steps, guidance 1, spacing trailing"):
        assert load(file, **CPU).prediction == "sample"
        assert load(file, prediction="epsilon", **CPU).prediction == "epsilon"
    assert re.search(r"predicts +sample\n", info(file))


def test_a_folder_by_its_name(tmp_path):
    save(model("sd1"), tmp_path / "RealVis_Lightning")
    assert load(tmp_path / "RealVis_Lightning", **CPU).variant.steps == 20  # ours notes its settings
    index = tmp_path / "RealVis_Lightning" / "model_index.json"
    index.write_text(index.read_text().replace('"steps"', '"unknown"'))
    with pytest.warns(UserWarning, match="'RealVis_Lightning' says that the model is distilled"):
        assert load(tmp_path / "RealVis_Lightning", **CPU).variant.steps == 4
    assert public_name(tmp_path / "models--owner--sdxl-turbo" / "snapshots" / "0a1b") == "sdxl-turbo"


PLAIN = {"epsilon": {}, "v_prediction": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}}


@pytest.mark.parametrize(
    "base, size, scheduler, prediction, name",
    [
        ("sdxl-base", 128, "EulerDiscreteScheduler", "v_prediction", "sdxl-base"),  # the usual recipe with zero SNR
        ("sdxl-base", 128, "EulerDiscreteScheduler", "epsilon", "sdxl-base"),
        ("sdxl-base", 64, "EulerAncestralDiscreteScheduler", "epsilon", "sdxl-turbo"),
        ("sd2-base", 64, "EulerDiscreteScheduler", "epsilon", "sd2-turbo"),
        ("sd2-base", 64, "DDIMScheduler", "epsilon", "sd2-base"),
        ("sd2-base", 96, "DDIMScheduler", "v_prediction", "sd2-768"),
        ("sdxl-lcm", 128, "LCMScheduler", "epsilon", "sdxl-lcm"),
    ],
)
def test_trailing_spacing_alone_is_not_turbo(base, size, scheduler, prediction, name):
    files = {path: json.loads(text) for path, text in write_variant(VARIANTS[base]).items()}
    del files["model_index.json"]["_plainsd"]  # another program's folder
    files["model_index.json"]["scheduler"] = ["diffusers", scheduler]
    files["unet/config.json"]["sample_size"] = size
    asked = {"_class_name": scheduler, "timestep_spacing": "trailing"} | PLAIN[prediction]
    files["scheduler/scheduler_config.json"] |= asked
    variant = read_variant(files.__getitem__, "m")
    assert (variant.name, variant.size, variant.spacing) == (name, 8 * size, "trailing")
    assert (variant.steps == 1) == name.endswith("turbo")


def test_sd_turbos_own_single_file(tmp_path, small_families, monkeypatch):
    """Its text encoder has the names of SDXL's files; they are written back as they were."""
    sd = model("sd2-base")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    monkeypatch.setattr("plainsd.files.predicted.probe", lambda unet: "epsilon")
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    tensors = {
        name.replace("cond_stage_model.", "conditioner.embedders.0."): t
        for name, t in load_file(without_notes(tmp_path / "a.safetensors")).items()
    }
    block = next(t for name, t in tensors.items() if name.endswith("resblocks.0.ln_1.weight"))
    tensors |= {
        "conditioner.embedders.0.model.transformer.resblocks.23.ln_1.weight": block.clone(),
        "conditioner.embedders.0.model.text_projection": block.clone(),
        "conditioner.embedders.0.model.logit_scale": block[0].clone(),
    }
    save_file(tensors, tmp_path / "sd_turbo.safetensors")
    with pytest.warns(UserWarning, match="'sd_turbo' says that the model is distilled"):
        again = load(tmp_path / "sd_turbo.safetensors", **CPU)
    for mine, theirs in ((again.unet, sd.unet), (again.text_encoders[0], sd.text_encoders[0])):
        assert all((mine.state_dict()[name] == t).all() for name, t in theirs.state_dict().items())
    convert(tmp_path / "sd_turbo.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same_tensors(load_file(tmp_path / "back.safetensors"), tensors)
    assert load(tmp_path / "folder", **CPU).variant.steps == again.variant.steps  # noted there, whatever its name
    assert replace(again.variant, guidance=7.5, sampler="dpmpp_2m", steps=20, spacing=None) == sd.variant


def gapped(name: str, levels: int) -> str:
    """A UNet's name in diffusers' layout as diffusers' conversion script for SD 1.x writes it."""
    for i in range(levels):
        for j in range(2):
            name = name.replace(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0.")
            name = name.replace(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1.")
        for j in range(3):
            name = name.replace(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0.")
            if i > 0:
                name = name.replace(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{3 * i + j}.1.")
        name = name.replace(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{3 * (i + 1)}.0.op.")
        name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.")
    leaves = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    leaves |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    block = re.fullmatch(r"((?:in|out)put_blocks\.\d+\.0)\.(\w+)\.(\w+)", name)
    return f"{block[1]}.{leaves[block[2]]}.{block[3]}" if block and block[2] in leaves else name


@pytest.mark.parametrize("kind", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "koala-700m"])
def test_blocks_numbered_with_gaps(kind):
    """As the script would write the UNets, at full size and without their numbers: the original's names come out."""
    variant = VARIANTS[kind]
    unet = empty(UNet, variant.unet)
    diffusers, original = (places(unet, layout, conv=True) for layout in ("diffusers", "original"))
    tops = {place.name: other.name for place, other in zip(diffusers, original, strict=True)}
    names = {
        name: gapped(name, len(variant.unet.channels)) if name.startswith(("down_", "up_")) else tops[name]
        for name in tops
    }
    start = "model.diffusion_model."
    file = TensorFile(Path("x"), {start + name: old for old, name in names.items()}, {})
    again = without_gaps(file)
    assert {start + new: old for old, new in tops.items()} == again.tensors
    assert without_gaps(again) is again
