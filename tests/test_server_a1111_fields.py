"""A1111's requests field by field: each acts, or has no part in the picture, or is refused by its name."""

import json

import pytest
from conftest import noise_picture
from PIL import Image
from serving import alike, base64_of, from_base64, lora_file, model_folder, open_service, served

import plainsd
from plainsd.pictures.masks import MaskOptions, canvas_of
from plainsd.pictures.texts.a1111 import parse_settings
from plainsd.server.api import a1111_table
from plainsd.server.api.a1111_fields import Image2Image, Text2Image
from plainsd.server.api.a1111_infotext import with_infotext
from plainsd.server.api.a1111_names import model_of, sampler_of
from plainsd.server.api.a1111_table import FIXED, OPTIONS, REFUSED, WITHOUT_EFFECT, known_options
from plainsd.server.errors import APIError

BOTH = """prompt negative_prompt styles seed subseed subseed_strength seed_resize_from_h seed_resize_from_w sampler_name
scheduler batch_size n_iter steps cfg_scale width height restore_faces tiling do_not_save_samples do_not_save_grid eta
denoising_strength s_min_uncond s_churn s_tmax s_tmin s_noise override_settings override_settings_restore_afterwards
refiner_checkpoint refiner_switch_at disable_extra_networks firstpass_image comments sampler_index script_name
script_args send_images save_images alwayson_scripts force_task_id infotext""".split()
FIELDS = {  # of the web UI 1.10, by its /openapi.json
    Text2Image: """enable_hr firstphase_width firstphase_height hr_scale hr_upscaler hr_second_pass_steps hr_resize_x
hr_resize_y hr_checkpoint_name hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt""".split(),
    Image2Image: """init_images resize_mode image_cfg_scale mask mask_blur_x mask_blur_y mask_blur mask_round
inpainting_fill inpaint_full_res inpaint_full_res_padding inpainting_mask_invert initial_noise_multiplier latent_mask
include_init_images""".split(),
}
SMALL = {"prompt": "p", "seed": 1, "steps": 2, "width": 64, "height": 64, "sampler_name": "Euler a", "cfg_scale": 3}
DRAWN = {"seed": 1, "steps": 2, "sampler": "euler_a", "guidance": 3, "size": (64, 64), "like": "a1111"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, loras = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("loras")
    models = [model_folder(folder), model_folder(folder, "other", 1)]
    lora_file(models[0], loras / "paper.safetensors", 1)
    with served(open_service(models, tmp_path_factory.mktemp("data"), loras=loras)) as server:
        yield server


@pytest.fixture(scope="module")
def sd(server):
    return plainsd.load(server.service.models.known["tiny"].source, device="cpu", dtype="float32")


def asked(server, path="txt2img", **fields):
    answer = server.post(f"/sdapi/v1/{path}", SMALL | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def first(answer) -> Image.Image:
    return from_base64(answer["images"][0])


@pytest.mark.parametrize("request_of", FIELDS)
def test_every_field_of_theirs_is_in_one_row(request_of):
    for name in BOTH + FIELDS[request_of]:
        places = [name in request_of.model_fields, name in WITHOUT_EFFECT, name in REFUSED]
        assert sum(places) == 1, (name, places)
    assert not set(OPTIONS) & set(FIXED)
    assert not [name for name in FIXED if name.startswith(a1111_table.OF_FILES_AND_PAGES) and not FIXED[name]][1:]


HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent"}


@pytest.mark.parametrize(("word", "fields"), [
    ("restore_faces", {"restore_faces": True}), ("styles", {"styles": ["s"]}),
    ("script_name", {"script_name": "x/y/z plot"}), ("s_min_uncond", {"s_min_uncond": 0.5}),
    ("randn_source", {"override_settings": {"randn_source": "TPU"}}),
    ("randn_source", {"override_settings": {"randn_source": ["CPU"]}}),
    ("ensd -1", {"override_settings": {"eta_noise_seed_delta": -1}}),
    ("s_churn", {"s_churn": 1.5, "sampler_name": "Euler"}), ("s_noise", {"s_noise": 1.1, "sampler_name": "DPM2 a"}),
    ("firstphase_width", {"firstphase_width": 32}), ("firstpass_image", {**HIRES, "firstpass_image": "AAAA"}),
    ("hr_checkpoint_name", {**HIRES, "hr_checkpoint_name": "other"}),
    ("token_merging_ratio", {"token_merging_ratio": 0.5}),
    ("a unit has no image", {"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}}),
    ("a unit has no image", {"alwayson_scripts": {"controlnet": {"args": [{"enabled": False}, {"enabled": True}]}}}),
    ("'ADetailer'", {"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "face"}]}}}),
    ("'ADetailer'", {"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "face"}]}}}),
    ("step", {"step": 30}), ("eta_ancestral", {"override_settings": {"eta_ancestral": 0}}),
    ("comma_padding_backtrack", {"override_settings": {"comma_padding_backtrack": 0}}),
    ("emphasis", {"override_settings": {"emphasis": "None"}}),
    ("clip_stop", {"override_settings": {"clip_stop": 2}}),
    ("batch_size", {"batch_size": -5, "n_iter": -5}), ("n_iter", {"n_iter": 0}),
    ("hr_scale", {**HIRES, "hr_scale": 1e308}), ("infotext", {"infotext": "no settings"}),
    ("face_restoration", {"infotext": "p\nSteps: 2, Sampler: Euler, CFG scale: 3, Face restoration: CodeFormer"}),
])  # fmt: skip
def test_what_would_change_the_picture_and_is_not_had_is_refused_by_its_name(server, word, fields):
    answer = server.post("/sdapi/v1/txt2img", SMALL | fields)
    assert answer.status_code == 422, answer.text
    assert word in answer.json()["detail"]


@pytest.mark.parametrize("fields", [
    {"restore_faces": False, "tiling": None, "styles": [], "script_name": "", "script_args": [1], "s_min_uncond": 0,
     "s_churn": 0, "s_tmin": 0, "s_tmax": 0, "s_noise": 0, "comments": {"a": 1}, "force_task_id": "x",
     "firstphase_width": 0, "firstpass_image": "AAAA", "save_images": True, "do_not_save_grid": True},
    {"seed_resize_from_h": -1, "seed_resize_from_w": 64, "hr_prompt": "else", "hr_second_pass_steps": 20},
    {"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False, "model": "canny"}]}, "Refiner": {"args": []},
                          "ADetailer": {"args": [False, False, {"ad_model": "face"}]}, "Seed": {}}},
    {"alwayson_scripts": {"Sampler": {"args": [20, "DPM++ 2M", "Automatic"]}, "Refiner": {"args": [False, "", 0.8]},
                          "seed": {"args": [-1, False, -1, 0, 0, 0]}}},
    {"override_settings": {"eta_noise_seed_delta": 0, "sd_vae": "Automatic", "samples_format": "jpg",
                           "return_grid": False, "show_progress_every_n_steps": 3}},
])  # fmt: skip
def test_what_changes_nothing_there_is_taken(server, sd, fields):
    """Swagger's example of every field, switched-off units, and options about files."""
    expected = plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN))[0]
    assert alike(first(asked(server, **fields)), expected)


@pytest.mark.parametrize(("fields", "ours"), [
    ({"override_settings": {"randn_source": "CPU", "eta_noise_seed_delta": 31337}}, {"noise": "cpu", "ensd": 31337}),
    ({"override_settings": {"randn_source": "NV"}}, {}), ({"override_settings": {"randn_source": "GPU"}}, {}),
    ({"seed_resize_from_w": 32, "seed_resize_from_h": 48}, {"seed_resize": (32, 48)}),
    ({"infotext": "p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, RNG: CPU, ENSD: 7, "
                  "Seed resize from: 32x48"}, {"noise": "cpu", "ensd": 7, "seed_resize": (32, 48)}),
])  # fmt: skip
def test_the_noise_is_the_one_that_is_named(server, sd, fields, ours):
    expected = plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN | ours))[0]
    assert alike(first(asked(server, **fields)), expected)
    other = plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN))[0]
    assert alike(other, expected) == (ours == {})


def test_null_prompts_are_empty_ones(server, sd):
    answer = asked(server, prompt=None, negative_prompt=None)
    assert alike(first(answer), plainsd.final(plainsd.text_to_image(sd, "", **DRAWN))[0])


def test_noise_by_options_fields_and_texts(server, sd):
    def drawn(**more):
        return plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN | more))[0]

    text = "p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64"
    assert alike(first(asked(server)), drawn(noise="nv")) and not alike(drawn(noise="nv"), drawn(noise="cpu"), 3)
    for said, noise in (("", "nv"), (", RNG: CPU", "cpu"), (", RNG: NV", "nv")):
        assert alike(first(asked(server, infotext=text + said)), drawn(noise=noise))
    cpu = asked(server, infotext=text, override_settings={"randn_source": "CPU", "eta_noise_seed_delta": 31337})
    assert alike(first(cpu), drawn(noise="cpu", ensd=31337))
    assert alike(first(asked(server, infotext=text + ", ENSD: 31337")), drawn(ensd=31337))
    resized = asked(server, seed_resize_from_w=32, seed_resize_from_h=48)
    assert alike(first(resized), drawn(seed_resize=(32, 48))) and not alike(first(resized), drawn(), 3)


