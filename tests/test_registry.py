"""A sampler and a spacing from outside: one entry in a table, and every surface takes them."""

import numpy as np
import pytest
from conftest import pixels
from PIL import Image
from serving import open_service, served

import plainsd
from plainsd.cli import main
from plainsd.diffusion.samplers import SAMPLERS, Sampler, Step, toward
from plainsd.diffusion.schedule import SPACINGS, Spacing
from plainsd.pictures.images import read_settings


def mine(denoise, x, sigmas, noise, *, eta=0.0):
    """Euler, the other way round: no step uses the table's name for it."""
    for index in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[index])
        x = toward(x, denoised, sigmas[index], sigmas[index + 1])
        yield Step(index, sigmas[index + 1], x, denoised)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(mine, takes=("eta",)))
    falling = Spacing(lambda low, high, steps: np.geomspace(high, low, steps).tolist(), of_levels=True)
    monkeypatch.setitem(SPACINGS, "my_own", falling)


CHOICES = ("--sampler", "mine", "--spacing", "my_own", "--steps", "3")


def test_python(model):
    sd = plainsd.load(model, device="cpu", dtype="float32")
    events = plainsd.text_to_image(sd, "a", sampler="mine", spacing="my_own", steps=3, eta=0.5)
    twin = plainsd.text_to_image(sd, "a", sampler="euler", spacing="exponential", steps=3)
    assert np.array_equal(plainsd.final(events)[0], plainsd.final(twin)[0])


def test_command_line_and_the_pictures_text(generate, tmp_path):
    code, out, _ = generate("a", *CHOICES)
    assert code == 0
    settings = read_settings(out.strip())
    assert (settings.sampler, settings.spacing, settings.steps) == ("mine", "my_own", 3) and not settings.other
    code, again, _ = generate("--from", out.strip())
    assert code == 0 and np.array_equal(pixels(out.strip()), pixels(again.strip()))


def test_grid(generate):
    code, out, _ = generate("a", "--grid", "sampler=euler,mine", "--grid", "spacing=karras,my_own", "--steps", "2")
    assert code == 0 and Image.open(out.strip()).size[0] > 64


def test_server(model, tmp_path):
    with served(open_service([model], tmp_path)) as server:
        info = server.get("/api/info").json()
        assert info["samplers"]["mine"] == "mine" and info["spacings"]["my_own"] == "my_own"
        done = server.wait(server.job(prompt="a", sampler="mine", spacing="my_own", steps=2)["id"])
        assert done["state"] == "done", done
        assert "mine" in [row["name"] for row in server.get("/sdapi/v1/samplers").json()]
        answer = server.post(
            "/sdapi/v1/txt2img", {"prompt": "a", "sampler_name": "mine", "scheduler": "my_own", "steps": 2}
        )
        assert answer.status_code == 200, answer.text


def test_unknown_names_are_refused_before_a_model_is_loaded(capsys):
    for flag, value in (("--sampler", "mein"), ("--spacing", "my_one")):
        assert main(["generate", "a", "--model", "/nowhere", flag, value]) == 2
        said = capsys.readouterr().err
        assert f"{flag[2:]} {value!r}; did you mean 'm" in said and said.count("\n") == 1
