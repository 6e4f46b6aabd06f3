"""Networks that enlarge pictures, on the server: in second passes by all ways in, and for pictures by themselves."""

import base64
import sys
from io import BytesIO

import pytest
import torch
from conftest import noise_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving import base64_of, from_base64, model_folder, open_service, png_bytes, served
from test_upscaling import network, spandrel  # noqa: F401

import plainsd
from plainsd.errors import UserError
from plainsd.pictures.images import read_settings, write_png
from plainsd.pictures.upscaling import load_upscaler, upscaled
from plainsd.server.limits import Limits
from plainsd.speed import faster


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [model_folder(tmp_path_factory.mktemp("models"))]


@pytest.fixture(scope="module")
def server(models, network, tmp_path_factory):  # noqa: F811
    torch.save({"a": torch.zeros(3)}, network.parent / "none.pth")
    limits = Limits(pixels=2**17, upload_pixels=2**19)
    service = open_service(models, tmp_path_factory.mktemp("data"), limits, upscalers=network.parent)
    with served(service) as server:
        yield server


def extras(server, image, **fields):
    answer = server.post("/sdapi/v1/extra-single-image", {"image": base64_of(image), "upscaler_1": "2x_Tiny"} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_they_are_told(server):
    info = server.get("/api/info").json()
    assert info["upscalers"][-2:] == ["lanczos", "2x_Tiny"]
    assert "is not an upscaler that spandrel knows" in info["unusable"]["upscalers"]["none"]
    told = {one["name"]: one["scale"] for one in server.get("/sdapi/v1/upscalers").json()}
    assert told == {"None": 4, "Lanczos": 4, "Nearest": 4, "2x_Tiny": 2}


def test_a_second_pass_draws_on_what_one_makes(server, models, network):  # noqa: F811
    choices = {"steps": 2, "hires": 1.5, "upscaler": "2x_Tiny", "seed": 4}
    job = server.drawn(prompt="a", **choices)
    sd = faster(plainsd.load(models[0], device="cpu", dtype="float32"))
    sd.upscaler = load_upscaler(network)
    (expected,) = plainsd.final(plainsd.text_to_image(sd, "a", **choices))
    drawn = server.picture(job["images"][0])
    assert drawn.size == (96, 96) and drawn.tobytes() == expected.tobytes()
    told = server.get(f"/api/images/{job['images'][0]}").json()["settings"]
    assert told["upscaler"] == "2x_Tiny"
    file = server.get(f"/api/images/{job['images'][0]}.png").content
    inside = server.post("/api/settings", {"image": base64.b64encode(file).decode()}).json()
    assert inside["upscaler"] == "2x_Tiny" and inside["unused"] == []
    body = {
        "prompt": "a",
        "seed": 4,
        "steps": 4,
        "denoising_strength": 0.7,
        "enable_hr": True,
        "hr_scale": 1.5,
        "hr_upscaler": "2x_Tiny",
    }
    theirs = server.post("/sdapi/v1/txt2img", body | {"override_settings": {"randn_source": "CPU"}})
    assert theirs.status_code == 200, theirs.text
    assert from_base64(theirs.json()["images"][0]).size == (96, 96)
    assert "Hires upscaler: 2x_Tiny" in theirs.json()["info"]


@pytest.mark.parametrize(("body", "says"), [
    ({"upscaler": "2x_Tyni"}, "unknown upscaler '2x_Tyni'; did you mean '2x_Tiny'"),
    ({"upscaler": "none"}, "upscaler 'none' cannot be used"),
])  # fmt: skip
def test_one_that_is_not_there_is_named(server, body, says):
    answer = server.post("/api/jobs", {"prompt": "a", "hires": 2, **body})
    assert answer.status_code == 422 and answer.json()["error"]["field"] == "upscaler"
    assert says in answer.json()["error"]["message"]


def test_without_a_folder_the_flag_is_named(models, tmp_path):
    service = open_service(models, tmp_path)
    with pytest.raises(UserError, match="start the server with --upscalers FOLDER"):
        service.models.upscalers.found("4x")
    service.close()


def test_without_the_library_no_server_starts(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UserError, match=r"pip install 'plainsd\[upscale\]'"):
        open_service(models, tmp_path / "data", upscalers=tmp_path)


def test_extras_enlarge_by_a_factor(server, network):  # noqa: F811
    image, net = noise_picture(40, 24), load_upscaler(network)
    answer = extras(server, image)
    large = from_base64(answer["image"])
    assert large.size == (80, 48) and large.tobytes() == upscaled(image, net).tobytes()
    assert "Postprocess upscaler: 2x_Tiny" in answer["html_info"]
    assert from_base64(extras(server, image, upscaling_resize=1.7)["image"]).size == (64, 40)  # down to eights
    twice = from_base64(extras(server, image, upscaling_resize=3)["image"])  # once is not enough
    expected = upscaled(upscaled(image, net), net, (120, 72))
    assert twice.size == (120, 72) and twice.tobytes() == expected.tobytes()
    plain = from_base64(extras(server, image, upscaler_1="Nearest")["image"])
    assert plain.tobytes() == image.resize((80, 48), Image.Resampling.NEAREST).tobytes()
    assert from_base64(extras(server, image, upscaler_1="None")["image"]).tobytes() == image.tobytes()


def test_extras_enlarge_to_a_size(server):
    image = noise_picture(40, 24)
    wanted = {"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64, "upscaler_1": "Lanczos"}
    whole = from_base64(extras(server, image, **wanted, upscaling_crop=False)["image"])
    assert whole.size == (104, 64)  # both sides are filled; 40 * 64 / 24 down to eights
    cut = from_base64(extras(server, image, **wanted)["image"])
    assert cut.size == (64, 64) and cut.tobytes() == whole.crop((20, 0, 84, 64)).tobytes()


def test_extras_mix_two_and_keep_the_settings(server, tmp_path):
    image = noise_picture(16, 16)
    one, other = (from_base64(extras(server, image, upscaler_1=name)["image"]) for name in ("Lanczos", "Nearest"))
    mixed = extras(server, image, upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=0.25)
    assert from_base64(mixed["image"]).tobytes() == Image.blend(one, other, 0.25).tobytes()
    write_png(image, tmp_path / "a.png", plainsd.Settings(prompt="a boat", seed=3))
    with Image.open(tmp_path / "a.png") as kept:
        info = PngInfo()
        info.add_text("parameters", kept.text["parameters"])
        content = png_bytes(kept, pnginfo=info)
    answer = server.post(
        "/sdapi/v1/extra-single-image", {"image": base64.b64encode(content).decode(), "upscaler_1": "2x_Tiny"}
    )
    settings = read_settings(BytesIO(base64.b64decode(answer.json()["image"])))
    assert (settings.prompt, settings.seed) == ("a boat", 3)
    assert ("Postprocess upscaler", "2x_Tiny") in settings.other


@pytest.mark.parametrize(("fields", "says"), [
    ({"gfpgan_visibility": 0.5}, "gfpgan_visibility 0.5: faces are not restored here"),
    ({"codeformer_visibility": 1}, "codeformer_visibility 1: faces are not restored here"),
    ({"upscaler_1": "ESRGAN_4x"}, "unknown upscaler 'ESRGAN_4x'"),
    ({"upscaler_2": "LDSR"}, "unknown upscaler 'LDSR'"),
    ({"upscale_by": 2}, "unknown field 'upscale_by'"),
    ({"upscaling_resize": 0}, "upscaling_resize"),
    ({"resize_mode": 2}, "resize_mode"),
    ({"image": "AAAA"}, "image is not a PNG"),
    ({"upscaling_resize": 16, "upscaler_1": "Lanczos"}, "pixels on the way; the limit is 524288"),
    ({"upscaling_resize": 4}, "pixels on the way; the limit is 524288"),
])  # fmt: skip
def test_extras_that_cannot_be_are_one_line(server, fields, says):
    body = {"image": base64_of(noise_picture(256, 256)), "upscaler_1": "2x_Tiny"} | fields
    answer = server.post("/sdapi/v1/extra-single-image", body)
    assert answer.status_code == 422 and says in answer.json()["detail"], answer.text
    quiet = {"gfpgan_visibility": 0, "codeformer_visibility": 0, "codeformer_weight": 0, "show_extras_results": True,
             "upscale_first": False}  # fmt: skip
    extras(server, noise_picture(8, 8), **quiet)
