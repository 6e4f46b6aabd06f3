"""Control nets on the page: a net is chosen, a map put in and seen, and all of it comes back."""

import base64
from io import BytesIO

import browser
import pytest
from browser import chromium, needed  # noqa: F401
from conftest import noise_picture, tiny_sd
from PIL import Image
from safetensors.torch import save_file
from serving import model_folder, open_service, png_bytes, served
from test_control_pictures import picture_of, tiny_net
from test_image_prompt import in_a_file, tiny_adapter, tower_of_transformers

import plainsd

pytestmark = needed
page = browser.page
MAP = png_bytes(picture_of(0))
CENTRE = """
const image = document.querySelector(arguments[0]), canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
canvas.getContext("2d").drawImage(image, 0, 0);
return canvas.toDataURL("image/png").split(",")[1];
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    nets, sd = folder / "nets", tiny_sd()
    nets.mkdir()
    plainsd.save_control(tiny_net(sd), nets / "edges.safetensors")
    plainsd.save_control(tiny_net(sd, 1, kinds=3), nets / "many.safetensors")
    adapter = in_a_file(tiny_adapter(sd.unet))
    save_file(adapter, nets / "looks.safetensors")
    tower_of_transformers().save_pretrained(nets / "image_encoder")
    plainsd.save_control(tiny_net(tiny_sd(channels=(32, 32))), nets / "narrow.safetensors")
    (nets / "broken.safetensors").write_bytes(b"no such thing")
    with served(open_service([model_folder(folder)], tmp_path_factory.mktemp("data"), controls=nets)) as server:
        yield server


def field(page, label, unit=0):
    """Of a unit, by its label."""
    return page.js(
        "const unit = document.querySelectorAll('.unit')[arguments[1]];"
        "return [...unit.querySelectorAll('label')].find((one) => one.textContent.startsWith(arguments[0]))"
        ".querySelector('input, select')",
        label, unit)  # fmt: skip


def put(page, label, value, unit=0):
    page.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change', { bubbles: true }))",
            field(page, label, unit), str(value))  # fmt: skip


def add(page, map=MAP, unit=0):
    page.js("document.getElementById('control-section').open = true")
    page.js("document.getElementById('add-control').click()")  # on a phone it may be under the Generate button
    if map:
        page.drop(f".unit[data-entry='{unit}'] .drop", "map.png", map)
        page.until(f"document.querySelector('.unit[data-entry=\"{unit}\"] .map').naturalWidth")
    page.saved()


def controls_of(page, job):
    return page.server.get(f"/api/images/{job['images'][0]}").json()["controls"]


def image_in(page, css):
    return Image.open(BytesIO(base64.b64decode(page.js(CENTRE, css)))).convert("RGB")


def test_a_job_follows_a_map_that_was_dropped(page):
    page.js("document.getElementById('control-section').open = true")
    assert "broken: " in page.find("#unusable-controls").text
    add(page)
    options = page.js("return [...arguments[0].options].map((one) => one.textContent)", field(page, "Net"))
    assert options == ["edges", "many"]  # those that fit the model
    assert image_in(page, ".unit .map").tobytes() == picture_of(0).tobytes()
    assert not page.find(".unit .under").is_displayed()
    for label, value in (("Strength", 0.8), ("From", 0.1), ("to", 0.7)):
        put(page, label, value)
    page.js("arguments[0].click()", field(page, "Guess"))
    page.set("prompt", "along the edges")
    page.set("seed", 3)
    job = page.drawn()
    expected = {"name": "edges", "strength": 0.8, "start": 0.1, "end": 0.7, "guess": True, "mode": "balanced",
                "preprocess": "none", "kind": []}  # fmt: skip
    assert controls_of(page, job) == [expected]
    plain = page.server.drawn(prompt="along the edges", seed=3)
    assert page.server.picture(plain["images"][0]).tobytes() != page.server.picture(job["images"][0]).tobytes()

    page.load()  # the unit is kept with its map
    page.until("document.querySelector('.unit .map')?.naturalWidth")
    assert field(page, "Strength").get_attribute("value") == "0.8"
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == page.server.picture(job["images"][0]).tobytes()
    page.js("[...document.querySelectorAll('.unit button')].at(-1).click()")
    assert not page.all(".unit") and page.driver.switch_to.active_element.get_attribute("id") == "add-control"
    page.saved()
    page.load()
    assert not page.all(".unit")
    page.find(".tile[title='along the edges']").click()
    assert "edges 0.8" in page.find("#viewer-settings").text


def test_several_units_come_back_with_their_picture(page):
    add(page)
    add(page, png_bytes(picture_of(1)), 1)
    put(page, "Net", "many", 1)
    assert field(page, "Kind of map", 1).is_displayed() and not field(page, "Kind of map", 0).is_displayed()
    put(page, "Kind of map", 2, 1)
    put(page, "Control mode", "control", 1)
    page.set("prompt", "two maps")
    page.set("seed", 4)
    job = page.drawn()
    told = controls_of(page, job)
    assert (
        [one["name"] for one in told] == ["edges", "many"] and told[1]["kind"] == [2] and told[1]["mode"] == "control"
    )
    page.js("document.querySelector('.unit').querySelectorAll('button')[1].click()")
    assert page.find(".unit legend").text == "Control 1"
    page.saved()
    page.load()
    page.find(".tile").click()
    page.until("!document.getElementById('show-map').hidden")
    assert not page.find("#viewer-map").is_displayed()
    page.find("#show-map").click()  # over the finished picture
    assert page.find("#viewer-map").is_displayed()
    assert [page.find("#viewer-map").rect[side] for side in ("x", "y", "width")] == [
        page.find("#viewer-image").rect[side] for side in ("x", "y", "width")]  # fmt: skip
    page.use()
    page.until("document.querySelectorAll('.unit .map[src]').length === 2")
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == page.server.picture(job["images"][0]).tobytes()
    put(page, "Kind of map", "", 1)  # not the first
    page.draw()
    page.until("document.querySelectorAll('.unit')[1].querySelector('.error')")
    assert "kind" in page.all(".unit")[1].find_element("css selector", ".error").text


def test_a_picture_of_another_browser_comes_back_without_its_maps(page):
    unit = {"name": "edges", "image": base64.b64encode(MAP).decode(), "strength": 0.6}
    (id,) = page.server.drawn(prompt="elsewhere", steps=1, controls=[unit])["images"]
    page.load()
    page.find(".tile").click()
    page.use()
    page.until("document.getElementById('toast').textContent.includes('control maps are not in this browser')")
    assert field(page, "Strength").get_attribute("value") == "0.6"
    page.js("document.querySelector('.unit').remove()")
    page.drop("#gallery", "made.png", page.server.get(f"/api/images/{id}.png").content)  # and its file likewise
    page.until("document.getElementById('toast').textContent.includes('control maps are not in the file')")
    assert field(page, "Strength").get_attribute("value") == "0.6"
    page.draw()
    page.until("document.querySelector('.unit .error')")


def test_a_preprocessor_shows_its_map_over_the_picture(page):
    pytest.importorskip("cv2")
    page.drop("#start", "start.png", png_bytes(noise_picture(64, 64)))
    page.until("!document.getElementById('canvas-tools').hidden")
    add(page)
    assert page.find(".unit .under").is_displayed()
    before = page.js("return document.querySelector('.unit .map').src")
    assert not field(page, "Edges from").is_displayed()
    put(page, "Preprocessor", "canny")
    page.until(
        f"document.querySelector('.unit .map').naturalWidth && document.querySelector('.unit .map').src !== '{before}'"
    )
    assert field(page, "Edges from").is_displayed()
    body = {"image": base64.b64encode(MAP).decode(), "preprocess": "canny"}
    expected = Image.open(BytesIO(page.server.post("/api/preprocess", body).content)).convert("RGB")
    assert image_in(page, ".unit .map").tobytes() == expected.tobytes()
    put(page, "Map over the picture", 100)
    page.js("const range = arguments[0]; range.value = 30; range.dispatchEvent(new Event('input', { bubbles: true }))",
            field(page, "Map over the picture"))  # fmt: skip
    assert page.js("return getComputedStyle(document.querySelector('.unit .map')).opacity") == "0.3"
    put(page, "Edges from", 300)
    page.until("document.querySelector('.unit .error')?.textContent.includes('the lower one first')")
    put(page, "Edges from", 50)
    page.until("!document.querySelector('.unit .error')")
    page.set("strength", 0.9)
    (told,) = controls_of(page, page.drawn())
    assert told["preprocess"] == "canny"
    page.find("#remove").click()
    assert not page.find(".unit .under").is_displayed()


def test_an_error_stands_in_its_unit(page):
    add(page)
    add(page, unit=1)
    put(page, "From", 0.9, 1)
    put(page, "to", 0.2, 1)
    page.draw()
    page.until("document.querySelector('.unit[data-entry=\"1\"] .error')")
    assert "act from 0.9 to 0.2" in page.find(".unit[data-entry='1'] .error").text
    assert len(page.all("#form .error:not(:empty)")) == 1
    put(page, "to", 1, 1)
    page.drop(".unit[data-entry='1']", "no.png", b"no picture")  # its type says that it is one
    page.until("document.querySelector('.unit[data-entry=\"1\"] .error')?.textContent.includes('cannot be read')")


def test_a_picture_of_the_gallery_becomes_a_map(page):
    page.server.drawn(prompt="a source", steps=1)
    page.load()
    page.find(".tile").click()
    page.find("#use-map").click()
    page.until("document.querySelector('.unit')")
    expected = "canny" if "canny" in page.server.get("/api/info").json()["preprocessors"] else "none"
    assert field(page, "Preprocessor").get_attribute("value") == expected


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_units_fit_any_width_and_have_names(page, width):
    page.size(width)
    add(page)
    page.js("document.getElementById('add-image-prompt').click(); document.querySelector('.masked').open = true")
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    form = page.find("#form").rect
    for input in page.all(".unit input, .unit select, .unit button, .unit img"):
        if input.is_displayed() and input.get_attribute("type") != "file":
            assert form["x"] <= input.rect["x"] and input.rect["x"] + input.rect["width"] <= form["x"] + form["width"]
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "combobox", "slider", "spinbutton", "checkbox", "image", "toolbar")
    nameless = [node for node in tree if node.get("role", {}).get("value") in roles and not node.get("ignored")
                and not node.get("name", {}).get("value")]  # fmt: skip
    assert nameless == []
    assert [legend.text for legend in page.all(".unit legend")] == ["Control 1", "Image prompt 1"]
