"""The other end of the API: what `plainsd generate --server` uses."""

import base64
import socket
import threading
from contextlib import contextmanager
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import pytest
from conftest import noise_picture
from PIL import Image
from serving import (
    Brake,
    alike,
    base64_of,
    embedding_file,
    lora_file,
    model_folder,
    open_service,
    served,
    until,
)  # fmt: skip

import plainsd
from plainsd.cli import main
from plainsd.commands import remote as remote_module
from plainsd.commands.generate import Generate
from plainsd.commands.remote import NOT_SENT, remote_pictures, submitted
from plainsd.errors import UserError
from plainsd.server import client as client_module
from plainsd.server.client import Busy, Finished, Lost, Progress, Remote
from plainsd.server.limits import Limits
from plainsd.server.schema import JobRequest

TOKEN = "a-token-for-clients"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models, adapters = [model_folder(folder), model_folder(folder, "other", 1)], tmp_path_factory.mktemp("adapters")
    lora_file(models[0], adapters / "paper.safetensors", 1)
    embedding_file(adapters / "fluffy-one.safetensors", 1)
    embedding_file(adapters / "cat.safetensors", 2, "<cat>")
    service = open_service(models, tmp_path_factory.mktemp("data"), loras=adapters, embeddings=adapters)
    with served(service, TOKEN) as server:
        yield server


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def test_pictures_come_home(server):
    events = list(Remote(server.url, TOKEN).draw(prompt="a red apple", seed=3, count=2, steps=4))
    pictures = [event for event in events if isinstance(event, Finished)]
    sd = plainsd.load(server.service.models.known["tiny"].source, device="cpu", dtype="float32")
    expected = plainsd.final(plainsd.text_to_image(sd, "a red apple", seed=3, count=2, steps=4))
    assert all(
        alike(Image.open(BytesIO(event.png)), picture) for event, picture in zip(pictures, expected, strict=True)
    )
    assert [event.settings["seed"] for event in pictures] == [3, 4]
    assert isinstance(events[0], Progress) and events[0].share < 1
    image = noise_picture(64, 64)
    *_, over = Remote(server.url, TOKEN).draw(prompt="p", image=base64_of(image), strength=0.5, seed=1)
    assert over.settings["strength"] == 0.5


def test_who_stops_listening_cancels(server, brake):
    events = Remote(server.url, TOKEN).draw(prompt="slow")
    assert isinstance(next(events), Progress)
    brake.wait()
    events.close()
    until(lambda: not server.service.queue.jobs)
    assert server.service.store.jobs(("cancelled",), 1)[0].settings[0].prompt == "slow"


def test_errors_are_one_line(server):
    def said(remote, **fields):
        with pytest.raises(UserError) as refused:
            list(remote.draw(prompt="p", **fields))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "unknown sampler 'x'" in said(Remote(server.url, TOKEN), sampler="x")
    assert "the token is wrong" in said(Remote(server.url, "wrong"))
    assert "weight 1e+09" in said(Remote(server.url, TOKEN), negative="(a:1000000000)")
    assert "is `plainsd serve` running there?" in said(Remote("127.0.0.1:1"))
    for address in ("ftp://x", "http://localhost:abc", "http://localhost:99999", "http://[::1", "http://"):
        with pytest.raises(UserError, match="is not a URL"):
            Remote(address)
    assert Remote("localhost:7860/some/path").url == "http://localhost:7860"
    assert Remote("http://localhost:7860/?token=abc").token == "abc"


@contextmanager
def answering(answer: bytes):
    """Something that answers its first request so; its address."""

    def answered():
        with listening.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answered).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("answer, says", [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "is `plainsd serve` running there?"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "lost the connection to"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{\n", "answered what is not JSON"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "answered what is not a job"),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 99\r\n\r\n{", "it answered 404; is this a plainsd server?"),
])  # fmt: skip
def test_what_something_else_answers_is_one_line(answer, says):
    with answering(answer) as address, pytest.raises(UserError) as refused:
        Remote(address).submit(prompt="p")
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("head, kind, seconds", [
    (b"429 Too Many Requests", Busy, 5), (b"503 Service Unavailable\r\nRetry-After: 7", Busy, 7),
    (b"503 Service Unavailable", Lost, 5), (b"502 Bad Gateway", Lost, 5),
])  # fmt: skip
def test_a_server_that_is_away_is_told_from_a_refusal(head, kind, seconds):
    answer = b"HTTP/1.1 " + head + b"\r\nContent-Length: 0\r\n\r\n"
    with answering(answer) as address, pytest.raises(kind) as away:
        Remote(address).submit(prompt="p")
    assert away.value.seconds == seconds


