"""A1111's API, spoken by a client that was written for A1111's web UI (webuiapi)."""

import base64
import json
import threading
from functools import partial

import pytest
from conftest import noise_picture
from PIL import Image, PngImagePlugin
from serving import (
    Brake,
    alike,
    base64_of,
    from_base64,
    lora_file,
    model_folder,
    open_service,
    png_bytes,
    served,
    until,
)  # fmt: skip
from webuiapi import HiResUpscaler, WebUIApi

import plainsd
from plainsd.pictures.masks import box_around, filled_hole
from plainsd.server.api.a1111_names import sampler_of
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest

text_to_image, image_to_image, inpaint = (  # what A1111's clients ask for is drawn as there
    partial(task, like="a1111") for task in (plainsd.text_to_image, plainsd.image_to_image, plainsd.inpaint)
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [model_folder(folder), model_folder(folder, "other", 1)]


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    loras = tmp_path_factory.mktemp("loras")
    lora_file(models[0], loras / "paper.safetensors", 1)
    with served(open_service(models, tmp_path_factory.mktemp("data"), Limits(pixels=256 * 256), loras=loras)) as server:
        yield server


@pytest.fixture(scope="module")
def api(server):
    return WebUIApi(port=int(server.url.rpartition(":")[2]), sampler="Euler a", steps=3)


@pytest.fixture(scope="module")
def sd(models):
    return plainsd.load(models[0], device="cpu", dtype="float32")


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


@pytest.fixture(scope="module")
def drawing():
    return noise_picture(64, 64)


def test_txt2img(api, sd):
    result = api.txt2img(prompt="a red apple", negative_prompt="blue", seed=7, cfg_scale=4, width=64, height=72,
                         batch_size=2,
                         n_iter=2, sampler_name="DPM++ 2M", scheduler="Karras")  # fmt: skip
    expected = plainsd.final(text_to_image(sd, "a red apple", "blue", seed=7, guidance=4, size=(64, 72),
                                                   steps=3, count=4,
                                                   sampler="dpmpp_2m", spacing="karras"))  # fmt: skip
    assert len(result.images) == 4 and all(alike(a, b) for a, b in zip(result.images, expected, strict=True))
    info = result.info
    assert (info["seed"], info["all_seeds"], info["sampler_name"], info["cfg_scale"]) == (
        7,
        [7, 8, 9, 10],
        "DPM++ 2M",
        4,
    )
    assert (info["width"], info["height"], info["steps"], info["sd_model_name"]) == (64, 72, 3, "tiny")
    assert info["infotexts"][1] == result.images[1].info["parameters"] and "Seed: 8" in info["infotexts"][1]
    assert result.parameters["prompt"] == "a red apple" and result.parameters["cfg_scale"] == 4


def test_older_sampler_names_eta_and_a_random_seed(api, sd):
    one = api.txt2img(prompt="p", seed=1, sampler_name="DPM++ 2M Karras", width=64, height=64)
    assert alike(
        one.image,
        plainsd.final(text_to_image(sd, "p", seed=1, steps=3, guidance=7, sampler="dpmpp_2m", spacing="karras"))[0],
    )
    half = api.txt2img(prompt="p", seed=1, sampler_name="DDIM", eta=0.5, width=64, height=64)
    assert alike(
        half.image,
        plainsd.final(text_to_image(sd, "p", seed=1, steps=3, guidance=7, sampler="ddim", eta=0.5))[0],
    )
    seeds = {api.txt2img(prompt="p", width=64, height=64, steps=1).info["seed"] for _ in range(2)}
    assert len(seeds) == 2 and -1 not in seeds


def test_cfg_scale_0_is_by_their_formula(api, sd):
    """uncond + 0 (cond - uncond): the negative prompt alone; here as in a picture that is made again."""
    zero = api.txt2img(prompt="p", negative_prompt="n", seed=1, cfg_scale=0, width=64, height=64)
    asked = {"seed": 1, "steps": 3, "sampler": "euler_a"}
    assert alike(zero.image, plainsd.final(text_to_image(sd, "n", guidance=1, **asked))[0])
    assert zero.info["notes"] == [] and zero.info["cfg_scale"] == 0 and "CFG scale: 0," in zero.info["infotexts"][0]
    below = api.txt2img(prompt="p", negative_prompt="n", seed=1, cfg_scale=0.5, width=64, height=64)
    assert alike(below.image, plainsd.final(text_to_image(sd, "p", "n", guidance=0.5, **asked))[0])


def test_long_seeds(api):
    """A GPU's noise reads all of a seed, a CPU's its low 32 bits."""
    for source, same in (("CPU", True), ("NV", False)):
        options = {"randn_source": source}
        short, long = (
            api.txt2img(prompt="p", seed=seed, width=64, height=64, steps=1, override_settings=options)
            for seed in (4, 2**40 + 4)
        )
        assert alike(short.image, long.image) is same and long.info["seed"] == 2**40 + 4
        assert short.info["notes"] == [] and ("draws the same as 4" in str(long.info["notes"])) is same


def test_hires_and_variations(api, sd):
    large = api.txt2img(
        prompt="p",
        seed=2,
        width=64,
        height=64,
        enable_hr=True,
        hr_scale=1.5,
        hr_upscaler=HiResUpscaler.Latent,
        denoising_strength=0.6,
    )
    assert alike(
        large.image,
        plainsd.final(text_to_image(sd, "p", seed=2, steps=3, guidance=7, sampler="euler_a", hires=1.5, strength=0.6))[
            0
        ],
    )
    sized = api.txt2img(prompt="p", seed=2, width=64, height=64, enable_hr=True, hr_resize_x=96, hr_second_pass_steps=0,
                        hr_upscaler=HiResUpscaler.Latent, denoising_strength=0.6)  # fmt: skip
    assert alike(sized.image, large.image)
    varied = api.txt2img(prompt="p", seed=2, subseed=5, subseed_strength=0.3, width=64, height=64, batch_size=2)
    expected = plainsd.final(text_to_image(sd, "p", seed=2, steps=3, guidance=7, sampler="euler_a", eta=1.0,
                                                   count=2,
                                                   variation_seed=5, variation_strength=0.3))  # fmt: skip
    assert all(alike(a, b) for a, b in zip(varied.images, expected, strict=True))
    assert varied.info["all_seeds"] == [2, 2] and varied.info["all_subseeds"] == [5, 6]


def test_a_lora_in_the_prompt(api, server):
    result = api.txt2img(prompt="a boat <lora:paper:0.5>", seed=3, width=64, height=64)
    assert "a boat <lora:paper:0.5>" in result.info["infotexts"][0]
    files = [(server.service.models.loras.path("paper"), 0.5)]
    sd = plainsd.load(server.service.models.known["tiny"].source, device="cpu", dtype="float32", loras=files)
    expected = text_to_image(sd, "a boat", seed=3, steps=3, guidance=7, sampler="euler_a")
    assert alike(result.image, plainsd.final(expected)[0])


def test_img2img(api, sd, drawing):
    result = api.img2img(images=[drawing], prompt="p", denoising_strength=0.7, seed=3, width=72, height=64)
    expected = plainsd.final(
        image_to_image(sd, "p", drawing, 0.7, seed=3, steps=3, guidance=7, sampler="euler_a", size=(72, 64))
    )[0]
    assert alike(result.image, expected) and result.info["denoising_strength"] == 0.7
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("blue", (0, 0, 32, 64))
    for mode in (1, 2):
        assert api.img2img(images=[wide], resize_mode=mode, denoising_strength=0.4, width=64, height=64).image.size == (
            64,
            64,
        )


def mask_of(*box, size=(64, 64)):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def test_inpainting_the_whole_picture(api, sd, drawing):
    mask = mask_of(16, 16, 48, 48)
    result = api.img2img(images=[drawing], mask_image=mask, mask_blur=0, inpainting_fill=1, inpaint_full_res=False,
                         prompt="p",
                         denoising_strength=0.9, seed=3, width=64, height=64)  # fmt: skip
    expected = plainsd.final(inpaint(sd, "p", drawing, mask, 0.9, seed=3, steps=3, guidance=7, sampler="euler_a"))[0]
    assert alike(result.image, expected)
    inverted = api.img2img(images=[drawing], mask_image=mask, mask_blur=0, inpainting_fill=1, inpaint_full_res=False,
                           inpainting_mask_invert=1, denoising_strength=0.9, seed=3, width=64, height=64)  # fmt: skip
    assert inverted.image.crop((16, 16, 48, 48)).tobytes() == drawing.crop((16, 16, 48, 48)).tobytes()


def test_inpainting_only_around_the_mask(api):
    large = noise_picture(256, 192)
    result = api.img2img(images=[large], mask_image=mask_of(100, 80, 140, 110, size=(256, 192)), mask_blur=4,
                         inpaint_full_res=True,
                         inpaint_full_res_padding=16, denoising_strength=1.0, seed=3, width=64, height=64)  # fmt: skip
    picture = result.image
    assert picture.size == (256, 192)  # pasted back into the whole
    for box in ((0, 0, 256, 60), (0, 130, 256, 192), (0, 0, 80, 192), (160, 0, 256, 192)):
        assert picture.crop(box).tobytes() == large.crop(box).tobytes()
    assert not alike(picture.crop((110, 90, 130, 100)), large.crop((110, 90, 130, 100)), 20)


def test_boxes_keep_the_proportions_and_holes_take_the_colours_around():
    alpha = mask_of(10, 20, 30, 30, size=(100, 60))
    assert box_around(alpha, 0, (64, 64)) == (10, 15, 30, 35)
    assert box_around(alpha, 5, (128, 64)) == (0, 15, 40, 35)
    assert box_around(mask_of(90, 20, 100, 50, size=(100, 60)), 0, (64, 64)) == (70, 20, 100, 50)  # up to the edge
    assert box_around(mask_of(0, 0, 100, 10, size=(100, 60)), 0, (64, 64)) == (0, 0, 100, 60)
    image = Image.new("RGB", (64, 64), (200, 40, 90))
    image.paste("white", (20, 20, 50, 50))
    assert alike(filled_hole(image, mask_of(20, 20, 50, 50)), Image.new("RGB", (64, 64), (200, 40, 90)))
    halves = Image.new("RGB", (64, 64), "black")
    halves.paste("white", (32, 0, 64, 64))
    across = filled_hole(halves, mask_of(8, 24, 56, 40)).convert("L")
    assert across.getpixel((9, 32)) < across.getpixel((54, 32)) and across.getpixel((2, 2)) == 0


def test_progress_and_interrupt(api, server, brake):
    assert api.get_progress()["progress"] == 0 and api.get_progress()["state"]["job_count"] == 0
    results = []
    thread = threading.Thread(
        target=lambda: results.append(api.txt2img(prompt="slow", batch_size=2, steps=10, width=64, height=64))
    )
    thread.start()
    brake.wait()
    brake.step(4)
    until(lambda: api.get_progress()["state"]["sampling_step"] == 4)
    told = api.get_progress()
    assert told["progress"] == pytest.approx(0.4) and told["eta_relative"] > 0
    assert told["state"]["sampling_steps"] == 10 and told["state"]["job_count"] == 2
    assert from_base64(told["current_image"]).size == (64, 64)
    assert server.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
    api.interrupt()
    thread.join(30)
    brake.off()
    assert [image.size for image in results[0].images] == [(64, 64)] * 2  # as far as they had come
    assert api.get_progress()["progress"] == 0
    assert server.get("/api/jobs").json()["ended"][-1]["state"] == "cancelled"


@pytest.mark.parametrize("whose", ["another client", "another api"])
def test_an_interrupt_reaches_only_this_clients_jobs_of_this_api(api, server, brake, whose):
    """Both clients ask at once: the one that interrupts has a job that waits, the other's is being drawn."""
    ours = "127.0.0.1"  # as the server sees the client here
    client, through = ("10.0.0.9", "a1111") if whose == "another client" else (ours, "jobs")
    wanted = JobRequest(prompt="not to be stopped", steps=4, size=(64, 64), seed=1)
    other = new_job(wanted, server.service.models, server.service.limits, client, through)
    server.service.queue.add(other)
    brake.wait()
    brake.step(2)
    until(lambda: other.step == 2)
    told = api.get_progress()
    assert told["progress"] == 0 and told["state"]["job"] == "" and told["current_image"] is None
    api.interrupt(), api.skip()
    assert other.state == "running"
    brake.off()
    until(lambda: not other.active)
    assert other.state == "done"


def test_png_info(api, server, drawing):
    made = api.txt2img(prompt="known, later", negative_prompt="rain", seed=5, width=64, height=64).image
    result = api.png_info(made)
    assert result.info == made.info["parameters"]
    parameters = result.parameters
    assert (
        parameters["Prompt"] == "known, later" and parameters["Negative prompt"] == "rain" and parameters["Seed"] == "5"
    )
    assert parameters["Size-1"] == 64 and parameters["Sampler"] == "Euler a"
    assert api.png_info(drawing).info == ""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "no settings at all")
    info.add_text("workflow", "{}")
    sent = {"image": base64.b64encode(png_bytes(drawing, pnginfo=info)).decode()}
    items = {"parameters": "no settings at all", "workflow": "{}"}
    told = server.post("/sdapi/v1/png-info", sent).json()
    assert told == {"info": "no settings at all", "items": items, "parameters": {}}


