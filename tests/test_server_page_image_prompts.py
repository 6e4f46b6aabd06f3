"""Image prompts on the page: pictures and masks are put in and seen, and come back with what was drawn."""

import base64

import browser
from browser import chromium, needed  # noqa: F401
from conftest import noise_picture
from PIL import Image
from serving import png_bytes
from test_server_page_control import image_in, put, server  # noqa: F401

pytestmark = needed
page = browser.page


def half() -> bytes:
    """Light on the left."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return png_bytes(mask)


def open_unit(page):
    page.js("document.getElementById('image-prompt-section').open = true")
    page.find("#add-image-prompt").click()


def add_image_prompt(page):
    open_unit(page)
    page.drop(".unit .drop", "photo.png", png_bytes(noise_picture(48, 48)))
    page.until("document.querySelectorAll('.thumbs img').length === 1")


def test_an_image_prompt_comes_back_with_its_picture(page):
    open_unit(page)
    for seed in range(3):
        page.drop(".unit .drop", f"{seed}.png", png_bytes(noise_picture(48, 48, seed)))
        page.until(f"document.querySelectorAll('.thumbs img').length === {seed + 1}")
    page.js("document.querySelectorAll('.thumbs button')[1].click()")
    assert len(page.all(".thumbs img")) == 2
    put(page, "Strength", 0.7)
    put(page, "to", 0.9)
    page.set("prompt", "as these look")
    page.set("seed", 8)
    page.set("steps", 3)
    job = page.drawn()
    images = [base64.b64encode(png_bytes(noise_picture(48, 48, seed))).decode() for seed in (0, 2)]
    unit = {"name": "looks", "images": images, "strength": 0.7, "end": 0.9}
    same = page.server.drawn(prompt="as these look", seed=8, steps=3, image_prompts=[unit])
    picture = page.server.picture(job["images"][0]).tobytes()
    assert picture == page.server.picture(same["images"][0]).tobytes()
    plain = page.server.drawn(prompt="as these look", seed=8, steps=3)
    assert picture != page.server.picture(plain["images"][0]).tobytes()

    page.saved()
    page.load()
    page.until("document.querySelectorAll('.thumbs img').length === 2")
    page.js("[...document.querySelectorAll('.unit button')].at(-1).click()")
    assert not page.all(".unit") and page.driver.switch_to.active_element.get_attribute("id") == "add-image-prompt"
    page.find(f".cell[data-id='{job['images'][0]}'] .tile").click()
    assert "looks 0.7" in page.find("#viewer-settings").text
    page.use()
    page.until("document.querySelectorAll('.thumbs img').length === 2")
    assert page.server.picture(page.drawn()["images"][0]).tobytes() == picture
    page.js("for (const button of document.querySelectorAll('.thumbs button')) button.click()")
    page.js("document.querySelector('.thumbs button')?.click()")
    page.draw()
    page.until("document.querySelector('#image-prompts .unit .error')")


def test_an_image_prompt_acts_under_its_mask(page):
    add_image_prompt(page)
    page.js("document.querySelector('.unit .masked').open = true")
    page.drop(".unit .masked .drop", "mask.png", half())
    page.until("document.querySelector('.masked .thumbs img')?.naturalWidth")
    assert len(page.all(".thumbs img")) == 2
    for name, value in (("prompt", "on the left"), ("seed", 8), ("steps", 3)):
        page.set(name, value)
    job = page.drawn()
    picture = page.server.picture(job["images"][0]).tobytes()
    fields = {"prompt": "on the left", "seed": 8, "steps": 3}
    unit = {"name": "looks", "images": [base64.b64encode(png_bytes(noise_picture(48, 48))).decode()]}
    masked = page.server.drawn(**fields, image_prompts=[unit | {"masks": [base64.b64encode(half()).decode()]}])
    everywhere = page.server.drawn(**fields, image_prompts=[unit])
    assert picture == page.server.picture(masked["images"][0]).tobytes()
    assert picture != page.server.picture(everywhere["images"][0]).tobytes()

    page.saved()
    page.load()  # the mask is kept with the pictures
    page.until("document.querySelector('.masked .thumbs img')?.naturalWidth")
    page.js("[...document.querySelectorAll('.unit button')].at(-1).click()")
    page.find(f".cell[data-id='{job['images'][0]}'] .tile").click()
    page.use()
    page.until("document.querySelector('.masked .thumbs img')?.naturalWidth")
    assert page.js("return document.querySelector('.masked').open")
    assert page.server.picture(page.drawn()["images"][0]).tobytes() == picture
    page.drop(".unit .masked", "mask.png", half())
    page.until("document.querySelectorAll('.masked .thumbs img').length === 2")
    page.draw()
    page.until("document.querySelector('#image-prompts .unit .error')?.textContent.includes('2 masks and 1 pictures')")
    page.js("document.querySelector('.masked .thumbs button').click()")
    page.js("document.querySelector('.masked .thumbs button').click()")
    assert not page.all(".masked .thumbs img") and len(page.all(".thumbs img")) == 1
    again = page.drawn()
    assert page.server.picture(again["images"][0]).tobytes() == page.server.picture(everywhere["images"][0]).tobytes()


def test_what_is_painted_over_the_start_picture_is_a_mask(page):
    add_image_prompt(page)
    page.js("document.querySelector('.unit .masked').open = true")
    use = [one for one in page.all(".masked button") if one.get_attribute("textContent") == "Use the painted mask"][0]
    assert not use.is_displayed()
    page.drop("#start", "start.png", png_bytes(noise_picture(64, 64)))
    page.until("!document.getElementById('canvas-tools').hidden")
    assert use.is_displayed()
    page.js("arguments[0].click()", use)
    page.until("document.getElementById('toast').textContent.includes('Nothing is painted')")
    assert not page.all(".masked .thumbs img")
    page.find("#mask").send_keys(" ")  # in the middle
    page.js("arguments[0].click()", use)
    page.until("document.querySelector('.masked .thumbs img')?.naturalWidth")
    mask = image_in(page, ".masked .thumbs img")
    width, height = mask.size
    assert mask.getpixel((width // 2, height // 2)) == (255, 255, 255) and mask.getpixel((0, 0)) == (0, 0, 0)
    assert {colour for _, colour in mask.getcolors()} == {(0, 0, 0), (255, 255, 255)}
    page.find("#remove").click()
    assert not use.is_displayed()
