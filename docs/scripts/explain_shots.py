"""Screenshots of the page of `plainsd explain` for docs/explain.md.

At three steps of its slider; the page of one picture and of two, smaller; and in the dark on a phone.

    .venv/bin/python docs/scripts/explain_shots.py [FOLDER]

Needs chromium and chromedriver (Debian: chromium-driver), and selenium.
"""

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

import plainsd
from plainsd.reports.explain_page import page

DOCS = Path(__file__).parents[1]
PROMPT, SEED, STEPS, SHOWN = "a red apple on a yellow background", 7, 20, (1, 8, 20)
LARGEST = 200_000  # bytes
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
SIZE = {"width": 1000, "height": 560, "deviceScaleFactor": 1, "mobile": False}
BESIDE = "a green apple on a blue background"
WHOLE = {  # width and height in CSS pixels, the scale, how many pictures, whether it is dark
    "explain": (1400, 1300, 0.7, 1, False), "explain-beside": (1280, 1010, 0.7, 2, False),
    "explain-phone": (390, 1500, 1, 1, True),
}  # fmt: skip
MOVE = """
const step = document.getElementById("step"), mean = document.getElementById("mean");
if (mean.checked) mean.click();
step.value = arguments[0];
step.dispatchEvent(new Event("input", { bubbles: true }));
scrollTo(0, 0);
"""


def shots(folder: Path) -> list[Path]:
    """Writes the files and returns their paths."""
    from selenium import webdriver

    sd = plainsd.load(device="cpu", dtype="float32")
    explained = [plainsd.explain(sd, prompt, seed=SEED, steps=STEPS) for prompt in (PROMPT, BESIDE)]
    with tempfile.TemporaryDirectory() as scratch:
        pages = [Path(scratch) / f"{count}.html" for count in (1, 2)]
        for count, html in enumerate(pages, 1):
            html.write_text(page(explained[:count]), encoding="utf-8")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or sys.exit("chromium is not installed")
        for flag in (*FLAGS, f"--user-data-dir={scratch}/profile"):
            options.add_argument(flag)
        os.environ["SE_OFFLINE"] = "true"
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            paths = [*steps(driver, pages[0], folder), *whole(driver, pages, folder)]
        finally:
            driver.quit()
    for path in paths:
        if path.stat().st_size >= LARGEST:
            sys.exit(f"{path} has {path.stat().st_size} bytes, and {LARGEST} is the limit")
    return paths


def steps(driver, html: Path, folder: Path) -> Iterator[Path]:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
    driver.get(html.as_uri())
    for step in SHOWN:
        driver.execute_script(MOVE, step - 1)
        said = driver.find_element("id", "at").text
        if not said.startswith(f"{step} of {STEPS}"):
            sys.exit(f"the page shows step {said!r}, not {step}")
        yield photographed(driver, folder / f"explain-step-{step}.png", (975, 505))


def whole(driver, pages: list[Path], folder: Path) -> Iterator[Path]:
    for name, (width, height, scale, count, dark) in WHOLE.items():
        driver.get(pages[count - 1].as_uri())
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield photographed(driver, folder / f"{name}.png", (round(width * scale), round(height * scale)))


def photographed(driver, path: Path, size: tuple[int, int]) -> Path:
    """In a palette that makes a small file."""
    shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB").crop((0, 0, *size))
    shot.quantize(256).save(path, optimize=True)
    return path


if __name__ == "__main__":
    for path in shots(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS):
        print(path)
