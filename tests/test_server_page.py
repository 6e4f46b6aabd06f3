"""The page, as people use it: headless Chromium clicks through it."""

import threading
from pathlib import Path

import browser
import pytest
from browser import Page, chromium, needed  # noqa: F401
from conftest import noise_picture
from PIL import Image
from serving import Brake, base64_of, embedding_file, lora_file, model_folder, open_service, png_bytes, served, until

import plainsd
from plainsd.pictures.images import write_png
from plainsd.server.limits import Limits
from plainsd.server.prompt_templates import PromptTemplates
from plainsd.server.schema import JobRequest

pytestmark = needed
page = browser.page
PAINTED = """
const mask = document.getElementById("mask");
return mask.getContext("2d").getImageData(0, 0, mask.width, mask.height).data.some(Boolean);
"""


ROOM = """
const box = document.getElementById(arguments[0]), style = getComputedStyle(box);
const context = document.createElement("canvas").getContext("2d");
context.font = style.font;
const buttons = style.appearance === "textfield" ? 0 : 16;  // that step up and down
return box.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - buttons
  - context.measureText(box.value).width;
"""
CLEAR = """
const [name, done] = arguments;
const asked = indexedDB.open("plainsd", 1);
asked.onsuccess = () => {
  const writing = asked.result.transaction(name, "readwrite");
  writing.objectStore(name).clear();
  writing.oncomplete = () => (asked.result.close(), done());
};
"""
ELSEWHERE = {
    "ensd",
    "seed_resize",
    "batch_index",
    "batch_size",
    "hires_steps",
    "hires_sampler",
    "hires_spacing",
    "hires_prompt",
    "hires_negative",
    "hires_guidance",
    "apg_parallel",
    "apg_momentum",
}  # fields of other programs: what is wrong with them stands below the button


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = [model_folder(folder), model_folder(folder, "other", 1)]
    loras = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "paper")):
        lora_file(models[0], loras / f"{name}.safetensors", seed)
    words = tmp_path_factory.mktemp("words")
    embedding_file(words / "fluffy-one.safetensors", 1)
    embedding_file(words / "cat.safetensors", 2, "<b>cat</b>")
    data = tmp_path_factory.mktemp("data")
    with served(open_service(models, data, Limits(steps=120), loras=loras, embeddings=words)) as server:
        yield server


def clear(page, name):
    page.driver.execute_async_script(CLEAR, name)


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def test_text_to_image_from_the_keyboard_to_the_gallery(page):
    from selenium.webdriver.common.keys import Keys

    assert page.value("steps") == "4" and page.value("width") == "64" and not page.all(".tile")
    prompt = page.driver.switch_to.active_element
    assert prompt.get_attribute("id") == "prompt"
    prompt.send_keys("a red apple")
    page.set("seed", "123")
    page.set("count", "2")
    prompt.send_keys(Keys.CONTROL, Keys.ENTER)
    page.until("document.querySelectorAll('.tile').length === 2")
    page.until("[...document.querySelectorAll('.tile img')].every((image) => image.complete && image.naturalWidth)")
    assert "seed 123, 124" in page.find(".card .status").text
    newest = page.server.get("/api/images").json()["images"][0]
    assert newest["settings"]["seed"] == 124 and newest["settings"]["prompt"] == "a red apple"
    page.find(".card img.whole").send_keys(Keys.ENTER)  # a finished picture opens by keyboard as by mouse
    page.until("document.getElementById('viewer').open")
    page.find("#close").send_keys(Keys.ENTER)
    page.until("!document.getElementById('viewer').open")
    page.find("#random-seed").click()
    assert page.value("seed") == ""
    page.find("#last-seed").click()
    assert page.value("seed") == "123"


def test_progress_preview_and_cancel(page, brake):
    page.set("prompt", "a very slow one")
    page.set("steps", 120)
    page.set("count", 4)
    before = len(page.server.get("/api/images").json()["images"])
    page.draw()
    brake.step(30)
    page.until("document.querySelector('.card img.rough')")
    assert page.js("return document.querySelector('.card img.rough').src").startswith("data:image/png")
    page.until("/Step 30 of 120 · 0 of 4 pictures · .* left/.test(document.querySelector('.card .status').textContent)")
    assert float(page.find(".card progress").get_attribute("value")) == 0.25
    assert "% · plainsd" in page.driver.title
    page.find(".card .card-foot button").click()
    brake.off()
    page.until("!document.querySelector('.card')")
    assert page.server.get("/api/jobs").json()["ended"][-1]["state"] == "cancelled"
    assert len(page.server.get("/api/images").json()["images"]) == before
    assert page.driver.title == "plainsd"