def test_lists_and_options(api, server):
    assert api.util_get_model_names() == ["other", "tiny"] and "DPM++ 2M" in api.util_get_sampler_names()
    assert (
        "karras" in api.util_get_scheduler_names()
        and [lora["name"] for lora in api.get_loras()] == ["paper"]
        and api.get_scripts() == {"txt2img": [], "img2img": []}
    )
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}} and api.get_prompt_styles() == api.get_sd_vae() == []
    assert api.util_get_current_model() == "tiny"
    try:
        api.util_set_model("other")
        assert api.txt2img(prompt="p", width=64, height=64).info["sd_model_name"] == "other"
        once = api.txt2img(
            prompt="p",
            width=64,
            height=64,
            override_settings={"sd_model_checkpoint": "tiny [0123abcd]", "CLIP_stop_at_last_layers": 2},
        )
        assert (once.info["sd_model_name"], once.info["clip_skip"]) == ("tiny", 2)
        assert api.util_get_current_model() == "other"
        api.set_options(
            {"CLIP_stop_at_last_layers": 2, "samples_format": "png", "save_images_before_highres_fix": True}
        )
        assert api.get_options()["CLIP_stop_at_last_layers"] == 2
        assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": "none such"}).status_code == 404
        assert server.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": "two"}).status_code == 422
        assert server.post("/sdapi/v1/options", {"face_restoration": True}).status_code == 422
    finally:
        api.set_options({"sd_model_checkpoint": "tiny", "CLIP_stop_at_last_layers": 1})
    api.util_wait_for_ready()
    assert api.refresh_checkpoints() is None and {one["name"] for one in api.get_upscalers()} == {
        "None",
        "Lanczos",
        "Nearest",
    }


