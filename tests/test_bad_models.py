"""What goes wrong with a model's files: one line each, and nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CPU, FAMILIES, model, without_notes

from plainsd.checkpoint import load, save, save_vae
from plainsd.cli import main
from plainsd.disk import whole_folder, written_whole
from plainsd.errors import UserError
from plainsd.files.configs import read_variant
from plainsd.files.configs_out import write_variant
from plainsd.files.convert import convert
from plainsd.files.stored import empty, parts
from plainsd.files.tensorfile import open_tensors


def damage(folder: Path, change) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def relist(folder: Path, name: str, entry: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index[name] = entry
    (folder / "model_index.json").write_text(json.dumps({key: value for key, value in index.items() if value}))


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(tensors: dict) -> None:
    for name in sorted(tensors)[:7]:
        tensors["x." + name] = tensors.pop(name)


def narrow(tensors: dict) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()


WRONG = {
    "missing and unexpected names": (
        lambda m: damage(m, rename),
        r"7 names missing \((\S+, ){5}\.\.\.\), 7 unexpected \(x\.conv_in.bias, (\S+, ){4}\.\.\.",
    ),
    "an unexpected name alone": (
        lambda m: damage(m, lambda tensors: tensors.update(strange=torch.zeros(1))),
        r"0 names missing \(none\), 1 unexpected \(strange\)",
    ),
    "a missing name alone": (
        lambda m: damage(m, lambda tensors: tensors.pop("conv_in.bias")),
        r"1 names missing \(conv_in.bias\), 0 unexpected \(none\)",
    ),
    "wrong shape": (
        lambda m: damage(m, narrow),
        r"'conv_in.weight' has shape \[16, 3, 3, 3\].*call for \[16, 4, 3, 3\]",
    ),
    "no text encoder listed": (
        lambda m: relist(m, "text_encoder", None),
        r"model_index.json \(StableDiffusionPipeline\) lists no text_encoder, which Stable Diffusion needs; download",
    ),
    "text encoder listed as nothing": (
        lambda m: relist(m, "text_encoder", [None, None]),
        "lists no text_encoder",
    ),
    "no unet listed": (lambda m: relist(m, "unet", None), "lists no unet"),
    "no vae listed": (lambda m: relist(m, "vae", "x"), "lists no vae"),
    "Git LFS pointer": (
        lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 3438167540\n"
        ),
        "is a Git LFS pointer and holds no weights; run `git lfs pull`",
    ),
    "a weight of another type": (
        lambda m: damage(
            m, lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"].to(torch.complex64)})
        ),
        "'conv_in.bias' has the type 'C64', which is not supported",
    ),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), r"cannot read .*vae/config.json.*needs this file"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "has no folder 'tokenizer'"),
    "no weights": (lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
    "no index": (lambda m: (m / "model_index.json").unlink(), "cannot read .*model_index.json"),
    "index is no JSON": (lambda m: (m / "model_index.json").write_text("{"), "index.json is damaged: it is not JSON"),
    "index is a list": (lambda m: (m / "model_index.json").write_text("[]"), "not a table of settings"),
    "settings are no text": (lambda m: (m / "unet" / "config.json").write_bytes(b"\xff\xfe"), "it is not text"),
    "a LoRA as UNet": (
        lambda m: save_file(
            {"lora_unet_x.lora_down.weight": torch.zeros(2)}, m / "unet" / "diffusion_pytorch_model.safetensors"
        ),
        "seems to be a LoRA",
    ),
    "the VAE as UNet": (
        lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").replace(
            m / "unet" / "diffusion_pytorch_model.safetensors"
        ),
        "seems to be a VAE",
    ),
    "truncated weights": (lambda m: os.truncate(m / "vae" / "diffusion_pytorch_model.safetensors", 5000), "is damaged"),
    "index of shards is damaged": (
        lambda m: [
            (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            (m / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        ],
        "lists no files",
    ),
    "text encoders of another model": (
        lambda m: change(m / "unet" / "config.json", cross_attention_dim=24),
        r"its UNet reads texts of width 24, and its text encoders give \d+; put the parts of one model together",
    ),
    "a VAE of another model": (
        lambda m: (
            change(m / "vae" / "config.json", latent_channels=2) or change(m / "unet" / "config.json", in_channels=2)
        ),
        "its UNet gives 4 channels, and its VAE's latents have 2; put the parts of one model together",
    ),
    "a VAE of another class": (
        lambda m: change(m / "vae" / "config.json", _class_name="ConsistencyDecoderVAE"),
        "'ConsistencyDecoderVAE' is not supported; choose an autoencoder of class AutoencoderKL or AutoencoderTiny",
    ),
    "unknown scheduler": (
        lambda m: (m / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "sigmoid"}'),
        "beta_schedule 'sigmoid'",
    ),
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
    unet = {key: t for key, t in tensors.items() if key.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "u.safetensors")
    with pytest.raises(UserError, match="holds no autoencoder"):
        load(tmp_path / "u.safetensors", **CPU)
    with pytest.raises(
        UserError, match="holds no text encoder, and seems to be a UNet alone.*; give a whole checkpoint"
    ):
        load(tmp_path / "u.safetensors", vae=tmp_path / "a.safetensors", **CPU)
    for content, what in (
        ({"lora_te_x.lora_up.weight": torch.zeros(1)}, "a LoRA"),
        ({"double_blocks.0.x": torch.zeros(1)}, "FLUX"),
        ({"x": torch.zeros(1)}, "no kind of file"),
    ):
        save_file(content, tmp_path / "c.safetensors")
        with pytest.raises(UserError, match=f"is not a single-file checkpoint: it seems to be {what}"):
            load(tmp_path / "c.safetensors", **CPU)
    save_file(tensors, tmp_path / "d.safetensors", metadata={"plainsd.files": "[1"})
    with pytest.raises(UserError, match="the note 'plainsd.files' in its metadata is not JSON"):
        load(tmp_path / "d.safetensors", **CPU)
    save_file(tensors, tmp_path / "d.safetensors", metadata={"plainsd.files": '{"unet/config.json": "{}"}'})
    with pytest.raises(UserError, match="settings 'model_index.json' in its metadata are incomplete"):
        load(tmp_path / "d.safetensors", **CPU)


@pytest.mark.parametrize(
    "path",
    [
        "../x.json",
        "tokenizer/../../x.json",
        "/tmp/x.json",
        "unet/.hidden.json",
        "unet/x.py",
        "tokenizer/a/b.json",
        "tokenizer/x\n.json",
        "unet/config.json/../../../x.json",
    ],
)
def test_metadata_cannot_name_files_elsewhere(tmp_path, path):
    save(model("sd1"), tmp_path / "a.safetensors", layout="single-file")
    texts = json.loads(open_tensors(tmp_path / "a.safetensors").metadata["plainsd.files"])
    tensors = load_file(tmp_path / "a.safetensors")
    for strange in ({path: "{}"}, {"unet/x.json": 7}):
        save_file(tensors, tmp_path / "b.safetensors", metadata={"plainsd.files": json.dumps(texts | strange)})
        with pytest.raises(UserError, match="which no model has"):
            convert(tmp_path / "b.safetensors", tmp_path / "m", "diffusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.bin", "m.pt", "m.gguf"])
@pytest.mark.parametrize(
    "content,what",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n", "is a Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file"),
        (b"<!DOCTYPE html>\n<html></html>", "is a web page"),
    ],
)
def test_files_that_are_no_weights_are_called_by_their_names(tmp_path, capsys, name, content, what):
    (tmp_path / name).write_bytes(content)
    for command in (
        ["info"],
        ["generate", "a", "--model"],
        ["convert", str(tmp_path / name)],
        ["generate", "a", "--vae"],
    ):
        given = str(tmp_path / "out") if command[0] == "convert" else str(tmp_path / name)
        assert main([*command, given]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith(f"plainsd: {tmp_path / name} {what}")
    assert not (tmp_path / "out").exists()


ODD = (None, "", "x", -1, 0, 3, 1.5, 10**12, 1e999, float("nan"), True, [], [7], [[1]], [None] * 3, {}, {"a": 1})


def test_a_single_file_without_the_weight_that_tells_most(tmp_path):
    """Its family cannot be told; the line says what lacks, and what is there."""
    save(model("sd1"), tmp_path / "m.safetensors", layout="single-file")
    tensors = load_file(tmp_path / "m.safetensors")
    del tensors["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(
        UserError,
        match=r"incomplete: input_blocks.0.0.weight is not among the \d+ weights of its UNet "
        r"\((\S+, ){5}\.\.\.\): it seems to be SD 1.x as a single file$",
    ):
        load(tmp_path / "m.safetensors", **CPU)


FILES = {path: json.loads(text) for path, text in write_variant(FAMILIES["sd1"]).items()}


@pytest.mark.parametrize("path", FILES)
def test_any_setting_of_any_value(path):
    """Each either describes a network that can be made, or is refused in one line."""
    refused, settings = 0, FILES[path]
    for name in [*settings, *settings.get("_plainsd", ())]:
        for value in ODD:
            within = settings if name in settings else settings["_plainsd"]
            changed = within | {name: value}
            files = FILES | {path: changed if within is settings else settings | {"_plainsd": changed}}
            try:
                for kind, config in parts(read_variant(files.__getitem__, "m")).values():
                    empty(kind, config)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 20


def test_places_that_cannot_be_written(tmp_path):
    sd = model("sd1")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x")
    for target, message in (
        (tmp_path / "file" / "m", "cannot write"),
        (tmp_path / "other", "not a model folder"),
        (tmp_path / "file", "not a model folder"),
    ):
        with pytest.raises(UserError, match=message):
            save(sd, target)
    with pytest.raises(UserError, match="cannot write"):
        save(sd, tmp_path / "file" / "m.safetensors", layout="single-file")
    with pytest.raises(UserError, match="written as .safetensors"):
        save(sd, tmp_path / "m.ckpt", layout="single-file")
    with pytest.raises(UserError, match="unknown layout 'difusers'; did you mean 'diffusers'"):
        save(sd, tmp_path / "m", layout="difusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


@pytest.mark.parametrize("content", ["{}", '{"architectures": ["LlamaForCausalLM"]}', "[1]", "{"])
def test_another_programs_folder_is_not_replaced(tmp_path, content):
    """Many have a config.json."""
    app = tmp_path / "app"
    (app / "src").mkdir(parents=True)
    (app / "config.json").write_text(content)
    (app / "src" / "a.py").write_text("1")
    with pytest.raises(UserError, match="exists and is not a model folder"), whole_folder(app):
        pass
    assert (app / "src" / "a.py").read_text() == "1" and sorted(tmp_path.iterdir()) == [app]


def test_what_lies_beside_a_model_is_kept_when_it_is_saved_again(tmp_path):
    sd, place = model("sd1"), tmp_path / "m"
    save(sd, place)
    (place / "notes").mkdir()
    (place / "notes" / "a.txt").write_text("mine")
    (place / "README.md").write_text("of this model")
    others = [place / name for name in ("model_final.safetensors", "models.json", "model-v2.safetensors")]
    for file in others:
        file.write_text("mine")
    (place / "image_encoder").mkdir()
    (place / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("of the old one")
    (place / "unet" / "old.txt").write_text("of the old one")
    (place / "link").symlink_to("README.md")
    save(sd, place)
    assert (place / "notes" / "a.txt").read_text() == "mine" and (place / "link").read_text() == "of this model"
    assert all(file.read_text() == "mine" for file in others) and (place / "image_encoder").is_dir()
    assert not (place / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert (place / "link").is_symlink() and not (place / "unet" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_part_does_not_take_the_place_of_a_model_nor_of_another_part(tmp_path):
    sd, place = model("sd1"), tmp_path / "m"
    save(sd, place)
    before = sorted(place.rglob("*"))
    with pytest.raises(
        UserError, match="m is the folder of a whole model, and not of AutoencoderKL; choose another place"
    ):
        save_vae(sd.vae, place, sd.variant)
    with pytest.raises(UserError, match="unet is the folder of UNet2DConditionModel, and not of AutoencoderKL"):
        save_vae(sd.vae, place / "unet", sd.variant)
    with pytest.raises(UserError, match="vae is the folder of AutoencoderKL, and not of a whole model"):
        save(sd, place / "vae")
    assert sorted(place.rglob("*")) == before
    save_vae(sd.vae, place / "vae", sd.variant)


def test_a_file_behind_a_link_is_written_there(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "a.json")
    for text in ("1", "2"):  # where there is no file yet, too
        with written_whole(tmp_path / "link.json") as draft:
            draft.write_text(text)
        assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real" / "a.json").read_text() == text


def test_an_interrupted_folder_vanishes(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "m") as folder:
        (folder / "x").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
