"""Image prompts and inpainting ControlNets on the server: jobs, A1111's units, a restart, `generate --server`."""

import base64
import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import pytest
from conftest import TINY_XL, difference, smooth_picture, tiny_sd
from PIL import Image
from safetensors.torch import save_file
from serving import base64_of, from_base64, model_folder, open_service, served
from test_control_pictures import tiny_net
from test_image_prompt import in_a_file, picture_of, tiny_adapter, tower_of_transformers

import plainsd
from plainsd.cli import main
from plainsd.generate import final, image_to_image, inpaint, text_to_image
from plainsd.pictures.images import open_picture, read_settings
from plainsd.pictures.preprocess import preprocessed
from plainsd.pictures.settings import ControlNote, ImagePromptNote, Resolved
from plainsd.server.api.a1111_control import unit_of, units_of
from plainsd.server.errors import APIError
from plainsd.server.jobs.rows import settings_from
from plainsd.server.requests import new_job
from plainsd.server.schema import ControlRequest, ImagePromptRequest, JobRequest
from plainsd.speed import faster

CPU = {"device": "cpu", "dtype": "float32"}
IMAGES = [picture_of(0), picture_of(1)]
OPTIONS = {"seed": 3, "steps": 4}


def corner(size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (8, 16, 40, 48))
    return mask


MASK, PHOTO = corner(), smooth_picture(64)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """What a server's folder holds: ControlNets, adapters, two image encoders, and what cannot be used."""
    place, sd = tmp_path_factory.mktemp("nets"), tiny_sd()
    plainsd.save_control(tiny_net(sd), place / "fill.safetensors")
    plainsd.save_control(tiny_net(sd, 1), place / "depth")
    tower_of_transformers(seed=1).save_pretrained(place / "eyes")
    tower_of_transformers().save_pretrained(place / "sd" / "image_encoder")
    save_file(in_a_file(tiny_adapter(sd.unet, "plus")), place / "sd" / "plus.safetensors")
    save_file(in_a_file(tiny_adapter(sd.unet)), place / "sd" / "base.safetensors")
    save_file(in_a_file(tiny_adapter(sd.unet, states=23)), place / "other.safetensors")
    save_file(in_a_file(tiny_adapter(tiny_sd(TINY_XL).unet)), place / "sd" / "xl.safetensors")
    face = in_a_file(tiny_adapter(sd.unet)) | {"image_proj.norm.weight": tiny_adapter(sd.unet).reader.norm.weight}
    face["image_proj.proj.0.weight"] = face["image_proj.proj.weight"].clone()
    save_file(face, place / "face.safetensors")
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model, nets, tmp_path_factory):
    service = open_service([model], tmp_path_factory.mktemp("data"), controls=nets)
    with served(service) as server:
        yield server


@pytest.fixture(scope="module")
def sd(model):
    return faster(plainsd.load(model, **CPU))  # as the server does


def prompt_of(nets: Path, name: str = "plus", *rest, **more) -> plainsd.ImagePrompt:
    return plainsd.ImagePrompt(plainsd.load_image_prompt(nets / "sd" / f"{name}.safetensors", **CPU), *rest, **more)


UNITS = [
    {"name": "plus", "images": [base64_of(one) for one in IMAGES], "masks": [base64_of(MASK)], "strength": 0.8},
    {"name": "base", "images": [base64_of(IMAGES[1])], "strength": 0.4, "start": 0.25, "end": 0.8},
]


def drawn_here(sd, nets: Path) -> Image.Image:
    prompts = [
        prompt_of(nets, "plus", IMAGES, 0.8, MASK),
        prompt_of(nets, "base", IMAGES[1], 0.4, start=0.25, end=0.8),
    ]
    return final(text_to_image(sd, "a red apple", image_prompt=prompts, **OPTIONS))[0]


def test_what_is_there_is_listed(server):
    info = server.get("/api/info").json()
    assert info["image_prompts"] == ["base", "other", "plus", "xl"] and info["controls"] == ["depth", "fill"]
    assert info["image_encoders"] == ["eyes"] and "inpaint" in info["preprocessors"]
    assert "FaceID" in info["unusable"]["controls"]["face"]


