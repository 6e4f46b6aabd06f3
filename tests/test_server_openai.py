"""OpenAI's images API, spoken by OpenAI's own Python client."""

import base64
import errno
import json
import threading
from contextlib import ExitStack, closing
from functools import partial
from io import BytesIO
from typing import get_args

import openai
import pytest
from conftest import noise_picture
from openai.types import ImageModel
from PIL import Image
from serving import Brake, alike, from_base64, model_folder, open_service, png_bytes, served, until

import plainsd
from plainsd.errors import UserError
from plainsd.server.jobs import drawing
from plainsd.server.limits import Limits

TOKEN = "a-token-for-openai"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with served(
        open_service([model], tmp_path_factory.mktemp("data"), Limits(queue=8, pixels=128 * 128)), TOKEN
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=TOKEN, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def sd(model):
    return plainsd.load(model, device="cpu", dtype="float32")


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def test_generate(client, sd):
    answer = client.images.generate(
        prompt="a red apple",
        model="tiny",
        n=2,
        size="64x72",
        response_format="b64_json",
        extra_body={"seed": 5, "steps": 3},
    )
    expected = plainsd.final(plainsd.text_to_image(sd, "a red apple", size=(64, 72), seed=5, steps=3, count=2))
    pictures = [from_base64(one.b64_json) for one in answer.data]
    assert len(pictures) == 2 and all(alike(a, b) for a, b in zip(pictures, expected, strict=True))
    assert answer.created > 1.7e9 and answer.data[0].url is None


def test_generate_with_nothing_but_a_prompt_gives_address_and_bytes(client, server):
    one = client.images.generate(prompt="a pear").data[0]
    file = server.get(one.url.removeprefix(server.url), headers={"Authorization": f"Bearer {TOKEN}"})
    assert file.content == base64.b64decode(one.b64_json)
    assert Image.open(BytesIO(file.content)).info["parameters"].startswith("a pear\n")


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_file_formats(client, kind):
    one = client.images.generate(
        prompt="p", output_format=kind, output_compression=80, response_format="b64_json", extra_body={"steps": 1}
    ).data[0]
    assert from_base64(one.b64_json).format == kind.upper()


def test_edit_inside_the_transparent_part(client, sd):
    image = noise_picture(64, 64)
    window = Image.new("RGBA", (64, 64), "black")
    window.paste((0, 0, 0, 0), (16, 16, 48, 48))
    hole = Image.new("L", (64, 64), 0)
    hole.paste(255, (16, 16, 48, 48))
    expected = plainsd.final(plainsd.inpaint(sd, "a hat", image, hole, seed=4))[0]
    one = client.images.edit(image=("a.png", png_bytes(image)), mask=("m.png", png_bytes(window)), prompt="a hat",
                             response_format="b64_json", extra_body={"seed": 4}).data[0]  # fmt: skip
    assert alike(from_base64(one.b64_json), expected)
    holed = image.copy()
    holed.putalpha(Image.eval(hole, lambda level: 255 - level))
    same = client.images.edit(image=[("a.png", png_bytes(holed))], prompt="a hat", extra_body={"seed": 4}).data[0]
    assert from_base64(same.b64_json).crop((0, 0, 64, 16)).tobytes() == image.crop((0, 0, 64, 16)).tobytes()
    whole = client.images.edit(
        image=("a.png", png_bytes(image)), prompt="a hat", extra_body={"seed": 4, "strength": 0.5}
    ).data[0]
    assert alike(from_base64(whole.b64_json), plainsd.final(plainsd.image_to_image(sd, "a hat", image, 0.5, seed=4))[0])


def test_an_edit_of_another_shape_is_cropped(client, sd):
    """Clients send one of a few sizes, whatever the picture's shape."""
    image = noise_picture(96, 64)
    middle = image.crop((16, 0, 80, 64))
    one = client.images.edit(image=("a.png", png_bytes(image)), prompt="a hat", size="64x64",
                             extra_body={"seed": 4, "strength": 0.5}).data[0]  # fmt: skip
    expected = plainsd.final(plainsd.image_to_image(sd, "a hat", middle, 0.5, seed=4))[0]
    assert alike(from_base64(one.b64_json), expected)
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (32, 16, 64, 48))
    one = client.images.edit(image=("a.png", png_bytes(image)), prompt="a hat", size="64x64", extra_body={"seed": 4})
    drawn = from_base64(one.data[0].b64_json)
    assert drawn.crop((0, 0, 64, 16)).tobytes() == middle.crop((0, 0, 64, 16)).tobytes()
    assert not alike(drawn.crop((16, 16, 48, 48)), middle.crop((16, 16, 48, 48)))


