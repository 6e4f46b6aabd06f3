"""`plainsd generate --from`: every kind of picture is made again, whoever wrote its text, or a line says what lacks."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import pixels, tiny_sd
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from serving import embedding_file, lora_file

import plainsd
from plainsd.checkpoint import save_vae
from plainsd.files import hashes
from plainsd.pictures.images import read_settings
from plainsd.pictures.texts.a1111 import parse_settings


@pytest.fixture
def made(generate):
    """The one picture that comes out."""

    def run(*arguments) -> Path:
        code, out, err = generate(*arguments)
        assert code == 0, err
        return Path(out.strip())

    return run


@pytest.fixture
def refused(generate):
    """The one line on stderr."""

    def run(*arguments) -> str:
        code, out, err = generate(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    return run


@pytest.fixture
def mask(tmp_path) -> Path:
    light = Image.new("L", (52, 40))
    light.paste(255, (8, 8, 24, 24))
    light.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def same(a: Path, b: Path) -> bool:
    return read_settings(a) == read_settings(b) and np.abs(pixels(a) - pixels(b)).max() <= 1


# --- our own texts ---------------------------------------------------------------------------------------------------

KINDS = {
    "plain": [],
    "negative": ["--negative", "blurred, (bad:1.2)"],
    "sampler and spacing": ["--sampler", "dpmpp_2m_sde", "--spacing", "karras"],
    "spacing alone": ["--sampler", "euler_a", "--spacing", "trailing"],
    "eta": ["--eta", "0.4"],
    "hires": ["--hires", "1.5", "--strength", "0.5"],
    "hires lanczos": ["--hires", "1.5", "--upscaler", "lanczos"],
    "variation": ["--variation-seed", "9", "--variation-strength", "0.3"],
    "clip skip": ["--clip-skip", "2"],
    "rescale": ["--rescale", "0.7"],
    "interval": ["--interval", "1", "2"],
    "perturbed": ["--perturbed", "3"],
    "threshold": ["--threshold", "0.9"],
    "projected": ["--apg", "3", "--apg-parallel", "0.2", "--apg-momentum", "-0.7"],
    "cache": ["--cache", "2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_text_alone(made, kind):
    first = made("a (red:1.2) apple [on:under:0.5] a table", "--steps", 4, "--seed", 3, *KINDS[kind])
    assert same(made("--from", first), first)
    if kind != "plain":
        plain = made("a (red:1.2) apple [on:under:0.5] a table", "--steps", 4, "--seed", 3)
        assert pixels(plain).shape != pixels(first).shape or np.abs(pixels(plain) - pixels(first)).max() > 1


def test_a_picture_drawn_over(made, refused, photo):
    first = made("x", "--steps", 4, "--image", photo, "--strength", 0.6)
    assert same(made("--from", first, "--image", photo), first)
    assert "needs a picture; give it with --image" in refused("--from", first)


def test_a_masked_picture(made, refused, photo, mask):
    first = made("x", "--steps", 4, "--image", photo, "--mask", mask)
    assert read_settings(first).masked
    assert same(made("--from", first, "--image", photo, "--mask", mask), first)
    for arguments in ([], ["--image", photo]):
        assert "was made with a mask; give picture and mask with --image and --mask" in refused(
            "--from", first, *arguments
        )


def test_a_picture_continued_past_its_edges(generate, made, refused, photo, mask):
    first = made("x", "--steps", 4, "--image", photo, "--outpaint", 4, 0, 8, 0)
    assert read_settings(first).outpaint == (4, 0, 8, 0) and not read_settings(first).masked
    assert same(made("--from", first, "--image", photo), first)
    assert "outpainting needs a picture; give it with --image" in refused("--from", first)
    other = made("--from", first, "--image", photo, "--outpaint", 0, 16, 0, 0)
    assert pixels(other).shape == (56, 52, 3) and read_settings(other).outpaint == (0, 16, 0, 0)
    assert (pixels(other)[16:] == pixels(photo)).all()
    code, path, err = generate("--from", first, "--image", photo, "--mask", mask)
    masked = read_settings(Path(path.strip()))
    assert code == 0 and masked.masked and masked.outpaint is None
    assert "was outpainted; --mask is used instead" in err


def test_another_vae_is_named_and_asked_for(made, refused, tmp_path):
    other = tiny_sd(seed=1)
    save_vae(other.vae, tmp_path / "sharp", other.variant)
    first = made("x", "--steps", 2, "--vae", tmp_path / "sharp")
    assert read_settings(first).vae == "sharp"
    assert np.abs(pixels(made("x", "--steps", 2)) - pixels(first)).max() > 5
    assert same(made("--from", first, "--vae", tmp_path / "sharp"), first)
    assert "was made with the VAE 'sharp'; give it with --vae" in refused("--from", first)
    assert "nowhere" in refused("--from", first, "--vae", tmp_path / "nowhere")


# --- A1111's texts ---------------------------------------------------------------------------------------------------

A1111 = (
    "a (red:1.2) apple, [on|under] a table\nNegative prompt: blurred, ((bad))\nSteps: 4, Sampler: {sampler}, "
    "CFG scale: 7, Seed: 1234, Size: 64x64, Model hash: 6ce0161689, Model: v1-5-pruned, {more}Version: v1.10.1"
)


@pytest.fixture
def theirs(tmp_path):
    """A picture with a text of A1111."""

    def write(sampler: str = "Euler a", more: str = "", prompt: str = "") -> Path:
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", prompt + A1111.format(sampler=sampler, more=more))
        Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
        return tmp_path / "theirs.png"

    return write


@pytest.mark.parametrize(
    ("sampler", "more", "ours"),
    [
        ("DPM++ 2M Karras", "", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Schedule type: Karras, ", ("dpmpp_2m", "karras")),
        ("DPM++ SDE", "Schedule type: Exponential, Clip skip: 2, ", ("dpmpp_sde", "exponential")),
        ("Euler a", "Schedule type: Automatic, ENSD: 31337, ", ("euler_a", "uniform")),
        ("DDIM", "Eta: 0.5, ", ("ddim", "ddim_uniform")),
        ("UniPC", "Schedule type: SGM Uniform, ", ("unipc", "uniform")),
    ],
)
def test_a_picture_of_a1111(generate, theirs, sampler, more, ours):
    code, out, err = generate("--from", theirs(sampler, more))
    assert code == 0 and "was made with the weights 6ce0161689, and those of" in err
    assert "no effect here" not in err
    settings = read_settings(out.strip())
    assert (settings.sampler, settings.spacing) == ours
    assert (settings.seed, settings.steps, settings.guidance, settings.size) == (1234, 4, 7.0, (64, 64))
    assert settings.clip_skip == (2 if "Clip skip" in more else 1)
    assert settings.negative == "blurred, ((bad))" and settings.prompt == "a (red:1.2) apple, [on|under] a table"


@pytest.mark.parametrize("how", ["Hires upscale: 1.5", "Hires resize: 96x96", "Hires resize: 96x0"])
def test_a1111s_second_pass(made, theirs, how):
    second = made("--from", theirs(more=f"Denoising strength: 0.5, {how}, Hires steps: 4, Hires upscaler: Latent, "))
    settings = read_settings(second)
    assert pixels(second).shape == (96, 96, 3) and (settings.hires, settings.strength) == (1.5, 0.5)


def test_what_they_record_of_no_second_pass_is_left_out(made, theirs):
    alone = read_settings(made("--from", theirs(more="Hires steps: 4, Hires prompt: y, ")))
    assert (alone.hires, alone.hires_steps, alone.hires_prompt) == (None, None, None)


def test_what_a1111_has_and_we_have_not(generate, made, refused, theirs):
    assert "unknown sampler 'Euler z'" in refused("--from", theirs("Euler z"))
    assert read_settings(made("--from", theirs("Euler z"), "--sampler", "euler")).sampler == "euler"
    hires = theirs(more="Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: R-ESRGAN 4x+, ")
    code, out, err = generate("--from", hires)  # said once the model is there, and it has none by that name
    assert (code, out) == (2, "") and "unknown upscaler 'R-ESRGAN 4x+'" in err
    assert read_settings(made("--from", hires, "--upscaler", "lanczos")).upscaler == "lanczos"
    vae = theirs(more="VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000-ema-pruned.safetensors, ")
    assert "was made with the VAE 'vae-ft-mse-840000-ema-pruned.safetensors'" in refused("--from", vae)
    refined = theirs(more="Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.8, ")
    assert "was made with the refiner 'sd_xl_refiner_1.0'" in refused("--from", refined)


def test_loras_of_a1111s_prompts(refused, theirs, tmp_path):
    (tmp_path / "loras").mkdir()
    tagged = theirs(prompt="<lora:style:0.8> ", more='Lora hashes: "style: 1a2b3c", ')
    assert "names the LoRA 'style'; give it with --lora FILE or --lora-folder FOLDER" in refused("--from", tagged)
    assert "style" in refused("--from", tagged, "--lora-folder", tmp_path / "loras")
    assert "hypernetworks are not supported" in refused("--from", theirs(prompt="<hypernet:anime:1> "))
    assert "with one strength or two" in refused("--from", theirs(prompt="<lora:style:0.8:0.5:lbw=MIDD> "))
    assert "names the LoRA 'style'" in refused("--from", theirs(prompt="<lora:style:0.8:0.5> "))


# --- hashes: which weights, beyond doubt -----------------------------------------------------------------------------


def test_a_picture_names_the_weights_that_drew_it(made, model, tmp_path):
    """As A1111 and kohya would: SHA-256 of a model's, autoencoder's or word's file, of a LoRA's tensors alone."""
    sd = plainsd.load(model, device="cpu", dtype="float32")
    plainsd.save(sd, tmp_path / "one.safetensors")
    save_vae(sd.vae, tmp_path / "sharp", sd.variant)
    lora_file(Path(model), tmp_path / "style.safetensors", 1)
    embedding_file(tmp_path / "cat.safetensors", 2)
    picture = made(
        "x cat",
        "--steps",
        1,
        "--model",
        tmp_path / "one.safetensors",
        "--vae",
        tmp_path / "sharp",
        "--lora",
        tmp_path / "style.safetensors",
        "--embedding",
        tmp_path / "cat.safetensors:cat",
    )
    content = (tmp_path / "style.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    (vae_file,) = (tmp_path / "sharp").glob("*.safetensors")
    expected = {
        "Model hash": sha256(tmp_path / "one.safetensors")[:10],
        "VAE hash": sha256(vae_file)[:10],
        "Lora hashes": f'"style: {hashlib.sha256(content[8 + header :]).hexdigest()[:12]}"',
        "TI hashes": f'"cat: {sha256(tmp_path / "cat.safetensors")[:12]}"',
    }
    with Image.open(picture) as image:
        text = image.info["parameters"]
    for key, value in expected.items():
        assert f"{key}: {value}, " in text
    assert parse_settings(text) == read_settings(picture)


def test_a_lora_that_is_a_folder_is_hashed_too(made, model, tmp_path):
    lora_file(Path(model), tmp_path / "style.safetensors", 1)
    (tmp_path / "ink").mkdir()
    (tmp_path / "style.safetensors").rename(tmp_path / "ink" / "pytorch_lora_weights.safetensors")
    picture = made("x", "--steps", 1, "--lora", tmp_path / "ink")
    assert "lora:ink" in dict(read_settings(picture).hashes)


def test_other_weights_under_the_same_name_are_told(made, generate, tmp_path):
    first = made("x", "--steps", 1)
    assert generate("--from", first)[2].count("note:") == 0
    plainsd.save(tiny_sd(seed=7), tmp_path / "other" / Path(read_settings(first).model))
    code, out, err = generate("--from", first, "--model", tmp_path / "other" / Path(read_settings(first).model))
    assert code == 0 and "the picture will differ" in err
    assert not same(Path(out.strip()), first)


def test_another_lora_under_the_same_name_is_told(made, generate, model, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        lora_file(Path(model), tmp_path / name / "p, q.safetensors", seed)
    one, two = (tmp_path / name / "p, q.safetensors" for name in ("a", "b"))
    first = made("x", "--steps", 1, "--lora", f"{one}:0.3", "--lora", f"{two}:0.9")
    code, out, err = generate("--from", first, "--lora", one, "--lora", two)
    assert code == 0 and "note:" not in err and same(Path(out.strip()), first)
    was = [value for name, value in read_settings(first).hashes if name.startswith("lora:")]
    code, out, err = generate("--from", first, "--lora", two, "--lora", two)
    assert code == 0 and err.count("note:") == 1 and not same(Path(out.strip()), first)
    assert f"LoRA 'p q' of the hash {was[0]}, and that of {two} is {was[1]}: the picture will differ" in err


def test_hashes_of_loras_in_others_texts(generate, theirs, model, tmp_path):
    """By what the trainer called it; of the tensors, as A1111, or of the whole file, as some programs write them."""
    file = tmp_path / "style.safetensors"
    lora_file(Path(model), file, 1)
    save_file(load_file(file), file, {"ss_output_name": "ink"})
    content = file.read_bytes()
    tensors = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    for recorded, noted in ((tensors[:12], 0), (sha256(file)[:10].upper(), 0), ("1a2b3c4d5e", 1)):
        text = theirs(prompt="<lora:ink:0.8> ", more=f'Lora hashes: "ink: {recorded}", ')
        code, _, err = generate("--from", text, "--lora", file)
        assert code == 0 and err.count("LoRA 'ink' of the hash") == noted, err


def test_a_tag_in_a1111s_negative_prompt_is_left_out(generate, theirs):
    for tag in ("<lora:style:0.8:lbw=MIDD>", "<lora:style:1>", "<hypernet:anime:1>"):
        prompt = "a cat\nNegative prompt: bad, "
        text = theirs(prompt=f"{prompt}{tag} ")
        code, out, err = generate("--from", text)
        assert code == 0 and f"note: {tag} in the negative prompt of '{text}' is left out: A1111 loads no LoRA" in err
        assert read_settings(out.strip()).negative.startswith("bad,  a (red:1.2) apple")


def test_hashes_of_large_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 8)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0123456789")
    assert hashes.file_hash(file) == sha256(file)
    kept = tmp_path / "cache" / "plainsd" / "hashes.json"
    kept.write_text(kept.read_text().replace(sha256(file), "known"))
    hashes._file_hash.cache_clear()  # as in another process
    assert hashes.file_hash(file) == "known"
    file.write_bytes(b"another one")
    assert hashes.file_hash(file) == sha256(file)
    file.write_bytes(b"ANOTHER ONE")  # of the same size, a second later
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    hashes._file_hash.cache_clear()
    assert hashes.file_hash(file) == sha256(file)
    kept.write_text("damaged")
    hashes._file_hash.cache_clear()
    assert hashes.file_hash(file) == sha256(file) and len(hashes.read_json(kept)) == 1
    hashes._file_hash.cache_clear()


def test_the_newest_hashes_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 8)
    monkeypatch.setattr(hashes, "MAX_CACHED_HASHES", 3)
    for number in range(5):
        (tmp_path / f"{number}.bin").write_bytes(b"0123456789" * (1 + number))
        hashes.file_hash(tmp_path / f"{number}.bin")
    kept = hashes.read_json(tmp_path / "cache" / "plainsd" / "hashes.json")
    assert [name.split()[0][-5:] for name in kept] == ["2.bin", "3.bin", "4.bin"]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
