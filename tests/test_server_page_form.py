"""The form of the page: what it shows is what is sent, what is kept, and what a picture was drawn with."""

from io import BytesIO

import browser
import pytest
from browser import chromium, needed  # noqa: F401
from conftest import noise_picture
from PIL import Image
from serving import model_folder, open_service, png_bytes, served
from test_server_page import ELSEWHERE

from plainsd.server.limits import Limits

pytestmark = needed
page = browser.page
EVERYTHING = {
    "prompt": "with all of it", "seed": 5, "steps": 4, "sampler": "euler_a",
    "hires": 1.5, "strength": 0.6, "hires_steps": 3, "hires_prompt": "something else", "hires_negative": "rain",
    "hires_guidance": 2.5, "hires_sampler": "heun", "hires_spacing": "karras", "ensd": 31337, "seed_resize": [32, 32],
    "noise": "comfyui", "batch_index": 1, "batch_size": 2, "apg": 2, "apg_parallel": 0.5, "apg_momentum": 0.3,
}  # fmt: skip
NOTHING = "document.getElementById('canvas-tools').hidden"
STARTED = f"!{NOTHING}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = [model_folder(folder), model_folder(folder, "other", 1)]
    with served(open_service(models, tmp_path_factory.mktemp("data"), Limits(steps=120))) as server:
        yield server


def start_from(page, image):
    page.drop("#drop", "start.png", image if isinstance(image, bytes) else png_bytes(image))
    page.until(STARTED)


def size(page):
    return page.value("width"), page.value("height")


def pixels(page, job):
    return page.server.picture(job["images"][0]).tobytes()


def toast(page):
    return page.find("#toast").text


# --- settings of a picture -------------------------------------------------------------------------------------------


def test_settings_without_a_field_come_back_are_listed_and_cleared(page):
    assert EVERYTHING.keys() >= ELSEWHERE
    made = page.server.drawn(**EVERYTHING)
    picture = page.server.picture(made["images"][0]).tobytes()
    page.load()
    assert not page.find("#kept").is_displayed()
    page.find(".tile").click()
    shown = page.find("#viewer-settings").text
    for line in ("Hires steps\n3", "Hires prompt\nsomething else", "Hires sampler\nHeun", "Eta noise seed delta\n31337",
                 "Seed resize from\n32 × 32", "Noise batch size\n2"):  # fmt: skip
        assert line in shown
    page.use()
    assert toast(page) == "Settings restored, with the seed."
    listed = page.js("return [...document.querySelectorAll('#kept-list li')].map((line) => line.dataset.field)")
    assert set(listed) == ELSEWHERE and "Hires spacing: Karras" in page.find("#kept-list").text
    assert pixels(page, page.drawn()) == picture
    page.load()
    assert "Eta noise seed delta: 31337" in page.find("#kept-list").text
    page.find("#clear-kept").click()
    assert not page.find("#kept").is_displayed()
    settings = page.settings(page.drawn())
    assert (settings["hires"], settings["hires_steps"], settings["ensd"]) == (1.5, None, None)
    page.load()
    assert not page.find("#kept").is_displayed()
    page.drop("#gallery", "made.png", page.server.get(f"/api/images/{made['images'][0]}.png").content)
    page.until("document.querySelectorAll('#kept-list li').length === 12")
    assert pixels(page, page.drawn()) == picture


def test_an_error_about_a_setting_without_a_field_stands_at_its_line(page, monkeypatch):
    page.server.drawn(prompt="twice", steps=1, hires=1.5, hires_steps=3)
    page.load()
    page.find(".tile").click()
    page.use()
    monkeypatch.setattr(page.server.service, "limits", Limits(steps=2))
    page.draw()
    page.until("document.querySelector('#kept-list [data-field=hires_steps] .error')")
    assert "hires steps 3 is out of range" in page.find("#kept-list .error").text


