"""Where settings lie in pictures' files, of every program that puts them there; and our own JPEG and WebP files."""

import json
from io import BytesIO

import pytest
from conftest import smooth_picture
from PIL import ExifTags, Image, PngImagePlugin

from plainsd.errors import UserError
from plainsd.pictures.images import read_settings, write_new_picture
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings
from plainsd.pictures.texts.embedded import MOST_BYTES, comment_text, exif_of, texts_in

TEXT = "a red apple, Größe 猫 🍎\nNegative prompt: blurred\nSteps: 20, Sampler: Euler a, Seed: 1, Version: v1.10.1"
GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a boat", "clip": ["1", 1]}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {"class_type": "KSampler", "inputs": {
        "seed": 5, "steps": 3, "cfg": 7, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def photo():
    return smooth_picture(32)


def held(photo, kind, **options):
    """What is read out of such a file."""
    file = BytesIO()
    photo.save(file, format=kind, **options)
    return read_settings(file)


def commented(comment):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        b"ASCII\0\0\0" + TEXT.encode(),
        bytes(8) + TEXT.encode(),
        TEXT.encode(),
        b"UNICODE\0" + TEXT.encode("utf-16-be") + b"\0\0",
    ],
)
def test_comments_in_every_encoding(photo, kind, comment):
    read = held(photo, kind, exif=commented(comment))
    assert read.prompt == "a red apple, Größe 猫 🍎" and (read.sampler, read.seed) == ("euler_a", 1)


@pytest.mark.parametrize("encoding", ["shift_jis", "iso2022_jp"])
def test_comments_in_japanese_encodings(encoding):
    assert comment_text(b"JIS\0\0\0\0\0" + "赤いりんご, x".encode(encoding)) == "赤いりんご, x"


def test_a1111s_own_bytes_are_ours():
    """UserComment as A1111's piexif writes it: UNICODE, then UTF-16, the high byte first."""
    assert b"UNICODE\0" + "a: b".encode("utf-16-be") in exif_of("a: b")


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp", "x.png"])
def test_every_format_brings_back_what_it_was_given(photo, tmp_path, name):
    made = Settings(
        "Größe, 猫 🍎\nand more", "bad", (32, 32), 20, 7.5, "euler_a", "karras", 3, model="emoji", noise="cpu"
    )
    path = write_new_picture(photo, tmp_path / name, made)
    assert read_settings(path) == made
    kind = {"jpg": "JPEG", "peg": "JPEG", "ebp": "WEBP", "png": "PNG"}[name[-3:].lower()]
    with Image.open(path) as image:
        assert image.format == kind and image.size == (32, 32)
    assert write_new_picture(photo, tmp_path / name, None).name == f"x-2{path.suffix}"


def test_settings_too_long_for_a_jpeg_are_said(photo, tmp_path):
    long = Settings("x" * 40_000, steps=1, noise="cpu")
    with pytest.raises(UserError, match="do not fit into a JPEG file; write PNG or WebP"):
        write_new_picture(photo, tmp_path / "x.jpg", long)
    assert not list(tmp_path.iterdir())
    assert read_settings(write_new_picture(photo, tmp_path / "x.webp", long)) == long


def test_stable_diffusion_cpps_places(photo):
    """A JPEG's comment with its word and a zero before it; XMP in WebP."""
    assert held(photo, "JPEG", comment=b"parameters\0" + TEXT.encode()).seed == 1
    escaped = TEXT.replace("a red", "a &lt;red&gt; &amp; &quot;").encode()
    xmp = b"<x:xmpmeta><rdf><sdcpp:parameters>" + escaped + b"</sdcpp:parameters></rdf></x:xmpmeta>"
    assert held(photo, "WEBP", xmp=xmp).prompt.startswith('a <red> & " apple')


@pytest.mark.parametrize("name", ["prompt", "workflow"])
def test_comfyuis_places(photo, name):
    info = PngImagePlugin.PngInfo()
    info.add_text(name, json.dumps(GRAPH))
    assert held(photo, "PNG", pnginfo=info).prompt == "a boat"
    exif = Image.Exif()
    exif[ExifTags.Base.Model if name == "prompt" else ExifTags.Base.Make] = f"{name}:{json.dumps(GRAPH)}"
    read = held(photo, "WEBP", exif=exif.tobytes())
    assert (read.prompt, read.seed, read.like) == ("a boat", 5, "comfyui")


def test_where_a_workflow_cannot_be_read_the_text_beside_it_is(photo):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "{}")
    info.add_text("parameters", TEXT)
    assert held(photo, "PNG", pnginfo=info).seed == 1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_pictures_without_settings(photo, kind):
    with pytest.raises(UserError, match="it carries no settings of plainsd, A1111, ComfyUI or stable-diffusion.cpp"):
        held(photo, kind)
    with pytest.raises(UserError, match="no settings in the text"):
        held(photo, kind, exif=exif_of("taken on a sunny day"))


def test_comments_that_are_too_long_or_broken(photo):
    with pytest.raises(UserError, match="too long"):
        comment_text(bytes(MOST_BYTES + 1))
    image = Image.new("RGB", (8, 8))
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    assert texts_in(image) == {}


def test_files_of_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff" + TEXT, "utf-8")
    assert read_settings(tmp_path / "a.txt").seed == 1
    (tmp_path / "a.json").write_text(json.dumps({"prompt": GRAPH}))
    assert read_settings(tmp_path / "a.json").prompt == "a boat"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    for name, says in (("b.txt", "not UTF-8 text"), ("c.json", "cannot read")):
        with pytest.raises(UserError, match=says):
            read_settings(tmp_path / name)


def test_what_we_write_is_what_we_show(photo, tmp_path):
    made = Settings("x", steps=3, seed=2)
    with Image.open(write_new_picture(photo, tmp_path / "a.webp", made)) as image:
        assert texts_in(image) == {"parameters": format_settings(made)}