# --- plainsd generate --server ---------------------------------------------------------------------------------------


@pytest.fixture
def generate(server, tmp_path, capsys, monkeypatch):
    """The command there, and, with `here`, without --server: (code, files, stderr)."""
    monkeypatch.setenv("PLAINSD_TOKEN", TOKEN)
    model = server.service.models.known["tiny"].source

    def run(*arguments, here=False):
        where = ["--model", model, "--device", "cpu", "--dtype", "float32"] if here else ["--server", server.url]
        out = tmp_path / ("here" if here else "there")
        code = main(["generate", *map(str, arguments), *where, "--out", str(out)])
        said = capsys.readouterr()
        return code, said.out.split(), said.err

    return run


@pytest.mark.parametrize("arguments", [
    ("a red apple", "--negative", "blue", "--count", 3, "--steps", 3, "--seed", 7, "--sampler", "euler_a"),
    ("a boat", "--image", "PHOTO", "--strength", 0.6, "--steps", 4),
    ("a boat", "--image", "PHOTO", "--mask", "MASK", "--steps", 3),
    ("x", "--count", 2, "--variation-seed", 9, "--variation-strength", 0.2, "--steps", 2),
    ("--prompts", "PROMPTS", "--count", 2, "--steps", 2, "--interval", 0.1, 20),
    ("compared", "--grid", "guidance=1,3", "--grid", "steps=1,2"),
    ("a boat", "--image", "PHOTO", "--outpaint", 8, 0, 16, 24, "--steps", 3),
    ("a fluffy-one", "--embedding", "WORD", "--steps", 3),
    ("a boat", "--refiner", "other", "--handover", 0.5, "--steps", 4),
])  # fmt: skip
def test_the_same_command_draws_the_same_there_as_here(generate, server, tmp_path, arguments):
    noise_picture(72, 64).save(tmp_path / "PHOTO.png")
    Image.new("L", (72, 64)).save(tmp_path / "MASK.png")
    with Image.open(tmp_path / "MASK.png") as mask:
        mask.paste(255, (16, 16, 48, 48))
        mask.save(tmp_path / "MASK.png")
    (tmp_path / "PROMPTS.txt").write_text("an owl\na fox\na robot\n")
    embedding_file(tmp_path / "fluffy-one.safetensors", 1)
    files = {"WORD": tmp_path / "fluffy-one.safetensors",
             "PHOTO": tmp_path / "PHOTO.png", "MASK": tmp_path / "MASK.png",
             "PROMPTS": tmp_path / "PROMPTS.txt"}  # fmt: skip
    arguments = [files.get(one, one) for one in arguments]
    places = [server.service.models.known[one].source if one == "other" else one for one in arguments]
    (code, there, err), (_, here, _) = generate(*arguments), generate(*places, here=True)
    assert code == 0, err
    assert [Path(path).name for path in there] == [Path(path).name for path in here] and there
    for one, other in zip(there, here, strict=True):
        with Image.open(one) as image, Image.open(other) as expected:
            assert alike(image, expected) and image.info.get("parameters") == expected.info.get("parameters")


def test_a_lora_a_preview_and_from(generate, server, tmp_path, brake):
    preview = tmp_path / "p.png"

    def steps():
        brake.step(2)
        until(preview.exists)
        brake.off()

    threading.Thread(target=steps).start()
    flags = ("--lora", "paper.safetensors:0.7", "--preview", preview, "--steps", 3)
    code, (path,), _ = generate("a boat", *flags)
    assert code == 0 and "<lora:paper:0.7>" in Image.open(path).info["parameters"]
    assert Image.open(preview).size == (64, 64)
    _, (again,), _ = generate("--from", path)
    assert alike(Image.open(again), Image.open(path), 0)


@pytest.mark.parametrize("prompt, strength", [
    ("a boat <lora:paper:0.2:0.7>", ""),  # the tag's strengths, of text encoders and UNet
    ("a boat <lora:paper:0.7>", ":0.4"),  # the flag's
    ("a boat", ""),
    ("a boat", ":0.4"),
])  # fmt: skip
def test_a_lora_by_flag_and_by_tag_is_there_once(generate, server, tmp_path, prompt, strength):
    """As here: a picture's tags, beside the flag that gives the file."""
    lora_file(server.service.models.known["tiny"].source, tmp_path / "paper.safetensors", 1)
    flag = ("--lora", f"{tmp_path / 'paper.safetensors'}{strength}")
    code, (first,), err = generate(prompt, *flag, "--steps", 2)
    assert code == 0, err
    for asked in ((prompt, *flag, "--steps", 2), ("--from", first, *flag)):
        (code, (there,), err), (_, (here,), _) = generate(*asked), generate(*asked, here=True)
        assert code == 0, err
        with Image.open(there) as image, Image.open(here) as expected:
            assert alike(image, expected) and image.info["parameters"] == expected.info["parameters"]
            assert image.info["parameters"].count("<lora:paper") == 1