def test_what_is_not_there_any_more_is_named(page, monkeypatch):
    made = page.server.drawn(prompt="by both", model="other", refiner="tiny", steps=2, hires=1.5, upscaler="lanczos")
    page.set("model", "other")
    monkeypatch.delitem(page.server.service.models.known, "other")
    monkeypatch.setattr("plainsd.server.api.app.UPSCALERS", ("latent",))
    page.load()
    assert toast(page) == "Not on this server: model other (tiny instead)."  # of the form as it was
    page.find(".tile").click()
    page.use()
    assert toast(page) == (
        "Settings restored, with the seed. Not on this server: model other (tiny instead), "
        "upscaler lanczos (latent instead), refiner tiny."
    )
    assert page.value("model") == "tiny" and page.settings(page.drawn())["upscaler"] == "latent"
    page.drop("#gallery", "made.png", page.server.get(f"/api/images/{made['images'][0]}.png").content)
    page.until("document.getElementById('toast').textContent.includes('Model: other')")


def test_fields_are_sent_with_what_they_belong_to(page):
    page.set("prompt", "alone")
    page.set("upscaler", "lanczos")
    page.set("variation_seed", "9")
    settings = page.settings(page.drawn())
    assert (settings["upscaler"], settings["variation_seed"]) == ("latent", None)
    assert (page.value("upscaler"), page.value("variation_seed")) == ("lanczos", "9")  # for later
    page.set("variation_strength", 0.5)
    page.set("x-name", "hires")
    page.set("x-values", "1.5")
    settings = page.settings(page.drawn())
    assert (settings["hires"], settings["upscaler"], settings["variation_seed"]) == (1.5, "lanczos", 9)
    page.server.drawn(prompt="projected", steps=1, apg=2, apg_momentum=0.3, apg_parallel=0.5)
    page.load()
    page.find(".tile").click()
    page.use()
    page.set("apg", "")
    settings = page.settings(page.drawn())
    assert (settings["apg"], settings["apg_momentum"]) == (0, -0.5)
    page.set("apg", 2)
    assert page.settings(page.drawn())["apg_momentum"] == 0.3


def test_a_dropped_picture_of_a_text_is_drawn_without_the_start_picture(page):
    made = page.server.drawn(prompt="from text", seed=5, steps=4, sampler="euler")
    file = page.server.get(f"/api/images/{made['images'][0]}.png").content
    start_from(page, noise_picture(96, 64))
    page.set("strength", 0.4)
    page.drop("#gallery", "made.png", file)
    page.until("document.getElementById('prompt').value === 'from text'")
    assert page.js(f"return {NOTHING}") and page.value("strength") == ""
    job = page.drawn()
    assert pixels(page, job) == page.server.picture(made["images"][0]).tobytes()

    start_from(page, noise_picture(96, 64))
    page.set("strength", 0.4)
    page.set("prompt", "from a picture")
    page.set("seed", 6)
    over = page.drawn()
    page.set("strength", 0.9)
    page.drop("#gallery", "over.png", page.server.get(f"/api/images/{over['images'][0]}.png").content)
    page.until("document.getElementById('strength').value === '0.4'")
    assert pixels(page, page.drawn()) == pixels(page, over)  # over the same one
    page.find("#remove").click()
    page.drop("#gallery", "over.png", page.server.get(f"/api/images/{over['images'][0]}.png").content)
    page.until("document.getElementById('toast').textContent.includes('Its start picture is not in the file')")


def test_the_prompts_of_a_picture_are_drawn_as_they_are_until_they_are_edited(page):
    def drawn():
        settings = page.settings(page.drawn())
        return settings["prompt"], settings["negative"]

    made = page.server.drawn(prompt="{{{apple}}}", negative="{rain}", steps=1, settled=["prompt", "negative"])
    page.load()
    page.find(".tile").click()
    page.use()
    assert drawn() == ("{{{apple}}}", "{rain}")
    page.load()
    assert drawn() == ("{{{apple}}}", "{rain}")
    page.set("negative", "{rain}")  # by hand
    assert drawn() == ("{{{apple}}}", "rain")
    page.drop("#gallery", "made.png", page.server.get(f"/api/images/{made['images'][0]}.png").content)
    page.until("document.getElementById('toast').textContent.includes('Settings restored from made.png')")
    assert drawn() == ("{{{apple}}}", "{rain}")
    page.find("#prompt").send_keys("!")
    assert drawn() == ("apple!", "{rain}")


