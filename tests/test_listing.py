"""Adapters and models in folders as people and their programs leave them: hidden files, links, endings in upper case,
byte-order marks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sd
from safetensors.torch import save_file
from serving import embedding_file, lora_file, model_folder

import plainsd
from plainsd.adapters.embeddings import add_embedding, embedding_in, save_embedding
from plainsd.adapters.lora import add_lora, attached, find_lora, save_lora
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.hashes import file_hash, weights_of
from plainsd.files.single import write_single
from plainsd.files.tensorfile import open_tensors
from plainsd.generate import final, text_to_image
from plainsd.reports.info import info
from plainsd.server.folders import named_files

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xff"  # how the files begin that macOS puts beside others


@pytest.fixture
def loras(tmp_path):
    """A LoRA with its ending in upper case, one in a linked folder, and what is none."""
    folder, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    (folder / ".ipynb_checkpoints").mkdir(parents=True), elsewhere.mkdir()
    model = model_folder(tmp_path)
    lora_file(model, folder / "ink.safetensors", 1), lora_file(model, elsewhere / "oil.safetensors", 2)
    (folder / "ink.safetensors").rename(folder / "ink.SAFETENSORS")
    (folder / "linked").symlink_to(elsewhere), (elsewhere / "round").symlink_to(folder)
    (folder / "._ink.safetensors").write_bytes(APPLE)
    (folder / ".ipynb_checkpoints" / "ink-checkpoint.safetensors").write_bytes(APPLE)
    return folder


def test_a_folder_of_loras(loras):
    assert find_lora(loras, "ink") == loras / "ink.SAFETENSORS"
    assert find_lora(loras, "oil") == find_lora(loras, "linked/oil") == loras / "linked" / "oil.safetensors"
    for name in ("._ink", "ink-checkpoint", "round/ink"):
        with pytest.raises(UserError, match="unknown LoRA"):
            find_lora(loras, name)


def test_the_servers_folder(loras):
    assert named_files(loras) == {"ink": loras / "ink.SAFETENSORS", "oil": loras / "linked" / "oil.safetensors"}


def drawn(sd):
    return np.asarray(final(text_to_image(sd, "a cat", seed=3, steps=2))[0])


def test_a_lora_with_its_ending_in_upper_case_is_the_same(loras, tmp_path):
    copy = tmp_path / "ink.safetensors"
    copy.write_bytes((loras / "ink.SAFETENSORS").read_bytes())
    upper, lower = tiny_sd(), tiny_sd()
    add_lora(upper, loras / "ink.SAFETENSORS"), add_lora(lower, copy)
    assert np.array_equal(drawn(upper), drawn(lower)) and not np.array_equal(drawn(upper), drawn(tiny_sd()))
    assert info(loras / "ink.SAFETENSORS").splitlines()[0].endswith(": a LoRA")
    save_lora(upper, tmp_path / "again.SAFETENSORS")
    again = tiny_sd()
    add_lora(again, tmp_path / "again.SAFETENSORS")
    assert len(attached(again)) == 1 and np.array_equal(drawn(again), drawn(upper))


@pytest.mark.parametrize("name", ["cat.SAFETENSORS", "cat.PT", "cat.BIN"])
def test_words_with_their_endings_in_upper_case(tmp_path, name):
    path = tmp_path / name
    vectors = torch.randn(2, tiny_sd().text_encoders[0].config.width)
    if name.endswith("SAFETENSORS"):
        embedding_file(path, 1, "<cat>")
    else:
        torch.save({"<cat>": vectors}, path)
    sd = tiny_sd()
    assert add_embedding(sd, path) == "<cat>"
    assert embedding_in(path)[1].startswith("2 vectors of 32 numbers")
    dialect = "a1111" if name.endswith("PT") else "diffusers"
    save_embedding(sd, "<cat>", tmp_path / f"out{path.suffix}", dialect)
    add_embedding(tiny_sd(), tmp_path / f"out{path.suffix}", "<cat>")


def test_hashes_leave_hidden_files_out(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "._adapter_model.safetensors").write_bytes(APPLE)
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter" / "adapter_model.SAFETENSORS", {"note": "one"})
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", {"note": "another"})
    (file,) = weights_of(tmp_path / "adapter")
    assert file_hash(file, tensors_only=True) == file_hash(tmp_path / "other.safetensors", tensors_only=True)


def test_a_single_file_in_upper_case(tmp_path):
    upper = tmp_path / "model.SAFETENSORS"
    save_file({"x": torch.zeros(1)}, upper)
    assert list(open_tensors(upper).tensors) == ["x"]
    folder = model_folder(tmp_path)
    assert main(["convert", folder, str(tmp_path / "whole.SAFETENSORS")]) == 0
    assert (tmp_path / "whole.SAFETENSORS").is_file()
    assert info(tmp_path / "whole.SAFETENSORS").splitlines()[0].find("a single file") > 0
    with pytest.raises(UserError, match="give it that ending"):
        write_single(None, Path("whole.ckpt"))


def test_a_models_folder_with_hidden_files_and_byte_order_marks(tmp_path):
    """As it comes from a Mac's disk, its settings edited with a Windows editor."""
    folder = Path(model_folder(tmp_path))
    before = drawn(plainsd.load(folder, device="cpu"))
    for file in [*folder.rglob("*.json"), *folder.rglob("*.txt"), *folder.rglob("*.safetensors")]:
        file.with_name(f"._{file.name}").write_bytes(APPLE)
        if file.suffix != ".safetensors":
            file.write_text(file.read_text("utf-8"), encoding="utf-8-sig")
    assert np.array_equal(drawn(plainsd.load(folder, device="cpu")), before)
    assert main(["convert", str(folder), str(tmp_path / "copy"), "--layout", "diffusers"]) == 0
    assert json.loads((tmp_path / "copy" / "unet" / "config.json").read_text("utf-8"))
    assert not list((tmp_path / "copy").rglob("._*"))


def test_prompts_with_comments_are_drawn(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# two of them\na cat\u2028asleep\n\n#a dog\na bird\n", encoding="utf-8")
    model, out = model_folder(tmp_path), tmp_path / "out"
    flags = ["--prompts", str(file), "--steps", "1", "--out", str(out), "--device", "cpu"]
    assert main(["generate", "--model", model, *flags]) == 0
    assert len(list(out.glob("*.png"))) == 2
    file.write_text("# none\n")
    assert main(["generate", "--model", model, *flags]) == 2
    assert "has no prompts; write one a line" in capsys.readouterr().err