def test_tiling_as_a_field_an_option_and_in_a_text(server, sd):
    (expected,) = plainsd.final(plainsd.text_to_image(sd, "p", tiling=True, **DRAWN))
    text = "p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, Tiling: True"
    for fields in ({"tiling": True}, {"override_settings": {"tiling": True}}, {"infotext": text}):
        assert alike(first(asked(server, **fields)), expected)
    plain = first(asked(server, tiling=False, override_settings={"tiling": True}))
    assert not alike(plain, expected, 3)
    assert server.post("/sdapi/v1/options", {"tiling": "sideways"}).status_code == 422


def test_disabled_extra_networks_are_taken_out_of_the_prompt(server, sd):
    off = asked(server, prompt="p<lora:paper:1>", disable_extra_networks=True)
    assert alike(first(off), plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN))[0])
    assert not alike(first(off), first(asked(server, prompt="p<lora:paper:1>")))


TEXT = """a red apple
Negative prompt: blue
Steps: 2, Sampler: Euler a, Schedule type: Karras, CFG scale: 3, Seed: 9, Size: 72x64, Clip skip: 2, Model: other, \
Face restoration model: none, Version: v1.10.1"""


def test_infotext_speaks_where_the_request_does_not(server, sd):
    def drawn(**fields):
        answer = server.post("/sdapi/v1/txt2img", {"infotext": TEXT} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    other = plainsd.load(server.service.models.known["other"].source, device="cpu", dtype="float32")
    said = {"steps": 2, "sampler": "euler_a", "spacing": "karras", "guidance": 3, "clip_skip": 2, "like": "a1111"}
    answer = drawn()
    expected = plainsd.text_to_image(other, "a red apple", "blue", seed=9, size=(72, 64), **said)
    assert alike(first(answer), plainsd.final(expected)[0])
    assert "infotext: Face restoration model: none has no effect here" in answer["info"]
    over = drawn(prompt="a pear", seed=4, width=64, override_settings={"sd_model_checkpoint": "tiny"})
    expected = plainsd.text_to_image(sd, "a pear", "blue", seed=4, size=(64, 64), **said)
    assert alike(first(over), plainsd.final(expected)[0])


@pytest.mark.parametrize("how", [
    {"like": "comfyui"}, {"like": "a1111"}, {}, {"noise": "comfyui"}, {"noise": "nv"}, {"spacing": "beta"},
    {"sampler": "dpm2", "eta": 0.5}, {"sampler": "tcd", "eta": 0.5}, {"hires": 1.5, "hires_spacing": "kl_optimal"},
], ids=str)  # fmt: skip
def test_a_picture_of_ours_comes_again_from_its_text(server, how):
    """Whatever it was drawn like. A1111's own texts are drawn as there."""
    job = server.drawn(**{"prompt": "p", "seed": 5, "steps": 2, "sampler": "euler_a", **how})
    text = server.get(f"/api/images/{job['images'][0]}").json()["parameters"]
    again = server.post("/sdapi/v1/txt2img", {"infotext": text}).json()
    assert json.loads(again["info"])["notes"] == []
    assert alike(first(again), server.picture(job["images"][0]), 0)
    cpu = server.post("/sdapi/v1/txt2img", {"infotext": text, "override_settings": {"randn_source": "CPU"}}).json()
    assert "RNG: CPU" in json.loads(cpu["info"])["infotexts"][0]


@pytest.mark.parametrize(
    "how", [{"mask_blur": 4}, {}, {"masked_padding": 8, "mask_blur": 2}, {"like": "a1111"}], ids=str
)
def test_a_masked_picture_of_ours_comes_again_from_its_text(server, how):
    photo, mask = noise_picture(64, 64), Image.new("L", (64, 64))
    mask.paste(255, (24, 20, 42, 40))
    sent = {"image": base64_of(photo), "mask": base64_of(mask)}
    job = server.drawn(prompt="p", seed=5, steps=2, sampler="euler_a", strength=0.8, **sent, **how)
    text = server.get(f"/api/images/{job['images'][0]}").json()["parameters"]
    body = {"infotext": text, "init_images": [sent["image"]], "mask": sent["mask"]}
    again = server.post("/sdapi/v1/img2img", body).json()
    assert json.loads(again["info"])["notes"] == []
    assert alike(first(again), server.picture(job["images"][0]), 0)


def test_older_names_go_before_the_infotext_too(server):
    text = "p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, Mask blur: 4"
    models, limits = server.service.models, server.service.limits
    asked = with_infotext(Image2Image(infotext=text, sampler_index="DDIM", mask_blur_x=9), models, limits)[0]
    assert asked.sampler_name is None and asked.blur() == (9, 4)
    asked = with_infotext(Image2Image(infotext=text), models, limits)[0]
    assert asked.sampler_name == "euler_a" and asked.blur() == (4, 4)


@pytest.mark.parametrize(("sampler", "acts"), [
    ("DPM++ 2M SDE Heun", True), ("DDIM CFG++", True), ("DPM fast", True), ("DPM adaptive", True), ("TCD", True),
    ("Euler a", True), ("Euler", False), ("DPM2", False), ("DPM++ 2M", False), (None, False),
])  # fmt: skip
def test_eta_acts_where_it_does_there(server, sampler, acts):
    fields = Text2Image(sampler_name=sampler, eta=0.5).job_fields({}, server.service.models)
    assert fields["eta"] == (0.5 if acts else None)


def test_a_second_pass_without_a_strength_has_theirs(server):
    assert json.loads(asked(server, **HIRES)["info"])["denoising_strength"] == 0.75


def test_a_grey_mask_is_taken_as_it_is(server, sd):
    photo, mask = noise_picture(64, 64), Image.new("L", (64, 64))
    mask.paste(100, (16, 16, 48, 48))
    mask.paste(140, (16, 16, 48, 32))
    sent = {"init_images": [base64_of(photo)], "mask": base64_of(mask), "denoising_strength": 0.9}
    answer = asked(server, "img2img", **sent, mask_blur=0, inpaint_full_res=False, inpainting_fill=1)
    (expected,) = plainsd.final(plainsd.inpaint(sd, "p", photo, mask, 0.9, **DRAWN))
    assert alike(first(answer), expected)
    dark = {"init_images": [base64_of(photo)], "mask": base64_of(Image.new("L", (64, 64)))}
    assert "the mask is dark everywhere" in server.post("/sdapi/v1/img2img", SMALL | dark).text


@pytest.mark.parametrize(("path", "entries"), [
    ("img2img", ["Hires upscale: 2", "Hires upscaler: Lanczos", "Hires steps: 3", "Hires prompt: else",
                 "Outpaint: 8 0 8 0"]),
    ("txt2img", ["Outpaint: 8 0 8 0", "Mask blur: 4", "Masked area padding: 8", "Image CFG scale: 2"]),
])  # fmt: skip
def test_entries_of_the_other_request_are_noted(server, path, entries):
    text = f"p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, {', '.join(entries)}"
    fields = {"init_images": [base64_of(noise_picture(64, 64))]} if path == "img2img" else {}
    answer = server.post(f"/sdapi/v1/{path}", {"infotext": text, **fields})
    assert answer.status_code == 200, answer.text
    notes = json.loads(answer.json()["info"])["notes"]
    assert {f"infotext: {entry} has no effect here" for entry in entries} <= {*notes}


def test_a_lora_of_the_second_pass_alone_is_noted(server):
    body = {"enable_hr": True, "hr_scale": 1.5, "hr_prompt": "else <lora:paper:0.5>", "denoising_strength": 0.6}
    said = "hr_prompt: <lora:paper:0.5> has no effect; the second pass has the LoRAs of prompt"
    assert said in json.loads(asked(server, **body)["info"])["notes"]
    same = asked(server, **body | {"prompt": "p <lora:paper:0.5>"})
    assert json.loads(same["info"])["notes"] == []
    assert json.loads(asked(server, **body | {"enable_hr": False})["info"])["notes"] == []


def test_infotext_brings_a_second_pass_and_a_variation(server, sd):
    text = (
        "p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, Denoising strength: 0.6, "
        "Variation seed: 5, Variation seed strength: 0.3, Hires upscale: 1.5, Hires upscaler: Latent"
    )
    answer = server.post("/sdapi/v1/txt2img", {"infotext": text}).json()
    more = {"hires": 1.5, "strength": 0.6, "variation_seed": 5, "variation_strength": 0.3}
    assert alike(first(answer), plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN, **more))[0])
    plain = server.post("/sdapi/v1/txt2img", {"infotext": text, "enable_hr": False}).json()
    assert first(plain).size == (64, 64)
    wrong = server.post("/sdapi/v1/txt2img", {"infotext": text + ", Hires checkpoint: other"})
    assert wrong.status_code == 422 and "hr_checkpoint_name" in wrong.text