def test_a_job_reads_its_pictures(server, sd, nets):
    job = server.drawn(prompt="a red apple", image_prompts=UNITS, **OPTIONS)
    assert difference(server.picture(job["images"][0]), drawn_here(sd, nets)) == 0
    png = BytesIO(server.get(f"/api/images/{job['images'][0]}.png").content)
    notes = read_settings(png).image_prompt
    assert [note.model.split()[0] for note in notes] == ["plus", "base"]
    assert [note[1:] for note in notes] == [(0.8, 2, 1, 0.0, 1.0), (0.4, 1, 0, 0.25, 0.8)]
    again = server.get(f"/api/images/{job['images'][0]}").json()
    assert again["problem"] is None and "ip-adapter-auto" in again["parameters"]
    said = server.post("/api/settings", {"image": base64.b64encode(png.getvalue()).decode()}).json()
    units = [{"name": "plus", "strength": 0.8, "start": 0.0, "end": 1.0},
             {"name": "base", "strength": 0.4, "start": 0.25, "end": 0.8}]  # fmt: skip
    assert said["image_prompts"] == again["image_prompts"] == units and said["unused"] == []  # without their pictures


def test_an_encoder_by_name_and_without_one_the_first_that_fits(server, sd, nets):
    """`eyes` has other weights than the one beside the adapter."""
    unit = UNITS[0] | {"masks": []}
    pictures = [
        server.picture(server.drawn(prompt="a", image_prompts=[unit | more], **OPTIONS)["images"][0])
        for more in ({}, {"encoder": "eyes"})
    ]
    reader = plainsd.load_image_prompt(nets / "sd" / "plus.safetensors", nets / "eyes", **CPU)
    for picture, adapter in zip(pictures, (prompt_of(nets, "plus", IMAGES).adapter, reader), strict=True):
        prompt = plainsd.ImagePrompt(adapter, IMAGES, 0.8)
        assert difference(picture, final(text_to_image(sd, "a", image_prompt=[prompt], **OPTIONS))[0]) == 0


def test_a_restart_keeps_them(model, nets, sd, tmp_path):
    """Files and numbers of image prompts, and of inpainting nets, which have no map."""
    first = open_service([model], tmp_path, controls=nets)
    over = {"image": base64_of(PHOTO), "mask": base64_of(MASK), "controls": [{"name": "fill", "strength": 0.7}]}
    ids = []
    for more in ({"image_prompts": UNITS}, over):
        job = new_job(JobRequest(prompt="a red apple", **OPTIONS, **more), first.models, first.limits, "me", "jobs")
        first.queue.add(job)
        ids.append(job.id)
    first.close()
    assert len(list((tmp_path / "inputs").iterdir())) >= 5
    with served(open_service([model], tmp_path, controls=nets)) as server:
        pictures = [server.picture(server.wait(id)["images"][0]) for id in ids]
        control = plainsd.Control(plainsd.load_control(nets / "fill.safetensors", sd), strength=0.7)
        with_infotext = final(inpaint(sd, "a red apple", PHOTO, MASK, control=[control], **OPTIONS))[0]
        assert difference(pictures[0], drawn_here(sd, nets)) == 0 and difference(pictures[1], with_infotext) == 0
        assert not list((tmp_path / "inputs").iterdir())


def test_settings_come_back_from_the_database():
    settings = Resolved(
        prompt="a", size=(64, 64), steps=3, guidance=2.0, sampler="ddim", spacing="leading",
        control=(ControlNote("canny", "x", kinds=(1, 2)),), image_prompt=(ImagePromptNote("y", 0.5, 2, 1, 0.1, 0.9),),
    )  # fmt: skip
    found = settings_from(json.loads(json.dumps(asdict(settings))), strict=True)
    assert found == settings and found.image_prompt[0].weight == 0.5