def test_strength_0_of_an_edit_is_not_1(client, sd):
    picture = Image.new("RGBA", (64, 64), "red")
    picture.paste((0, 0, 0, 0), (16, 16, 48, 48))
    with pytest.raises(openai.UnprocessableEntityError, match="strength 0"):
        client.images.edit(image=("a.png", png_bytes(picture)), prompt="p", extra_body={"strength": 0})


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_streaming_with_partial_pictures(client, server, brake, output_format):
    how = {"output_format": output_format, "extra_body": {"steps": 8}}
    stream = client.images.generate(prompt="slow", stream=True, partial_images=2, **how)
    brake.wait()
    events = []
    job = next(iter(server.service.queue.jobs.values()))
    for step in (3, 6):  # a third and two thirds of 8, rounded up
        brake.step(step - job.step)
        events.append(next(stream))
        assert job.step == step
    brake.off()
    events += list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    for event in events:
        image = from_base64(event.b64_json)
        assert image.format == output_format.upper() and f"{image.width}x{image.height}" == event.size
    assert from_base64(events[-1].b64_json).size == (64, 64) and events[-1].size == "64x64"


def test_an_edit_streams_too(client, brake):
    stream = client.images.edit(
        image=("a.png", png_bytes(noise_picture(64, 64))),
        prompt="slow",
        stream=True,
        partial_images=1,
        extra_body={"steps": 8, "strength": 0.5},
    )
    brake.wait()
    brake.step(3)  # of 4
    events = [next(stream)]
    brake.off()
    events += list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert from_base64(events[-1].b64_json).size == (64, 64) and events[-1].size == "64x64"


def test_a_failure_amid_a_stream_is_an_event(client, server, monkeypatch):
    def wrong(*_, **__):
        raise UserError("the picture is not finite")

    monkeypatch.setattr(drawing, "batch", wrong)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.images.generate(prompt="p", stream=True))
    with closing(server.asking("/v1/images/generations", {"prompt": "p", "stream": True}, TOKEN)) as connection:
        answer = connection.getresponse()
        name, data = answer.read().decode().strip().split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (answer.status, name, told["type"]) == (200, "event: error", "error")
    assert "not finite" in told["error"]["message"]


def test_addresses_alone(client, server):
    (one,) = client.images.generate(prompt="p", response_format="url", extra_body={"steps": 1}).data
    assert one.b64_json is None and one.url.startswith(f"{server.url}/api/images/")


def test_what_is_accepted_without_effect(client):
    fixed = {"prompt": "p", "response_format": "b64_json", "extra_body": {"seed": 3, "steps": 2}}
    image = ("a.png", png_bytes(noise_picture(64, 64)))
    for task, more in (
        (client.images.generate, {"moderation": "low", "quality": "high", "style": "natural"}),
        (partial(client.images.edit, image=image), {"input_fidelity": "high", "quality": "low"}),
    ):
        plain, other = (from_base64(task(**fixed, **given).data[0].b64_json) for given in ({}, more))
        assert alike(plain, other)


def test_users_take_turns(server, brake):
    """Of one token and one address: `user` tells them apart."""
    waiting, queue = [], server.service.queue

    def ask(user, steps):  # of other steps each, so that none share a batch
        body = {"prompt": "p", "user": user, "steps": steps}
        waiting.append(stack.enter_context(closing(server.asking("/v1/images/generations", body, TOKEN))))
        until(lambda: len(queue.jobs) == len(waiting))

    with ExitStack() as stack:
        ask("ann", 1), brake.wait()
        ask("ann", 2), ask("ann", 3), ask("bob", 4)
        brake.off()
        assert [connection.getresponse().status for connection in waiting] == [200] * 4
    assert [batch[0].steps for batch in brake.batches] == [1, 2, 4, 3]


def test_models(client):
    listed = {model.id: model for model in client.models.list()}
    assert next(iter(listed)) == "tiny" and {"gpt-image-1", "dall-e-3", "dall-e-2"} <= set(listed)
    assert [name for name, model in listed.items() if getattr(model, "alias_of", None) != "tiny"] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "plainsd"


