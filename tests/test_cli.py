"""The command line, in this process: what is written, what is said, and the exit codes."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_REFINER, TINY_XL, pixels, tiny_sd
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

import plainsd
from plainsd.cli import COMMANDS, main
from plainsd.commands.adapters import LoraStrengths, chosen_loras, embedding_from_flag, from_flag
from plainsd.commands.generate import Generate
from plainsd.commands.grid import axis, grid_cells, set_strengths
from plainsd.commands.output import Target
from plainsd.commands.recorded import check_recorded, with_notes
from plainsd.commands.remote import prompt_and_loras
from plainsd.commands.tokens import describe
from plainsd.errors import UserError
from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import Settings
from plainsd.text.prompts import LoraTag, tagged_loras


@pytest.fixture
def generate(generate):
    return lambda *arguments: generate("--steps", "2", *arguments)


# --- what works ------------------------------------------------------------------------------------------------------


def test_help_comes_at_once_and_without_torch():
    code = "import sys, plainsd.cli; plainsd.cli.main(['--help']); print('torch' in sys.modules, 'tyro' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("False False\n")
    assert all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_help_of_each_command_needs_no_torch(name):
    code = f"import sys, plainsd.cli; print(plainsd.cli.main([{name!r}, '--help']), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"usage: plainsd {name}" in said and said.endswith("0 False\n")
    assert "default: False" not in said  # of a switch this is no news


def test_a_choice_that_is_none_of_those_offered(capsys):
    assert main(["extract-lora", "a", "b", "--out", "c", "--naming", "x"]) == 2
    said = "plainsd: --naming: 'x' is not one of kohya, peft, diffusers; see plainsd extract-lora --help\n"
    assert capsys.readouterr().err == said


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"plainsd {plainsd.__version__}\n"


def test_numbers_go_on_behind_the_highest(generate, tmp_path):
    """Where some were deleted, no number comes again."""
    (tmp_path / "out").mkdir()
    for name in ("00003-5.png", "00007-5.png", "picture.png"):
        (tmp_path / "out" / name).write_bytes(b"")
    assert generate("x", "--seed", "1", "--count", "2", "--steps", "1")[0] == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["00003-5.png", "00007-5.png", "00008-1.png", "00009-2.png", "picture.png"]


def test_a_folder_is_listed_once_for_a_run_and_again_where_others_write_into_it(tmp_path, monkeypatch):
    """Else a run of many pictures would take time with their square."""
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda *given: listed.append(1) or glob(*given))
    target, names = Target(tmp_path / "out"), []
    for seed in range(3):
        names.append(target.write(Image.new("RGB", (8, 8)), Settings(seed=seed)).name)
    assert names == ["00001-0.png", "00002-1.png", "00003-2.png"] and len(listed) == 1
    before = (tmp_path / "out").stat().st_mtime_ns
    (tmp_path / "out" / "00009-5.png").write_bytes(b"")  # another program
    os.utime(tmp_path / "out", ns=(before, before + 1))
    assert target.write(Image.new("RGB", (8, 8)), Settings(seed=7)).name == "00010-7.png" and len(listed) == 2


def test_pictures_are_numbered_and_made_again(generate, tmp_path):
    code, out, err = generate("a red apple", "--negative", "bad, (worse:1.2)", "--count", 3, "--batch", 2, "--seed", 5)
    assert code == 0
    names = ["00001-5.png", "00002-6.png", "00003-7.png"]
    assert out.split() == [str(tmp_path / "out" / name) for name in names]
    assert "3 pictures in" in err and "2 steps of ddim" in err
    second = tmp_path / "out" / names[1]
    settings = read_settings(second)
    assert (settings.prompt, settings.negative) == ("a red apple", "bad, (worse:1.2)")
    assert (settings.seed, settings.steps) == (6, 2)
    assert settings.model == "tiny"
    code, out, _ = generate("--from", second, "--out", tmp_path / "again.png")
    assert code == 0 and out.strip() == str(tmp_path / "again.png")
    assert np.abs(pixels(second) - pixels(tmp_path / "again.png")).max() <= 1
    assert read_settings(tmp_path / "again.png") == settings
    generate("--from", second, "--seed", 7, "--out", tmp_path / "again.png")
    assert np.abs(pixels(tmp_path / "again-2.png") - pixels(tmp_path / "out" / names[2])).max() <= 1
    assert generate("x")[1].strip().endswith("00004-0.png")
    assert sorted(os.listdir(tmp_path)) == ["again-2.png", "again.png", "out"]


@pytest.mark.parametrize("text", ["-1", "random"])
def test_a_random_seed_is_said(generate, text):
    code, out, err = generate("x", "--seed", text, "--variation-seed", text, "--variation-strength", 0.5)
    seed, other = (int(re.search(rf"^{name} ([0-9]+)$", err, re.M)[1]) for name in ("seed", "variation seed"))
    assert code == 0 and seed != other and max(seed, other) < 2**32
    settings = read_settings(out.strip())
    assert (settings.seed, settings.variation_seed) == (seed, other)
    _, again, _ = generate("x", "--seed", seed, "--variation-seed", other, "--variation-strength", 0.5)
    assert np.abs(pixels(out.strip()) - pixels(again.strip())).max() <= 1


def test_random_seeds_of_a_batch_and_of_a_grid(generate):
    _, out, err = generate("x", "--seed", "random", "--count", 3, "--batch", 2)
    first = int(re.search(r"^seed ([0-9]+)$", err, re.M)[1])
    assert [read_settings(path).seed for path in out.split()] == [first, first + 1, first + 2]
    code, out, _ = generate("x", "--grid", "seed=1,random,-1")
    sheet = np.asarray(Image.open(out.strip()).convert("RGB")).astype(int)[-64:]
    cells = [sheet[:, start : start + 64] for start in range(sheet.shape[1] - 192, sheet.shape[1], 64)]
    assert code == 0 and all(np.abs(a - b).max() > 5 for a, b in zip(cells, cells[1:], strict=False))


@pytest.mark.parametrize("name", ["seed", "variation_seed"])
def test_random_seeds_of_a_grid_are_told(name):
    seeds = axis(f"{name}=1,random,-1").values
    assert seeds[0] == 1 and all(0 <= seed < 2**32 for seed in seeds) and len(set(seeds)) == 3


def test_switches_of_a_grid():
    for name in ("tiling", "soft_mask", "soft-mask"):
        assert axis(f"{name}=true,False,ON,off").values == [True, False, True, False]


def torchrun(monkeypatch, rank):
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("plainsd.commands.torchrun.ProcessShare.agreed", lambda share, number: 1)


def test_processes_number_the_pictures_of_a_folder_as_one_does(generate, photo, tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo.read_bytes())
    for rank in (0, 1):
        torchrun(monkeypatch, rank)
        asked = ("x", "--count", 3, "--image", tmp_path / "photos", "--strength", 0.5)
        assert generate(*asked)[0] == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [f"{number + 1:05d}-{number % 3}.png" for number in range(9)]


@pytest.mark.parametrize("flags", [
    ["--seed", "random"], ["--variation-seed", "random", "--variation-strength", "0.5"],
], ids=" ".join)  # fmt: skip
def test_processes_do_not_draw_seeds(generate, monkeypatch, flags):
    torchrun(monkeypatch, 1)
    code, out, err = generate("x", *flags, "--count", 2)
    assert code == 2 and not out and err.count("\n") == 1
    assert "seed random would differ from process to process under torchrun; give a number" in err


def test_of_a_long_seed_the_low_bits_count_and_this_is_said(generate):
    _, short, err = generate("x", "--seed", 5)
    assert "note" not in err
    code, long, err = generate("x", "--seed", 2**64 - 2**32 + 5)
    assert code == 0 and "note: seed 18446744069414584325 draws the same as 5: PyTorch's generator reads only" in err
    assert np.abs(pixels(short.strip()) - pixels(long.strip())).max() <= 1
    assert read_settings(long.strip()).seed == 2**64 - 2**32 + 5 and long.strip().endswith("-18446744069414584325.png")


def test_guidance_0_is_off_and_this_is_said(generate, tmp_path):
    """But where A1111's program has written a picture, its 0 is what its formula says."""
    _, off, err = generate("x", "--negative", "y", "--guidance", 0)
    assert err.count("note: ") == 1 and "note: guidance 0 is off, as 1 is" in err
    _, one, err = generate("x", "--negative", "y", "--guidance", 1)
    assert "note" not in err and read_settings(off.strip()).guidance == 1
    assert np.abs(pixels(off.strip()) - pixels(one.strip())).max() <= 1
    assert "note: guidance 0 is off" in generate("x", "--grid", "guidance=0,1")[2]
    info = PngInfo()
    info.add_text("parameters", "x\nNegative prompt: y\nSteps: 2, Sampler: DDIM, CFG scale: 0, Seed: 0, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    _, theirs, err = generate("--from", tmp_path / "theirs.png")
    _, negative, _ = generate("y", "--guidance", 1, "--like", "a1111", "--sampler", "ddim")
    assert "note" not in err and np.abs(pixels(theirs.strip()) - pixels(negative.strip())).max() <= 1
    _, again, _ = generate("--from", theirs.strip())
    assert np.abs(pixels(theirs.strip()) - pixels(again.strip())).max() <= 1
    assert "note: guidance 0 is off" in generate("--from", theirs.strip(), "--like", "diffusers")[2]


def test_the_prompt_may_follow_several_numbers(generate):
    code, out, err = generate("--interval", 0.1, 20, "--size", 72, 64, "a red apple")
    assert code == 0, err
    settings = read_settings(out.strip())
    assert (settings.prompt, settings.size, settings.interval) == ("a red apple", (72, 64), (0.1, 20.0))


def test_a_file_of_prompts(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n\n  a green pear\n")
    code, out, _ = generate("--prompts", tmp_path / "prompts.txt", "--count", 2)
    assert code == 0
    made = [read_settings(path) for path in out.split()]
    assert [(one.prompt, one.seed) for one in made] == [
        ("a red apple", 0), ("a red apple", 1), ("a green pear", 2), ("a green pear", 3)
    ]  # fmt: skip


def test_variations_count_their_own_seed(generate):
    _, out, _ = generate("x", "--count", 3, "--batch", 2, "--variation-seed", 9, "--variation-strength", 0.2)
    made = [read_settings(path) for path in out.split()]
    assert [(one.seed, one.variation_seed) for one in made] == [(0, 9), (0, 10), (0, 11)]


def test_image_to_image_says_how_many_steps_run(generate, photo):
    code, out, err = generate("x", "--image", photo, "--steps", 7, "--strength", 0.6)
    assert code == 0 and "4 of 7 steps run at strength 0.6" in err
    assert Image.open(out.strip()).size == (52, 40)
    assert read_settings(out.strip()).strength == 0.6


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_pictures_in_other_formats_know_how_they_were_made_too(generate, tmp_path, format):
    code, out, _ = generate("a red apple", "--format", format, "--seed", 4, "--steps", 2)
    first = Path(out.strip())
    assert code == 0 and first.name == f"00001-4.{format}" and read_settings(first).prompt == "a red apple"
    code, out, _ = generate("--from", first, "--out", tmp_path / f"again.{format}")
    assert code == 0 and read_settings(tmp_path / f"again.{format}") == read_settings(first)
    assert generate("x", "--steps", 1)[1].strip().endswith("00002-0.png")


def test_what_has_no_effect_is_written_again(generate, tmp_path):
    (tmp_path / "theirs.txt").write_text("x\nSteps: 2, Seed: 1, Face restoration: GFPGAN, RNG: CPU, Version: v1.10.1")
    code, out, err = generate("--from", tmp_path / "theirs.txt")
    assert code == 0 and "no effect here: Face restoration" in err
    assert read_settings(out.strip()).other == (("Face restoration", "GFPGAN"),)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--like", "a1111"), "7 of 9 steps run"),  # the first pass makes 8
        (("--hires-steps", 3), "3 of 3 steps run"),
        (("--like", "a1111", "--sampler", "euler"), "9 of 9 steps run"),
    ],
)
def test_hires_counts_the_steps_of_its_second_pass(generate, flags, says):
    code, _, err = generate("x", "--hires", 1.5, "--steps", 9, "--strength", 0.5, "--sampler", "ddim", *flags)
    assert code == 0 and says in err


