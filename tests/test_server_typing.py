"""Drawing while one types: the embedded model in few steps, and the page."""

from dataclasses import replace

import browser
import numpy as np
import pytest
from browser import chromium, needed  # noqa: F401
from conftest import TINY, noise_picture
from serving import model_folder, open_service, png_bytes, served, until

import plainsd
from plainsd.adapters.layers import Adapter
from plainsd.cli import main
from plainsd.server.pool import QUICK

page = browser.page
PROMPTS = (
    "a red apple on a yellow background",
    "a cat face on a blue background",
    "a soccer ball on a black background",
    "a cactus on a white background",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(open_service([None], tmp_path_factory.mktemp("data"))) as server:
        yield server


def pixels(options):
    sd = plainsd.load(device="cpu", dtype="float32")
    drawn = plainsd.final(plainsd.text_to_image(sd, PROMPTS, seed=5, **options))
    return [np.asarray(image, dtype=np.float64) for image in drawn]


def test_four_steps_draw_what_twenty_draw():
    whole, few = (pixels(options) for options in ({}, QUICK))
    apart = np.array([[np.mean((a - b) ** 2) for b in whole] for a in few])
    assert list(apart.argmin(axis=1)) == [0, 1, 2, 3]


def adapters_of(network):
    return [module for module in network.modules() if isinstance(module, Adapter)]


def test_eval_scores_a_model_with_a_lora(monkeypatch, tmp_path, capsys):
    from plainsd.adapters.lora import attached, inject
    from plainsd.emoji import evaluate

    made = inject((sd := plainsd.load(device="cpu")).unet, rank=2)
    plainsd.save_lora(sd, tmp_path / "ink.safetensors", lora=made)
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda sd, concepts, **options: seen.append(sd))
    monkeypatch.setattr(evaluate, "score_table", lambda result: "")
    assert main(["eval", "--lora", f"{tmp_path / 'ink.safetensors'}:0.5"]) == 0
    (ink,) = attached(seen[0])
    assert ink.name == "lora_ink" and {one.strength for one in adapters_of(seen[0].unet)} == {0.5}
    assert main(["eval", "--clip-score", "clip", "--pictures", str(tmp_path), "--lora", "ink.safetensors"]) == 2
    assert "leave MODEL, --prompt-file and --lora out" in capsys.readouterr().err


def test_models_of_few_steps_are_quick(server, tmp_path):
    assert [model["quick"] for model in server.get("/api/info").json()["models"]] == [QUICK]
    models = [model_folder(tmp_path, "four"), model_folder(tmp_path, "many", variant=replace(TINY, steps=20))]
    with served(open_service(models, tmp_path / "data")) as other:
        assert [model["quick"] for model in other.get("/api/info").json()["models"]] == [{}, None]


@needed
def test_the_page_draws_while_one_types(page):
    ids = lambda: [one["id"] for one in page.server.get("/api/images").json()["images"]]  # noqa: E731
    shown = "document.querySelector('.typed img').src"
    page.find("#typing").click()
    prompt = page.find("#prompt")
    prompt.send_keys("a red apple")
    page.until(f"{shown} && document.querySelector('.typed img').naturalWidth === 128")
    assert "ms · seed" in page.find(".typed .status").text
    first = page.js(f"return {shown}")
    until(lambda: len(ids()) == 1)
    prompt.send_keys(" on a blue background")
    page.until(f"{shown} !== '{first}' && !document.querySelector('.typed .card-foot button').disabled")
    until(lambda: page.js(f"return {shown}").split("/")[-1] in [f"{id}.png" for id in ids()] and len(ids()) == 1)
    kept = ids()
    page.find(".typed .card-foot button").click()
    page.until("document.querySelectorAll('.tile').length === 1")  # in the gallery
    page.set("prompt", "a cat face")
    until(lambda: len(ids()) == 2)
    page.find("#typing").click()
    until(lambda: ids() == kept)  # what was not kept is gone
    assert not page.all(".typed")
    for one in kept:
        page.server.session.delete(f"{page.server.url}/api/images/{one}", timeout=60)


@needed
def test_a_picture_that_is_kept_while_one_types_comes_back_with_its_start(page):
    page.drop("#drop", "noise.png", png_bytes(noise_picture(128, 128)))
    page.until("!document.getElementById('canvas-tools').hidden")
    page.set("prompt", "a red apple")
    page.find("#typing").click()
    page.until("!document.querySelector('.typed .card-foot button').disabled")
    page.find(".typed .card-foot button").click()
    page.until("document.querySelectorAll('.tile').length === 1")
    page.find("#typing").click()
    page.find("#remove").click()
    page.saved()
    page.find(".tile").click()
    page.use()
    assert page.find("#canvas-tools").is_displayed()
    page.server.session.delete(f"{page.server.url}/api/images/{page.find('.tile').get_attribute('data-id')}")


@needed
def test_what_is_wrong_while_one_types_is_told_there(page):
    page.find("#typing").click()
    page.set("prompt", "a cat face")
    page.set("seed", "seven")
    page.until("document.querySelector('.typed .status').textContent.startsWith('seed: ')")
    page.set("seed", "7")
    page.set("hires", "2")  # as the strength of its second pass, left out of quick pictures
    page.set("strength", "0.5")
    page.set("upscaler", "lanczos")
    page.until("document.querySelector('.typed img').naturalWidth === 128")
    page.until("!document.querySelector('.typed .card-foot button').disabled")
    assert page.server.get("/api/images").json()["images"][0]["settings"]["upscaler"] == "latent"
    page.find("#typing").click()
    until(lambda: page.server.get("/api/images").json()["images"] == [])