def test_programs_that_hard_code_a_name_of_openais_draw_with_the_default(client, sd):
    (expected,) = plainsd.final(plainsd.text_to_image(sd, "p", size=(64, 64), seed=1, steps=1))
    asked = {"prompt": "p", "size": "64x64", "response_format": "b64_json", "extra_body": {"seed": 1, "steps": 1}}
    for name in ("gpt-image-1", "dall-e-3"):
        (made,) = client.images.generate(model=name, **asked).data
        assert alike(from_base64(made.b64_json), expected)
    for name in get_args(ImageModel):  # all that the client itself knows
        assert client.models.retrieve(name).alias_of == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_whose_fault_a_failure_is_shows_in_its_status(client, server, monkeypatch):
    def wrong(*_, **__):
        raise UserError("the picture is not finite")

    with monkeypatch.context() as patched, pytest.raises(openai.UnprocessableEntityError, match="not finite") as asked:
        patched.setattr(drawing, "batch", wrong)
        client.images.generate(prompt="p", size="64x64")
    assert asked.value.status_code == 422 and "x-should-retry" not in asked.value.response.headers

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server.service.store, "write", full)
    with pytest.raises(openai.InternalServerError, match="No space left on device") as failed:
        client.images.generate(prompt="p", size="64x64")
    assert failed.value.status_code == 500 and failed.value.response.headers["x-should-retry"] == "false"


def test_a_cancelled_job_is_not_asked_for_again(client, server, brake):
    def cancel():
        brake.wait()
        server.service.queue.cancel(next(iter(server.service.queue.jobs)))

    threading.Thread(target=cancel).start()
    with pytest.raises(openai.ConflictError, match="was cancelled") as cancelled:
        client.images.generate(prompt="p", size="64x64")
    assert cancelled.value.response.headers["x-should-retry"] == "false"


def test_errors_are_those_that_the_client_knows(client, server, brake):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-token-here").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="p", model="sd-turbo")
    assert missing.value.code == "model_not_found" and "unknown model 'sd-turbo'" in str(missing.value)
    wrong = {
        "size": {"size": "big"}, "n": {"n": 99}, "steps": {"extra_body": {"steps": 0}},
        "sampler": {"extra_body": {"sampler": "x"}},
        "stepps": {"extra_body": {"stepps": 1}}, "background": {"background": "transparent"},
    }  # fmt: skip
    for field, more in wrong.items():
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.images.generate(prompt="p", **more)
        assert refused.value.param == field and (field != "n" or "n 99 is out of range" in str(refused.value))
    with pytest.raises(openai.UnprocessableEntityError, match="is not a PNG, JPEG or WebP"):
        client.images.edit(image=("a.svg", b"<svg/>"), prompt="p")
    with pytest.raises(openai.UnprocessableEntityError, match="0 files were sent|2 files were sent"):
        client.images.edit(image=[("a.png", png_bytes(Image.new("L", (8, 8))))] * 2, prompt="p")
    mask = ("m.png", png_bytes(Image.new("RGB", (64, 64))))
    with pytest.raises(openai.UnprocessableEntityError, match="no transparent part"):
        client.images.edit(image=mask, mask=mask, prompt="p")
    failing = client.with_options(timeout=60)
    brake.off()
    with pytest.raises(openai.UnprocessableEntityError, match="weight 1e\\+09"):
        failing.images.generate(prompt="(a:1000000000)")


def test_a_full_queue_is_a_rate_limit_and_a_client_that_hangs_up_cancels(client, server, brake):
    with closing(server.asking("/v1/images/generations", {"prompt": "nobody waits for this"}, TOKEN)):
        assert brake.wait() == 1
    until(lambda: not server.service.queue.jobs)
    assert server.service.store.jobs(("cancelled",), 1)[0].settings[0].prompt == "nobody waits for this"
    jobs = [
        server.session.post(
            server.url + "/api/jobs", json={"prompt": "p"}, headers={"Authorization": f"Bearer {TOKEN}"}
        ).json()
        for _ in range(4)
    ]
    with pytest.raises(openai.RateLimitError) as refused:
        client.images.generate(prompt="p")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for job in jobs:
        server.service.queue.cancel(job["id"])
