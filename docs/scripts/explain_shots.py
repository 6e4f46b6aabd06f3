"""Screenshots of the page of `plainsd explain` at three steps of its slider: docs/explain-step-*.png.

    .venv/bin/python docs/scripts/explain_shots.py [FOLDER]

Needs chromium and chromedriver (Debian: chromium-driver), and selenium.
"""

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

import plainsd
from plainsd.reports.explain_page import page

DOCS = Path(__file__).parents[1]
PROMPT, SEED, STEPS, SHOWN = "a red apple on a yellow background", 7, 20, (1, 8, 20)
LARGEST = 200_000  # bytes
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
SIZE = {"width": 1000, "height": 560, "deviceScaleFactor": 1, "mobile": False}
MOVE = """
const step = document.getElementById("step"), mean = document.getElementById("mean");
if (mean.checked) mean.click();
step.value = arguments[0];
step.dispatchEvent(new Event("input", { bubbles: true }));
scrollTo(0, 0);
"""


def shots(folder: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    from selenium import webdriver

    sd = plainsd.load(device="cpu", dtype="float32")
    written, paths = page([plainsd.explain(sd, PROMPT, seed=SEED, steps=STEPS)]), []
    with tempfile.TemporaryDirectory() as scratch:
        html = Path(scratch) / "explain.html"
        html.write_text(written, encoding="utf-8")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or sys.exit("chromium is not installed")
        for flag in (*FLAGS, f"--user-data-dir={scratch}/profile"):
            options.add_argument(flag)
        os.environ["SE_OFFLINE"] = "true"
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
            driver.get(html.as_uri())
            for step in SHOWN:
                driver.execute_script(MOVE, step - 1)
                said = driver.find_element("id", "at").text
                if not said.startswith(f"{step} of {STEPS}"):
                    sys.exit(f"the page shows step {said!r}, not {step}")
                paths.append(folder / f"explain-step-{step}.png")
                shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
                shot.crop((0, 0, 975, 505)).save(paths[-1], optimize=True)
        finally:
            driver.quit()
    for path in paths:
        if path.stat().st_size >= LARGEST:
            sys.exit(f"{path} has {path.stat().st_size} bytes, and {LARGEST} is the limit")
    return paths


if __name__ == "__main__":
    for path in shots(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS):
        print(path)
