"""Every text of a request that becomes a prompt has the same bounds, by whatever field and API it comes."""

import pytest
from conftest import TINY
from serving import embedding_file, model_folder, open_service, served

from plainsd.server.limits import Limits

LIMITS = Limits(pixels=128 * 128, steps=20, prompt=2000)
FIELDS = {
    "/api/jobs": ("prompt", "negative", "hires_prompt", "hires_negative"),
    "/sdapi/v1/txt2img": ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt"),
    "/v1/images/generations": ("prompt", "negative"),
}
AROUND = {
    "/api/jobs": {"prompt": "p", "hires": 2, "size": [32, 32], "strength": 0.5, "steps": 4},
    "/sdapi/v1/txt2img": {"prompt": "p", "enable_hr": True, "hr_upscaler": "Latent", "denoising_strength": 0.5,
                          "steps": 4, "width": 32, "height": 32},
    "/v1/images/generations": {"prompt": "p", "steps": 4, "size": "32x32"},
}  # fmt: skip
BAD = {
    "a " * 1001: "characters; at most 2000 are taken",
    "(" * 70: "has 70 brackets inside each other; at most 64",
    "(a:" + "9" * 400 + ")": "the weight inf of 'a' is out of bounds",
    "{" + "9" * 400 + "::a|b}": "the weight inf of an option is out of bounds",
    "{a|b": "without its partner",
    "__long__": "characters; at most 2000 are taken",
    "__long__" * 200: "take more than 400000 characters",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "wildcards").mkdir()
    (folder / "wildcards" / "long.txt").write_text("b" * 2500 + "\n")
    (folder / "wildcards" / "inked.txt").write_text("<lora:ink:0.5> drawn\n")
    (folder / "words").mkdir()
    embedding_file(folder / "words" / "fluffy-one.safetensors", 1, width=TINY.text[0].width)
    rows = [f'"{place}","{text}",' for place, text in enumerate(BAD)]
    (folder / "styles.csv").write_text("\n".join(["name,prompt,negative_prompt", *rows]))
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    more = {"wildcards": folder / "wildcards", "styles": folder / "styles.csv", "embeddings": folder / "words"}
    service = open_service([model_folder(folder)], tmp_path_factory.mktemp("data"), LIMITS, **more)
    with served(service) as server:
        yield server


@pytest.fixture
def refused(server, monkeypatch):
    """The message of a refusal, after which nothing is queued or stored."""
    monkeypatch.setattr("plainsd.text.wildcard_files.WILDCARD_WORK", 400_000)

    def post(path, body):
        before = server.service.store.counts()
        answer = server.post(path, body)
        assert answer.status_code == 422 and len(answer.text) < 4000, answer.text[:500]
        assert server.service.store.counts() == before and not server.get("/api/jobs").json()["active"]
        return answer.json()

    return post


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize(("path", "field"), [(path, field) for path, fields in FIELDS.items() for field in fields])
def test_every_prompt_has_the_same_bounds(refused, path, field, text):
    told = refused(path, AROUND[path] | {field: text})
    assert BAD[text] in str(told)
    if path == "/api/jobs":
        assert told["error"]["field"] == field


@pytest.mark.parametrize("place", range(len(BAD)))
def test_a_style_has_them_too(refused, place):
    assert [*BAD.values()][place] in str(refused("/api/jobs", AROUND["/api/jobs"] | {"styles": [str(place)]}))


def test_many_pictures_share_a_budget(server, refused):
    body = AROUND["/api/jobs"] | {"prompt": "{199$$" + " " * 999 + "$$" + "a|" * 299 + "a}"}
    assert "has" in str(refused("/api/jobs", body | {"count": 1}))
    assert "take more than 400000 characters" in str(refused("/api/jobs", body | {"count": 64}))


def test_the_second_pass_is_read_as_it_will_be_drawn(server, refused):
    """Its share of the steps begins at 1; what stands there is not read in the first pass."""
    late = AROUND["/api/jobs"] | {"prompt": "[a:(b:99999):1.5]"}
    assert "prompt: the weight 99999 of 'b' is out of bounds" in str(refused("/api/jobs", late))
    first = {name: value for name, value in late.items() if name not in ("hires", "strength")}
    assert server.drawn(**first)["state"] == "done"


