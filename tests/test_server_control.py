"""Maps to follow on the server: nets by name, checked before queueing, in all three ways in."""

import base64
import os
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_sd
from PIL import Image
from serving import alike, base64_of, from_base64, model_folder, open_service, served
from test_control_pictures import picture_of, reading_its_map, tiny_net

import plainsd
from plainsd.commands.flags import GenerateFlags
from plainsd.commands.remote import control_fields
from plainsd.generate import final, text_to_image
from plainsd.pictures.images import read_settings
from plainsd.pictures.preprocess import preprocessed
from plainsd.server import controls
from plainsd.server.api.a1111_control import unit_of
from plainsd.server.controls import ControlNets, filling_resolution
from plainsd.server.errors import APIError


def encoded(image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    nets, sd = folder / "nets", tiny_sd()
    nets.mkdir()
    plainsd.save_control(reading_its_map(tiny_net(sd)), nets / "edges.safetensors")
    plainsd.save_control(tiny_net(sd, 1), nets / "depth")
    plainsd.save_control(tiny_net(tiny_sd(channels=(32, 32))), nets / "narrow.safetensors")
    (nets / "broken.safetensors").write_bytes(b"no such thing")
    for name, config in (("torn", "{"), ("bare", (nets / "depth" / "config.json").read_text()), ("other", "{}")):
        (nets / name).mkdir()
        (nets / name / "config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    service = open_service([model_folder(folder)], tmp_path_factory.mktemp("data"), controls=folder / "nets")
    with served(service) as server:
        yield server


def png_of(server, id):
    return BytesIO(server.get(f"/api/images/{id}.png").content)


MAP = picture_of(0)
UNIT = {"name": "edges", "image": encoded(MAP), "strength": 0.8, "end": 0.7}


def test_what_is_there_is_told(server):
    info = server.get("/api/info").json()
    assert info["controls"] == ["depth", "edges", "narrow"] and [*info["control_nets"]] == info["controls"]
    assert sorted(info["unusable"]["controls"]) == ["bare", "broken", "torn"]  # with "other" it has nothing to do
    assert info["control_nets"]["edges"] == {"kinds": 0, "adapter": False}
    assert info["models"][0]["controls"] == ["depth", "edges"]  # those that fit it
    assert info["preprocessors"] == ["none", "canny", "inpaint"] and "balanced" in info["control_modes"]


def test_a_job_follows_its_maps(server, folder):
    job = server.drawn(prompt="a red apple", seed=3, steps=3, controls=[UNIT, {**UNIT, "name": "depth", "guess": True}])
    sd = plainsd.load(folder / "tiny", device="cpu", dtype="float32")
    nets = [plainsd.load_control(folder / "nets" / name, sd) for name in ("edges.safetensors", "depth")]
    control = [plainsd.Control(nets[0], MAP, 0.8, end=0.7), plainsd.Control(nets[1], MAP, 0.8, end=0.7, guess=True)]
    expected = final(text_to_image(sd, "a red apple", seed=3, steps=3, control=control))[0]
    drawn = server.picture(job["images"][0])
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1
    notes = read_settings(png_of(server, job["images"][0])).control
    assert [note.model.split()[0] for note in notes] == ["edges", "depth"] and notes[1].guess and notes[0].weight == 0.8
    again = server.get(f"/api/images/{job['images'][0]}").json()
    assert again["problem"] is None and "ControlNet 1" in again["parameters"]
    unit = {"strength": 0.8, "start": 0.0, "end": 0.7, "mode": "balanced", "preprocess": "none", "kind": []}
    units = [{"name": "edges", "guess": False, **unit}, {"name": "depth", "guess": True, **unit}]
    assert again["controls"] == units  # of the history, and of its file: as a request has them, without maps
    file = base64.b64encode(png_of(server, job["images"][0]).getvalue()).decode()
    told = server.post("/api/settings", {"image": file}).json()
    assert told["controls"] == units and told["unused"] == []


@pytest.mark.parametrize("how", ["crop", "fill"])
def test_a_map_of_another_shape_gets_the_pictures_as_asked(server, folder, how):
    wide = picture_of(0).resize((128, 64))
    job = server.drawn(prompt="a", seed=3, steps=3, controls=[UNIT | {"image": base64_of(wide), "resize": how}])
    sd = plainsd.load(folder / "tiny", device="cpu", dtype="float32")
    net = plainsd.load_control(folder / "nets" / "edges.safetensors", sd)
    control = [plainsd.Control(net, wide, 0.8, end=0.7, resize=how)]
    expected = final(text_to_image(sd, "a", seed=3, steps=3, control=control))[0]
    assert alike(server.picture(job["images"][0]), expected, 2)
    (note,) = read_settings(png_of(server, job["images"][0])).control
    assert note.resize == how and server.get(f"/api/images/{job['images'][0]}").json()["controls"][0]["resize"] == how
    command = GenerateFlags(control=(str(folder / "nets" / "edges.safetensors"),), control_image=(folder / "map.png",))
    wide.save(folder / "map.png")
    assert [one["resize"] for one in control_fields(command, [note])] == [how]  # `generate --from ... --server`
    mask = Image.new("L", (64, 64))  # a part alone is drawn, and of the map that lies there
    mask.paste(255, (8, 8, 40, 40))
    photo, strong = picture_of(1), UNIT | {"image": base64_of(wide), "resize": how, "strength": 8}
    masked = {"image": base64_of(photo), "mask": base64_of(mask), "masked_padding": 4}
    job = server.drawn(prompt="a", seed=3, steps=3, controls=[strong], **masked)
    drawn = {
        resize: final(
            plainsd.inpaint(sd, "a", photo, mask, seed=3, steps=3, masked_padding=4,
                            control=[plainsd.Control(net, wide, 8.0, end=0.7, resize=resize)])
        )[0]
        for resize in (how, "stretch")
    }  # fmt: skip
    assert alike(server.picture(job["images"][0]), drawn[how], 2) and not alike(drawn[how], drawn["stretch"], 4)


@pytest.mark.parametrize(
    "unit, says",
    [
        ({"name": "edgs"}, "unknown ControlNet 'edgs'; did you mean 'edges'"),
        ({"name": "broken"}, "'broken' cannot be used"),
        ({"name": "narrow"}, "does not fit the model"),
        ({"image": "no picture"}, ""),
        ({"preprocess": "hed"}, "unknown preprocessor 'hed'"),
        ({"start": 0.9, "end": 0.1}, "act from 0.9 to 0.1"),
        ({"kind": [1]}, "is for union nets"),
        ({"strength": 11}, "controls.1.strength"),
        ({"preprocess": "canny", "low": 300}, "canny thresholds 300.0 and 200"),
    ],
    ids=str,
)
def test_wrong_units_are_refused_at_the_door(server, unit, says):
    answer = server.post("/api/jobs", {"prompt": "p", "controls": [UNIT, UNIT | unit]})
    error = answer.json()["error"]
    assert answer.status_code == 422 and says in error["message"]
    assert (error["field"], error["entry"]) == ("controls", 1)


def test_a_map_is_made_before_anything_is_drawn(server):
    pytest.importorskip("cv2")
    body = {"image": encoded(MAP), "preprocess": "canny", "low": 50, "high": 100, "resolution": 128}
    answer = server.post("/api/preprocess", body)
    assert answer.headers["Content-Type"] == "image/png"
    expected = preprocessed(MAP, "canny", (50, 100), 128)
    assert Image.open(BytesIO(answer.content)).tobytes() == expected.tobytes()
    for wrong, field in (
        ({"preprocess": "hed"}, "preprocess"),
        ({"image": "no picture"}, "image"),
        ({"low": -1}, "low"),
    ):
        error = server.post("/api/preprocess", body | wrong).json()["error"]
        assert error["field"] == field and error["remedy"]


def test_how_a_map_was_made_is_written_and_comes_again(server, monkeypatch):
    monkeypatch.setattr("plainsd.pictures.preprocess.canny", lambda image, *_: image)
    unit = {"name": "edges", "image": encoded(MAP), "preprocess": "canny", "low": 30, "high": 60, "resolution": 128}
    job = server.drawn(prompt="a", seed=3, steps=2, controls=[unit])
    told = server.get(f"/api/images/{job['images'][0]}").json()
    assert "Processor Res: 128, Threshold A: 30.0, Threshold B: 60.0" in told["parameters"]
    (again,) = told["controls"]
    assert {name: again[name] for name in ("low", "high", "resolution")} == {"low": 30, "high": 60, "resolution": 128}
    usual = server.drawn(prompt="a", seed=3, steps=2, controls=[unit | {"low": 100, "high": 200, "resolution": None}])
    told = server.get(f"/api/images/{usual['images'][0]}").json()
    assert "Processor Res: -1, Threshold A: -1.0, Threshold B: -1.0" in told["parameters"]
    assert not {"low", "resolution"} & told["controls"][0].keys()


def test_a1111s_units(server):
    unit = {"enabled": True, "input_image": encoded(MAP), "model": "edges [01234567]", "module": "none", "weight": 0.8,
            "guidance_end": 0.7, "control_mode": "Balanced", "processor_res": 512, "pixel_perfect": False}  # fmt: skip
    body = {"prompt": "a red apple", "seed": 3, "steps": 3, "width": 64, "height": 64}
    answer = server.post("/sdapi/v1/txt2img", body | {"alwayson_scripts": {"controlnet": {"args": [unit]}}})
    assert answer.status_code == 200, answer.text
    drawn = BytesIO(base64.b64decode(answer.json()["images"][0]))
    (note,) = read_settings(drawn).control
    assert note.model.startswith("edges [") and (note.weight, note.end) == (0.8, 0.7)
    plain = server.post(
        "/sdapi/v1/txt2img", body | {"alwayson_scripts": {"controlnet": {"args": [unit | {"enabled": False}]}}}
    )
    assert plain.status_code == 200 and plain.json()["images"] != answer.json()["images"]


@pytest.mark.parametrize(
    "unit, says",
    [
        ({"module": "openpose_full"}, "module 'openpose_full' is not supported"),
        ({"image": None}, "a unit has no image"),
        ({"control_mode": "Strict"}, "unknown control_mode 'Strict'"),
        ({"control_mode": [1]}, r"unknown control_mode \[1\]"),
        ({"weight": -3}, "strength"),
        ({"advanced_weighting": [1.0]}, "advanced_weighting"),
        ({"resize_mode": "Resize and Fill"}, "resize_mode"),
        ({"image": {"image": "x", "mask": "y"}}, "a mask beside the image"),
    ],
    ids=str,
)
def test_a1111s_units_that_are_not_had_are_named(unit, says):
    with pytest.raises(APIError, match=says):
        unit_of({"model": "edges", "image": "eA=="} | unit)


def test_modes_and_thresholds_of_units():
    unit = {"model": "edges", "image": "eA==", "module": "canny", "control_mode": 2, "processor_res": 512,
            "threshold_a": 50, "threshold_b": -1}  # fmt: skip
    found = unit_of(unit)
    assert (found.mode, found.resolution, found.low, found.high) == ("control", 512, 50, 200)
    for res in (None, -1, -0.5):
        assert unit_of(unit | {"processor_res": res}).resolution == 512
    assert unit_of({name: value for name, value in unit.items() if name != "processor_res"}).resolution == 512
    assert unit_of(unit | {"module": "none"}).resolution is None
    assert not found.pixel_perfect and unit_of(unit | {"pixel_perfect": True}).pixel_perfect


@pytest.mark.parametrize(("mode", "crops"), [
    ({}, True), ({"resize_mode": "Crop and Resize"}, True), ({"resize_mode": 1}, True),
    ({"resize_mode": "Just Resize"}, False), ({"resize_mode": 0}, False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("task", ["txt2img", "img2img"])
def test_a_map_of_another_shape_is_cropped_as_there(server, task, mode, crops):
    """By the shape of the whole picture, where a part alone is drawn."""
    wide, side = picture_of(0).resize((128, 64)), 64
    shapes = [wide.crop((32, 0, 96, 64)), wide.resize((64, 64), Image.Resampling.LANCZOS)]
    body = {"prompt": "a", "seed": 3, "steps": 2, "sampler_name": "Euler", "width": side, "height": side}
    if task == "img2img":
        mask = Image.new("L", (64, 64))
        mask.paste(255, (8, 8, 24, 24))
        body |= {"init_images": [encoded(MAP)], "mask": encoded(mask), "inpaint_full_res": True, "width": 96}
    drawn = []
    for image in (wide, *(shapes if crops else reversed(shapes))):
        unit = {"image": encoded(image), "model": "edges", **mode}
        answer = server.post(f"/sdapi/v1/{task}", body | {"alwayson_scripts": {"controlnet": {"args": [unit]}}})
        assert answer.status_code == 200, answer.text
        drawn.append(np.asarray(from_base64(answer.json()["images"][0])).astype(float))
    right, wrong = (np.abs(drawn[0] - other).mean() for other in drawn[1:])
    assert 4 * right < wrong


@pytest.mark.parametrize("image, target, resolution", [
    ((512, 512), (96, 64), 96), ((1024, 512), (512, 512), 512), ((512, 1024), (640, 512), 640),
    ((300, 200), (96, 64), 64), ((9000, 8), (96, 64), 64),
])  # fmt: skip
def test_a_pixel_perfect_map_fills_the_picture(image, target, resolution):
    """As `pixel_perfect_resolution` of the extension."""
    assert filling_resolution(image, target) == resolution


@pytest.mark.parametrize("task", ["txt2img", "img2img"])
def test_a_pixel_perfect_unit_is_recorded_with_its_resolution(server, monkeypatch, task):
    asked = []
    monkeypatch.setattr(controls, "preprocessed", lambda image, *how: asked.append((image.size, how)) or image)
    unit = {"image": encoded(MAP.resize((200, 100))), "model": "edges", "module": "canny", "pixel_perfect": True,
            "processor_res": 512}  # fmt: skip
    body = {"prompt": "a", "seed": 3, "steps": 4, "width": 96, "height": 64, "init_images": [encoded(MAP)]}
    if task == "txt2img":
        del body["init_images"]
    answer = server.post(f"/sdapi/v1/{task}", body | {"alwayson_scripts": {"controlnet": {"args": [unit]}}})
    assert answer.status_code == 200, answer.text
    (note,) = read_settings(BytesIO(base64.b64decode(answer.json()["images"][0]))).control
    assert note.resolution == 64 and asked == [((200, 100), ("canny", (100, 200), 64))]


def test_a_net_is_loaded_again_when_its_model_was_changed(tmp_path, monkeypatch):
    """Nets of differences are made from the model's weights."""
    (tmp_path / "net.safetensors").touch()
    sd = SimpleNamespace(path=tmp_path / "model")
    sd.path.mkdir()
    (sd.path / "unet").touch()
    nets, loaded = ControlNets(tmp_path), []
    monkeypatch.setattr(ControlNets, "path", lambda self, name: tmp_path / "net.safetensors")
    monkeypatch.setattr(controls, "load_control", lambda path, sd: loaded.append(path) or object())
    first = nets.net("net", "tiny", sd)
    assert nets.net("net", "tiny", sd) is first
    os.utime(sd.path / "unet", ns=(2**62, 2**62))
    assert nets.net("net", "tiny", sd) is not first and len(loaded) == 2
