"""`preview.json`: the projection for previews is stored with the model, in every layout, and read from there."""

import json
import shutil
from contextlib import closing
from io import BytesIO

import pytest
import torch
from conftest import TINY, tiny_sd
from diffusers import AutoencoderTiny
from PIL import Image
from serving import Brake, model_folder, open_service, served, until

import plainsd
from plainsd.checkpoint import add_preview, save_vae
from plainsd.errors import UserError
from plainsd.files.convert import convert
from plainsd.pictures import previews
from plainsd.pictures.previews import fit_latent_rgb
from plainsd.server import previews as server_previews


def test_save_writes_it_and_load_and_the_server_read_it(tmp_path, monkeypatch):
    folder = model_folder(tmp_path)
    table = json.loads((tmp_path / "tiny" / "preview.json").read_text())["latent_rgb"]
    matrix, bias = torch.tensor(table["matrix"]), torch.tensor(table["bias"])
    fitted = fit_latent_rgb(tiny_sd().vae)
    assert matrix.shape == (3, 4) and torch.allclose(torch.cat([matrix.T, bias[None]]), fitted, atol=1e-4)

    def never(vae):
        raise AssertionError("fitted, though it is stored")

    monkeypatch.setattr(previews, "fit_latent_rgb", never)
    service = open_service([folder], tmp_path / "data")
    assert torch.allclose(service.models.resident("tiny").preview.latent_rgb, fitted, atol=1e-4)
    service.close()
    assert server_previews.previewer is previews.previewer


def test_it_goes_through_single_files_and_back_unchanged(tmp_path):
    folder = model_folder(tmp_path)
    convert(folder, tmp_path / "one.safetensors", "single-file")
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers")
    text = (tmp_path / "tiny" / "preview.json").read_text()
    assert (tmp_path / "back" / "preview.json").read_text() == text
    assert previews.preview_text(plainsd.load(tmp_path / "one.safetensors").latent_rgb) == text


def test_a_folder_without_it_is_fitted_and_can_be_given_it(tmp_path):
    folder = tmp_path / "tiny"
    text = (shutil.copytree(model_folder(tmp_path, "first"), folder) / "preview.json").read_text()
    (folder / "preview.json").unlink()
    sd = plainsd.load(folder, device="cpu", dtype="float32")
    assert sd.latent_rgb is None and previews.latent_rgb(sd).shape == (5, 3)
    add_preview(folder)
    assert (folder / "preview.json").read_text() == text
    with pytest.raises(UserError, match="no model_index.json"):
        add_preview(tmp_path)


def test_another_autoencoder_has_another_projection(tmp_path):
    folder = model_folder(tmp_path)
    assert plainsd.load(folder, device="cpu", vae=tmp_path / "tiny" / "vae").latent_rgb is None


@pytest.mark.parametrize("text", [
    "no JSON", "[]", "{}", '{"latent_rgb": {"matrix": [[1], [2]], "bias": [1]}}',
    '{"latent_rgb": {"matrix": [[1, 2, 3, 4]], "bias": [1, 2, 3]}}',
    '{"latent_rgb": {"matrix": "x", "bias": {}}}',
])  # fmt: skip
def test_a_damaged_one_is_one_line(tmp_path, text):
    folder = model_folder(tmp_path)
    (tmp_path / "tiny" / "preview.json").write_text(text)
    with pytest.raises(UserError, match="preview.json of .* is damaged: .*; delete it"):
        plainsd.load(folder, device="cpu")


def test_a_vae_that_overflows_in_half_precision_is_fitted_in_float32():
    vae = tiny_sd().vae
    expected = fit_latent_rgb(vae)
    vae.decoder.conv_in.weight.data *= 3e5
    vae.decoder.conv_in.bias.data *= 3e5  # a normalisation follows, which undoes it in float32
    assert fit_latent_rgb(vae.half()).isfinite().all() and expected.isfinite().all()


def test_a_file_for_previews_is_checked_at_the_start(tmp_path):
    """Not by each job, after its model is loaded."""
    model = model_folder(tmp_path)
    save_vae(tiny_sd().vae, tmp_path / "vae", TINY)
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    for name, says in (("none", "no model at"), ("broken.safetensors", "broken"), ("vae", "taesd_decoder")):
        with pytest.raises(UserError, match=says):
            open_service([model], tmp_path / "data", preview_vae=tmp_path / name)


def test_where_it_does_not_fit_previews_are_made_without_it(tmp_path, caplog):
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "taesd")
    service = open_service([model_folder(tmp_path)], tmp_path / "data", preview_vae=tmp_path / "taesd")
    with closing(service):
        assert service.models.resident("tiny").preview.tiny is None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "previews of tiny are made without --preview-vae: its latents have 16 channels" in warning


@pytest.mark.parametrize(("taesd", "size"), [(False, (8, 8)), (True, (64, 64))], ids=["projection", "taesd"])
def test_previews_of_a_job(tmp_path, monkeypatch, taesd, size):
    brake = Brake(monkeypatch)
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    service = open_service(
        [model_folder(tmp_path)], tmp_path / "data", preview_vae=tmp_path / "taesd" if taesd else None
    )
    with served(service) as server:
        id = server.job(prompt="a", steps=3)["id"]
        brake.wait()
        brake.step()
        job = service.queue.jobs[id]
        until(lambda: job.previews)
        shown = Image.open(BytesIO(job.previews[0]))
        brake.off()
        server.wait(id)
    assert shown.size == size
