"""Jobs on the page: however many there are, one stream tells of all, and what is open stays open when they end."""

import json

import browser
import pytest
from browser import chromium, needed  # noqa: F401
from serving import Brake, model_folder, open_service, served, until

page = browser.page
HIDE = """
Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
document.dispatchEvent(new Event("visibilitychange"));
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    service = open_service([model_folder(tmp_path_factory.mktemp("models"))], tmp_path_factory.mktemp("data"))
    with served(service) as server:
        yield server


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def active(server):
    return [job["id"] for job in server.get("/api/jobs?limit=0").json()["active"]]


def listeners(server):
    return sum(len(job.notifier.waiting) for job in [*server.service.queue.jobs.values()])


# --- the API ---------------------------------------------------------------------------------------------------------


def test_one_stream_tells_of_several_jobs_until_the_last_has_ended(server, brake):
    ids = [server.job(prompt=prompt, steps=2)["id"] for prompt in "abc"]
    told = {id: [] for id in ids}
    with server.get("/api/events", params={"id": [*ids, ids[0]]}, stream=True) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = None
        for line in stream.iter_lines(decode_unicode=True):
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                told[data["id"]].append(name)
                if all(told.values()):
                    brake.off()
    for id in ids:
        assert told[id][0] == "progress" and told[id][-1] == "end" and told[id].count("end") == 1
    late = server.get("/api/events", params={"id": ids[:2]}).text
    assert late.count("event: end") == 2 and "progress" not in late.replace('"progress"', "")


def test_a_stream_of_several_jobs_ends_with_its_listener(server, brake):
    ids = [server.job(prompt=prompt, steps=2)["id"] for prompt in "ab"]
    with server.get("/api/events", params={"id": ids}, stream=True):
        until(lambda: listeners(server) == 2)
    until(lambda: listeners(server) == 0)


def test_a_stream_needs_jobs_that_are_there(server):
    id = server.drawn(prompt="a", steps=1)["id"]
    answer = server.get("/api/events", params={"id": [id, "nobody"]})
    assert answer.status_code == 404 and "there is no job 'nobody'" in answer.json()["error"]["message"]
    assert [server.get("/api/events", params={"id": ids}).status_code for ids in ([], ["a"] * 501)] == [422, 422]


# --- the page --------------------------------------------------------------------------------------------------------


@needed
def test_eight_jobs_at_once(page, brake):
    page.set("prompt", "one of eight")
    for count in range(1, 9):
        page.until("!document.getElementById('generate').disabled", 10)
        page.draw()
        until(lambda count=count: len(active(page.server)) == count, 10)
    page.until("document.querySelectorAll('.card').length === 8", 10)
    before = set(active(page.server))
    page.find(".card .card-foot button").click()  # the newest
    page.until("document.querySelectorAll('.card').length === 7", 10)
    (cancelled,) = before - set(active(page.server))
    assert page.server.get(f"/api/jobs/{cancelled}").json()["state"] == "cancelled"
    page.load()  # all of them are found again
    page.until("document.querySelectorAll('.card progress').length === 7")
    brake.off()
    page.until("!document.querySelector('.card progress')")
    assert len(page.all(".card.over .whole")) == 7


@needed
def test_a_key_that_is_held_draws_once(page, brake):
    def press(repeat, ctrl=True, times=1):
        """Enter in the field of the seed; whether the browser would go on to submit the form."""
        key = f"{{ key: 'Enter', ctrlKey: {str(ctrl).lower()}, repeat: {str(repeat).lower()} }}"
        event = f"new KeyboardEvent('keydown', {{ bubbles: true, cancelable: true, ...{key} }})"
        return page.js(f"return Array.from({{ length: {times} }}, () => seed.dispatchEvent({event}))[0]")

    page.set("prompt", "held")
    press(False, times=2)  # the second before the first is answered
    page.until("document.querySelector('.card') && !document.getElementById('generate').disabled")
    press(True)
    assert press(False, ctrl=False) and not press(True, ctrl=False)
    page.until("!document.getElementById('generate').disabled")
    page.set("prompt", "after it")
    page.draw()
    page.until("document.querySelector('.card-prompt').textContent === 'after it'")
    assert len(active(page.server)) == 2
    brake.off()
    page.until("!document.querySelector('.card progress')")


@needed
def test_a_finished_picture_opens_before_its_job_ends_and_outside_the_search(page, brake):
    page.set("prompt", "one of five")
    page.set("steps", 20)
    page.set("count", 5)
    page.draw()
    brake.step(30)  # four at once, and half of the fifth
    page.until("document.querySelector('.card img.whole')")
    for condition in ("document.querySelector('.card progress')", "!document.querySelector('.tile')"):
        page.until(condition)
        page.find(".card img.whole").click()
        page.until("document.getElementById('viewer').open")
        assert page.find("#viewer-prompt").text == "one of five"
        assert page.find("#newer").get_attribute("disabled") and page.find("#older").get_attribute("disabled")
        page.find("#close").click()
        brake.off()
        page.until("document.querySelector('.card.over')")
        page.set("search", "nothing like it")


@needed
def test_a_page_that_is_not_seen_has_no_stream_and_goes_on(page, brake):
    page.set("prompt", "in the background")
    page.set("steps", 4)
    page.draw()
    brake.wait()
    until(lambda: listeners(page.server) == 1)
    page.js(HIDE, True)
    until(lambda: listeners(page.server) == 0)
    brake.step(2)
    page.until("document.querySelector('.card .status').textContent.startsWith('Step 2 of 4')")
    page.js(HIDE, False)
    until(lambda: listeners(page.server) == 1)
    page.js(HIDE, True)
    brake.off()
    page.until("document.querySelector('.card.over .whole')")
    page.until("document.querySelector('.tile').title === 'in the background'")


@needed
def test_a_job_that_the_server_does_not_know(page):
    page.js(
        "const job = { id: 'nobody', count: 1, images: [], state: 'queued', progress: 0 };"
        "import('/page/jobs.js').then((jobs) => jobs.watch(job));"
    )
    page.until("document.querySelector('.card.over .status').textContent.includes('does not know this job')")
    page.set("prompt", "the next one")
    assert page.drawn()["state"] == "done"
    page.driver.get_log("browser")  # says 404


@needed
def test_the_viewer_keeps_its_picture_when_a_job_ends(page, monkeypatch):
    (seen,) = page.server.drawn(prompt="seen", steps=1)["images"]
    brake = Brake(monkeypatch)
    page.load()
    page.set("prompt", "drawn meanwhile")
    page.draw()
    brake.wait()
    page.find(".tile").click()
    page.until("document.getElementById('viewer').open")
    assert page.find("#newer").get_attribute("disabled")
    brake.off()
    page.until("document.querySelector('.tile')?.title === 'drawn meanwhile'")
    new = page.find(".cell").get_attribute("data-id")
    assert page.find("#viewer-image").get_attribute("src").endswith(f"{seen}.png")
    page.find("#viewer-favourite").click()
    page.until("document.getElementById('viewer-favourite').ariaPressed === 'true'")
    marked = [page.server.get(f"/api/images/{id}").json()["favourite"] for id in (seen, new)]
    assert marked == [True, False] and page.find(f".cell.favourite[data-id='{seen}']")
    page.find("#newer").click()  # there is one now
    assert page.find("#viewer-prompt").text == "drawn meanwhile"
    page.find("#older").click()
    page.find("#delete").click()
    page.until("document.getElementById('toast').textContent.includes('1 picture deleted')")
    assert [page.server.get(f"/api/images/{id}").status_code for id in (seen, new)] == [404, 200]


@needed
def test_a_long_gallery_is_loaded_again_in_pieces(page):
    page.server.drawn(prompt="copied", steps=1)
    columns = "file, width, height, settings, loras, search, created, owner"
    with page.server.service.store.transaction() as db:
        for i in range(220):  # more than come in one answer
            copy = f"INSERT INTO images (id, job, place, {columns}) SELECT ?, ?, 0, {columns} FROM images LIMIT 1"
            db.execute(copy, (f"copy{i}-0", f"copy{i}"))
    page.load()
    while page.find("#more").is_displayed():
        count = len(page.all(".cell"))
        page.js("document.getElementById('more').click()")
        page.until(f"document.querySelectorAll('.cell').length > {count}")
    count = len(page.all(".cell"))
    assert count > 220
    page.set("prompt", "the newest")
    page.set("steps", 1)
    page.drawn()
    page.until("document.querySelector('.tile').title === 'the newest'")
    assert len(page.all(".cell")) == count and page.find("#more").is_displayed()
    with page.server.service.store.transaction() as db:
        db.execute("DELETE FROM images WHERE job LIKE 'copy%'")


@needed
def test_older_pictures_and_a_reload_do_not_cancel_each_other(page):
    page.server.drawn(prompt="old", steps=1, count=60)
    page.load()
    page.server.drawn(prompt="meanwhile", steps=1)
    page.js("document.getElementById('more').click()"
            "; import('/page/gallery.js').then((gallery) => gallery.reload())")  # fmt: skip
    page.until(
        "document.querySelector('.tile').title === 'meanwhile' && document.querySelectorAll('.cell').length >= 60", 9
    )
    ids = [one["id"] for one in page.server.get("/api/images", params={"limit": 200}).json()["images"]]
    shown = page.js("return [...document.querySelectorAll('.cell')].map((cell) => cell.dataset.id)")
    assert shown == ids[: len(shown)]


@needed
def test_the_gallery_stays_as_it_is_when_a_job_ends(page):
    page.server.drawn(prompt="old", steps=1, count=60)
    page.load()
    page.find("#more").click()
    page.until("document.querySelectorAll('.cell').length >= 60")
    count = len(page.all(".cell"))
    page.find("#select").click()
    page.js("for (const cell of [...document.querySelectorAll('.cell')].slice(-5)) cell.querySelector('.tile').click()")
    chosen = "return [...document.querySelectorAll('.cell.chosen')].map((cell) => cell.dataset.id)"
    before = page.js(chosen)
    assert len(before) == 5 and page.find("#selected-count").text == "5 selected"
    page.set("prompt", "new")
    page.set("steps", 1)
    page.drawn()
    page.until("document.querySelector('.tile').title === 'new'")
    assert page.js(chosen) == before and page.find("#selected-count").text == "5 selected"
    assert len(page.all(".cell")) == count + 1  # the oldest is selected, so it stays too
    page.find("#select-none").click()
    page.drawn()
    page.until("document.querySelectorAll('.tile[title=new]').length === 2")
    assert len(page.all(".cell")) == count + 1  # as many as there were
    while page.find("#more").is_displayed():
        count = len(page.all(".cell"))
        page.find("#more").click()
        page.until(f"document.querySelectorAll('.cell').length > {count}")
    ids = [one["id"] for one in page.server.get("/api/images", params={"limit": 200}).json()["images"]]
    assert page.js("return [...document.querySelectorAll('.cell')].map((cell) => cell.dataset.id)") == ids