def test_small_answers(server):
    modes = [one["name"] for one in server.get("/sdapi/v1/latent-upscale-modes").json()]
    assert modes == ["Latent", "Latent (antialiased)", "Latent (bicubic)", "Latent (bicubic antialiased)",
                     "Latent (nearest)", "Latent (nearest-exact)"]  # fmt: skip
    for what in ("checkpoints", "loras", "embeddings"):
        answer = server.post(f"/sdapi/v1/refresh-{what}")
        assert (answer.status_code, answer.json()) == (200, None)


@pytest.mark.parametrize(("name", "scheduler", "ours"), [
    ("Euler a", None, ("euler_a", None)), ("euler_a", "Automatic", ("euler_a", None)),
    ("k_euler_a", "automatic", ("euler_a", None)),
    ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")), ("DPM++ 2M SDE", "exponential", ("dpmpp_2m_sde", "exponential")),
    ("DPM++ SDE", "SGM Uniform", ("dpmpp_sde", "sgm_uniform")), ("UniPC", "Uniform", ("unipc", "uniform")),
    (None, "karras", (None, "karras")), (None, "beta", (None, "beta_a1111")), (None, "Beta", (None, "beta_a1111")),
    (None, "kl_optimal", (None, "kl_optimal_a1111")), (None, "ComfyUI beta", (None, "beta")),
    (None, "ComfyUI kl_optimal", (None, "kl_optimal")), (None, "sgm_uniform", (None, "sgm_uniform")),
])  # fmt: skip
def test_sampler_names(name, scheduler, ours):
    assert sampler_of(name, scheduler) == ours