def test_a_job_survives_a_reload_of_the_page(page, brake):
    page.set("prompt", "goes on without the page")
    page.draw()
    page.until("document.querySelector('.card progress')")
    page.load()
    page.until("document.querySelector('.card-prompt')?.textContent === 'goes on without the page'")
    brake.off()
    page.until("document.querySelector('.tile')?.title === 'goes on without the page'")
    assert page.value("prompt") == "goes on without the page"  # the form is kept, too


def test_the_page_waits_for_a_server_that_restarts(chromium, server, tmp_path, brake):  # noqa: F811
    source = server.service.models.known["tiny"].source
    service = open_service([source], tmp_path)
    with served(service) as first:
        page = Page(chromium, first)
        page.set("prompt", "outlives the server")
        page.draw()
        brake.wait()
        page.until("document.querySelector('.card progress')")
        threading.Thread(target=lambda: (until(lambda: service.queue.stopping), brake.off())).start()
    page.until("document.querySelector('.card .status').textContent.includes('waiting for it')")
    with served(open_service([source], tmp_path), port=int(first.url.rpartition(":")[2])):
        page.until("document.querySelector('.card.over .whole')")
        page.until("document.querySelector('.tile')?.title === 'outlives the server'")
    chromium.get_log("browser"), chromium.get_log("performance")


def test_gallery_search_viewer_and_settings_back_in_the_form(page):
    for prompt in ("green <b>pear</b>", "blue boat"):
        page.server.drawn(prompt=prompt, negative="rain", seed=77, steps=3, sampler="heun", spacing="karras",
                          guidance=3.5,
                          rescale=0.4, model="other", size=[72, 64])  # fmt: skip
    page.load()
    page.set("search", "PEAR green")
    page.until("[...document.querySelectorAll('.tile')].map((tile) => tile.title).join() === 'green <b>pear</b>'")
    page.find(".tile").click()
    assert page.find("#viewer-prompt").text == "green <b>pear</b>"  # as text, not as HTML
    shown = page.find("#viewer-settings").text
    assert "72 × 64" in shown and "Heun" in shown and "Karras" in shown and "77" in shown and "rain" in shown
    assert page.find("#download").get_attribute("href").endswith(".png")
    page.use()
    got = {
        name: page.value(name)
        for name in (
            "prompt",
            "negative",
            "steps",
            "sampler",
            "spacing",
            "guidance",
            "seed",
            "rescale",
            "model",
            "width",
            "height",
        )
    }
    assert got == {"prompt": "green <b>pear</b>", "negative": "rain", "steps": "3", "sampler": "heun",
                   "spacing": "karras", "guidance": "3.5",
                   "seed": "77", "rescale": "0.4", "model": "other", "width": "72", "height": "64"}  # fmt: skip
    old = page.server.get("/api/images", params={"search": "pear"}).json()["images"][0]
    again = page.drawn()
    assert page.server.picture(old["id"]).tobytes() == page.server.picture(again["images"][0]).tobytes()

    page.set("search", "")
    page.until("document.querySelectorAll('.tile').length > 2")
    page.all(".tile")[0].click()
    page.find("#older").click()
    page.until("!document.getElementById('newer').disabled")
    page.use("use-new-seed")
    assert page.value("seed") == "" and not page.js("return document.getElementById('viewer').open")


def test_a_picture_is_deleted_and_brought_back(page):
    (id,) = page.server.drawn(prompt="to be deleted", steps=1)["images"]
    page.load()
    page.find(".tile").click()
    page.find("#delete").click()
    page.until("document.querySelector('.tile')?.title !== 'to be deleted'")
    assert page.server.get(f"/api/images/{id}").status_code == 404
    assert "1 picture deleted" in page.find("#toast").text
    page.find("#toast-button").click()
    page.until("document.querySelector('.tile')?.title === 'to be deleted'")
    assert page.server.get(f"/api/images/{id}").status_code == 200


