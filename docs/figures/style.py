"""What the figures of these pages share: colours for light and dark, a size, and how a figure is written and compared.

A figure is a script in this folder with a function `draw()` that returns it as SVG. Running the script writes the file
beside it; running this one writes all of them:

    .venv/bin/python docs/figures/schedules.py
    .venv/bin/python docs/figures/style.py

tests/test_figures.py draws each figure again and compares it with its file by `differences`: the coordinates of all
that stands for data, the images and the texts. Bytes may differ between versions of matplotlib, these may not. A script
that takes more than a few seconds has a line `SLOW = True`, and is drawn again by `make test-full` only.

An SVG that is written by hand goes through `finished`, with its data inside elements whose id begins with "data-".
"""

import base64
import io
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

FOLDER = Path(__file__).parent
LARGEST = 200_000  # bytes
COLOURS = {  # (light, dark); a figure uses these only
    "ground": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#818b98", "#7d8590"),
    "grid": ("#e5e8eb", "#262c34"),
    "panel": ("#f6f8fa", "#161b22"),
    "blue": ("#0969da", "#58a6ff"),
    "orange": ("#bc4c00", "#f0883e"),
    "green": ("#1a7f37", "#3fb950"),
    "purple": ("#8250df", "#bc8cff"),
    "red": ("#cf222e", "#ff7b72"),
    "teal": ("#1b7c83", "#39c5cf"),
    "yellow": ("#9a6700", "#d29922"),
    "pink": ("#bf3989", "#f778ba"),
    "pale_blue": ("#ddf4ff", "#11284a"),  # grounds of boxes, for ink on top
    "pale_orange": ("#fff1e5", "#3d1d08"),
    "pale_green": ("#dafbe1", "#0c2d15"),
    "pale_purple": ("#fbefff", "#271052"),
    "pale_yellow": ("#fff8c5", "#341a00"),
}
INK, FAINT, GRID, GROUND, PANEL = (COLOURS[name][0] for name in ("ink", "faint", "grid", "ground", "panel"))
BLUE, ORANGE, GREEN, PURPLE = (COLOURS[name][0] for name in ("blue", "orange", "green", "purple"))
RED, TEAL, YELLOW, PINK = (COLOURS[name][0] for name in ("red", "teal", "yellow", "pink"))
FONT = "system-ui, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
NAMESPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
PLACES = ("d", "points", "x", "y", "width", "height", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry")

matplotlib.use("Agg")
pyplot.rcParams.update(
    {
        "svg.fonttype": "none",  # texts stay texts
        "svg.hashsalt": "plainsd",
        "path.simplify": False,
        "image.composite_image": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 9,
        "axes.edgecolor": FAINT,
        "axes.facecolor": GROUND,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, YELLOW, PINK]),
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "figure.facecolor": GROUND,
    }
)


def panels(rows: int, columns: int, height: float, **margins: float) -> tuple[Figure, np.ndarray]:
    """A figure 7 inches (672 pixels) wide and its axes, an array of (rows, columns).

    Margins are those of `subplots_adjust`. Axes stay where they are put: nothing depends on the size of a text.
    """
    figure, axes = pyplot.subplots(rows, columns, figsize=(7, height), squeeze=False)
    figure.subplots_adjust(**{"left": 0.08, "right": 0.98, "bottom": 0.14, "top": 0.92, "wspace": 0.25} | margins)
    return figure, axes


def bare(*axes: Axes) -> None:
    """Axes without ticks, grid and frame, with equal scales: for pictures, drawings and points of a plane."""
    for one in axes:
        one.set(xticks=[], yticks=[], aspect="equal")
        one.grid(False)
        one.spines[:].set_visible(False)


# --- writing ---------------------------------------------------------------------------------------------------------


def svg(figure: Figure, title: str) -> str:
    """The figure as SVG; `title` is what a screen reader says. All artists that show data get an id."""
    for i, axes in enumerate(figure.axes):
        shown = (*axes.lines, *axes.collections, *axes.patches, *axes.images)
        arrows = (text.arrow_patch for text in axes.texts if getattr(text, "arrow_patch", None) is not None)
        for k, artist in enumerate((*shown, *arrows)):
            artist.set_gid(f"data-{i}-{k}")
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return finished(written.getvalue(), title)


def finished(text: str, title: str) -> str:
    """An SVG with a title, our font, and the rules that give each light colour its dark one."""
    rules = "".join(
        f'[style*="{what}: {light}"],[{what}="{light}"]{{{what}:{dark} !important}}'
        for light, dark in COLOURS.values()
        if light in text
        for what in ("fill", "stroke")
    )
    style = f"<style>text{{font-family:{FONT} !important}}@media (prefers-color-scheme:dark){{{rules}}}</style>"
    text = re.sub(r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", text)
    text = re.sub(r"(<svg[^>]*?)>", rf'\1 role="img"><title>{title}</title>{style}', text, count=1)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).rstrip() + "\n"


def write(script: str, text: str) -> None:
    """Writes a figure beside the script that drew it."""
    path = Path(script).with_suffix(".svg").resolve()
    if len(text) >= LARGEST:
        sys.exit(f"{path.name} would have {len(text)} bytes, and {LARGEST} is the limit; draw fewer points")
    path.write_text(text, encoding="utf-8")
    print(path)


# --- comparing -------------------------------------------------------------------------------------------------------


def differences(text: str, other: str, most: float = 1.0, levels: float = 8.0) -> list[str]:
    """In what two figures differ: data by more than `most` points, images by more than `levels` of 255 in the mean,
    texts at all. Empty if they are the same."""
    found = []
    for kind, compare in ((texts, None), (places, most), (images, levels)):
        a, b = kind(text), kind(other)
        if sorted(a) != sorted(b):
            found.append(f"{kind.__name__}: {sorted(set(a) ^ set(b))}")
            continue
        for name in a if compare is not None else ():
            if len(a[name]) != len(b[name]):
                found.append(f"{name}: {len(a[name])} numbers, {len(b[name])}")
                continue
            apart = np.abs(np.asarray(a[name]) - np.asarray(b[name]))
            apart = apart.mean() if kind is images else apart.max(initial=0)
            if apart > compare:
                found.append(f"{name}: {apart:.2f} apart, {compare} are allowed")
    return found


def texts(text: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(text).iter(f"{NAMESPACE}text")]


def places(text: str) -> dict[str, list[float]]:
    """The coordinates inside each element whose id begins with "data-"."""
    return {
        name: [
            float(number)
            for part in element.iter()
            for key in PLACES
            if not (part.tag == f"{NAMESPACE}image")
            for number in NUMBER.findall(part.get(key, ""))
        ]
        for name, element in _data(text)
    }


def images(text: str) -> dict[str, np.ndarray]:
    """The pixels of each image, as numbers from 0 to 255 in one row."""
    found = {}
    for name, element in _data(text):
        for part in element.iter(f"{NAMESPACE}image"):
            data = base64.b64decode((part.get(LINK) or part.get("href") or "").split(",", 1)[1])
            found[name] = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), float).ravel()
    return found


def _data(text: str) -> Sequence[tuple[str, ElementTree.Element]]:
    return [(e.get("id", ""), e) for e in ElementTree.fromstring(text).iter() if e.get("id", "").startswith("data-")]


if __name__ == "__main__":
    for script in sorted(FOLDER.glob("*.py")):
        if script.stem != "style":
            runpy.run_path(str(script), run_name="__main__")