def test_unknown_names_and_what_is_not_had(server, drawing):
    with pytest.raises(APIError, match="did you mean 'Euler a'"):
        sampler_of("Euler q", None)
    wrong = [
        ("txt2img", {"sampler_name": "Euler z"}, 404), ("txt2img", {"scheduler": "Turbo"}, 404),
        ("img2img", {}, 404),
        ("img2img", {"init_images": [base64_of(drawing)] * 2}, 422),
        ("txt2img", {"s_churn": 1.5}, 422), ("txt2img", {"enable_hr": True, "hr_sampler_name": "Euler z"}, 404),
        ("txt2img", {"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 64, "width": 64, "height": 64}, 422),
        ("txt2img", {"eta": float("nan")}, 422), ("txt2img", {"styles": ["my style"]}, 422),
        ("txt2img", {"restore_faces": True}, 422), ("txt2img", {"script_name": "x/y/z plot"}, 422),
        ("txt2img", {"width": 65}, 422),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "canny"}]}}}, 422),
        ("txt2img", {"steps": 0}, 422),
        ("txt2img", {"override_settings": {"sd_vae": "some.vae.pt"}}, 422),
        ("txt2img", {"enable_hr": True, "hr_upscaler": "ESRGAN_4x"}, 422),
        ("img2img", {"init_images": [base64_of(drawing)], "mask": base64_of(drawing), "inpainting_fill": 4}, 422),
        ("img2img", {"init_images": [base64_of(drawing)], "mask": base64_of(Image.new("L", (64, 64)))}, 422),
        ("img2img", {"init_images": ["http://example.com/a.png"]}, 422), ("png-info", {"image": "AAAA"}, 422),
    ]  # fmt: skip
    for path, body, status in wrong:
        answer = server.post(f"/sdapi/v1/{path}", data=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == status, (path, body, answer.text)
        assert answer.json()["detail"] and answer.json()["error"] == "HTTPException"


def test_a_token_as_basic_authentication(models, tmp_path):
    token = "a-token-for-a1111"
    with served(open_service(models[:1], tmp_path / "data"), token) as guarded:
        port = int(guarded.url.rpartition(":")[2])
        assert WebUIApi(port=port, username="anybody", password=token).util_get_model_names() == ["tiny"]
        assert WebUIApi(port=port).get_options()["error"] == "HTTPException"
