"""Sheets over prompts, strengths of LoRAs and models; and folders of pictures that are drawn over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, pixels, tiny_sd
from PIL import Image

import plainsd
from plainsd.adapters.lora import inject, save_lora
from plainsd.pictures.images import grid, read_settings


def same(sheet: str, paths: list[str], across: list[str], down: list[str] = ()) -> bool:
    """Whether the sheet is that of these pictures, row by row, under these labels."""
    expected = grid([Image.open(path).convert("RGB") for path in paths], len(across), across, down)
    drawn = Image.open(sheet).convert("RGB")
    return drawn.size == expected.size and np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


@pytest.fixture
def made(generate, tmp_path):
    def run(*arguments):
        code, out, err = generate("--steps", 2, "--seed", 3, *arguments)
        assert code == 0, err
        return out.strip().splitlines()

    return run


def test_prompts_take_the_place_of_the_first(made, generate):
    (sheet,) = made("a red apple", "--grid", "prompt=apple,pear,plum")
    alone = [made(prompt)[0] for prompt in ("a red apple", "a red pear", "a red plum")]
    assert same(sheet, alone, ["prompt apple", "prompt pear", "prompt plum"])
    code, _, err = generate("a red apple", "--grid", "prompt=cat,dog")
    assert code == 2 and "'cat' is not in the prompt" in err


def test_strengths_of_a_lora(made, generate, model, tmp_path):
    sd = plainsd.load(model, device="cpu", dtype="float32")
    lora = inject(sd.unet, rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    save_lora(sd, tmp_path / "style.safetensors")
    (sheet,) = made(
        "x", "--lora", f"{tmp_path}/style.safetensors:1", "--grid", "lora:style=0,0.5", "--grid", "steps=2,3"
    )
    flag = f"{tmp_path}/style.safetensors"
    alone = [made("x", "--lora", f"{flag}:{s}", "--steps", n)[0] for n in (2, 3) for s in (0, 0.5)]
    assert same(sheet, alone, ["lora:style 0.0", "lora:style 0.5"], ["steps 2", "steps 3"])
    assert np.abs(pixels(alone[0]) - pixels(made("x")[0])).max() <= 1
    code, _, err = generate("x", "--grid", "lora:stile=0,1")
    assert code == 2 and "unknown LoRA 'stile'" in err


def test_models(made, tmp_path):
    for name, seed in (("one", 5), ("two", 6)):
        plainsd.save(tiny_sd(seed=seed), tmp_path / name)
    (sheet,) = made("x", "--grid", "guidance=1,7", "--grid", f"model={tmp_path}/two,{tmp_path}/one")
    models = [str(tmp_path / name) for name in ("two", "one")]
    alone = [made("x", "--model", model, "--guidance", g)[0] for model in models for g in (1, 7)]
    assert same(sheet, alone, ["guidance 1.0", "guidance 7.0"], [f"model {model}" for model in models])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--size", 1024, 1024, "--grid", f"seed={','.join(map(str, range(16)))}", "--out", "x.webp"),
         "is more than the 16383 pixels of a .webp file"),
        (("--grid", "model=one,tipo"), "there is no model at 'tipo'"),
        (("--perturbed", 3, "--grid", "model=one,plain"), "needs attention in the UNet's middle"),
    ],
)  # fmt: skip
def test_a_sheet_that_cannot_be_is_refused_before_anything_is_drawn(generate, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr("plainsd.commands.generate.draw", lambda *args, **more: pytest.fail("something was drawn"))
    monkeypatch.chdir(tmp_path)
    plainsd.save(tiny_sd(), tmp_path / "one")
    plainsd.save(tiny_sd(replace(TINY, unet=replace(TINY.unet, mid_depth=0))), tmp_path / "plain")
    code, out, err = generate("x", *flags)
    assert (code, out) == (2, "") and says in err


def test_every_picture_of_a_folder_is_drawn_over(made, generate, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), (".c.png", "green"), ("note.txt", None)):
        if colour:
            Image.new("RGB", (64, 48), colour).save(photos / name)
        else:
            (photos / name).write_text("no picture")
    both = made("x", "--image", photos, "--strength", 0.5)
    for path, name in zip(both, ("a.jpg", "b.png"), strict=True):
        (alone,) = made("x", "--image", photos / name, "--strength", 0.5)
        assert np.abs(pixels(path) - pixels(alone)).max() <= 1 and read_settings(path).seed == 3
    code, _, err = generate("x", "--image", photos, "--strength", 0.5, "--grid", "steps=2,3")
    assert code == 2 and "give one file" in err
    (tmp_path / "empty").mkdir()
    code, _, err = generate("x", "--image", tmp_path / "empty")
    assert code == 2 and "a folder without pictures" in err
