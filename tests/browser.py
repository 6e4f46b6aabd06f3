"""Headless Chromium, and the page in it by the names that a reader sees."""

import base64
import shutil

import pytest
from serving import until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needed = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-prefers-reduced-motion",
         "--window-size=1280,1000")  # fmt: skip
DROP = """
const [target, name, data] = arguments;
const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, { type: "image/png" }));
for (const kind of ["dragenter", "dragover", "drop"])
  target.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        driver.set_script_timeout(60)
        yield driver
        driver.quit()


@pytest.fixture
def page(chromium, server):
    """The page of the module's server; nothing has gone wrong on it, and it has asked for nothing from outside."""
    page = Page(chromium, server)
    yield page
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    errors = [line["message"] for line in chromium.get_log("browser") if line["level"] == "SEVERE"]
    expected = ("status of 422", "status of 429", "status of 409", "status of 401")  # answers that the page shows
    assert [line for line in errors if not any(part in line for part in expected)] == []
    asked = [
        line["message"] for line in chromium.get_log("performance") if '"Network.requestWillBeSent"' in line["message"]
    ]
    foreign = [line for line in asked if '"url":"http' in line and f'"url":"{server.url}' not in line]
    assert foreign == []  # no outside requests


class Page:
    """The page in the browser, by the names that a reader sees."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server
        kept = {"origin": server.url, "storageTypes": "indexeddb,local_storage"}
        driver.execute_cdp_cmd("Storage.clearDataForOrigin", kept)
        self.load()

    def load(self):
        self.driver.get(self.server.url)
        self.until("document.documentElement.dataset.ready === 'yes'")

    def size(self, width, height=800):
        """Of the window, until the test ends; a narrow one is a phone's."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def saved(self):
        """Waits until the form's pictures are in the browser's database."""
        self.until("!('saving' in document.documentElement.dataset)")

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def until(self, condition, seconds=60):
        """Waits for it; what it speaks of need not be there yet."""
        missing = "catch (error) { if (error instanceof TypeError) return false; throw error }"
        until(lambda: self.js(f"try {{ return Boolean({condition}) }} {missing}"), seconds)

    def drop(self, css, name, content):
        """A file dropped there."""
        self.js(DROP, self.find(css), name, base64.b64encode(content).decode())

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def set(self, id, value):
        self.js("const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, { bubbles: true }));",
                id, str(value))  # fmt: skip

    def value(self, id):
        return self.js("return document.getElementById(arguments[0]).value", id)

    def use(self, button="use"):
        """Presses "Use these settings" in the viewer, and waits until the form has them."""
        self.find(f"#{button}").click()
        self.until("!document.getElementById('viewer').open")

    def draw(self):
        self.find("#generate").click()

    def drawn(self):
        """Presses Draw, waits for the end; the job."""
        self.js("for (const card of document.querySelectorAll('.card')) card.remove()")
        self.draw()
        self.until("document.querySelector('.card.over')")
        return self.server.get(f"/api/jobs/{self.find('.card.over').get_attribute('data-job')}").json()

    def settings(self, job):
        return self.server.get(f"/api/images/{job['images'][0]}").json()["settings"]
