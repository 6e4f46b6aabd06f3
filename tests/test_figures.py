"""The figures of docs/figures: each file is what its script draws, small, legible on light and dark, and shown."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import style

FOLDER = Path(__file__).parents[1] / "docs" / "figures"


SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "def draw()" in path.read_text("utf-8")]
NAMES = [path.stem for path in SCRIPTS]
SLOW = {path.stem for path in SCRIPTS if re.search(r"^SLOW = True\b", path.read_text("utf-8"), re.MULTILINE)}
DRAWN = [pytest.param(name, marks=pytest.mark.full if name in SLOW else ()) for name in NAMES]


def drawn(name: str) -> str:
    return (FOLDER / f"{name}.svg").read_text("utf-8")


def test_every_script_that_says_it_is_slow_is_marked():
    assert SLOW == {path.stem for path in SCRIPTS if "SLOW" in path.read_text("utf-8")}


@pytest.mark.parametrize("name", DRAWN)
def test_the_file_is_what_the_script_draws(name):
    again = import_module(name).draw()
    assert style.places(again), "nothing in it has an id that begins with data-"
    found = style.differences(drawn(name), again)
    assert not found, f"{found}; if that is meant, run python docs/figures/{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_loads_nothing(name):
    text = drawn(name)
    assert len(text.encode()) < style.LARGEST
    assert not re.findall(r'(?:href|src)="(?!#|data:)|url\((?!#)|@import|<script', text)
    assert len(ElementTree.fromstring(text).findtext(f"{style.NAMESPACE}title") or "") > 20


@pytest.mark.parametrize("name", NAMES)
def test_its_colours_have_a_light_and_a_dark_form(name):
    body, known = drawn(name).split("</style>", 1)[1], dict(style.COLOURS.values())
    used = set(re.findall(r"#[0-9a-f]{6}\b", body))
    assert used <= set(known)
    rules = drawn(name).split("</style>", 1)[0]
    assert all(f'[style*="fill: {light}"]' in rules and f"fill:{known[light]} !important" in rules for light in used)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_it(name):
    pages = [*FOLDER.parent.glob("*.md"), FOLDER.parents[1] / "README.md"]
    assert any(f"figures/{name}.svg)" in page.read_text("utf-8") for page in pages)


def test_every_file_has_a_script():
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(NAMES)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_from_their_ground():
    grounds = [colours for name, colours in style.COLOURS.items() if name.startswith(("ground", "panel", "pale"))]
    for name in ("ink", "blue", "orange", "green", "purple", "red", "teal", "yellow", "pink"):
        for ground in grounds if name == "ink" else [style.COLOURS["ground"]]:
            assert all(contrast(*pair) >= 4.5 for pair in zip(style.COLOURS[name], ground, strict=True)), (name, ground)


def figure(y: float = 1.0, text: str = "a title", shade: float = 0.5) -> str:
    made, axes = style.panels(1, 2, 2)
    axes[0, 0].plot([0, 1, 2], [0, y, 0])
    axes[0, 0].set(title=text, ylim=(0, 2))
    axes[0, 1].imshow([[0, shade], [1, 1]], vmin=0, vmax=1)
    return style.svg(made, "A figure for the test of figures")


def test_differences_are_seen():
    assert style.differences(figure(), figure()) == []
    assert style.differences(figure(), figure(y=1.001)) == []
    assert any("apart" in found for found in style.differences(figure(), figure(y=1.1)))
    assert any("texts" in found for found in style.differences(figure(), figure(text="another")))
    assert any("apart" in found for found in style.differences(figure(), figure(shade=0.9)))
    assert style.differences(figure(), re.sub(r'id="data-0-0"', 'id="data-9-9"', figure()))


def test_a_script_runs_by_itself(tmp_path):
    """As its docstring says, from any folder; the file is written beside the script."""
    for name in ("style.py", "schedules.py"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    subprocess.run([sys.executable, "schedules.py"], cwd=tmp_path, check=True, capture_output=True)
    assert style.differences((tmp_path / "schedules.svg").read_text("utf-8"), drawn("schedules")) == []
