"""What a model's network predicts, and zero terminal SNR: told in files, by flags, by a picture; asked by a trial."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, TINY_XL, pipeline, seeded, tiny_sd
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import CPU, without_notes
from small_models import model as family

import plainsd
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.convert import convert, read
from plainsd.models.variants import ScheduleConfig
from plainsd.pictures.images import read_settings
from plainsd.reports.info import info
from plainsd.reports.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")
ZERO_SNR = {"schedule": ScheduleConfig(zero_terminal_snr=True), "spacing": "trailing"}


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_prediction_told_at_the_door_equals_diffusers(model, zero_snr):
    """A folder that says epsilon, read as v: as diffusers' pipeline with a scheduler that is told so."""
    theirs = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    theirs |= {"timestep_spacing": "trailing" if zero_snr else "leading", "set_alpha_to_one": False}
    pipe = pipeline("StableDiffusionPipeline", model, "DDIMScheduler", **theirs)
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "width": 64, "height": 64, "output_type": "latent"}
    expected = pipe("a cat", generator=seeded(2), **given).images
    sd = plainsd.load(model, prediction="v_prediction", zero_snr=zero_snr, **CPU)
    assert sd.variant.schedule.zero_terminal_snr == zero_snr
    *_, ours = plainsd.text_to_image(sd, "a cat", seed=2, steps=5, guidance=4.0, sampler="ddim")
    error = (ours.latents - expected).abs().max() / expected.abs().max()
    assert error < (1e-3 if zero_snr else 1e-4)  # in float32 their first step, from alpha_bar 0, loses digits
    off = plainsd.load(model, prediction="epsilon", zero_snr=False, **CPU)
    assert off.variant == plainsd.load(model, **CPU).variant


def test_a_folder_that_predicts_the_sample_equals_diffusers(tmp_path):
    plainsd.save(tiny_sd(replace(TINY, prediction="sample")), tmp_path / "m")
    pipe = pipeline("StableDiffusionPipeline", tmp_path / "m", "DDIMScheduler", set_alpha_to_one=False)
    assert pipe.scheduler.config.prediction_type == "sample"
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "width": 64, "height": 64, "output_type": "latent"}
    expected = pipe("a cat", generator=seeded(2), **given).images
    *_, ours = plainsd.text_to_image(plainsd.load(tmp_path / "m", **CPU), "a cat", seed=2, steps=5, guidance=4.0)
    assert (ours.latents - expected).abs().max() / expected.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "words", "note"),
    [
        ({"prediction": "epsilon"}, set(), "epsilon"),
        ({"prediction": "v_prediction"}, {"v_pred"}, "v"),
        ({"prediction": "v_prediction", **ZERO_SNR}, {"v_pred", "ztsnr"}, "v"),
        ({"prediction": "epsilon", **ZERO_SNR}, set(), "epsilon"),  # others pass over a ztsnr alone
    ],
)
def test_a_single_file_says_it_as_other_programs_read_it(tmp_path, fields, words, note):
    sd = tiny_sd(replace(TINY_XL, **fields))
    plainsd.save(sd, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert {name for name in ("v_pred", "ztsnr") if name in file.keys()} == words
        assert file.metadata()["modelspec.prediction_type"] == note
    again = plainsd.load(tmp_path / "a.safetensors", **CPU)
    assert (again.prediction, again.variant.schedule) == (sd.prediction, sd.variant.schedule)
    convert(tmp_path / "a.safetensors", tmp_path / "b")
    assert not (tmp_path / "b/leftovers.safetensors").exists()
    convert(tmp_path / "b", tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


def test_words_follow_what_the_user_says(tmp_path):
    plainsd.save(tiny_sd(replace(TINY_XL, prediction="v_prediction", **ZERO_SNR)), tmp_path / "a.safetensors")
    flags = ["--prediction", "epsilon", "--zero-snr", "off"]
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *flags]) == 0
    assert not {"v_pred", "ztsnr"} & load_file(tmp_path / "b.safetensors").keys()
    assert main(["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "c"), "--prediction", "v_prediction"]) == 0
    config = json.loads((tmp_path / "c/scheduler/scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", False)
    assert plainsd.load(tmp_path / "c", **CPU).variant.spacing is None


@pytest.mark.parametrize("name", ["sd1", "sdxl-base"])
@pytest.mark.parametrize("found", ["epsilon", "v_prediction", None])
def test_an_unmarked_file_is_asked_and_the_result_is_said(tmp_path, small_families, monkeypatch, name, found):
    sd = family(name)
    plainsd.save(sd, tmp_path / "a.safetensors")
    file = without_notes(tmp_path / "a.safetensors")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    monkeypatch.setattr("plainsd.files.predicted.probe", lambda unet: found)
    said = f"a trial says {found}" if found else "a trial did not tell, so epsilon is assumed"
    with pytest.warns(UserWarning, match=said):
        assert plainsd.load(file, **CPU).prediction == (found or "epsilon")
    with pytest.warns(UserWarning, match=said):
        contents = read(file)
    config = json.loads(contents.texts["scheduler/scheduler_config.json"])
    assert config["prediction_type"] == contents.variant.prediction == (found or "epsilon")
    assert "the file does not tell" in info(file) and "the file does not tell" not in info(file, None, "epsilon")

    def never(unet):
        raise AssertionError

    monkeypatch.setattr("plainsd.files.predicted.probe", never)
    assert plainsd.load(file, prediction="v_prediction", **CPU).prediction == "v_prediction"
    save_file(load_file(file) | {"v_pred": torch.empty(0)}, file)
    assert plainsd.load(file, **CPU).prediction == "v_prediction"


def test_a_ztsnr_counts_where_the_trial_says_v(tmp_path, small_families, monkeypatch):
    sd = family("sdxl-base")
    plainsd.save(sd, tmp_path / "a.safetensors")
    file = without_notes(tmp_path / "a.safetensors")
    save_file(load_file(file) | {"ztsnr": torch.empty(0)}, file)
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    for found in ("epsilon", "v_prediction"):
        monkeypatch.setattr("plainsd.files.predicted.probe", lambda unet, found=found: found)
        zero = plainsd.load(file, **CPU).variant.schedule.zero_terminal_snr
        told = plainsd.load(file, prediction=found, **CPU).variant.schedule.zero_terminal_snr
        assert zero == told == (found == "v_prediction")


def test_flags_and_a_pictures_text(generate, tmp_path):
    """A picture that was made so says it, and --from draws it again without the flags."""
    code, out, _ = generate("a cat", "--prediction", "v_prediction", "--zero-snr", "on", "--steps", "2")
    assert code == 0
    first = out.split()[-1]
    settings = read_settings(first)
    assert settings.prediction == "v_prediction" and settings.zero_snr is True and settings.spacing == "trailing"
    assert generate("--from", first)[0] == 0
    plain = generate("a cat", "--steps", "2")
    images = sorted((tmp_path / "out").glob("*.png"))
    assert plain[0] == 0 and len(images) == 3
    assert images[0].read_bytes() == images[1].read_bytes() != images[2].read_bytes()
    assert read_settings(images[2]).prediction is None


def test_a_server_is_not_sent_it(generate, tmp_path, capsys):
    _, out, _ = generate("a cat", "--prediction", "v_prediction", "--steps", "1")
    assert main(["generate", "--from", out.split()[-1], "--server", "http://127.0.0.1:9"]) == 2
    assert "was made with --prediction" in capsys.readouterr().err
    assert main(["generate", "x", "--zero-snr", "on", "--server", "http://127.0.0.1:9"]) == 2
    assert "--zero-snr does not go with --server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--prediction", "eps"],
            "unknown prediction 'eps'; did you mean 'epsilon'? choose from epsilon, v_prediction, sample",
        ),
        (["--zero-snr", "maybe"], "unknown zero-snr 'maybe'; choose from on, off"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "info", "convert", "verify", "eval", "train"])
