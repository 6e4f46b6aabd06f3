"""docs/serving.md: its examples run as they stand, and what it says about flags and limits is so."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from PIL import Image
from serving import embedding_file, model_folder, open_service, served, until

from plainsd.commands.cluster import ClusterFlags
from plainsd.commands.serve import Serve
from plainsd.server.api import connections
from plainsd.server.limits import Limits
from plainsd.server.schema import MAX_NAME
from plainsd.server.sheets import SHEET_PIXELS
from plainsd.text.wildcard_files import WILDCARD_WORK

CHAPTER = Path(__file__).parents[1] / "docs" / "serving.md"
TEXT = CHAPTER.read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:7860"


def blocks(kind):
    found = re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("words")
    models = [model_folder(folder, name, seed) for seed, name in enumerate(("emoji", "sdxl-base", "sdxl-refiner"))]
    embedding_file(words / "ink.safetensors", 1, "<ink>")
    with served(open_service(models, tmp_path_factory.mktemp("data"), embeddings=words)) as server:
        yield server


def run(command, code, server, folder):
    """Finished without an error; what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "no_proxy": "127.0.0.1"}
    done = subprocess.run([*command, code.replace(ADDRESS, server.url)], cwd=folder, env=environment, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", blocks("python client"))
def test_python_examples(server, tmp_path, code):
    assert ADDRESS in code
    run([sys.executable, "-c"], code, server, tmp_path)
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as image:
            assert "Steps: " in image.info["parameters"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_examples(server, tmp_path, code):
    assert ADDRESS in code
    said = run(["bash", "-ec"], code, server, tmp_path)
    if code.startswith("curl"):
        assert server.wait(json.loads(said)["id"])["done"] == 7  # six pictures and their sheet
    else:
        assert Image.open(tmp_path / said.strip()).size == (64, 64)
    until(lambda: not server.service.queue.jobs)


@pytest.mark.parametrize("code", blocks("sh serve"))
def test_commands_that_serve(code):
    name, command, *flags = shlex.split(code.replace("\\\n", " "))
    assert (name, command) == ("plainsd", "serve")
    assert tyro.cli(Serve, args=flags) != Serve()


def test_the_error_is_what_the_server_says(server):
    (shown,) = blocks("json")
    told = server.post("/api/jobs", {"prompt": "p", "sampler": "eular"}).json()["error"]
    for name, value in json.loads(shown)["error"].items():
        assert told[name] == value if value is None else told[name].startswith(value.removesuffix("...")), name


def test_limits_and_flags_are_as_told():
    rows = dict(re.findall(r"^\| ([a-z][^|]*?) \| ([\d,]+)[^|]*\| (?:`--[a-z-]+`)? ?\|$", TEXT, re.MULTILINE))
    told = {name: int(value.replace(",", "")) for name, value in rows.items()}
    limits = Limits()
    assert told == {
        "pixels of a picture, after enlarging": limits.pixels, "steps": limits.steps, "pictures of a job": limits.count,
        "pixels of a grid's sheet; characters of its labels (longer ones are cut)": SHEET_PIXELS,
        "seconds of drawing, for a job": limits.seconds, "jobs that wait or run": limits.queue,
        "pictures marked, deleted or packed at once": limits.selection,
        "seconds for which deleted pictures can be restored": limits.undo,
        "characters of a prompt": limits.prompt, "bytes of a request, pixels of a picture sent": limits.upload,
        "brackets inside each other, in a prompt": limits.nesting,
        "characters of prompts times steps, all cells of a grid together": limits.reading,
        "characters of settings, in a picture or as `infotext`": limits.text,
        "seconds for the head of a request, and for its body": connections.HEAD_SECONDS,
        "connections, in all and of one address (an IPv6 network of 64 bits counts as one)": connections.CONNECTIONS,
        "characters of a name": MAX_NAME,
        "characters that choices and wildcards of a request take: files, lines, options": WILDCARD_WORK,
    }  # fmt: skip
    known = {
        f"--{name.replace('_', '-')}" for name in (*Serve.__dataclass_fields__, *ClusterFlags.__dataclass_fields__)
    }
    assert set(re.findall(r"`(--[a-z-]+)`", TEXT)) <= known


def test_its_pictures_are_there_and_small():
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert len(names) == 3
    for name in names:
        assert (CHAPTER.parent / name).stat().st_size < 300_000
        with Image.open(CHAPTER.parent / name) as image:
            image.load()
