"""Choices, wildcards and styles in the prompts of all APIs: settled by each picture's seed, and written settled."""

import base64
import json

import pytest
from serving import lora_file, model_folder, open_service, served

from plainsd.commands.serve import Serve
from plainsd.errors import UserError
from plainsd.text.wildcards import settled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "loras").mkdir()
    (folder / "wildcards").mkdir()
    (folder / "wildcards" / "colours.txt").write_text("red\ngreen\nblue\n")
    (folder / "wildcards" / "inked.txt").write_text("plain\n<lora:ink:0.5> drawn\n")
    (folder / "styles.csv").write_text(
        "name,prompt,negative_prompt\nfilm,a still of {prompt},text\noil,in oil,\ninked,<lora:ink:0.5> in ink,\n"
        "mood,{prompt} {wild|calm},{fog|rain}\n"
    )
    lora_file(model_folder(folder), folder / "loras" / "ink.safetensors", 0)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    more = {"wildcards": folder / "wildcards", "styles": folder / "styles.csv", "loras": folder / "loras"}
    with served(open_service([model_folder(folder)], tmp_path_factory.mktemp("data"), **more)) as server:
        yield server


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    with served(open_service([model_folder(folder)], tmp_path_factory.mktemp("data"))) as server:
        yield server


def prompts(server, job, name="prompt"):
    return [server.get(f"/api/images/{id}").json()["settings"][name] for id in job["images"]]


def test_each_picture_is_settled_by_its_seed(server, folder):
    asked = "a __colours__ {cat|dog|owl|fox}"
    job = server.drawn(prompt=asked, negative="{rain|snow}", count=4, seed=7, steps=1)
    expected = [settled(asked, 7 + place, folder / "wildcards") for place in range(4)]
    assert prompts(server, job) == expected and len({*expected}) > 1
    assert prompts(server, job, "negative") == [settled("{rain|snow}", 7 + place) for place in range(4)]
    alone = server.drawn(prompt=asked, negative="{rain|snow}", seed=9, steps=1)
    assert server.picture(alone["images"][0]).tobytes() == server.picture(job["images"][2]).tobytes()
    told = server.get(f"/api/images/{job['images'][2]}").json()
    assert (
        told["parameters"].startswith(expected[2]) and server.get("/api/images?search=colours").json()["images"] == []
    )


def test_signs_that_are_meant_stay(server):
    job = server.drawn(prompt=r"a \{b\|c\} my_file", seed=1, steps=1)
    assert prompts(server, job) == [r"a \{b\|c\} my_file"]


def test_a_lora_may_come_out_of_a_choice_for_all_pictures_alike(server):
    job = server.drawn(prompt="{<lora:ink:0.5>} a boat", seed=1, steps=1)
    told = server.get(f"/api/images/{job['images'][0]}").json()
    assert told["loras"] == [{"name": "ink", "strength": 0.5}] and told["settings"]["prompt"] == "a boat"
    answer = server.post("/api/jobs", {"prompt": "__inked__ boat", "seed": 0, "count": 16})
    assert answer.status_code == 422 and "different LoRAs" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("body", "field", "says"), [
    ({"prompt": "a {b|c"}, "prompt", "without its partner"),
    ({"negative": "a } b"}, "negative", "without its partner"),
    ({"prompt": "__colors__"}, "prompt", "unknown wildcard 'colors'; did you mean 'colours'"),
    ({"styles": ["flim"]}, "styles", "unknown style 'flim'; did you mean 'film'"),
    ({"prompt": "{2$$" + "x" * 1500 + "|" + "y" * 1500 + "}", "styles": ["film"] * 32}, "prompt", ""),
])  # fmt: skip
def test_what_cannot_be_read_is_named(server, body, field, says):
    answer = server.post("/api/jobs", {"prompt": "a", **body})
    if says:
        error = answer.json()["error"]
        assert answer.status_code == 422 and error["field"] == field and says in error["message"]
    else:
        assert answer.status_code == 202