def test_from_asks_for_the_same_words_refiner_and_margins(generate, tmp_path):
    noise_picture(64, 64).save(tmp_path / "photo.png")
    drawing = ("--image", tmp_path / "photo.png", "--outpaint", 8, 8, 0, 0)
    flags = ("--embedding", "any/where.pt:<cat>", "--refiner", "other", "--handover", 0.6, "--steps", 4, *drawing)
    code, (path,), err = generate("a <cat>", *flags)
    assert code == 0 and "Embeddings: <cat>" in Image.open(path).info["parameters"], err
    code, (again,), err = generate("--from", path, "--image", tmp_path / "photo.png")
    assert alike(Image.open(again), Image.open(path), 0)
    assert Image.open(again).info == Image.open(path).info
    code, _, err = generate("--from", path)
    assert code == 2 and "outpaint without an image" in err
    code, (other,), err = generate("a boat", "--from", path, *drawing)
    assert code == 0 and "Embeddings" not in Image.open(other).info["parameters"]


def test_from_takes_signs_of_choices_as_they_are(generate, server, tmp_path):
    """As here: of a picture's texts the choices are made."""
    body = {"prompt": "{{{boat}}} :{", "negative_prompt": "a {b|c}", "seed": 1, "steps": 2}
    answer = server.post("/sdapi/v1/txt2img", body, headers={"Authorization": f"Bearer {TOKEN}"})
    first = tmp_path / "first.png"
    first.write_bytes(base64.b64decode(answer.json()["images"][0]))
    code, (again,), err = generate("--from", first)
    assert code == 0, err
    with Image.open(again) as image, Image.open(first) as expected:
        assert alike(image, expected, 0) and image.info == expected.info


def test_what_a_server_does_not_take_is_one_line(generate):
    for flags, says in (
        (["--device", "cpu"], "--device does not go with --server"), (["--model", "none"], "unknown model 'none'"),
        (["--lora", "none.safetensors"], "unknown LoRA 'none'"), (["--image", "none.png"], "cannot read 'none.png'"),
        (["--outpaint", 8, 8, 8, 8], "outpaint without an image"), (["--refiner", "none"], "unknown refiner 'none'"),
        (["--embedding", "none.pt"], "unknown embedding 'none'"), (["--handover", 0.5], "without a refiner"),
        (["--vae", "x"], "--vae does not go with --server"), (["--sampler", "eular"], "did you mean 'euler'"),
    ):  # fmt: skip
        code, _, err = generate("p", *flags)
        assert code == 2 and says in err and err.count("\n") == 1, err


def test_every_flag_is_sent_or_refused():
    sent = {"prompts", "lora", "embedding", "from_"} | JobRequest.model_fields.keys()
    sent |= {"control", "control_image", "control_range", "guess", "control_mode", "preprocess", "control_kind"}
    sent |= {"image_prompt", "image_prompt_image", "image_prompt_mask", "image_prompt_range", "image_encoder"}
    here = {"out", "format", "preview", "server", "wildcards", "combinations", "style"}  # settled before it is sent
    assert {field.name for field in fields(Generate)} - sent - here == set(NOT_SENT)


def test_a_job_that_is_refused_cancels_those_before_it():
    sent, cancelled = [], []

    class Stub:
        def submit(self, prompt):
            if prompt == "three":
                raise UserError("refused; try another")
            sent.append(prompt)
            return prompt

        def cancel(self, id):
            cancelled.append(id)

    with pytest.raises(UserError, match="refused"):
        list(remote_pictures(Stub(), [{"prompt": prompt} for prompt in ("one", "two", "three")], None))
    assert cancelled == sent == ["one", "two"]


