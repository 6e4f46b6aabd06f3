"""What is built of the sources: a wheel with every file of the package, links that lead on, bounds that are proven."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling.build import build_wheel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PAGES, FILES = (
    "https://github.com/plainsd/plainsd/blob/main/",
    "https://raw.githubusercontent.com/plainsd/plainsd/main/",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as file:
        yield file


def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_a_wheel_has_every_file_of_the_package(wheel):
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("git says which files there are, and this is no clone")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "src/plainsd"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    files = {name.removeprefix("src/") for name in listed if (ROOT / name).is_file()}
    assert {name for name in wheel.namelist() if name.startswith("plainsd/")} == files
    needed = ("py.typed", "speed/kernels.cpp", "server/page/index.html", "assets/clip/bpe_simple_vocab_16e6.txt.gz")
    assert files >= {f"plainsd/{name}" for name in needed}


def test_both_licences_are_in_the_wheel(wheel):
    texts = [wheel.read(name).decode() for name in wheel.namelist() if "/licenses/" in name]
    assert len(texts) == 2 and any("2021 OpenAI" in text for text in texts)


def test_links_of_the_readme_lead_somewhere_from_pypi_too(wheel):
    said = metadata(wheel)
    assert said["Description-Content-Type"] == "text/markdown"
    text = said.get_payload(decode=True).decode()
    pictures, pages = (set(re.findall(mark + r"\[[^\]]*\]\(([^)\s]+)\)", text)) for mark in ("!", r"(?<!!)"))
    written = set(re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text("utf-8")))
    outside = {link for link in written if link.startswith(("http://", "https://"))}
    inside = {link.removeprefix(FILES) for link in pictures} | {link.removeprefix(PAGES) for link in pages - outside}
    assert len(pictures) >= 2 and all(link.startswith(FILES) for link in pictures)
    assert all(link.startswith(PAGES) for link in pages - outside)
    assert inside == written - outside and all((ROOT / link.split("#")[0]).exists() for link in inside)


def lower_bounds(requirements):
    """name -> the oldest version that is allowed, of each requirement but ours of ourselves."""
    found = {}
    for line in requirements:
        name, bound = re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:(?:>=|==)([\d.]+))?", line).groups()
        if name != "plainsd":
            found[name] = bound
    return found


def release(version):
    """(1, 0) for 1.0.0: zeros at the end say nothing."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def test_everything_has_a_lower_bound():
    for requirements in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert all(lower_bounds(requirements).values()), lower_bounds(requirements)


def test_lower_bounds_are_those_that_were_proven():
    lines = (ROOT / "constraints-lowest.txt").read_text("utf-8").splitlines()
    proven = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    claimed = lower_bounds([*PROJECT["dependencies"], *extras["serve"], *extras["train"], *extras["emoji"]])
    del claimed["torch"], proven["torch"]  # of which only one version could be had
    assert {name: release(bound) for name, bound in claimed.items()} == {
        name: release(bound) for name, bound in proven.items() if name in claimed
    }


DISTRIBUTIONS = {"PIL": "Pillow", "cv2": "opencv-python-headless", "prometheus_client": "prometheus-client",
                 "python_multipart": "python-multipart"}  # fmt: skip
BROUGHT = {
    "anyio": "fastapi",
    "starlette": "fastapi",
    "h11": "uvicorn",
    "fsspec": "datasets",
    "grpc": "ray",
}  # by which of ours it is always installed


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def test_all_that_is_imported_is_declared():
    """As a dependency, or in an extra that users install: what only the tests install is not there."""
    extras = [one for name, found in PROJECT["optional-dependencies"].items() if name != "test" for one in found]
    declared = lower_bounds([*PROJECT["dependencies"], *extras]).keys()
    for path in (ROOT / "src").rglob("*.py"):
        for name in set(imported(path)) - set(sys.stdlib_module_names) - {"plainsd"}:
            assert DISTRIBUTIONS.get(name, BROUGHT.get(name, name)) in declared, f"{path} imports {name}"
