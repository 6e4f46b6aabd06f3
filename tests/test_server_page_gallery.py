"""Several pictures of the page's gallery at once, by mouse and keyboard: favourites, deletion with undo, a zip."""

import zipfile
from io import BytesIO

import browser
import pytest
from browser import chromium, needed  # noqa: F401
from serving import model_folder, open_service, served

pytestmark = needed
page = browser.page
COUNT = 7


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    service = open_service([model_folder(tmp_path_factory.mktemp("models"))], tmp_path_factory.mktemp("data"))
    with served(service) as server:
        yield server


@pytest.fixture
def ids(server, page):
    """Of the gallery's pictures, as it shows them: newest first."""
    old = [one["id"] for one in server.get("/api/images").json()["images"]]
    if old:
        server.post("/api/images/delete", {"ids": old})
    made = server.drawn(prompt="one of several", steps=1, count=COUNT)["images"]
    page.load()
    return made[::-1]


def shown(page):
    return page.js("return [...document.querySelectorAll('.cell')].map((cell) => cell.dataset.id)")


def chosen(page):
    checked = page.js(
        "return [...document.querySelectorAll('.pick:checked')].map((one) => one.parentElement.dataset.id)"
    )
    assert page.js("return [...document.querySelectorAll('.cell.chosen')].map((one) => one.dataset.id)") == checked
    return checked


def click(page, id, *keys):
    from selenium.webdriver import ActionChains

    actions = ActionChains(page.driver)
    for key in keys:
        actions.key_down(key)
    actions.click(page.find(f".cell[data-id='{id}'] .tile"))
    for key in keys:
        actions.key_up(key)
    actions.perform()


def focused(page):
    return page.js("return document.activeElement.closest('.cell')?.dataset.id")


def favourites(server):
    return {one["id"] for one in server.get("/api/images", params={"favourites": True}).json()["images"]}


def test_clicks_choose_pictures(page, ids):
    from selenium.webdriver.common.keys import Keys

    assert shown(page) == ids and not page.find("#selection").is_displayed()
    click(page, ids[1], Keys.CONTROL)
    assert chosen(page) == [ids[1]] and page.find("#selected-count").text == "1 selected"
    click(page, ids[4], Keys.SHIFT)
    assert chosen(page) == ids[1:5]
    click(page, ids[2])  # now plain clicks choose, too
    assert chosen(page) == [ids[1], ids[3], ids[4]] and not page.js("return document.getElementById('viewer').open")
    page.find("#select-none").click()
    assert chosen(page) == [] and not page.find("#selection").is_displayed()
    page.find("#select").click()  # as on a phone
    click(page, ids[5])
    assert chosen(page) == [ids[5]]
    page.find("#select-all").click()
    assert chosen(page) == ids
    page.find("#select").click()
    click(page, ids[0])
    page.until("document.getElementById('viewer').open")