def test_the_second_pass_may_draw_with_something_else(server, sd):
    """By the request's fields, and by the same words in an infotext."""
    fields = {
        "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent (nearest-exact)", "denoising_strength": 0.6,
        "hr_second_pass_steps": 3, "hr_sampler_name": "DDIM", "hr_scheduler": "Karras", "hr_prompt": "else <lora:x:1>",
        "hr_negative_prompt": "blue", "hr_cfg": 2,
    }  # fmt: skip
    text = (
        "p\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, Denoising strength: 0.6, "
        "Hires upscale: 1.5, Hires upscaler: Latent (nearest-exact), Hires steps: 3, "
        "Hires sampler: DDIM, Hires schedule type: Karras, "
        "Hires prompt: else, Hires negative prompt: blue, Hires CFG Scale: 2"
    )
    more = {"hires": 1.5, "strength": 0.6, "upscaler": "latent-nearest-exact", "hires_steps": 3,
            "hires_sampler": "ddim", "hires_spacing": "karras", "hires_prompt": "else", "hires_negative": "blue",
            "hires_guidance": 2.0}  # fmt: skip
    expected = plainsd.final(plainsd.text_to_image(sd, "p", **DRAWN, **more))[0]
    assert alike(first(asked(server, **fields)), expected)
    assert alike(first(server.post("/sdapi/v1/txt2img", {"infotext": text}).json()), expected)