def test_hires_says_so_too(generate):
    code, out, err = generate("x", "--hires", 1.5, "--steps", 4, "--strength", 0.5)
    assert code == 0 and "2 of 4 steps run at strength 0.5" in err
    assert Image.open(out.strip()).size == (96, 96) and read_settings(out.strip()).hires == 1.5


def test_inpainting_and_outpainting(generate, photo, tmp_path):
    Image.new("L", (52, 40)).save(tmp_path / "mask.png")
    mask = Image.new("L", (52, 40))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(tmp_path / "mask.png")
    _, out, _ = generate("x", "--image", photo, "--mask", tmp_path / "mask.png")
    changed = (pixels(out.strip()) != pixels(photo)).any(axis=-1)
    assert changed[8:24, 8:24].mean() > 0.9 and changed.sum() == changed[8:24, 8:24].sum()
    _, out, _ = generate("x", "--image", photo, "--outpaint", 4, 0, 8, 0)
    assert pixels(out.strip()).shape == (40, 64, 3)
    assert (pixels(out.strip())[:, 4:56] == pixels(photo)).all()


def test_loras_by_flag_and_by_tag(generate, model, tmp_path):
    import torch

    from plainsd.adapters.lora import inject, save_lora

    (tmp_path / "loras").mkdir()
    sd = plainsd.load(model, device="cpu", dtype="float32")
    lora = inject(sd.unet, rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 0.3
    save_lora(sd, tmp_path / "loras" / "style.safetensors")

    def made(*arguments):
        code, out, err = generate(*arguments)
        assert code == 0, err
        return Path(out.strip())

    plain, styled = made("x"), made("x", "--lora", f"{tmp_path}/loras/style.safetensors:0.5")
    assert np.abs(pixels(plain) - pixels(styled)).max() > 5
    assert read_settings(styled).prompt == "x <lora:style:0.5>"
    for place in (["--lora-folder", tmp_path / "loras"], ["--lora", tmp_path / "loras" / "style.safetensors"]):
        again = made("--from", styled, *place)
        assert np.abs(pixels(again) - pixels(styled)).max() <= 1
        assert read_settings(again) == read_settings(styled)
    assert "names the LoRA 'style'" in generate("--from", styled)[2]


def test_two_strengths_of_a_lora(generate, model, tmp_path):
    """One on the text encoders, one on the UNet: drawn as add_lora's two, and recorded."""
    import torch

    from plainsd.adapters.lora import inject, save_lora

    (tmp_path / "loras").mkdir()
    sd = plainsd.load(model, device="cpu", dtype="float32")
    lora = inject(sd, rank=2, alpha=2, text=True, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 0.3
    save_lora(sd, tmp_path / "loras" / "style.safetensors")
    lora.set_strength(0.25, 0.75)
    (expected,) = plainsd.final(plainsd.text_to_image(sd, "x", steps=2))

    def made(*arguments):
        code, out, err = generate(*arguments)
        assert code == 0, err
        return Path(out.strip())

    place = ["--lora-folder", tmp_path / "loras"]
    drawn = made("x <lora:style:te=0.75:unet=0.25>", *place)
    assert read_settings(drawn).prompt == "x <lora:style:0.75:0.25>"
    assert np.abs(pixels(drawn) - np.asarray(expected).astype(int)).max() <= 1
    assert np.abs(pixels(made("x <lora:style:0.25>", *place)) - pixels(drawn)).max() > 5
    again = made("--from", drawn, "--lora", tmp_path / "loras" / "style.safetensors")
    assert read_settings(again) == read_settings(drawn) and np.abs(pixels(again) - pixels(drawn)).max() <= 1
    assert "is not a LoRA with one strength or two ('dyn=4')" in generate("x <lora:style:1:dyn=4>", *place)[2]


@pytest.mark.parametrize("tags, flags, expected", [  # strengths of the UNet
    ("<lora:d:0.5> <lora:d:0.3>", ["d"], [("d", 0.5), ("d", 0.3)]),  # of --lora d:0.5 --lora d:0.3
    ("<lora:d:0.5> <lora:d:0.3>", ["d:0.9"], [("d", 0.9)]),  # a flag's overrides them
    ("<lora:d:0.5> <lora:d:0.3>", ["d", "d"], [("d", 0.5), ("d", 0.3)]),
    ("<lora:d:0.3> <lora:d:0.9>", ["A/d", "B/d"], [("A/d", 0.3), ("B/d", 0.9)]),
    ("<lora:d:0.3> <lora:d:0.9>", ["A/d:2", "B/d"], [("A/d", 2.0), ("B/d", 0.9)]),
    ("<lora:d:0.3>", ["d", "e", "d:0.1"], [("d", 0.3), ("e", 1.0), ("d", 0.1)]),
    ("<lora:x/d:0.1:0.2> <lora:e:0.5>", ["e", "d"], [("e", 0.5), ("d", 0.2)]),
    ("", ["d:0.5", "d:0.3"], [("d", 0.5), ("d", 0.3)]),
])  # fmt: skip
def test_tags_are_taken_in_turn(tags, flags, expected):
    """By the LoRAs of --lora, here and where a server draws."""
    flags = ["{}.safetensors{}{}".format(*flag.partition(":")) for flag in flags]
    given = [from_flag(flag) for flag in flags]
    here = chosen_loras(flags, tagged_loras(tags)[1], None)
    assert [(str(path.with_suffix("")), one.strength) for path, one in here] == expected
    there = prompt_and_loras(f"a {tags}", given)
    assert there["prompt"].strip() == "a"
    names = [Path(name).name for name, _ in expected]
    fields = [LoraStrengths(one["strength"], one.get("text_strength", one["strength"])) for one in there["loras"]]
    assert [one["name"] for one in there["loras"]] == names and fields == [strengths for _, strengths in here]


def test_a_lora_named_twice_acts_twice(generate, model, tmp_path):
    from serving import lora_file

    (tmp_path / "loras").mkdir()
    file = tmp_path / "loras" / "d.safetensors"
    lora_file(model, file, 1)

    def made(*arguments):
        code, out, err = generate(*arguments)
        assert code == 0, err
        return Path(out.strip())

    twice, once = made("x", "--lora", f"{file}:0.5", "--lora", f"{file}:0.3"), made("x", "--lora", f"{file}:0.8")
    assert read_settings(twice).prompt == "x <lora:d:0.5> <lora:d:0.3>"
    for again in (
        made("--from", twice, "--lora", file), made("x <lora:d:0.5> <lora:d:0.3>", "--lora-folder", file.parent)
    ):  # fmt: skip
        assert read_settings(again) == read_settings(twice)
        assert np.abs(pixels(again) - pixels(twice)).max() <= 1 and np.abs(pixels(again) - pixels(once)).max() <= 1
    assert np.abs(pixels(made("x", "--lora", f"{file}:0.3")) - pixels(once)).max() > 5


def test_a_folder_and_its_trainers_name(generate, model, tmp_path):
    """A LoRA in a folder with a dot is recorded whole, and its tag may be what A1111 calls it."""
    import torch

    from plainsd.adapters.lora import inject, save_lora

    sd = plainsd.load(model, device="cpu", dtype="float32")
    lora = inject(sd.unet, rank=2, generator=torch.Generator().manual_seed(0))
    for parameter in lora.parameters():
        parameter.data += 0.3
    (saved := tmp_path / "loras" / "v1.5").mkdir(parents=True)
    save_lora(sd, saved / "pytorch_lora_weights.safetensors", metadata={"ss_output_name": "ink"})
    code, out, err = generate("x", "--lora", f"{saved}:0.5")
    first = Path(out.strip())
    assert read_settings(first).prompt == "x <lora:v1.5:0.5>" and "lora:v1.5" in dict(read_settings(first).hashes)
    for arguments in (["--from", first, "--lora-folder", saved.parent], ["x <lora:ink:0.5>", "--lora", saved]):
        code, out, err = generate(*arguments)
        assert code == 0 and read_settings(out.strip()) == read_settings(first), err
        assert np.abs(pixels(out.strip()) - pixels(first)).max() <= 1
    fields = prompt_and_loras("x <lora:ink:0.5>", [(saved / "pytorch_lora_weights.safetensors", None)])
    assert fields == {"prompt": "x", "loras": [{"name": "pytorch_lora_weights", "strength": 0.5}]}


def test_strengths_of_a_grid_are_set_by_the_loras_own_names():
    from plainsd.adapters.lora import inject

    sd = tiny_sd()
    names = ("a-b", "a_b", "v1.5 ink", "a_b_2", "ink", "ink")
    loras = [inject(sd.unet, 2, name=name) for name in names]
    set_strengths(sd, [(axis(f"lora:{name}=0.25").name.removeprefix("lora:"), 0.25) for name in names[:3]])
    strengths = [next(iter(lora.adapters.values())).strength for lora in loras]
    assert strengths == [0.25, 0.25, 0.25, 1.0, 1.0, 1.0]
    for name, says in (("a b", "unknown LoRA 'a b'"), ("ink", "grid lora:ink: 2 LoRAs of this name are on the model")):
        with pytest.raises(UserError, match=says):
            set_strengths(sd, [(name, 0.5)])


def test_a_tag_in_a_negative_prompt_is_said_before_the_model_is_loaded(generate):
    code, out, err = generate("x", "--negative", "bad <lora:d:0.5>", "--model", "none")
    assert (code, out) == (2, "") and err.startswith("plainsd: <lora:d> in the negative prompt: take the tag out")


def test_what_a_workflow_says_without_effect_is_told(generate, tmp_path):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    text = {"text_g": "x", "text_l": "x", "width": 4096, "height": 64}
    (tmp_path / "flow.json").write_text(json.dumps({
        "text": node("CLIPTextEncodeSDXL", **text), "empty": node("EmptyLatentImage", width=64, height=64),
        "sampler": node("KSampler", seed=5, steps=2, cfg=7, sampler_name="euler", scheduler="normal",
                        positive=["text", 0], latent_image=["empty", 0]),
    }))  # fmt: skip
    code, _, err = generate("--from", tmp_path / "flow.json")
    assert code == 0 and "no effect here: ComfyUI nodes (CLIPTextEncodeSDXL's width 4096)\n" in err


def test_embeddings_by_flag(generate, model, tmp_path):
    import torch
    from safetensors.torch import save_file

    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 3
    save_file({"emb_params": rows}, tmp_path / "kitty.safetensors")
    save_file({"emb_params": -rows}, tmp_path / "other.safetensors")
    file = tmp_path / "kitty.safetensors"

    def made(*arguments):
        code, out, err = generate(*arguments)
        assert code == 0, err
        return Path(out.strip())

    plain = made("a kitty")
    learned = made("a kitty", "--embedding", file, "--embedding", tmp_path / "other.safetensors")
    err = generate("a Kitty", "--embedding", file, "--embedding", tmp_path / "other.safetensors")[2]
    assert err.count("note: ") == 1 and "other.safetensors has no effect: no prompt has its word 'other'" in err
    assert np.abs(pixels(plain) - pixels(learned)).max() > 5
    assert read_settings(plain).embeddings == () and read_settings(learned).embeddings == ("kitty",)
    renamed = made("a <cat>", "--embedding", f"{file}:<cat>")
    assert read_settings(renamed).embeddings == ("<cat>",)
    code, out, err = generate("--from", renamed)
    assert (code, out) == (2, "") and "made with the embedding '<cat>'; give it with --embedding FILE:<cat>" in err
    again = made("--from", renamed, "--embedding", f"{file}:<cat>")
    assert np.abs(pixels(again) - pixels(renamed)).max() <= 1 and read_settings(again) == read_settings(renamed)
    assert read_settings(made("--from", renamed, "a dog")).embeddings == ()


@pytest.mark.filterwarnings("ignore")
def test_a_refiner_takes_over_and_is_asked_for_again(tmp_path, capsys):
    for name, variant in (("base", TINY_XL), ("refiner", TINY_REFINER)):
        plainsd.save(tiny_sd(variant), tmp_path / name)
    common = ["--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out"), "--model", f"{tmp_path}/base"]
    common += ["--size", "32", "32"]

    def made(*arguments):
        code = main(["generate", *common, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.strip(), err

    refined = made("x", "--steps", 4, "--refiner", tmp_path / "refiner", "--handover", 0.6)[1]
    settings = read_settings(refined)
    assert (settings.refiner, settings.handover) == ("refiner", 0.6)
    plain = made("x", "--steps", 4)[1]
    assert np.abs(pixels(refined) - pixels(plain)).max() > 5
    code, out, err = made("--from", refined)
    assert (code, out) == (2, "") and "made with the refiner 'refiner'; give it with --refiner" in err
    again = made("--from", refined, "--refiner", tmp_path / "refiner")[1]
    assert np.abs(pixels(again) - pixels(refined)).max() <= 1 and read_settings(again) == settings
    code, out, err = made("x", "--handover", 0.5)
    assert (code, out) == (2, "") and "needs a refiner" in err


def test_two_axes_of_the_prompt_replace_different_words():
    axes = [axis("prompt=red,blue"), axis("prompt=apple,pear")]
    texts = [prompts for prompts, _ in grid_cells("a red apple", {}, axes)]
    assert texts == [["a red apple"], ["a blue apple"], ["a red pear"], ["a blue pear"]]


def test_a_grid_is_one_labelled_sheet(generate):
    code, out, _ = generate("x", "--grid", "guidance=1,7.5", "--grid", "sampler=ddim,euler,lms")
    assert code == 0 and out.strip().endswith("00001-grid.png")
    sheet = Image.open(out.strip())
    assert sheet.width > 2 * 64 and sheet.height > 3 * 64
    _, single, _ = generate("x", "--guidance", 7.5, "--sampler", "euler")
    wide = max(64, round(ImageFont.load_default(12).getlength("guidance 7.5")) + 12)
    left = sheet.width - wide + (wide - 64) // 2
    cell = sheet.crop((left, sheet.height - 128, left + 64, sheet.height - 64))
    assert np.abs(np.asarray(cell).astype(int) - pixels(single.strip())).max() <= 1


def test_preview_is_a_rough_picture_of_the_right_size(generate, tmp_path):
    assert generate("x", "--preview", tmp_path / "deep" / "p.png", "--size", 72, 64)[0] == 0
    assert Image.open(tmp_path / "deep" / "p.png").size == (72, 64)
    assert os.listdir(tmp_path / "deep") == ["p.png"]


def test_tokens_and_info_and_convert(model, tmp_path, capsys):
    assert main(["tokens", "(ab:1.5)", "--model", model]) == 0
    said = capsys.readouterr().out
    assert "chunk 1 of 1" in said and "1.500" in said
    for steps in (0, 1001):
        assert main(["tokens", "[a:b:0.5]", "--model", model, "--steps", str(steps)]) == 2
        assert capsys.readouterr().err == f"plainsd: steps {steps} is out of range; choose 1 to 1000\n"
    assert main(["info", model]) == 0
    assert "diffusers folder" in capsys.readouterr().out
    assert main(["convert", model, str(tmp_path / "copy"), "--layout", "diffusers"]) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (Path(model) / weights).read_bytes()


def test_tokens_as_another_program_reads_them(model, capsys):
    sd, prompt, told = plainsd.load(model, device="cpu", dtype="float32"), "(a:1.5) [b:c:0.5] d AND e", []
    for like in ("diffusers", "a1111", "comfyui"):
        assert main(["tokens", prompt, "--model", model, "--steps", "8", "--like", like]) == 0
        told.append(capsys.readouterr().out)
        assert told[-1] == describe(sd, prompt, 8, like) + "\n"
    assert told[2] not in told[:2]
    assert main(["tokens", prompt, "--model", model, "--like", "comfy"]) == 2
    assert "did you mean 'comfyui'?" in capsys.readouterr().err


# --- what goes wrong --------------------------------------------------------------------------------------------------

WRONG = {
    "no prompt": ([], "there is no prompt"),
    "sampler": (["x", "--sampler", "eular"], "unknown sampler 'eular'; did you mean 'euler'?"),
    "spacing": (["x", "--spacing", "karas"], "unknown spacing 'karas'; did you mean 'karras'?"),
    "size": (["x", "--size", "100", "64"], "size 100x64: both sides must be multiples of 8 from 8 to 4096; try 96x64"),
    "huge": (["x", "--size", "64", "80000"], "out of range"),
    "steps": (["x", "--steps", "0"], "steps 0 is out of range"),
    "too many steps": (["x", "--steps", "1001"], "steps 1001 is out of range"),
    "no number": (["x", "--steps", "many"], "plainsd: --steps: 'many' is not a whole number; see"),
    "half a number": (["x", "--count", "1.5"], "plainsd: --count: '1.5' is not a whole number; see"),
    "a word as guidance": (["x", "--guidance", "high"], "plainsd: --guidance: 'high' is not a number; see"),
    "a word in a pair": (["x", "--interval", "1", "b"], "plainsd: --interval: 'b' is not a number; see"),
    "a word in a repeated pair": (["x", "--control-range", "a", "1"], "--control-range: 'a' is not a number; see"),
    "a word as a repeated number": (["x", "--control-kind", "b"], "--control-kind: 'b' is not a whole number; see"),
    "no value": (["x", "--device"], "plainsd: --device needs a value; see"),
    "one of two values": (["x", "--interval", "1"], "plainsd: --interval needs 2 values; see"),
    "a word as size": (["--size", "64", "x", "--steps", "2"], "--size: 'x' is not a whole number"),
    "half a size": (["x", "--size", "64"], "--size needs 2 values"),
    "unknown flag": (["x", "--sped", "3"], "--sped"),
    "misspelled flag": (["x", "--stepz", "3"], "--stepz, 3; did you mean --steps?"),
    "two prompts": (["x", "y"], "Unrecognized options: y"),
    "seed": (
        ["x", "--seed", "-2"],
        "seed -2 is out of range; choose 0 to 18446744073709551615, or -1 for a random one",
    ),
    "a long seed": (["x", "--seed", str(2**64)], "seed 18446744073709551616 is out of range"),
    "half a seed": (
        ["x", "--seed", "1.5"],
        "seed '1.5' is not a whole number; give one from 0 to 18446744073709551615, or",
    ),
    "variation seed": (["x", "--variation-seed", "rand"], "variation seed 'rand' is not a whole number"),
    "seeds past the last": (["x", "--seed", str(2**64 - 2), "--count", "3"], "and the 2 after it pass"),
    "a switch of a grid": (["x", "--grid", "tiling=true,maybe"], "grid 'tiling=true,maybe' has a value that cannot be"),
    "a grid of the hires pass": (["x", "--grid", "upscaler=latent,lanczos"], "upscaler has no effect without hires"),
    "a grid of variations": (["x", "--grid", "variation_seed=1,2"], "variation seed has no effect without variation"),
    "a seed of a grid": (["x", "--grid", "seed=1,2.5"], "grid 'seed=1,2.5' has a value that cannot be read"),
    "guidance": (["x", "--guidance", "nan"], "guidance nan is out of range"),
    "count": (["x", "--count", "0"], "count 0"),
    "clip skip": (["x", "--clip-skip", "9"], "clip skip 9"),
    "eta": (["x", "--eta", "0.5", "--sampler", "lms"], "sampler 'lms' has no eta"),
    "variation": (["x", "--variation-strength", "0.5"], "variation seed"),
    "two kinds of guidance": (["x", "--rescale", "0.5", "--threshold", "0.9"], "do not go together"),
    "model": (["x", "--model", "/nowhere/at all"], "there is no model"),
    "device": (["x", "--device", "gpu9"], "unknown device 'gpu9'; choose auto or cpu"),
    "device of another build": (["x", "--device", "vulkan"], "device 'vulkan' is not there: this PyTorch ("),
    "device without numbers": (["x", "--device", "meta"], "device 'meta' is not there"),
    "one processor too many": (
        ["x", "--device", "cpu:7"],
        "'cpu:7' is not there; the last one of this machine is cpu:0",
    ),
    "dtype": (["x", "--dtype", "float8"], "unknown dtype 'float8'"),
    "lora": (["x", "--lora", "/nowhere.safetensors:0.5"], "/nowhere.safetensors"),
    "lora's strength": (["x", "--lora", "/nowhere:strong"], "'strong' is not a strength"),
    "lora by tag": (["x <lora:style:1>"], "names the LoRA 'style'"),
    "embedding": (["x", "--embedding", "/nowhere.pt:<cat>"], "no such file '/nowhere.pt'"),
    "embedding that is none": (["x", "--embedding", "PHOTO"], "photo.png"),
    "handover": (["x", "--handover", "2"], "handover 2.0 is out of range"),
    "handover alone": (["x", "--handover", "0.5"], "needs a refiner"),
    "refiner": (["x", "--refiner", "/nowhere/at all"], "there is no model"),
    "from nothing": (["--from", "/nowhere.png"], "does not exist"),
    "from a photo": (["--from", "PHOTO"], "carries no settings"),
    "image": (["x", "--image", "/nowhere.png"], "does not exist"),
    "mask alone": (["x", "--mask", "PHOTO"], "--mask needs a picture"),
    "mask of another size": (["x", "--image", "PHOTO", "--mask", "SMALL"], "the mask is 8x8 and the picture 52x40"),
    "dark mask": (["x", "--image", "SMALL", "--mask", "SMALL"], "the mask is dark everywhere"),
    "outpaint alone": (["x", "--outpaint", "8", "0", "0", "0"], "outpainting needs a picture; give it with --image"),
    "absurd outpaint": (["x", "--image", "PHOTO", "--outpaint", "0", "999999999", "0", "0"], "0 to 4096, at least one"),
    "strength alone": (["x", "--strength", "0.5"], "give it with --image"),
    "strength": (["x", "--image", "PHOTO", "--strength", "1.5"], "strength 1.5 is out of range"),
    "no step left": (["x", "--image", "PHOTO", "--strength", "0.1"], "leaves none to run"),
    "hires": (["x", "--hires", "2", "--size", "4096", "4096"], "size 8192x8192"),
    "upscaler": (["x", "--hires", "2", "--upscaler", "esrgan"], "unknown upscaler 'esrgan'"),
    "strength of a grid": (["x", "--grid", "strength=0.4,0.8"], "strength needs a picture; give it with --image"),
    "steps of no hires": (["x", "--hires-steps", "3"], "hires steps has no effect without hires; give both"),
    "text of no hires": (["x", "--hires-prompt", "y"], "hires prompt has no effect without hires"),
    "upscaler of no hires": (["x", "--upscaler", "lanczos"], "upscaler has no effect without hires"),
    "variation seed alone": (["x", "--variation-seed", "5"], "variation seed has no effect without variation strength"),
    "apg parallel alone": (["x", "--apg-parallel", "0.5"], "apg parallel has no effect without apg"),
    "grid setting": (["x", "--grid", "speed=1"], "unknown grid setting 'speed'"),
    "grid value": (["x", "--grid", "guidance=high"], "cannot be read"),
    "two axes of one": (["x", "--grid", "steps=1,2", "--grid", "steps=3,4"], "both axes of the grid are steps"),
    "two axes of a LoRA": (["x", *["--grid", "lora:ink=0,1"] * 2], "both axes of the grid are lora:ink"),
    "three axes": (["x", *["--grid", "steps=1"] * 3], "one or two axes"),
    "gif": (["x", "--out", "x.gif"], "written as PNG, JPEG or WebP"),
    "format": (["x", "--format", "gif"], "unknown format 'gif'"),
    "two formats": (["x", "--format", "webp", "--out", "x.jpg"], "disagree; leave one of them out"),
    "preview in a file": (["x", "--preview", "PHOTO/sub"], "choose another folder"),
    "file in the way": (["x", "--out", "PHOTO/sub"], "is not a folder"),
    "prompts": (["--prompts", "PHOTO"], "cannot read the prompts"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_code_2(generate, photo, tmp_path, what):
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    arguments, message = WRONG[what]
    paths = {"PHOTO": str(photo), "SMALL": str(tmp_path / "small.png"), "PHOTO/sub": f"{photo}/sub"}
    code, out, err = generate(*(paths.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("plainsd: ") and err.count("\n") == 1 and message in err
    assert sorted(os.listdir(tmp_path)) == ["photo.png", "small.png"]


def test_an_unknown_command(capsys):
    assert main(["genrate"]) == 2
    assert capsys.readouterr().err.startswith("plainsd: unknown command 'genrate'; did you mean 'generate'?")


def test_what_is_missing_is_named(capsys):
    assert main(["convert", "a"]) == 2
    assert capsys.readouterr().err == "plainsd: missing: DST; see plainsd convert --help\n"
    assert main(["merge", "a", "b"]) == 2
    assert capsys.readouterr().err == "plainsd: missing: --out; see plainsd merge --help\n"


@pytest.mark.parametrize("command", [["convert", "MODEL", "COPY"], ["verify", "MODEL"]])
def test_an_unknown_family(model, tmp_path, capsys, command):
    arguments = [{"MODEL": model, "COPY": str(tmp_path / "copy")}.get(argument, argument) for argument in command]
    assert main([*arguments, "--family", "sd1-inpaint"]) == 2
    err = capsys.readouterr().err
    assert "unknown model family 'sd1-inpaint'; did you mean 'sd1-inpainting'?" in err and not os.listdir(tmp_path)


def test_convert_takes_the_layout_from_the_name(model, tmp_path):
    assert main(["convert", model, str(tmp_path / "a.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b")]) == 0
    assert (tmp_path / "a.safetensors").is_file() and (tmp_path / "b" / "model_index.json").is_file()


def test_eval_of_a_model_without_concepts(model, capsys):
    assert main(["eval", model]) == 2
    assert "concepts.json" in capsys.readouterr().err


def test_the_flags_of_eval_arrive(model, tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(
        "plainsd.emoji.evaluate.evaluate", lambda sd, concepts, **more: asked.update(more, concepts=concepts)
    )
    monkeypatch.setattr("plainsd.emoji.evaluate.score_table", lambda result: "its scores\n")
    (tmp_path / "concepts.json").write_text('{"size": 64}')
    flags = {
        "prompts": 5, "steps": 7, "guidance": 3.5, "sampler": "euler", "seed": 11, "out": tmp_path / "out",
        "font": tmp_path / "font.ttf", "sheet": tmp_path / "sheet.png", "concepts": tmp_path / "concepts.json",
    }  # fmt: skip
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["eval", "none", *arguments]) == 2
    assert "no emoji font at " in capsys.readouterr().err  # before the model is looked for
    looked = []
    monkeypatch.setattr("plainsd.emoji.drawing.open_font", looked.append)
    assert main(["eval", model, *arguments, "--device", "cpu", "--dtype", "float32", "--plain"]) == 0
    assert capsys.readouterr().out == "its scores\n"
    assert asked.pop("about")["model"] == model and callable(asked.pop("progress"))
    assert asked == flags | {"concepts": {"size": 64}} and looked == [flags["font"]]


def test_debug_shows_the_traceback(generate, monkeypatch):
    monkeypatch.setenv("PLAINSD_DEBUG", "1")
    code, _, err = generate("x", "--sampler", "eular")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("plainsd: unknown sampler")


def test_a_picture_of_another_model(generate, model, photo, tmp_path, monkeypatch, capsys):
    _, out, _ = generate("x")
    monkeypatch.setattr("plainsd.checkpoint.find", lambda source, variant_file: Path(model).rename(tmp_path / "other"))
    assert main(["generate", "--from", out.strip(), "--out", str(tmp_path / "y")]) == 2
    (tmp_path / "other").rename(model)
    assert "was made with the model 'tiny', not 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["info"], ["tokens", "x"], ["nothing"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_closes_early_ends_quietly(arguments, stream):
    """Nobody reads: what is printed reaches a closed pipe at the first line, or when the rest is flushed at the end."""
    read, write = os.pipe()
    os.close(read)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    command = [sys.executable, "-m", "plainsd", *arguments]
    done = subprocess.run(command, **{stream: write, other: subprocess.PIPE}, text=True, timeout=120)
    os.close(write)
    says_it_there = (arguments == ["nothing"]) == (stream == "stderr")
    assert done.returncode == (141 if says_it_there else 2 if arguments == ["nothing"] else 0)
    assert bool(getattr(done, other)) == (not says_it_there)


def test_drawing_ends_quietly_too(model, tmp_path):
    command = [sys.executable, "-m", "plainsd", "generate", "x", "--model", model, "--steps", "1", "--count", "3"]
    command += ["--batch", "1", "--device", "cpu", "--out", str(tmp_path / "o")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 141 and "Error" not in done.stderr and "plainsd:" not in done.stderr
    assert os.listdir(tmp_path / "o") == ["00001-0.png"]  # whole, and its name was to be printed


def test_a_full_disk_leaves_nothing(generate, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = generate("x")
    assert code == 2 and "No space left on device" in err.splitlines()[-1]
    assert os.listdir(tmp_path / "out") == []


def test_ctrl_c_keeps_what_is_done_and_nothing_half_written(generate, tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    import plainsd.pictures.drawing as module

    real = module.decode
    monkeypatch.setattr(module, "decode", interrupted)
    code, out, err = generate("x", "--count", 4, "--batch", 1)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert os.listdir(tmp_path / "out") == ["00001-0.png"] and out.split() == [str(tmp_path / "out" / "00001-0.png")]


@pytest.mark.full
def test_a_real_interrupt(model, tmp_path):
    """SIGINT to the installed command, in the middle of its steps."""
    import signal

    command = [sys.executable, "-m", "plainsd", "generate", "x", "--model", model, "--steps", "900"]
    command += ["--out", tmp_path / "o"]
    process = subprocess.Popen(  # which heeds it though the tests run in the background
        [*command, "--preview", tmp_path / "p.png"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "p.png").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in process.stderr.read()
    assert sorted(os.listdir(tmp_path)) == ["p.png"]


def test_an_adapter_flag_that_cannot_be_read_names_its_field():
    for call, field in (
        (partial(from_flag, "a.safetensors:high"), "loras"),
        (partial(from_flag, "a.safetensors:high", "control"), "control"),
        (partial(from_flag, "a.safetensors:high", "image-prompt"), "image_prompt"),
        (partial(embedding_from_flag, "none.pt:<cat>"), "embeddings"),
        (partial(chosen_loras, [], [LoraTag("ink")], None), "loras"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.field == field


# --- words and LoRAs that other programs' texts name -----------------------------------------------------------------

BY_A1111 = "Steps: 2, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Model: x, {}Version: v1.10.1\n"


def embedding_named(path):
    from safetensors.torch import save_file

    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 3}, path)
    return path


@pytest.mark.parametrize("negative", ["EasyNegative", "easynegative, bad"])
def test_embeddings_of_a1111s_texts_are_asked_for(generate, tmp_path, negative):
    text = tmp_path / "theirs.txt"
    text.write_text(
        f"a cat\nNegative prompt: {negative}\n" + BY_A1111.format('TI hashes: "EasyNegative: c74b4e810b03", ')
    )
    code, out, err = generate("--from", text)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "made with the embedding 'EasyNegative'; give it with --embedding FILE:EasyNegative" in err
    file = embedding_named(tmp_path / "EasyNegative.safetensors")
    code, out, err = generate("--from", text, "--embedding", file)
    assert code == 0 and read_settings(out.strip()).embeddings == ("EasyNegative",)
    assert "embedding 'EasyNegative' of the hash c74b4e810b03, and that of" in err
    now = dict(read_settings(out.strip()).hashes)["embed:EasyNegative"]
    text.write_text(text.read_text().replace("c74b4e810b03", now))
    assert "of the hash" not in generate("--from", text, "--embedding", f"{file}:easyNegative")[2]
    code, _, err = generate("a dog", "--from", text, "--negative", "")  # which have no use for it
    assert code == 0 and "embedding" not in err


def test_loras_of_a_hires_prompt_are_named(generate, tmp_path, model):
    from serving import lora_file

    text = tmp_path / "theirs.txt"
    hires = (
        'Denoising strength: 0.5, Hires prompt: "a dog <lora:two:0.5>", Hires upscale: 1.5, Hires upscaler: Latent, '
    )
    text.write_text("a cat <lora:one:0.8>\n" + BY_A1111.format(hires))
    lora_file(model, tmp_path / "one.safetensors", 1)
    code, out, err = generate("--from", text, "--lora", tmp_path / "one.safetensors")
    assert code == 0 and err.count("hires pass") == 1
    assert f"note: the hires pass of '{text}' was drawn with the LoRAs <lora:two:0.5>" in err
    assert "no effect here" not in err
    again = read_settings(out.strip())
    assert (again.prompt, again.hires_prompt, again.other) == ("a cat <lora:one:0.8>", "a dog ", ())
    assert "hires pass" not in generate("--from", out.strip(), "--lora", tmp_path / "one.safetensors")[2]


@pytest.mark.parametrize(
    ("texts", "used"),
    [
        ({"negative": "EASYNEGATIVE"}, True),
        ({"prompt": "easynegative, a cat"}, True),
        ({"hires": 2.0, "hires_prompt": "a (EasyNegative:1.2) cat"}, True),
        ({"hires": 2.0, "hires_negative": "easynegative"}, True),
        ({"prompt": "uneasynegatives", "negative": "EasyNegative_2"}, False),
    ],
)
def test_embeddings_are_recorded_where_the_tokenizer_finds_them(tmp_path, texts, used):
    file = embedding_named(tmp_path / "EasyNegative.safetensors")
    sd, settings = tiny_sd(), Settings(**{"prompt": "a", **texts})
    word = plainsd.add_embedding(sd, file)
    units = [sd.tokenizers[0].units(text) for text in texts.values() if isinstance(text, str)]
    assert used == any(len(unit) == 2 for text in units for unit in text)
    found = with_notes(settings, sd, [], {word: file}, None, {})
    assert found.embeddings == ((word,) if used else ()) and len(found.hashes) == used
    choices = vars(settings) | {"embeddings": (word,), "model": None, "hashes": ()}
    command = Generate(from_=tmp_path / "x.png")
    if used:
        with pytest.raises(UserError, match="made with the embedding 'EasyNegative'"):
            check_recorded(command, sd, [settings.prompt], [], {}, dict(choices))
    else:
        check_recorded(command, sd, [settings.prompt], [], {}, dict(choices))