def test_bad_flags(model, tmp_path, capsys, command, flags, said):
    words = {
        "generate": ["x", "--model", model, "--out", str(tmp_path / "o")],
        "info": [model],
        "convert": [model, str(tmp_path / "o")],
        "verify": [model],
        "eval": [model],
        "train": ["--method", "lora", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--base", model],
    }
    assert main([command, *words[command], *flags]) == 2
    assert capsys.readouterr().err == f"plainsd: {said}\n"
    assert not (tmp_path / "o").exists() or command == "train"


def test_other_commands_take_it(model, tmp_path):
    assert re.search(r"predicts +sample\n", info(model, None, "sample"))
    assert "v_prediction" in info(model, None, "v_prediction") and "zero terminal SNR" in info(model, zero_snr=True)
    found = {row.name: row for row in verify(model, device="cpu", prediction="v_prediction", zero_snr=True)}
    assert all(row.passed for row in found.values()), found


def test_a_server_reads_its_one_model_so(model, tmp_path):
    from plainsd.server.limits import Limits
    from plainsd.server.pool import Models, PoolOptions
    from plainsd.server.requests import new_job
    from plainsd.server.schema import JobRequest

    models = Models([model], PoolOptions("cpu", "float32", prediction="v_prediction", zero_snr=True))
    assert models[None].bare.prediction == "v_prediction"
    job = new_job(JobRequest(prompt="x"), models, Limits(), "me", "jobs")
    assert job.settings[0].spacing == "trailing"
    assert models.resident(models.default).sd.prediction == "v_prediction"
    with pytest.raises(UserError, match="apply to a single model"):
        Models([model, None], PoolOptions(prediction="v_prediction"))


def test_training_follows_it(model, tmp_path, capsys):
    """The loss is that of v, and what is saved says so."""
    from test_finetune import write_pictures

    pictures = write_pictures(tmp_path / "pictures", count=2)
    given = ["--data", str(pictures), "--base", model, "--device", "cpu", "--dtype", "float32", "--steps", "1"]
    noise = ["--prediction", "v_prediction", "--zero-snr", "on"]
    assert main(["train", "--method", "full", "--out", str(tmp_path / "run"), *given, *noise]) == 0
    config = json.loads((tmp_path / "run/run/scheduler/scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    capsys.readouterr()
    assert main(["train", "--method", "scratch", "--out", str(tmp_path / "other"), *given, *noise]) == 2
    assert "describe the UNet of --base" in capsys.readouterr().err