class FullQueue:
    """A server that takes one job at a time, and refuses so many tries before."""

    def __init__(self, refusals=0):
        self.waiting, self.drawn, self.cancelled, self.refusals = [], [], [], refusals

    def submit(self, prompt):
        if self.waiting or self.refusals:
            self.refusals -= not self.waiting
            raise Busy("the queue is full with 1 jobs; try again in 5 s", seconds=5)
        self.waiting.append(prompt)
        return prompt

    def follow(self, id):
        self.waiting.remove(id)
        self.drawn.append(id)
        return iter([Finished(id, b"", {})])

    def cancel(self, id):
        self.cancelled.append(id)


def test_a_full_queue_cancels_nothing(monkeypatch):
    slept = []
    monkeypatch.setattr(remote_module.time, "sleep", slept.append)
    jobs = [{"prompt": prompt} for prompt in ("one", "two", "three")]
    server = FullQueue(refusals=2)
    assert len(list(remote_pictures(server, jobs, None))) == 3
    assert server.drawn == ["one", "two", "three"] and server.cancelled == [] and slept == [5, 5]
    with pytest.raises(Busy, match="the queue is full"):
        list(remote_pictures(FullQueue(refusals=1000), jobs, None))
    assert len(slept) == 2 + remote_module.MOST_WAITS


class Away(Remote):
    """A server that takes a job, and does not answer any more."""

    cancelled: list[str] = []

    def submit(self, **fields):
        return "a"

    def events(self, id):
        yield "progress", {"step": 1, "steps": 2, "progress": 0.5, "position": None, "previews": {}}

    def cancel(self, id):
        self.cancelled.append(id)


@pytest.mark.parametrize("listen", [lambda remote: remote.draw(prompt="p"),
                                    lambda remote: remote_pictures(remote, [{"prompt": "p"}] * 2, None)])  # fmt: skip
def test_what_a_lost_server_has_is_not_cancelled(monkeypatch, listen):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        monkeypatch.setattr(Away, "events", lambda remote, id: iter(()))

    monkeypatch.setattr(client_module.time, "sleep", sleep)
    with pytest.raises(Lost, match="lost the connection to .*; job a resumes when the server runs again"):
        list(listen(Away("127.0.0.1:1")))
    assert slept == [client_module.RETRY_AFTER] * client_module.MOST_LOSSES and Away.cancelled == []


def test_a_server_that_stops_is_waited_for_by_the_first_job_alone(monkeypatch):
    """Its place is taken by another within the time that it says, or a little later."""
    monkeypatch.setattr(remote_module.time, "sleep", lambda seconds: None)
    answers = [Busy("the server is about to stop; try again in 5 s", 5), Lost("cannot reach it"), "an id"]

    class Restarting:
        def submit(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    assert submitted(Restarting(), {}, is_first=True) == "an id"
    answers += [Lost("cannot reach it"), "never asked"]
    with pytest.raises(Lost):
        submitted(Restarting(), {}, is_first=True)


def test_a_server_that_restarts_is_followed_again(tmp_path, monkeypatch, brake):
    monkeypatch.setattr(client_module, "RETRY_AFTER", 0.05)
    monkeypatch.setattr(client_module, "MOST_LOSSES", 10**6)
    model, pictures = model_folder(tmp_path), []
    with served(open_service([model], tmp_path / "data", batch=1)) as first:
        jobs = [{"prompt": prompt, "steps": 2} for prompt in ("one", "two")]
        port = int(first.url.rpartition(":")[2])
        listening = threading.Thread(target=lambda: pictures.extend(remote_pictures(Remote(first.url), jobs, None)))
        listening.start()
        brake.wait()
        until(lambda: len(first.service.queue.jobs) == 2)
        first.service.stop()
        brake.step()
    brake.off()
    with served(open_service([model], tmp_path / "data"), port=port):
        listening.join(60)
    assert [one.settings["prompt"] for each in pictures for one in each] == ["one", "two"]


def test_a_server_says_when_its_queue_has_room(tmp_path):
    service = open_service([model_folder(tmp_path)], tmp_path / "data", Limits(queue=1))
    service.start = lambda: None  # nothing is drawn
    with served(service) as server:
        remote = Remote(server.url)
        remote.submit(prompt="p")
        with pytest.raises(Busy, match="the queue is full") as busy:
            remote.submit(prompt="p")
        assert busy.value.seconds >= 1


def test_an_interrupt_cancels_what_was_sent(generate, server, brake, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("plainsd.commands.remote.Remote.follow", interrupted)
    assert generate("--prompts", tmp_path / "prompts.txt")[0] == 130
    until(lambda: not server.service.queue.jobs)
    assert {job.settings[0].prompt for job in server.service.store.jobs(("cancelled",), 3)} == {"one", "two", "three"}