def test_an_automatic_schedule_of_the_second_pass_is_not_the_first_ones(server):
    for schedule, drawn in (
        ("Automatic", "uniform"),
        ("Use same scheduler", None),
        (None, None),
        ("beta", "beta_a1111"),
    ):
        answer = asked(server, **HIRES, scheduler="Karras", hr_scheduler=schedule, denoising_strength=0.6)
        (text,) = json.loads(answer["info"])["infotexts"]
        assert parse_settings(text).hires_spacing == drawn


def test_options_stay_where_a_request_says_so(server):
    override = {"CLIP_stop_at_last_layers": 2}
    try:
        asked(server, override_settings=override)
        assert server.get("/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] == 1
        asked(server, override_settings=override, override_settings_restore_afterwards=False)
        assert server.get("/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] == 2
    finally:
        server.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 1})


def test_a_model_that_stays_is_known_by_its_served_name(server):
    title = {"sd_model_checkpoint": "other.safetensors [0123]"}
    try:
        asked(server, override_settings=title, override_settings_restore_afterwards=False)
        assert server.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "other"
        assert server.get("/sdapi/v1/embeddings").status_code == 200
    finally:
        server.post("/sdapi/v1/options", {"sd_model_checkpoint": "tiny"})


@pytest.mark.parametrize(("scripts", "says"), [
    ({"controlnet": {"args": ["edges"]}}, "script 'controlnet', unit 0: 'edges' is not an object of fields"),
    ({"controlnet": {"args": [{}, ["edges"]]}}, "script 'controlnet', unit 1: \"['edges']\" is not an object"),
    ({"controlnet": {"args": []}, "ControlNet": {"args": []}}, "'controlnet' and 'ControlNet' are the same one"),
])  # fmt: skip
def test_units_that_would_be_left_out_are_refused(server, scripts, says):
    answer = server.post("/sdapi/v1/txt2img", SMALL | {"alwayson_scripts": scripts})
    assert answer.status_code == 422 and says in answer.json()["detail"]