def test_a_dropped_png_restores_its_settings(page, tmp_path):
    path = tmp_path / "apple.png"
    settings = plainsd.Settings(prompt="a dropped apple", negative="grey", size=(72, 80), steps=6, guidance=2.5,
                                sampler="dpmpp_2m",
                                spacing="karras", seed=2**60 + 1,
                                other=(("Face restoration", "CodeFormer"),))  # fmt: skip
    write_png(Image.new("RGB", (72, 80), "green"), path, settings)

    page.set("steps", 50)
    page.drop("#gallery", path.name, path.read_bytes())
    page.until("document.getElementById('prompt').value === 'a dropped apple'")
    got = [
        page.value(name) for name in ("negative", "steps", "guidance", "sampler", "spacing", "seed", "width", "height")
    ]
    assert got == ["grey", "6", "2.5", "dpmpp_2m", "karras", str(2**60 + 1), "72", "80"]
    assert "Settings restored from apple.png" in page.find("#toast").text
    page.find("#toast-button").click()  # and it may be the start of another
    page.until("!document.getElementById('canvas-tools').hidden")
    page.find("#remove").click()
    assert page.settings(page.drawn())["seed"] == str(2**60 + 1)


def test_image_to_image_with_a_dropped_picture(page):
    image = noise_picture(128, 64)
    page.drop("#drop", "noise.png", png_bytes(image))
    page.until("!document.getElementById('canvas-tools').hidden")
    assert (page.value("width"), page.value("height")) == ("88", "48")  # its shape, at the model's number of pixels
    page.set("prompt", "over it")
    page.set("strength", 0.5)
    settings = page.settings(page.drawn())
    assert settings["size"] == [88, 48] and settings["strength"] == 0.5