def test_what_is_read_in_comfyuis_notation_is_checked_in_it(server, refused):
    body = {"prompt": "(a:1e9)", "like": "comfyui", "steps": 1, "size": [32, 32]}
    assert "the weight 1e+09 of 'a' is out of bounds" in str(refused("/api/jobs", body))
    assert server.drawn(**body | {"prompt": "[a:b:0.5] AND c:99999"})["state"] == "done"  # text there


@pytest.mark.parametrize(("name", "value"), [
    ("hires_prompt", "a"), ("hires_negative", "a"), ("hires_steps", 2), ("hires_sampler", "euler"),
    ("hires_spacing", "karras"), ("hires_guidance", 3),
])  # fmt: skip
def test_settings_of_a_second_pass_need_one(server, refused, name, value):
    error = refused("/api/jobs", {"prompt": "p", name: value})["error"]
    said = f"{name.replace('_', ' ')} has no effect without hires; give both, or leave it out"
    assert error["field"] == name and error["message"] == said
    grid = {"prompt": "p", name: value, "size": [32, 32], "strength": 0.5, "steps": 4}
    assert server.drawn(**grid, grid=[{"name": "hires", "values": [2]}])["state"] == "done"


@pytest.mark.parametrize(("name", "value", "need"), [
    ("upscaler", "lanczos", "hires"), ("variation_seed", 9, "variation_strength"), ("apg_parallel", 0.5, "apg"),
    ("apg_momentum", 0.1, "apg"),
])  # fmt: skip
def test_settings_without_what_they_belong_to_are_refused(server, refused, name, value, need):
    """Otherwise they would stand in the picture's text, and have had no part in it."""
    error = refused("/api/jobs", {"prompt": "p", name: value})["error"]
    assert error["field"] == name
    assert error["message"] == f"{name.replace('_', ' ')} has no effect without {need.replace('_', ' ')}; give both, " \
                               "or leave it out"  # fmt: skip
    with_need = {"prompt": "p", name: value, need: 1.5 if need == "hires" else 0.5, "size": [32, 32], "steps": 4}
    assert server.drawn(**with_need)["state"] == "done"


def test_steps_of_the_second_pass_are_bounded(refused):
    error = refused("/api/jobs", AROUND["/api/jobs"] | {"hires_steps": 21})["error"]
    assert error["field"] == "hires_steps" and "hires steps 21 is out of range; choose 1 to 20" in error["message"]


def test_a_lora_of_the_second_pass_is_not_taken_for_text(refused):
    error = refused("/api/jobs", AROUND["/api/jobs"] | {"hires_prompt": "__inked__"})["error"]
    assert error["field"] == "hires_prompt" and "<lora:ink> has no effect there" in error["message"]


def test_a_word_of_the_second_pass_is_used(server):
    job = server.drawn(**AROUND["/api/jobs"] | {"hires_prompt": "a fluffy-one"})
    assert server.get(f"/api/images/{job['images'][0]}").json()["settings"]["embeddings"] == ["fluffy-one"]


@pytest.mark.parametrize("body", [
    {"model": "a" * 2000}, {"sampler": "a" * 2000}, {"styles": ["a" * 2000]}, {"embeddings": ["a" * 2000]},
    {"loras": [{"name": "a" * 2000}]}, {"grid": [{"name": "sampler", "values": ["euler" + " " * 2000]}]},
    {"grid": [{"name": "steps" + " " * 2000, "values": [1]}]}, {"controls": [{"name": "a [" + "0" * 2000 + "]"}]},
    {"image_prompts": [{"name": "a", "encoder": "b" * 2000, "images": ["x"]}]},
])  # fmt: skip
def test_names_are_bounded(refused, body):
    assert "at most 1000 characters" in str(refused("/api/jobs", {"prompt": "p"} | body))