def test_what_a_wildcard_becomes_has_its_limits_too(server, folder):
    (folder / "wildcards" / "long.txt").write_text("word " * 1000)
    answer = server.post("/api/jobs", {"prompt": "__long__"})
    assert answer.status_code == 422 and "prompt has 4999 characters" in answer.json()["error"]["message"]
    (folder / "wildcards" / "long.txt").unlink()


def test_without_a_folder_it_is_said(plain):
    error = plain.post("/api/jobs", {"prompt": "a __colour__"}).json()["error"]
    assert "__colour__ is a wildcard" in error["message"] and error["field"] == "prompt"
    assert "--styles FILE" in plain.post("/api/jobs", {"styles": ["film"]}).json()["error"]["message"]


def test_styles_lie_around_the_prompt(server):
    job = server.drawn(prompt="a boat", negative="rain", styles=["film", "oil"], seed=1, steps=1)
    assert prompts(server, job) == ["a still of a boat, in oil"]
    assert prompts(server, job, "negative") == ["rain, text"]
    again = server.drawn(prompt="a", hires=1.5, hires_prompt="{b}", strength=1, seed=1, steps=2)
    assert prompts(server, again, "hires_prompt") == ["b"]
    assert server.get("/api/info").json()["styles"] == ["film", "oil", "inked", "mood"]
    listed = server.get("/sdapi/v1/prompt-styles").json()
    assert listed[0] == {"name": "film", "prompt": "a still of {prompt}", "negative_prompt": "text"}
    body = {"prompt": "a boat", "styles": ["oil"], "seed": 1, "steps": 4}
    answer = server.post("/sdapi/v1/txt2img", body)
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert info["prompt"] == "a boat, in oil" and info["styles"] == ["oil"]


def test_styles_lie_around_the_prompts_of_a_second_pass_too(server):
    """A1111: StableDiffusionProcessingTxt2Img.setup_prompts of 1.10."""
    second = {"hires": 1.5, "hires_prompt": "a ship", "strength": 1, "seed": 1, "steps": 2}
    job = server.drawn(prompt="a boat", styles=["film", "inked"], **second)
    assert prompts(server, job, "hires_prompt") == ["a still of a ship,  in ink"]
    told = server.get(f"/api/images/{job['images'][0]}").json()
    assert told["loras"] == [{"name": "ink", "strength": 0.5}] and told["settings"]["hires_negative"] is None
    job = server.drawn(prompt="a boat", styles=["film"], hires_negative="rain", **second)
    assert prompts(server, job, "hires_negative") == ["rain, text"]
    plain = server.drawn(prompt="a boat", styles=["film"], hires=1.5, strength=1, seed=1, steps=2)
    assert prompts(server, plain, "hires_prompt") == [None]  # that of the first pass, which has them


def test_loras_that_are_switched_off_are_those_of_styles_too(server):
    body = {"prompt": "a boat", "styles": ["inked"], "seed": 1, "steps": 4, "width": 64, "height": 64}
    with_it, off = (
        server.post("/sdapi/v1/txt2img", body | more).json() for more in ({}, {"disable_extra_networks": 1})
    )
    plain = server.post("/sdapi/v1/txt2img", body | {"styles": [], "prompt": "a boat,  in ink"}).json()
    assert off["images"] == plain["images"] != with_it["images"]
    assert json.loads(off["info"])["prompt"] == "a boat,  in ink" and json.loads(off["info"])["styles"] == ["inked"]


@pytest.mark.parametrize(
    ("prompt", "more", "drawn"),
    [
        ("# a draft\na boat # <lora:ink:0.5>\nat sea#\n", {}, "a boat \nat sea\n"),
        ("a boat # at sea", {"styles": ["oil"]}, "a boat "),  # the style is behind the sign
        ("a boat", {"styles": ["oil"], "negative_prompt": "#rain"}, "a boat, in oil"),
        ("boat #3", {"override_settings": {"enable_prompt_comments": False}}, "boat #3"),
        ("a", {"hr_prompt": "a boat # at sea", "enable_hr": True, "hr_scale": 1.5, "styles": ["film"]}, "a still of a"),
    ],
)
def test_comments_in_a1111s_prompts(server, prompt, more, drawn):
    body = {"prompt": prompt, "seed": 1, "steps": 4, "width": 64, "height": 64} | more
    answer = server.post("/sdapi/v1/txt2img", body)
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert info["prompt"] == drawn and "#" not in info["negative_prompt"]
    written = info["infotexts"][0]
    assert "<lora" not in written and ("a still of a boat" in written) == ("hr_prompt" in more)