def test_masks_are_blurred_across_and_down_and_may_be_painted_in_alpha(server):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (24, 24, 40, 40))
    across = canvas_of(noise_picture(64, 64), mask, (64, 64), MaskOptions(blur=(6, 0))).alpha
    assert across.getpixel((20, 32)) > 0 and across.getpixel((32, 20)) == 0
    drawing = noise_picture(64, 64)
    alpha = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    alpha.paste((0, 0, 0, 255), (24, 24, 40, 40))  # black paint on nothing
    common = {"init_images": [base64_of(drawing)], "inpaint_full_res": False, "denoising_strength": 0.9}
    light = asked(server, "img2img", mask=base64_of(mask), mask_blur_x=0, mask_blur_y=0, **common)
    painted = asked(server, "img2img", mask=base64_of(alpha), mask_blur=0, **common)
    assert alike(first(light), first(painted)) and "init_images" not in light["parameters"]
    tall = asked(
        server, "img2img", mask=base64_of(mask), mask_blur_x=0, mask_blur_y=4, include_init_images=True, **common
    )
    assert alike(first(tall).crop((0, 0, 23, 64)), drawing.crop((0, 0, 23, 64)), 0)
    assert not alike(first(tall).crop((24, 18, 40, 24)), drawing.crop((24, 18, 40, 24)), 0)
    assert tall["parameters"]["init_images"] == common["init_images"]


def test_models_by_title_file_and_hash(server):
    models = server.service.models
    models.known["other"].hashes = (("model", "0123abcd45"),)
    for title in ("other", "other.safetensors", "other.safetensors [0123abcd45]", "sd/other.ckpt", "0123abcd45"):
        assert model_of(title, models) == "other", title
    assert model_of(None, models) is None and model_of("none such.safetensors", models) == "none such.safetensors"
    with pytest.raises(APIError, match="not a name"):
        model_of(3, models)


def test_any_schedule_may_stand_behind_a_samplers_name():
    assert sampler_of("DPM++ 2M SDE SGM Uniform", None) == ("dpmpp_2m_sde", "sgm_uniform")
    assert sampler_of("Euler a uniform", "Karras") == ("euler_a", "uniform")


def test_options_are_refused_with_what_they_may_be():
    assert known_options({"CLIP_stop_at_last_layers": 2, "sd_vae": "None", "js_modal_lightbox": False}) == {
        "CLIP_stop_at_last_layers": 2
    }
    with pytest.raises(APIError, match="option s_noise 0 is not supported; set it to 1, or leave it out"):
        known_options({"s_noise": 0})
