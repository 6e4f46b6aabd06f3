"""How a mask is used, on the server: the same pictures as `inpaint` gives, by jobs and by A1111's names."""

import pytest
from conftest import noise_picture
from PIL import Image
from serving import alike, base64_of, from_base64, model_folder, open_service, served

import plainsd

PHOTO = noise_picture(96, 80)
MASK = Image.new("L", PHOTO.size)
MASK.paste(255, (40, 24, 64, 48))
GREY = Image.linear_gradient("L").resize(PHOTO.size)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = [model_folder(tmp_path_factory.mktemp("models"))]
    with served(open_service(models, tmp_path_factory.mktemp("data"))) as server:
        yield server


@pytest.fixture(scope="module")
def sd(server):
    return plainsd.load(server.service.models.known["tiny"].source, device="cpu", dtype="float32")


@pytest.mark.parametrize("how", [
    {"mask_blur": 3}, {"mask_grow": 4}, {"mask_grow": -8}, {"masked_padding": 8, "size": [64, 64]},
    {"masked_padding": 8, "mask_blur": 2, "size": [64, 64]}, {"masked_content": "fill"}, {"masked_content": "noise"},
    {"masked_content": "nothing", "strength": 0.8}, {"soft_mask": True}, {"soft_mask": True, "mask_blur": 2},
], ids=str)  # fmt: skip
def test_a_job_draws_what_inpaint_does(server, sd, how):
    mask = GREY if how.get("soft_mask") else MASK
    job = server.drawn(prompt="p", image=base64_of(PHOTO), mask=base64_of(mask), seed=3, steps=6, **how)
    choices = how | ({"size": tuple(how["size"])} if "size" in how else {})
    (expected,) = plainsd.final(plainsd.inpaint(sd, "p", PHOTO, mask, seed=3, steps=6, **choices))
    picture = server.picture(job["images"][0])
    assert picture.size == PHOTO.size and alike(picture, expected, 3)
    plain = server.drawn(prompt="p", image=base64_of(PHOTO), mask=base64_of(mask), seed=3, steps=6,
                         strength=how.get("strength", 1))  # fmt: skip
    idle = how in ({"masked_content": "fill"}, {"masked_content": "noise"})  # at strength 1 no content matters
    assert any("has no effect at strength 1" in note for note in job["notes"]) == idle
    assert alike(picture, server.picture(plain["images"][0]), 3) == idle
    told = server.get(f"/api/images/{job['images'][0]}").json()["settings"]
    assert {name: told[name] for name in how} == how


@pytest.mark.parametrize(("fill", "content"), [(0, "fill"), (1, "original"), (2, "noise"), (3, "nothing")])
def test_what_lies_under_the_mask_by_their_numbers(server, sd, fill, content):
    body = {"prompt": "p", "seed": 3, "steps": 6, "init_images": [base64_of(PHOTO)], "mask": base64_of(MASK),
            "mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": fill, "denoising_strength": 0.6,
            "override_settings": {"randn_source": "CPU"}}  # fmt: skip
    answer = server.post("/sdapi/v1/img2img", body)
    assert answer.status_code == 200, answer.text
    picture = from_base64(answer.json()["images"][0])
    (expected,) = plainsd.final(
        plainsd.inpaint(
            sd, "p", PHOTO, MASK, 0.6, seed=3, steps=6, masked_content=content, like="a1111", noise="cpu"
        )
    )  # fmt: skip
    assert alike(picture, expected)
    whole = server.post("/sdapi/v1/img2img", body | {"inpaint_full_res": True, "inpaint_full_res_padding": 16})
    text = whole.json()["info"]
    assert "Masked area padding: 16" in text


@pytest.mark.parametrize("how", [{"mask_grow": 2}, {"masked_padding": 0}, {"masked_content": "fill"},
                                 {"soft_mask": True}, {"mask_blur": 2}], ids=str)  # fmt: skip
def test_without_a_mask_they_are_refused(server, how):
    (name,) = how
    for body in ({"prompt": "p", **how}, {"prompt": "p", "image": base64_of(PHOTO), **how}):
        error = server.post("/api/jobs", body).json()["error"]
        assert error["field"] == name and "without a mask" in error["message"]


def test_what_is_out_of_its_range_is_named(server):
    for how, says in (({"mask_grow": 500}, "out of range"), ({"masked_content": "grey"}, "unknown masked_content"),
                      ({"mask_grow": -40}, "the mask is dark everywhere")):  # fmt: skip
        body = {"prompt": "p", "image": base64_of(PHOTO), "mask": base64_of(MASK), **how}
        answer = server.post("/api/jobs", body)
        assert answer.status_code == 422 and says in answer.json()["error"]["message"], answer.text