def test_a_read_text_has_no_comments(server):
    """A number in a text that A1111 wrote with comments switched off, or that another program wrote."""
    text = "boat #3 {a|b} __colours__\nSteps: 1, Sampler: Euler a, Seed: 1, Size: 64x64"
    info = json.loads(server.post("/sdapi/v1/txt2img", {"infotext": text, "negative_prompt": "{a}"}).json()["info"])
    assert info["prompt"] == "boat #3 {a|b} __colours__" and info["negative_prompt"] == "a"  # nor choices
    refused = server.post("/sdapi/v1/options", {"enable_prompt_comments": "no"})
    assert refused.status_code == 422 and "true or false" in refused.text
    server.post("/sdapi/v1/options", {"enable_prompt_comments": False})
    kept = server.post("/sdapi/v1/txt2img", {"prompt": "boat #4", "seed": 1, "steps": 4}).json()
    server.post("/sdapi/v1/options", {"enable_prompt_comments": True})
    assert json.loads(kept["info"])["prompt"] == "boat #4"


def test_other_apis_read_choices_where_there_is_a_folder(server, plain):
    body = {"prompt": "{red} boat", "seed": 1, "steps": 4}
    told = [json.loads(one.post("/sdapi/v1/txt2img", body).json()["info"])["prompt"] for one in (server, plain)]
    assert told == ["red boat", "{red} boat"]


def test_what_a_picture_records_is_settled(plain):
    """Its text may have braces: a picture of another program, or of a server without wildcards."""
    signs = "{{{boat}}} {a|b} __no__ :{"
    second = {"enable_hr": True, "hr_scale": 1.5, "hr_prompt": signs, "hr_negative_prompt": "}"}
    body = {"prompt": signs, "negative_prompt": "{", "seed": 1, "steps": 3} | second
    answer = plain.post("/sdapi/v1/txt2img", body)
    assert answer.status_code == 200, answer.text
    told = plain.get("/api/images?limit=1").json()["images"][0]
    assert told["settings"]["prompt"] == told["settings"]["hires_prompt"] == signs
    wanted = {name: value for name, value in told["settings"].items() if value is not None}
    again = plain.drawn(**wanted)
    assert plain.picture(again["images"][0]).tobytes() == plain.picture(told["id"]).tobytes()
    file = base64.b64encode(plain.get(told["url"]).content).decode()
    read = plain.post("/api/settings", {"image": file}).json()
    assert {*read["settled"]} == {"prompt", "negative", "hires_prompt", "hires_negative"}
    refused = plain.post("/api/jobs", wanted | {"settled": ["prompt", "negative", "hires_prompt"]})
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "hires_negative"


def test_styles_lie_around_what_is_settled(server):
    """Their choices are made, and theirs alone."""
    job = server.drawn(prompt="{a|b} ", negative="{c|d}", settled=["prompt"], styles=["mood", "oil"], seed=3, steps=1)
    assert prompts(server, job) == [f"{{a|b}}  {settled('{wild|calm}', 3)}, in oil"]
    (negative,) = prompts(server, job, "negative")
    assert negative == settled("{c|d}, {fog|rain}", 3)


def test_the_flags_are_checked_at_the_start(tmp_path):
    with pytest.raises(UserError, match="--wildcards '.*': no such folder"):
        Serve(wildcards=tmp_path / "none").check()
    with pytest.raises(UserError, match="cannot read"):
        Serve(styles=tmp_path / "none.csv").check()
