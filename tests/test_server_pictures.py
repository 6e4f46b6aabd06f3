"""The page with the embedded model, photographed: the pictures of docs/serving.md are what this makes.

    PLAINSD_PICTURES=docs .venv/bin/python -m pytest tests/test_server_pictures.py

makes them again. Without the variable it only sees that they can be made.
"""

import base64
import os
from io import BytesIO
from pathlib import Path

import pytest
from browser import Page, chromium, needed  # noqa: F401
from PIL import Image
from serving import Brake, open_service, served

pytestmark = [needed, pytest.mark.full]
PROMPT = "an owl on a green background"
LARGEST = 300_000  # bytes of a file


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(open_service([None], tmp_path_factory.mktemp("data"))) as server:
        ideas = server.get("/api/models").json()["models"][0]["ideas"]
        jobs = [server.job(prompt=prompt, seed=seed)["id"] for seed, prompt in enumerate(ideas[3:108:7])]
        for job in jobs:
            assert server.wait(job, 600)["state"] == "done"
        yield server


@pytest.fixture
def page(chromium, server):  # noqa: F811
    yield Page(chromium, server)
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def size(page, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def photographed(page, name, tmp_path):
    """In a palette that makes a small file, into the folder that the environment names."""
    page.js("scrollTo(0, 0)")
    page.until("[...document.images].every((image) => image.hidden || !image.src || image.complete)")
    shot = base64.b64decode(page.driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    path = Path(os.environ.get("PLAINSD_PICTURES", tmp_path)) / f"serving-{name}.png"
    with Image.open(BytesIO(shot)) as image:
        image = image.convert("RGB")
        for colours in (256, 128, 64):
            palette = image.quantize(colours)
            image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
            if path.stat().st_size < LARGEST:
                return
    pytest.fail(f"{path} is large with {colours} colours")


def test_while_it_draws(page, monkeypatch, tmp_path):
    size(page, 1280, 880)
    assert page.find("#width").get_attribute("step") == "16"  # pixels a latent of this model
    brake = Brake(monkeypatch)
    page.set("prompt", PROMPT)
    page.set("count", 4)
    page.set("seed", 7)
    page.draw()
    brake.step(13)
    page.until("document.querySelector('.card .status').textContent.startsWith('Step 13 of')")
    page.until("document.querySelectorAll('.card .rough').length === 4")
    photographed(page, "drawing", tmp_path)
    brake.off()
    page.until("document.querySelector('.card.over')", 600)


def test_the_brush_in_the_dark(page, tmp_path):
    from selenium.webdriver import ActionChains

    size(page, 1280, 880)
    page.js("document.documentElement.dataset.theme = 'dark'")
    newest = page.server.get("/api/images", params={"search": PROMPT}).json()["images"][0]["id"]
    page.find(f".tile[data-id='{newest}']").click()
    page.find("#use-picture").click()
    page.until("!document.getElementById('canvas-tools').hidden")
    page.set("prompt", "an owl with a blue hat on a green background")
    mask = page.find("#mask")
    page.js("document.getElementById('form').scrollTop = 0")
    side = mask.size["width"]
    for row in range(-4, 0):
        stroke = ActionChains(page.driver).move_to_element_with_offset(mask, -side // 5, row * side // 12)
        stroke.click_and_hold().move_by_offset(side * 2 // 5, 0).release().perform()
    photographed(page, "brush", tmp_path)


def test_on_a_phone(page, tmp_path):
    size(page, 390, 844)
    page.load()
    page.set("search", PROMPT)
    page.until("document.querySelectorAll('.tile').length === 4")
    page.find(".tile").click()
    page.until("document.getElementById('viewer-image').complete")
    photographed(page, "phone", tmp_path)