def test_inpainting_with_the_brush(page):
    from selenium.webdriver import ActionChains

    image = noise_picture(64, 64)
    page.drop("#drop", "noise.png", png_bytes(image))
    page.until("!document.getElementById('canvas-tools').hidden")
    mask = page.find("#mask")
    page.js("arguments[0].scrollIntoView({ block: 'center' })", mask)
    side = mask.size["width"]

    def stroke():
        move = ActionChains(page.driver).move_to_element_with_offset(mask, -side // 4, -side // 4).click_and_hold()
        for _ in range(5):
            move.move_by_offset(side // 10, 0)
        move.release().perform()
        return page.js(PAINTED)

    assert stroke()
    page.find("#undo").click()
    assert not page.js(PAINTED)
    assert stroke()
    page.set("prompt", "in the hole")
    page.set("seed", 9)
    job = page.drawn()
    picture = page.server.picture(job["images"][0])
    assert picture.size == (64, 64) and page.settings(job)["strength"] == 1
    changed = [sum(a != b for a, b in zip(picture.crop(box).tobytes(), image.crop(box).tobytes(), strict=True))
               for box in ((0, 8, 64, 24), (0, 40, 64, 64))]  # fmt: skip
    assert changed[0] > 300 and changed[1] == 0  # drawn anew under the brush, as it was elsewhere
    page.find("#remove").click()
    page.find(".card .whole").click()
    page.use()  # with its picture and mask
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == picture.tobytes()
    page.saved()
    page.load()  # the form has them, and the job too
    page.until("document.getElementById('picture').width === 768")
    assert page.js(PAINTED)
    page.find("#remove").click()
    page.saved()
    page.load()
    assert not page.find("#canvas-tools").is_displayed()
    page.find(".tile").click()
    page.use()
    page.until("!document.getElementById('canvas-tools').hidden")
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == picture.tobytes()
    clear(page, "jobs")  # as in another browser
    page.load()
    page.find(".tile").click()
    page.use()
    page.until("document.getElementById('toast').textContent.includes('start picture is not in this browser')")


def test_the_brush_works_from_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.drop("#drop", "grey.png", png_bytes(Image.new("RGB", (64, 64), "grey")))
    page.until("!document.getElementById('canvas-tools').hidden")
    mask = page.find("#mask")
    mask.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.SPACE)
    assert page.js("return document.getElementById('mask').getContext('2d').getImageData(360, 360, 1, 1).data[3]") > 0
    assert "across" in page.find("#canvas-hint").text
    mask.send_keys("e", Keys.SPACE)
    assert page.find("#erase").get_attribute("aria-pressed") == "true"
    assert page.js("return document.getElementById('mask').getContext('2d').getImageData(360, 360, 1, 1).data[3]") == 0
    page.set("prompt", "nothing is left to redraw alone")
    assert page.settings(page.drawn())["strength"] == 0.75  # all of it is redrawn


def test_lines_drawn_from_the_keyboard_are_undone(page):
    from selenium.webdriver.common.keys import Keys

    page.drop("#drop", "grey.png", png_bytes(Image.new("RGB", (64, 64), "grey")))
    page.until("!document.getElementById('canvas-tools').hidden")
    page.find("#mask").send_keys(Keys.SHIFT, Keys.ARROW_LEFT)
    assert page.js(PAINTED)
    page.find("#undo").click()
    assert not page.js(PAINTED)


def test_a_second_finger_draws_nothing(page):
    page.drop("#drop", "grey.png", png_bytes(Image.new("RGB", (64, 64), "grey")))
    page.until("!document.getElementById('canvas-tools').hidden")
    page.js("document.getElementById('mask').scrollIntoView({ block: 'center' })")
    box = page.js("return document.getElementById('mask').getBoundingClientRect().toJSON()")

    def touch(kind, *fingers):
        points = [{"id": id, "x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
                  for id, x, y in fingers]  # fmt: skip
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def painted(x, y):
        return page.js("const mask = document.getElementById('mask');"
                       "const [x, y] = [...arguments].map((share) => share * mask.width);"
                       "return mask.getContext('2d').getImageData(x, y, 1, 1).data[3] > 0", x, y)  # fmt: skip

    touch("touchStart", (1, 0.2, 0.2))
    touch("touchStart", (1, 0.2, 0.2), (2, 0.8, 0.8))
    touch("touchMove", (1, 0.2, 0.4), (2, 0.8, 0.6))
    touch("touchEnd", (2, 0.8, 0.6))
    touch("touchMove", (1, 0.2, 0.8))
    touch("touchEnd")
    assert painted(0.2, 0.2) and painted(0.2, 0.4) and painted(0.2, 0.8)
    assert not any(painted(*place) for place in ((0.8, 0.8), (0.8, 0.6), (0.5, 0.5)))


def test_an_error_stands_beside_its_field(page):
    page.set("width", 60)
    page.draw()
    page.until("document.querySelector('[data-field=size] .error')")
    assert "multiples of 8" in page.find("[data-field=size] .error").text
    assert page.find("#width").get_attribute("aria-describedby") == "error-size"
    assert page.driver.switch_to.active_element.get_attribute("id") == "width"
    page.set("width", 64)
    assert not page.all("[data-field] .error")
    page.set("rescale", 7)
    page.draw()
    page.until("document.querySelector('[data-field=rescale] .error')")
    assert page.js("return document.getElementById('more-section').open")


def test_every_field_has_its_place_for_errors(page):
    placed = set(page.js("return [...document.querySelectorAll('[data-field]')].map((one) => one.dataset.field)"))
    fields = JobRequest.model_fields.keys() - {"settled"}  # which no reader writes
    assert fields - placed == ELSEWHERE and placed <= fields
    page.drop("#drop", "grey.png", png_bytes(Image.new("RGB", (64, 64), "grey")))
    page.until("!document.getElementById('canvas-tools').hidden")
    page.find("#mask").send_keys(" ")
    page.set("mask_grow", -256)  # nothing is left of it
    page.draw()
    page.until("document.querySelector('[data-field=mask] .error')")
    assert "the mask is dark everywhere" in page.find("[data-field=mask] .error").text


def test_an_x_y_grid(page):
    page.js("document.getElementById('grid-section').open = true")
    page.set("prompt", "compared")
    page.set("x-name", "guidance")
    page.set("x-values", "1, 4")
    page.set("y-name", "sampler")
    page.set("y-values", "euler, ddim, wrong")
    page.draw()
    page.until("document.querySelector('[data-field=grid] .error')")
    assert "unknown sampler 'wrong'" in page.find("[data-field=grid] .error").text
    assert not page.all("[data-field=sampler] .error")
    page.set("y-values", "euler, DPM++ 2M")  # by our name, or by the one that the page shows
    job = page.drawn()
    assert job["count"] == 5 and job["done"] == 5
    samplers = [page.server.get(f"/api/images/{id}").json()["settings"].get("sampler") for id in job["images"]]
    assert samplers == ["euler", "euler", "dpmpp_2m", "dpmpp_2m", None]
    page.until("document.querySelector('.tile.sheet img')?.naturalWidth")
    style = "return getComputedStyle(document.querySelector('.tile.sheet img')).objectFit"
    assert page.js(style) == "contain"  # all of it is seen
    page.all(".card .whole")[4].click()
    shown = page.find("#viewer-settings").text
    assert "guidance 1, 4 × sampler Euler, DPM++ 2M" in shown and "Sampler" not in shown
    page.use()
    axes = [page.value(f"{side}-{part}") for side in "xy" for part in ("name", "values")]
    assert axes == ["guidance", "1, 4", "sampler", "Euler, DPM++ 2M"]
    again = page.drawn()
    for one, other in zip(job["images"][:4], again["images"], strict=False):
        assert page.server.picture(one).tobytes() == page.server.picture(other).tobytes()


def test_sizes_show_all_their_digits(page):
    for width in (360, 800, 1280):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            for id in ("width", "height"):
                page.set(id, 1024)
                assert page.js(ROOM, id) >= 0
        finally:
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_what_else_a_picture_is_drawn_with(page):
    page.js("document.getElementById('more-section').open = true")
    page.find("#tiling").click()
    page.set("like", "a1111")
    page.set("noise", "cpu")
    page.set("prompt", "seamless")
    job = page.drawn()
    settings = page.settings(job)
    assert (settings["tiling"], settings["like"], settings["noise"]) == (True, "a1111", "cpu")
    page.find("#tiling").click()
    page.set("like", "")
    page.find(".card .whole").click()
    page.use()
    assert page.js("return document.getElementById('tiling').checked") and page.value("like") == "a1111"
    page.load()
    assert page.js("return document.getElementById('tiling').checked") and page.value("noise") == "cpu"
    assert not page.find("[data-field=image_guidance]").is_displayed()  # this model edits none


def test_loras_are_added_and_come_back_with_their_picture(page):
    page.find("#lora-section summary").click()
    for _ in range(2):
        page.find("#add-lora").click()
    page.js("const [name, strength] = document.querySelectorAll('.lora select, .lora input');"
            "name.value = 'paper'; strength.value = 0.7")  # fmt: skip
    page.all(".lora button")[1].click()
    page.set("prompt", "a folded boat")
    page.set("seed", 5)
    job = page.drawn()
    told = page.server.get(f"/api/images/{job['images'][0]}").json()
    assert told["loras"] == [{"name": "paper", "strength": 0.7}]
    assert "<lora:paper:0.7>" in told["parameters"]
    page.find(".lora button").click()
    assert not page.all(".lora")
    page.find(".card .whole").click()
    assert "paper 0.7" in page.find("#viewer-settings").text
    page.use()
    values = "return [...document.querySelectorAll('.lora select, .lora input')].map((one) => one.value)"
    assert page.js(values) == ["paper", "0.7", ""]
    page.js("document.querySelectorAll('.lora input')[1].value = 0.2")
    told = page.server.get(f"/api/images/{page.drawn()['images'][0]}").json()
    assert told["loras"] == [{"name": "paper", "strength": 0.7, "text_strength": 0.2}]
    page.find(".card .whole").click()
    assert "paper 0.7 0.2" in page.find("#viewer-settings").text
    page.use()
    assert page.js(values) == ["paper", "0.7", "0.2"]
    page.js("for (const one of document.querySelectorAll('.lora input')) {"
            "one.value = ''; one.dispatchEvent(new Event('input', { bubbles: true })); }")  # fmt: skip
    told = page.server.get(f"/api/images/{page.drawn()['images'][0]}").json()
    assert told["loras"] == [{"name": "paper", "strength": 1}]
    page.load()
    assert page.js(values) == ["paper", "", ""]


def test_files_that_cannot_be_used_are_listed(page, tmp_path, monkeypatch):
    (tmp_path / "styles.csv").write_text("what,ever\n")
    models = page.server.service.models
    monkeypatch.setattr(models, "templates", PromptTemplates(styles=tmp_path / "styles.csv"))
    monkeypatch.setattr(models.upscalers, "known", dict)
    monkeypatch.setattr(models.upscalers, "unusable", {"odd": "it is not an upscaler"})
    page.load()
    text = "return document.getElementById(`unusable-${arguments[0]}`).textContent"
    assert page.js(text, "upscalers") == "odd: it is not an upscaler"
    assert "styles.csv: styles.csv is not a styles file" in page.js(text, "styles")
    assert page.find("#unusable-styles").is_displayed()


def test_an_embedding_is_written_into_the_prompt_and_shown_with_its_picture(page):
    page.find("#embedding-section summary").click()
    assert [button.text for button in page.all("#embeddings button")] == ["<b>cat</b>", "fluffy-one"]  # as text
    page.set("prompt", "a boat")
    page.all("#embeddings button")[1].click()
    assert page.value("prompt") == "a boat fluffy-one"
    job = page.drawn()
    assert page.settings(job)["embeddings"] == ["fluffy-one"]
    page.find(".card .whole").click()
    assert "fluffy-one" in page.find("#viewer-settings").text
    page.use()
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == page.server.picture(job["images"][0]).tobytes()


def test_a_refiner_is_chosen_and_comes_back_with_its_picture(page):
    page.js("document.getElementById('more-section').open = true")
    page.set("handover", 0.5)  # of no effect by itself
    assert page.settings(page.drawn())["refiner"] is None
    page.set("refiner", "other")
    page.set("handover", 7)
    page.draw()
    page.until("document.querySelector('[data-field=handover] .error')")
    page.set("handover", 0.5)
    settings = page.settings(page.drawn())
    assert (settings["refiner"], settings["handover"]) == ("other", 0.5)
    page.set("model", "other")
    assert page.value("refiner") == ""
    assert page.js("return document.getElementById('refiner').options[1].value") == "tiny"
    page.find(".card .whole").click()
    assert "Refiner" in page.find("#viewer-settings").text
    page.use()
    assert (page.value("model"), page.value("refiner"), page.value("handover")) == ("tiny", "other", "0.5")


def test_a_picture_is_continued_past_its_edges(page):
    image = noise_picture(64, 64)
    page.set("outpaint-left", 8)  # of no effect without a picture
    assert page.settings(page.drawn())["size"] == [64, 64]
    page.drop("#drop", "noise.png", png_bytes(image))
    page.until("!document.getElementById('canvas-tools').hidden")
    for side, pixels in (("left", 8), ("top", 0), ("right", 24), ("bottom", 16)):
        page.set(f"outpaint-{side}", pixels)
    page.set("prompt", "further")
    job = page.drawn()
    picture, settings = page.server.picture(job["images"][0]), page.settings(job)
    assert picture.size == (96, 80) and settings["outpaint"] == [8, 0, 24, 16]
    assert picture.crop((8, 0, 72, 64)).tobytes() == image.tobytes()
    page.find(".card .whole").click()
    page.use()
    sides = [page.value(f"outpaint-{side}") for side in ("left", "top", "right", "bottom")]
    assert (sides, page.value("width"), page.value("height")) == (["8", "0", "24", "16"], "64", "64")
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == picture.tobytes()
    page.load()
    assert (page.value("outpaint-right"), page.value("width")) == ("24", "64")
    page.drop("#drop", "noise.png", png_bytes(image))
    page.until("!document.getElementById('canvas-tools').hidden")
    page.set("outpaint-left", -8)
    page.draw()
    page.until("document.querySelector('[data-field=outpaint] .error')")


def test_light_dark_and_a_phone(page):
    page.find("#theme").click()
    first = page.js("return getComputedStyle(document.body).backgroundColor")
    page.find("#theme").click()
    assert page.js("return getComputedStyle(document.body).backgroundColor") != first
    for width in (360, 800, 1280):
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        try:
            assert page.js("return document.documentElement.scrollWidth <= innerWidth")  # nothing to scroll sideways
            assert page.find("#generate").is_displayed()
        finally:
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_has_a_name_for_screen_readers(page):
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = (
        "button",
        "textbox",
        "combobox",
        "slider",
        "spinbutton",
        "searchbox",
        "img",
        "image",
        "link",
        "application",
    )
    nameless = [node for node in tree if node.get("role", {}).get("value") in roles and not node.get("ignored")
                and not node.get("name", {}).get("value")]  # fmt: skip
    assert nameless == []
    page.find("h1").click()
    assert page.find(".skip").get_attribute("href").endswith("#results")


def test_the_api_page_lists_and_tries_routes(page):
    page.driver.get(page.server.url + "/docs")
    page.until("document.querySelectorAll('.route').length > 20")
    page.js(
        "[...document.querySelectorAll('.route')]"
        ".find((one) => one.querySelector('code').textContent === '/api/models').open = true"
    )
    page.js("document.querySelector('.route[open] button').click()")
    page.until("document.querySelector('.route[open] pre').textContent.includes('\"default\": \"tiny\"')")


PASTE = """
const [target, content, text] = arguments;
const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
if (text) transfer.setData("text/plain", text);
target.focus();
target.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData: transfer }));
"""


def test_text_that_is_pasted_with_a_picture_of_it_is_text(page):
    picture = base64_of(noise_picture(64, 64))
    page.js(PASTE, page.find("#prompt"), picture, "a boat")
    page.driver.execute_async_script("setTimeout(arguments[0], 300)")
    assert not page.find("#canvas-tools").is_displayed()
    page.js(PASTE, page.find("#prompt"), picture)
    page.until("!document.getElementById('canvas-tools').hidden")
    page.js("document.getElementById('remove')?.click()")


def test_text_that_is_dragged_into_the_prompt_is_dropped_there(page):
    box = page.find("#prompt").rect
    place = {"x": box["x"] + 20, "y": box["y"] + 10}
    text = {"items": [{"mimeType": "text/plain", "data": "a boat"}], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **place, "data": text})
    page.until("document.getElementById('prompt').value === 'a boat'")


BLOCKED = """
Object.defineProperty(window, "localStorage", { get() { throw new DOMException("blocked", "SecurityError"); } });
"""


def test_the_page_works_where_the_browser_keeps_nothing(page):
    script = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": BLOCKED})
    try:
        page.load()
        page.set("prompt", "a boat")
        page.set("steps", 1)
        page.drawn()
        page.find("#theme").click()
        assert page.js("return document.documentElement.dataset.theme") in ("dark", "light")
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_a_picture_that_is_gone_is_said(page):
    page.server.drawn(prompt="gone", steps=1)
    page.load()
    page.find(".tile").click()
    gone = '{"error": {"message": "the file of a picture is gone"}}'
    page.js("window.fetch = async () => new Response(arguments[0], { status: 404 })", gone)
    page.find("#use-picture").click()
    page.until("document.getElementById('toast').textContent.includes('the file of a picture is gone')", 9)
    assert not page.find("#canvas-tools").is_displayed()


def test_a_token_is_asked_for_once(chromium, tmp_path, server):  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    token = "a-token-for-the-page"
    folder = Path(server.service.models.known["tiny"].source)
    with served(open_service([str(folder)], tmp_path / "data"), token) as guarded:
        chromium.get(guarded.url)
        page = Page.__new__(Page)
        page.driver, page.server = chromium, guarded
        page.until("document.getElementById('login').open")
        for _ in range(3):  # it stays, whatever is pressed
            chromium.switch_to.active_element.send_keys(Keys.ESCAPE)
            page.until("document.getElementById('login').open", 9)
        page.find("#token").send_keys("wrong-token-here")
        page.find("#login-form button").click()
        page.until("document.getElementById('login-error').textContent.includes('wrong')")
        page.find("#token").clear()
        page.find("#token").send_keys(token)
        page.find("#login-form button").click()
        page.until("document.documentElement.dataset.ready === 'yes'")
        assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
        page.load()  # the cookie is kept
        assert page.find("#user").text == ""
    (tmp_path / "tokens").write_text(f"anna {token}\n")
    with served(open_service([str(folder)], tmp_path / "hers"), tokens=tmp_path / "tokens") as named:
        page.server = named
        chromium.get(f"{named.url}/?token={token}")
        page.until("document.documentElement.dataset.ready === 'yes'")
        assert page.find("#user").text == "anna"
    chromium.get_log("browser"), chromium.get_log("performance")
