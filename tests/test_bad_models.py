"""What goes wrong with a model's files: one line each, and nothing half-written."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CPU, model, small_families, without_notes

from plainsd.checkpoint import load, save
from plainsd.errors import UserError
from plainsd.folder import whole_folder


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
        lambda m: damage(m, rename),
        r"7 names missing \((\S+, ){5}\.\.\.\), 7 unexpected \(x\.conv_in.bias, (\S+, ){4}\.\.\."),
    "wrong shape": (
        lambda m: damage(m, narrow), r"'conv_in.weight' has shape \[16, 3, 3, 3\].*call for \[16, 4, 3, 3\]"),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), r"cannot read .*vae/config.json.*needs this file"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "has no folder 'tokenizer'"),
    "no weights": (lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
    "no index": (lambda m: (m / "model_index.json").unlink(), "cannot read .*model_index.json"),
    "index is no JSON": (lambda m: (m / "model_index.json").write_text("{"), "index.json is damaged: it is not JSON"),
    "index is a list": (lambda m: (m / "model_index.json").write_text("[]"), "not a table of settings"),
    "settings are no text": (lambda m: (m / "unet" / "config.json").write_bytes(b"\xff\xfe"), "it is not text"),
    "a LoRA as UNet": (lambda m: save_file({"lora_unet_x.lora_down.weight": torch.zeros(2)},
                                           m / "unet" / "diffusion_pytorch_model.safetensors"), "seems to be a LoRA"),
    "the VAE as UNet": (lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").replace(
        m / "unet" / "diffusion_pytorch_model.safetensors"), "seems to be a VAE"),
    "truncated weights": (lambda m: os.truncate(m / "vae" / "diffusion_pytorch_model.safetensors", 5000), "is damaged"),
    "index of shards is damaged": (lambda m: [
        (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        (m / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": [1]}')],
        "lists no files"),
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
    other = {key: t for key, t in tensors.items() if key != name} | {"strange": torch.zeros(1)}
    save_file(other, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=rf"1 names missing \({name}\), 1 unexpected \(strange\); it seems to be SD 1"):
        load(tmp_path / "b.safetensors", **CPU)
    for content, what in (({"lora_te_x.lora_up.weight": torch.zeros(1)}, "a LoRA"),
                          ({"double_blocks.0.x": torch.zeros(1)}, "FLUX"), ({"x": torch.zeros(1)}, "no kind of file")):
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