def test_the_gallery_works_from_the_keyboard(page, ids):
    from selenium.webdriver.common.keys import Keys

    tabs = page.js("return [...document.querySelectorAll('.cell *')].filter((one) => one.tabIndex === 0).length")
    assert tabs == 1  # one stop, not one for each picture
    page.find(".tile").send_keys(Keys.ARROW_RIGHT)
    assert focused(page) == ids[1]
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert chosen(page) == [ids[1]] and not page.js("return document.getElementById('viewer').open")
    page.driver.switch_to.active_element.send_keys(Keys.SHIFT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert chosen(page) == ids[1:4] and focused(page) == ids[3]
    assert page.find("#live").get_attribute("textContent") == "3 selected"
    page.driver.switch_to.active_element.send_keys("f")
    page.until("document.querySelectorAll('.cell.favourite').length === 3")
    assert favourites(page.server) == set(ids[1:4]) and focused(page) == ids[3]
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert chosen(page) == []
    page.driver.switch_to.active_element.send_keys(Keys.DELETE)
    page.until("document.querySelectorAll('.cell').length === 6")
    assert shown(page) == [*ids[:3], *ids[4:]]
    page.until(f"document.activeElement.closest('.cell')?.dataset.id === '{ids[4]}'")  # what was next to it
    page.driver.switch_to.active_element.send_keys(Keys.CONTROL, "z")
    page.until("document.querySelectorAll('.cell').length === 7")
    assert shown(page) == ids and page.find(f".cell[data-id='{ids[3]}'] .star").get_attribute("aria-pressed") == "true"
    page.driver.switch_to.active_element.send_keys(Keys.CONTROL, "a")
    assert chosen(page) == ids
    page.driver.switch_to.active_element.send_keys(Keys.HOME)
    assert focused(page) == ids[0]
    below = page.js("const [first, ...all] = document.querySelectorAll('.cell');"
                    "return 1 + all.findIndex((one) => one.offsetTop > first.offsetTop)")  # fmt: skip
    if below:
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        assert focused(page) == ids[below]
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.until("document.getElementById('viewer').open")


def test_favourites_by_their_stars(page, ids):
    for id in ids[2:4]:
        page.js("arguments[0].click()", page.find(f".cell[data-id='{id}'] .star"))
        page.until(f"document.querySelector(\".cell[data-id='{id}'] .star\").ariaPressed === 'true'")
    assert favourites(page.server) == set(ids[2:4])
    page.find("#favourites").click()
    page.until("document.querySelectorAll('.cell').length === 2")
    assert shown(page) == ids[2:4]
    page.find(".tile").click()
    page.until("document.getElementById('viewer-favourite').ariaPressed === 'true'")
    page.find("#viewer-favourite").click()
    page.until("document.getElementById('viewer-favourite').ariaPressed === 'false'")
    assert favourites(page.server) == {ids[3]}
    page.find("#close").click()
    page.find("#favourites").click()
    page.until("document.querySelectorAll('.cell').length === 7")
    page.js("arguments[0].click()", page.find(f".cell[data-id='{ids[3]}'] .star"))
    page.until("!document.querySelector('.cell.favourite')")
    assert favourites(page.server) == set()
    page.find("#favourites").click()
    page.until("!document.querySelector('.cell')")
    assert "No favourites yet" in page.find("#empty").text


def test_a_selection_is_deleted_and_brought_back(page, ids):
    from selenium.webdriver.common.keys import Keys

    for id in ids[1:4]:
        click(page, id, Keys.CONTROL)
    page.find("#selected-delete").click()
    page.until("document.querySelectorAll('.cell').length === 4")
    assert shown(page) == [ids[0], *ids[4:]] and page.server.get(f"/api/images/{ids[1]}").status_code == 404
    assert "3 pictures deleted" in page.find("#toast").text and chosen(page) == []
    page.find("#toast-button").click()
    page.until("document.querySelectorAll('.cell').length === 7")
    assert shown(page) == ids and "They are back" in page.find("#toast").text
    for id in ids[:2]:
        click(page, id, Keys.CONTROL)
    page.find("#selected-delete").click()
    page.until("document.querySelectorAll('.cell').length === 5")
    page.server.service.store.empty_trash()
    page.find("#toast-button").click()
    page.until("document.getElementById('toast').textContent.includes('too late for 2')")


def test_nothing_extends_from_what_is_not_selected_any_more(page, ids):
    from selenium.webdriver.common.keys import Keys

    def there(count):
        page.until(f"document.querySelectorAll('.cell').length === {count}")

    click(page, ids[1], Keys.CONTROL)
    page.find("#select-none").click()
    click(page, ids[4], Keys.SHIFT)
    assert chosen(page) == [ids[4]]
    page.find("#select-none").click()
    click(page, ids[1], Keys.CONTROL)
    for search, count in (("nothing like it", 0), ("", 7)):
        page.set("search", search)
        there(count)
    click(page, ids[4], Keys.SHIFT)
    assert chosen(page) == [ids[4]]
    page.find("#selected-delete").click()
    there(6)
    click(page, ids[5], Keys.SHIFT)
    assert chosen(page) == [ids[5]]


def test_deletions_are_undone_one_after_the_other(page, ids):
    from selenium.webdriver.common.keys import Keys

    def tile(id):
        return page.find(f".cell[data-id='{id}'] .tile")

    held = "new KeyboardEvent('keydown', { key: 'Delete', repeat: true, bubbles: true })"
    page.js(f"arguments[0].dispatchEvent({held})", tile(ids[0]))
    for id in ids[1:3]:
        tile(id).send_keys(Keys.DELETE)
        page.until(f"!document.querySelector(\".cell[data-id='{id}']\")")
    assert shown(page) == [ids[0], *ids[3:]]
    page.server.post("/api/images/delete", {"ids": [ids[3]]})
    tile(ids[3]).send_keys(Keys.DELETE)  # it is gone, and the page does not know it
    page.until("document.querySelectorAll('.cell').length === 4")
    assert "1 picture deleted" in page.find("#toast").text  # of the one before
    for id in ids[2:0:-1]:
        page.driver.switch_to.active_element.send_keys(Keys.CONTROL, "z")
        page.until(f"document.querySelector(\".cell[data-id='{id}']\")")
    assert shown(page) == [*ids[:3], *ids[4:]]


def test_a_selection_is_sent_as_a_zip(page, ids):
    from selenium.webdriver.common.keys import Keys

    page.find("#select").click()
    assert page.find("#selected-zip").get_attribute("href") is None
    for id in (ids[0], ids[3]):
        click(page, id, Keys.CONTROL)
    address = page.find("#selected-zip").get_attribute("href")
    answer = page.server.get(address.removeprefix(page.server.url))
    names = zipfile.ZipFile(BytesIO(answer.content)).namelist()
    assert len(names) == 2 and all(name.endswith(f"{id}.png") for name, id in zip(names, (ids[0], ids[3]), strict=True))


def test_a_phone_shows_the_selection(page, ids):
    page.size(360)
    page.find("#select").click()
    click(page, ids[0])
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    for id in ("selected-favourite", "selected-zip", "selected-delete", "select-none"):
        box = page.find(f"#{id}").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 24
