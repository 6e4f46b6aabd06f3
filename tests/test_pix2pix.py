"""Models that edit a picture (InstructPix2Pix), beside diffusers' pipelines; UNets that read what is not supported."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, TINY_XL, difference, pipeline, seeded, smooth_picture, tiny_sd
from PIL import Image
from test_detect import header_of
from test_edm import TINY_COSXL

import plainsd
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.detect import detect
from plainsd.models.variants import VARIANTS
from plainsd.pictures.texts.a1111 import format_settings, parse_settings

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = {"device": "cpu", "dtype": "float32"}
EDITS = {"in_channels": 8}


@pytest.fixture(scope="module")
def editor(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "editor"
    plainsd.save(tiny_sd(TINY, **EDITS), path)
    return str(path)


@pytest.mark.parametrize("image_guidance", [1.0, 1.5, 2.2])
def test_a_picture_equals_diffusers(editor, image_guidance):
    pipe = pipeline("StableDiffusionInstructPix2PixPipeline", editor, "DDIMScheduler")
    photo = smooth_picture(64)
    options = {"num_inference_steps": 5, "guidance_scale": 6.0, "image_guidance_scale": image_guidance}
    theirs = pipe("make it red", photo, negative_prompt="blue", generator=seeded(3), output_type="latent", **options)
    sd = plainsd.load(editor, **CPU)
    given = {"seed": 3, "steps": 5, "guidance": 6.0, "sampler": "ddim", "spacing": "leading"}
    *_, ours = plainsd.image_to_image(sd, "make it red", photo, negative="blue", image_guidance=image_guidance, **given)
    assert (ours.latents - theirs.images).abs().max() / theirs.images.abs().max() < 2e-5
    picture = pipe("make it red", photo, negative_prompt="blue", generator=seeded(3), **options).images[0]
    assert difference(ours.images[0], picture) <= 1
    assert ours.settings[0].image_guidance == image_guidance and ours.settings[0].strength == 1


@pytest.mark.parametrize("edm", [False, True])
def test_sdxl_equals_diffusers(tmp_path, edm):
    """The picture's latent is scaled for CosXL's editing model, and for no other."""
    plainsd.save(tiny_sd(TINY_COSXL if edm else TINY_XL, **EDITS), tmp_path / "m")
    kind = "EDMEulerScheduler" if edm else "EulerDiscreteScheduler"
    pipe = pipeline("StableDiffusionXLInstructPix2PixPipeline", tmp_path / "m", kind)
    assert pipe.is_cosxl_edit == edm
    photo = smooth_picture(64)
    theirs = pipe(
        "make it red", image=photo, negative_prompt="blue", num_inference_steps=5, guidance_scale=4.0, height=64,
        width=64, image_guidance_scale=1.5, generator=seeded(3), output_type="latent",
    ).images  # fmt: skip
    sd = plainsd.load(tmp_path / "m", **CPU)
    spacing = "exponential" if edm else "leading"
    given = {"seed": 3, "steps": 5, "guidance": 4.0, "sampler": "euler", "spacing": spacing}
    *_, ours = plainsd.image_to_image(sd, "make it red", photo, negative="blue", **given)
    assert (ours.latents - theirs).abs().max() / theirs.abs().max() < 2e-4


def test_pictures_of_a_batch_are_as_alone(editor):
    sd, photo = plainsd.load(editor, **CPU), smooth_picture(64)
    *_, both = plainsd.image_to_image(sd, ["red", "a blue sky, wide"], photo, seed=5, steps=3)
    *_, second = plainsd.image_to_image(sd, "a blue sky, wide", photo, seed=6, steps=3)
    torch.testing.assert_close(both.latents[1:], second.latents, rtol=1e-4, atol=1e-4)


def test_both_guidances_at_one_ask_once(editor, monkeypatch):
    """At 1 both differences cancel but for the prompted estimate: one row, the same picture."""
    sd, photo = plainsd.load(editor, **CPU), smooth_picture(64)
    rows = []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, *more, **named: rows.append(len(x)) or forward(x, *more, **named))
    *_, once = plainsd.image_to_image(sd, "red", photo, guidance=1.0, image_guidance=1.0, steps=3)
    assert set(rows) == {1}
    *_, near = plainsd.image_to_image(sd, "red", photo, guidance=1.0, image_guidance=1.0 + 1e-6, steps=3)
    assert rows[-1] == 3
    torch.testing.assert_close(once.latents, near.latents, rtol=1e-3, atol=1e-3)


def test_a_strength_begins_at_the_picture(editor):
    sd, photo = plainsd.load(editor, **CPU), smooth_picture(64)
    events = plainsd.image_to_image(sd, "red", photo, 0.5, steps=4)
    assert events.steps == 2 and events.settings[0].strength == 0.5
    *_, done = events
    assert done.latents.isfinite().all()


def test_command_line_and_settings(editor, tmp_path, capsys):
    smooth_picture(64).save(tmp_path / "a.png")
    common = ["generate", "red", "--model", editor, "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    given = ["--image", str(tmp_path / "a.png"), "--image-guidance", "1.8", "--out", str(tmp_path / "b.png")]
    assert main([*common, *given]) == 0
    settings = plainsd.pictures.images.read_settings(tmp_path / "b.png")
    assert settings.image_guidance == 1.8 and "Image CFG scale: 1.8" in format_settings(settings)
    assert parse_settings(format_settings(settings)) == settings
    again = ["--from", str(tmp_path / "b.png"), "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "c.png")]
    assert main(["generate", "--model", editor, "--device", "cpu", "--dtype", "float32", *again]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert main([*common, "--out", str(tmp_path / "d.png")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "plainsd: this model edits pictures; it needs one (image_to_image, or --image)"


def test_what_does_not_go_together(editor, model):
    sd, photo = plainsd.load(editor, **CPU), smooth_picture(64)
    with pytest.raises(UserError, match="reads no mask"):
        plainsd.inpaint(sd, "red", photo, photo)
    with pytest.raises(UserError, match="rescale does not go with a model that edits"):
        plainsd.image_to_image(sd, "red", photo, rescale=0.5)
    with pytest.raises(UserError, match="image guidance 1000 is out of range"):
        plainsd.image_to_image(sd, "red", photo, image_guidance=1000)
    plain = plainsd.load(model, **CPU)
    with pytest.raises(UserError, match=r"image guidance 1.5 is for models that edit") as error:
        plainsd.image_to_image(plain, "red", photo, image_guidance=1.5)
    assert error.value.field == "image_guidance"
    sd.refiner = plain
    with pytest.raises(UserError, match="refiner"):
        plainsd.image_to_image(sd, "red", photo)


@pytest.mark.parametrize("name", ["sd1-pix2pix", "sdxl-pix2pix", "cosxl-edit"])
def test_single_files(name):
    file = header_of(VARIANTS[name])
    assert detect(file, name)[0] == VARIANTS[name]
    assert detect(file)[0].name == ("sdxl-pix2pix" if name == "cosxl-edit" else name)


@pytest.mark.parametrize(
    ("channels", "what"), [(5, "a depth map .depth2img."), (7, "a small picture .the x4 upscaler."), (6, "unknown")]
)
def test_other_channels_are_refused_by_name(tmp_path, capsys, channels, what):
    plainsd.save(tiny_sd(TINY, in_channels=channels), tmp_path / "m")
    with pytest.raises(UserError, match=f"{channels} input channels: .*{what}"):
        plainsd.load(tmp_path / "m", **CPU)
    assert main(["generate", "x", "--model", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=f"{channels} input channels: .*{what}"):
        detect(header_of(replace(VARIANTS["sd1"], unet=replace(VARIANTS["sd1"].unet, in_channels=channels))))


def test_other_pipelines_that_read_two_latents_are_refused(editor, tmp_path):
    import shutil

    shutil.copytree(editor, tmp_path / "m")
    index = json.loads((tmp_path / "m/model_index.json").read_text()) | {"_class_name": "MarigoldDepthPipeline"}
    (tmp_path / "m/model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="MarigoldDepthPipeline, which is not supported"):
        plainsd.load(tmp_path / "m", **CPU)


def test_verify_passes(editor):
    from plainsd.reports.verify import verify

    found = {row.name: row for row in verify(editor, device="cpu")}
    assert all(row.passed for row in found.values()), found


def test_a_server_draws_it(editor, tmp_path):
    """Through our own API and A1111's: the same picture as in Python, and the second guidance in its settings."""
    import base64
    from io import BytesIO

    from serving import open_service, served

    from plainsd.pictures.images import read_settings

    photo, png = smooth_picture(64), BytesIO()
    photo.save(png, format="PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    with served(open_service([editor], tmp_path / "data")) as server:
        wanted = {"prompt": "red", "init_images": [encoded], "steps": 4, "seed": 3, "image_cfg_scale": 1.8}
        found = server.post("/sdapi/v1/img2img", wanted | {"denoising_strength": 1.0})
        assert found.status_code == 200, found.text
        drawn = base64.b64decode(found.json()["images"][0])
        assert read_settings(BytesIO(drawn)).image_guidance == 1.8
        refused = server.post("/api/jobs", {"prompt": "red", "image": encoded, "image_guidance": 1000})
        assert refused.status_code == 422 and refused.json()["error"]["field"] == "image_guidance", refused.text
        assert server.get("/api/models").json()["models"][0]["edits"] is True
    sd = plainsd.load(editor, **CPU)
    ours = plainsd.final(plainsd.image_to_image(sd, "red", photo, steps=4, seed=3, image_guidance=1.8, like="a1111"))[0]
    assert difference(ours, Image.open(BytesIO(drawn)).convert("RGB")) <= 1