# --- strength, interval, size ----------------------------------------------------------------------------------------


def test_the_strength_of_the_hires_pass_is_seen(page):
    assert not page.find("#strength").is_displayed()
    start_from(page, noise_picture(64, 64))
    assert page.find("#canvas-tools #strength").is_displayed()
    page.set("strength", 0.2)
    page.find("#remove").click()
    assert not page.find("#strength").is_displayed()
    page.js("document.getElementById('more-section').open = true")
    page.set("prompt", "twice")
    page.set("steps", 10)
    page.set("hires", 1.5)
    assert page.find("#more-section #strength").is_displayed() and page.value("strength") == "0.2"
    assert page.settings(page.drawn())["strength"] == 0.2
    page.set("strength", 0.5)
    assert page.settings(page.drawn())["strength"] == 0.5
    page.set("strength", 7)
    page.draw()
    page.until("document.querySelector('#more-section [data-field=strength] .error')")
    page.set("strength", "")
    assert page.settings(page.drawn())["strength"] == 0.7  # as its placeholder says
    page.load()
    assert page.find("#strength").is_displayed()
    page.set("hires", "")
    assert not page.find("#strength").is_displayed()
    page.set("x-name", "hires")
    assert page.find("#strength").is_displayed()


def test_a_guidance_interval_is_sent_or_refused(page):
    page.set("prompt", "guided")
    page.js("document.getElementById('more-section').open = true")
    for typed, sent in (("1, 5", [1, 5]), ("0.3-5", [0.3, 5]), ("0.3 5", [0.3, 5]), ("1e-1 – 5", [0.1, 5])):
        page.set("interval", typed)
        assert page.settings(page.drawn())["interval"] == sent
    for typed in ("5", "15", "0.3, -5", "low, high"):
        page.set("interval", typed)
        page.draw()
        page.until("document.querySelector('[data-field=interval] .error')")
        assert f"guidance interval {typed}: give two noise levels" in page.find("[data-field=interval] .error").text
    page.load()
    assert page.value("interval") == "low, high"


def test_a_number_that_the_browser_cannot_read_is_refused(page):
    start_from(page, noise_picture(64, 64))
    page.set("prompt", "in steps")
    page.find("#mask_blur").send_keys("1e")
    page.draw()
    page.until("document.querySelector('[data-field=mask_blur] .error')")
    error = "Mask blur: not a number; correct it, or leave it empty"
    assert page.find("[data-field=mask_blur] .error").text == error
    page.find("#remove").click()  # and the mask's fields with it
    page.find("#steps").clear()
    page.find("#steps").send_keys("1e")
    page.draw()
    page.until("document.querySelector('[data-field=steps] .error')")
    page.set("steps", 4)
    assert page.drawn()["state"] == "done"


def test_a_start_picture_without_a_side_is_refused(page):
    start_from(page, noise_picture(64, 64))
    page.set("width", "")
    page.draw()
    page.until("document.querySelector('[data-field=size] .error')")
    assert page.find("[data-field=size] .error").text == "size 0x64: give both sides in pixels, such as 64"


def test_a_grid_that_goes_down_alone_is_kept_and_refused(page):
    page.set("prompt", "compared")
    page.set("y-name", "guidance")
    page.set("y-values", "1, 4")
    page.load()
    assert [page.value(id) for id in ("x-name", "x-values", "y-name", "y-values")] == ["", "", "guidance", "1, 4"]
    page.draw()
    page.until("document.querySelector('[data-field=grid] .error')")
    assert "Down is filled in without Across" in page.find("[data-field=grid] .error").text
    page.set("x-name", "seed")
    page.set("x-values", "7")
    assert page.drawn()["count"] == 3  # the pictures and their sheet