WRONG = {  # the unit, and what the message says
    "name": ({"name": "plsu"}, "unknown IP-Adapter 'plsu'; did you mean 'plus'"),
    "face": ({"name": "face"}, "'face' cannot be used: face is an IP-Adapter FaceID"),
    "kind": ({"name": "fill"}, "unknown IP-Adapter 'fill'"),
    "family": ({"name": "xl"}, "does not fit the model"),
    "no encoder": ({"name": "other"}, "needs its image encoder"),
    "encoder": ({"encoder": "eys"}, "unknown image encoder 'eys'; did you mean 'eyes'"),
    "picture": ({"images": ["eA=="]}, "images is not a PNG"),
    "none": ({"images": []}, "image_prompts"),
    "masks": ({"masks": [base64_of(MASK)] * 3}, "has 3 masks and 2 pictures"),
    "steps": ({"start": 0.9, "end": 0.1}, "act from 0.9 to 0.1"),
    "strength": ({"strength": 11}, "strength"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_image_prompts_are_refused_with_field_and_index(server, case):
    change, says = WRONG[case]
    answer = server.post("/api/jobs", {"prompt": "p", "image_prompts": [UNITS[1], UNITS[0] | change]})
    error = answer.json()["error"]
    assert answer.status_code == 422 and says in error["message"]
    assert (error["field"], error["entry"]) == ("image_prompts", 1)
    if case in ("name", "face", "kind", "no encoder", "encoder", "picture"):
        assert error["message"].startswith("image_prompts[1]: ")
    assert "\n" not in error["message"]


@pytest.mark.parametrize("unit, says", [
    ({"name": "depht"}, "controls[1]: unknown ControlNet 'depht'; did you mean 'depth'"),
    ({"image": "eA=="}, "controls[1]: image is not a PNG"),
    ({"preprocess": "hed", "image": base64_of(PHOTO)}, "controls[1]: unknown preprocessor 'hed'"),
    ({"image": None}, "controls[1]: a control without an image reads the picture that is drawn over"),
], ids=str)  # fmt: skip
def test_wrong_controls_are_refused_with_their_index(server, unit, says):
    one = {"name": "depth", "image": base64_of(PHOTO)}
    error = server.post("/api/jobs", {"prompt": "p", "controls": [one, one | unit]}).json()["error"]
    assert says in error["message"] and (error["field"], error["entry"]) == ("controls", 1)


# --- the picture that is drawn over ----------------------------------------------------------------------------------


def test_an_inpainting_net_reads_picture_and_mask(server, sd, nets):
    net = plainsd.load_control(nets / "fill.safetensors", sd)
    over = {"image": base64_of(PHOTO), "mask": base64_of(MASK), "prompt": "a cat", **OPTIONS}
    for unit, more in (({}, {}), ({"preprocess": "inpaint"}, {}), ({}, {"masked_padding": 8})):
        job = server.drawn(**over, **more, controls=[{"name": "fill", "strength": 0.7, **unit}])
        control = [plainsd.Control(net, strength=0.7)]
        expected = final(inpaint(sd, "a cat", PHOTO, MASK, size=PHOTO.size, control=control, **more, **OPTIONS))[0]
        assert difference(server.picture(job["images"][0]), expected) == 0
        note = read_settings(BytesIO(server.get(f"/api/images/{job['images'][0]}.png").content)).control[0]
        assert note.module == "inpaint"
    plain = server.drawn(**over)
    assert difference(server.picture(plain["images"][0]), expected) > 20
    without_mask = {name: value for name, value in over.items() if name != "mask"}
    job = server.drawn(**without_mask, controls=[{"name": "fill"}])
    expected = final(image_to_image(sd, "a cat", PHOTO, control=[plainsd.Control(net)], **OPTIONS))[0]
    assert difference(server.picture(job["images"][0]), expected) == 0
    error = server.post("/api/jobs", without_mask | {"controls": [{"name": "fill", "preprocess": "inpaint"}]}).json()
    assert "needs a picture and a mask" in error["error"]["message"] and error["error"]["field"] == "controls"


def test_maps_and_masks_lie_under_the_part_that_is_drawn(server, sd, nets):
    net = plainsd.load_control(nets / "depth", sd)
    control = {"controls": [{"name": "depth", "image": base64_of(PHOTO)}]}
    over = {"image": base64_of(PHOTO), "mask": base64_of(MASK), "prompt": "a cat", "masked_padding": 2, **OPTIONS}
    job = server.drawn(**over, **control)
    expected = final(inpaint(sd, "a cat", PHOTO, MASK, size=PHOTO.size, control=[plainsd.Control(net, PHOTO)],
                             masked_padding=2, **OPTIONS))[0]  # fmt: skip
    assert difference(server.picture(job["images"][0]), expected) <= 1


def test_edges_of_the_picture_that_is_drawn_over(server, sd, nets):
    pytest.importorskip("cv2")
    over = {"image": base64_of(IMAGES[0].resize((64, 64))), "prompt": "a", **OPTIONS}
    unit = {"name": "fill", "preprocess": "canny", "low": 20, "high": 60}
    pictures = [
        server.picture(server.drawn(**over, controls=[unit | more])["images"][0])
        for more in ({}, {"image": over["image"]}, {"image": over["image"], "low": 200, "high": 300})
    ]
    assert difference(pictures[0], pictures[1]) == 0 and difference(pictures[0], pictures[2]) > 0


def test_maps_are_no_larger_than_pictures(server):
    """A strip of 2000x2 pixels, whose shorter side is to be 512."""
    strip = base64_of(Image.new("RGB", (2000, 2)))
    unit = {"name": "depth", "image": strip, "preprocess": "canny", "resolution": 512}
    detect = {"controlnet_module": "canny", "controlnet_input_images": [strip], "controlnet_processor_res": 512}
    for path, body in (
        ("/api/jobs", {"prompt": "a", "controls": [unit]}),
        ("/api/preprocess", {name: value for name, value in unit.items() if name != "name"}),
        ("/controlnet/detect", detect),
    ):
        answer = server.post(path, body)
        assert answer.status_code == 422 and "resolution 512000x512 is out of range" in answer.text, answer.text


# --- A1111 -----------------------------------------------------------------------------------------------------------

TEXT = {"prompt": "a red apple", "seed": 3, "steps": 4, "width": 64, "height": 64, "sampler_name": "DDIM",
        "override_settings": {"randn_source": "CPU"}}  # fmt: skip


def asked(server, units: list[dict], over: dict | None = None):
    path = "/sdapi/v1/img2img" if over else "/sdapi/v1/txt2img"
    return server.post(path, TEXT | (over or {}) | {"alwayson_scripts": {"controlnet": {"args": units}}})


@pytest.mark.parametrize("module", [
    "ip-adapter-auto", "ip-adapter_clip_sd15", "ip-adapter_clip_h",
                                    "ip-adapter_clip_sdxl", "ip-adapter_clip_g", "ip-adapter_clip_sdxl_plus_vith"],
)  # fmt: skip
def test_ip_adapter_modules_are_image_prompts(module):
    found = units_of({"ControlNet": {"args": [
        {"module": module, "model": "plus [01234567]", "image": "eA==", "weight": 0.6, "guidance_start": 0.1,
         "guidance_end": 0.9, "effective_region_mask": "eQ==", "control_mode": "Balanced"},
        {"module": "none", "model": "depth", "image": "eA=="},
    ]}})  # fmt: skip
    unit = ImagePromptRequest(name="plus [01234567]", images=["eA=="], masks=["eQ=="], strength=0.6, start=0.1, end=0.9)
    assert found["image_prompts"] == [unit.labelled("script 'ControlNet', unit 0")]
    assert isinstance(found["controls"][0], ControlRequest)


def test_a1111s_units_draw_what_jobs_draw_and_their_text_is_read_back(server, nets):
    unit = {"module": "ip-adapter_clip_h", "model": "plus [01234567]", "weight": 0.8,
            "image": [base64_of(one) for one in IMAGES], "effective_region_mask": base64_of(MASK)}  # fmt: skip
    answer = asked(server, [unit])
    assert answer.status_code == 200, answer.text
    there = from_base64(answer.json()["images"][0])
    job = server.drawn(
        prompt="a red apple", image_prompts=[UNITS[0]], like="a1111", noise="cpu", sampler="ddim", **OPTIONS
    )
    assert difference(there, server.picture(job["images"][0])) == 0
    (text,) = json.loads(answer.json()["info"])["infotexts"]
    assert 'ControlNet 0: "Module: ip-adapter-auto, Model: plus [' in text and "Weight: 0.8" in text
    (note,) = read_settings(BytesIO(base64.b64decode(answer.json()["images"][0]))).image_prompt
    assert note[1:] == (0.8, 2, 1, 0.0, 1.0)


def test_a1111s_units_without_an_image_read_that_of_img2img(server):
    unit = {"module": "ip-adapter-auto", "model": "plus"}
    over = {"init_images": [base64_of(PHOTO)]}
    own, given = (asked(server, [unit | more], over).json()["images"] for more in ({}, {"image": base64_of(PHOTO)}))
    assert own == given
    answer = asked(server, [unit])
    assert answer.status_code == 422 and "script 'controlnet': a unit has no image" in answer.json()["detail"]


@pytest.mark.parametrize("module", ["inpaint", "inpaint_only", "inpaint_global_harmonious"])
def test_a1111s_inpainting_modules(server, module):
    over = {"init_images": [base64_of(PHOTO)], "mask": base64_of(MASK), "inpainting_fill": 1, "mask_blur": 0,
            "inpaint_full_res": False, "denoising_strength": 1}  # fmt: skip
    unit = {"module": module, "model": "fill", "weight": 0.7}
    answer = asked(server, [unit], over)
    assert answer.status_code == 200, answer.text
    body = {"image": base64_of(PHOTO), "mask": base64_of(MASK), "strength": 1.0, "sampler": "ddim", "like": "a1111"}
    job = server.drawn(
        prompt="a red apple", controls=[{"name": "fill", "strength": 0.7}], noise="cpu", **body, **OPTIONS
    )
    assert difference(from_base64(answer.json()["images"][0]), server.picture(job["images"][0])) == 0
    assert '"Module: inpaint_only, Model: fill [' in json.loads(answer.json()["info"])["infotexts"][0]
    for more, says in (({"image": base64_of(PHOTO)}, "leave image out"), ({}, "")):
        answer = asked(server, [unit | more], over if more else None)
        assert answer.status_code == 422 and f"module '{module}' reads the image of img2img" in answer.json()["detail"]
        assert says in answer.json()["detail"]


@pytest.mark.parametrize("unit, says", [
    ({"module": "ip-adapter_face_id"}, "'ip-adapter_face_id' reads a face recognition network"),
    ({"module": "ip-adapter_face_id_plus"}, "'ip-adapter_face_id_plus' reads a face recognition network"),
    ({"module": "ip-adapter_pulid"}, "'ip-adapter_pulid' reads a face recognition network"),
    ({"module": "inpaint_only+lama"}, r"'inpaint_only\+lama' fills .* choose inpaint_only"),
    ({"module": "ip-adapter-auto", "control_mode": 2}, "'ControlNet is more important' of an IP-Adapter"),
    ({"module": "none", "effective_region_mask": "eA=="}, "effective_region_mask"),
    ({"module": "ip-adapter-auto", "image": None}, "has no image"),
], ids=str)  # fmt: skip
def test_units_that_are_not_supported_are_named(unit, says):
    with pytest.raises(APIError, match=says):
        unit_of({"model": "plus", "image": "eA=="} | unit)
    with pytest.raises(APIError, match="^script 'controlnet', unit 1: "):
        units_of({"controlnet": {"args": [{"model": "x", "image": "eA=="}, {"model": "plus", "image": "eA=="} | unit]}})


def test_the_extensions_routes(server, nets):
    assert server.get("/controlnet/version").json() == {"version": 2}
    listed = server.get("/controlnet/model_list").json()["model_list"]
    assert [one.split(" [")[0] for one in listed] == ["base", "depth", "fill", "other", "plus", "xl"]
    modules = server.get("/controlnet/module_list").json()
    assert (
        {"none", "canny", "inpaint_only", "ip-adapter-auto"} <= {*modules["module_list"]} == {*modules["module_detail"]}
    )
    unit = {"module": "none", "model": listed[1], "image": base64_of(PHOTO)}  # as it is listed
    assert asked(server, [unit]).status_code == 200
    pytest.importorskip("cv2")
    body = {"controlnet_module": "canny", "controlnet_input_images": [base64_of(IMAGES[0])],
            "controlnet_processor_res": 96,
            "controlnet_threshold_a": 20, "controlnet_threshold_b": -1}  # fmt: skip
    (made,) = server.post("/controlnet/detect", body).json()["images"]
    assert from_base64(made).tobytes() == preprocessed(IMAGES[0], "canny", (20, 200), 96).tobytes()
    for change, says in (({"controlnet_module": "hed"}, "unknown preprocessor 'hed'"),
                         ({"controlnet_input_images": ["eA=="]}, "controlnet_input_images is not a PNG")):  # fmt: skip
        answer = server.post("/controlnet/detect", body | change)
        assert answer.status_code == 422 and says in answer.json()["detail"]


# --- plainsd generate --server ---------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for name, image in (("0", IMAGES[0]), ("1", IMAGES[1]), ("mask", MASK), ("photo", PHOTO)):
        image.save(tmp_path / f"{name}.png")
    return tmp_path


COMMANDS = {
    "control": ("--control", "fill.safetensors:0.7", "--control-image", "0.png", "--control", "depth",
                "--control-image", "1.png", "--control-range", 0, 0.6, "--control-mode", "prompt"),
    "guess": ("--control", "depth", "--control-image", "0.png", "--guess"),
    "inpaint": ("--control", "fill.safetensors", "--image", "photo.png", "--mask", "mask.png"),
    "inpaint and another": ("--control", "depth:0.5", "--control", "fill.safetensors", "--preprocess", "none",
                            "--preprocess", "inpaint", "--control-image", "1.png", "--image", "photo.png", "--mask",
                            "mask.png"),
    "image prompt": ("--image-prompt", "sd/plus.safetensors:0.6", "--image-prompt-image", "0.png",
                     "--image-prompt-image", "1.png", "--image-prompt-mask", "mask.png"),
    "two image prompts": ("--image-prompt", "sd/plus.safetensors", "--image-prompt-image", "0.png", "--image-prompt",
                          "sd/base.safetensors:0.5", "--image-prompt-image", "1.png", "--image-prompt-range", 0, 0.5,
                          "--image-prompt-range", 0.2, 1, "--image-encoder", "eyes"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_the_same_command_draws_the_same_there_as_here(server, model, nets, files, monkeypatch, capsys, case):
    """Bit for bit, settings too; and again from what the picture records."""
    there_flags = [str(one) for one in COMMANDS[case]]
    there_names = [one.partition(":")[0] for one in there_flags]
    names = [
        str(nets / one) if (nets / name).exists() else one for one, name in zip(there_flags, there_names, strict=True)
    ]
    monkeypatch.chdir(files)
    found = []
    for flags, where in ((names, ["--model", model, "--device", "cpu", "--dtype", "float32"]),
                         (there_flags, ["--server", server.url])):  # fmt: skip
        out = files / f"out{len(found)}"
        code = main(["generate", "a red apple", *flags, *where, "--count", "2", "--steps", "4", "--out", str(out)])
        said = capsys.readouterr()
        assert code == 0, said.err
        found.append(said.out.split())
    for here, there in zip(*found, strict=True):
        assert open_picture(here).tobytes() == open_picture(there).tobytes()
        mine, its = read_settings(here), read_settings(there)
        assert (mine.control, mine.image_prompt) == (its.control, its.image_prompt)
        assert len(mine.control) + len(mine.image_prompt) == sum(
            one in ("--control", "--image-prompt") for one in names
        )
    code = main(["generate", "--from", there, *there_flags, "--server", server.url, "--out", str(files / "again")])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert difference(open_picture(said.out.strip()), open_picture(there)) <= 1  # alone, and in a batch of two
    plain = ["--image", "photo.png", "--mask", "mask.png"] if case.startswith("inpaint") else []
    code = main(["generate", "--from", there, *plain, "--server", server.url])
    error = capsys.readouterr().err
    assert code == 2 and "was made with the" in error and error.count("\n") == 1


def test_what_a_server_does_not_have_is_one_line(server, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    for flags, says in (
        (["--control", "nets/fil.safetensors", "--control-image", "0.png"], "unknown ControlNet 'fil'; did you mean"),
        (["--control", "fill", "--control-image", "none.png"], "cannot read 'none.png'"),
        (["--control", "fill"], "1 --control and 0 --control-image"),
        (["--control", "fill"] * 3 + ["--preprocess", "none"] * 2, "2 --preprocess for 3 --control"),
        (["--control", "fill", "--preprocess", "inpaint"], "--preprocess inpaint reads a picture and its mask"),
        (["--image-prompt", "plus", "--image-prompt-image", "0.png", "--image-encoder", "x"], "unknown image encoder"),
        (["--image-prompt", "plus:0.5"], "1 --image-prompt and 0 --image-prompt-image"),
    ):
        assert main(["generate", "p", *flags, "--server", server.url]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