def test_another_model_draws_the_start_picture_in_its_shape(page):
    start_from(page, noise_picture(128, 64))
    assert size(page) == ("88", "48")
    page.set("model", "other")
    assert size(page) == ("88", "48")
    page.find("#remove").click()
    page.set("model", "tiny")
    assert size(page) == ("64", "64")


def test_the_size_of_a_start_picture_is_a_multiple_of_the_models(page):
    page.js("return import('/page/paint.js').then((paint) => paint.setNative(128, 16))")
    start_from(page, noise_picture(128, 64))
    assert size(page) == ("176", "96")


def test_the_form_is_kept_as_it_was_shown(page):
    start_from(page, noise_picture(96, 64))
    assert size(page) == ("80", "56")
    page.saved()
    page.load()
    assert size(page) == ("80", "56")
    page.find("#remove").click()
    page.saved()


def test_a_swapped_size_is_kept(page):
    page.set("width", 128)
    page.find("#swap").click()
    assert size(page) == ("64", "128")
    page.load()
    assert size(page) == ("64", "128")


def test_what_a_model_has_set_is_kept(page):
    page.set("steps", 77)
    page.set("model", "other")
    assert page.value("steps") == "4"
    page.load()
    assert (page.value("steps"), page.value("model")) == ("4", "other")


def test_the_size_between_outpainted_sides_is_kept(page):
    page.set("width", 128)
    page.set("outpaint-left", 16)
    page.set("outpaint-right", 16)
    for _ in range(3):
        page.load()
        assert (page.value("width"), page.value("outpaint-left")) == ("128", "16")


def test_a_seed_and_a_grid_are_kept(page):
    page.set("seed", 7)
    page.find("#random-seed").click()
    page.set("x-name", "guidance")
    page.set("x-values", "1, 4")
    page.load()
    assert (page.value("seed"), page.value("x-name"), page.value("x-values")) == ("", "guidance", "1, 4")


# --- only masked -----------------------------------------------------------------------------------------------------


def mask_the_middle(page):
    from selenium.webdriver.common.keys import Keys

    page.find("#mask").send_keys(Keys.SPACE)
    page.set("masked_padding", 8)
    page.set("prompt", "in the middle")


def test_only_masked_gives_the_whole_picture_back(page):
    image = noise_picture(256, 256)
    start_from(page, image)
    assert size(page) == ("64", "64")
    mask_the_middle(page)
    job = page.drawn()
    picture, settings = page.server.picture(job["images"][0]), page.settings(job)
    assert picture.size == (256, 256) and settings["size"] == [64, 64] and settings["masked_padding"] == 8
    for box in ((0, 0, 256, 108), (0, 148, 256, 256), (0, 0, 108, 256), (148, 0, 256, 256)):
        assert picture.crop(box).tobytes() == image.crop(box).tobytes()
    assert picture.tobytes() != image.tobytes()
    page.set("masked_padding", "")
    assert page.server.picture(page.drawn()["images"][0]).size == (64, 64)
    page.set("masked_padding", 8)
    page.find("#clear").click()  # nothing is masked
    assert page.server.picture(page.drawn()["images"][0]).size == (64, 64)


def test_only_masked_of_a_picture_that_lies_on_its_side(page):
    buffer, turned = BytesIO(), Image.Exif()
    turned[0x0112] = 6  # the camera was turned
    noise_picture(128, 64).save(buffer, "JPEG", exif=turned)
    start_from(page, buffer.getvalue())
    assert size(page) == ("48", "88")
    mask_the_middle(page)
    assert page.server.picture(page.drawn()["images"][0]).size == (64, 128)
