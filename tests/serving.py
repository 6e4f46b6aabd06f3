"""What the server's tests share: a model's folder, a server in a thread, and a brake on its worker."""

import base64
import json
import queue
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import requests
import torch
from conftest import TINY, tiny_sd
from PIL import Image
from safetensors.torch import save_file

import plainsd
from plainsd.adapters.lora import inject, save_lora
from plainsd.commands.serve import listening_socket, server_of
from plainsd.models.variants import Variant
from plainsd.server.api.app import create_app
from plainsd.server.api.security import Hosts
from plainsd.server.jobs import drawing
from plainsd.server.limits import Limits
from plainsd.server.pool import PoolOptions
from plainsd.server.service import Service


def model_folder(folder: Path, name: str = "tiny", seed: int = 0, variant: Variant = TINY, **unet) -> str:
    path = folder / name
    if not path.exists():
        plainsd.save(tiny_sd(variant, seed, **unet), path)
    return str(path)


def embedding_file(path: Path, seed: int, word: str = "emb_params", width: int = TINY.text[0].width) -> None:
    """An embedding of two random vectors: A1111's form, or with a word diffusers'."""
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    save_file({word: vectors}, path)


def lora_file(model: str, path: Path, seed: int) -> None:
    """A LoRA with random weights for a model."""
    sd = plainsd.load(model, device="cpu", dtype="float32")
    lora = inject(sd, rank=2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_lora(sd, path)


def open_service(models: list[str], data: Path, limits: Limits = Limits(), batch: int = 4, **options) -> Service:
    return Service.open(models, data, limits, PoolOptions("cpu", "float32", **options), batch=batch)


class Server:
    """A running server, and requests to it."""

    def __init__(self, service: Service, url: str, on_signal=None):
        self.service, self.url, self.session = service, url, requests.Session()
        self.on_signal = on_signal  # as the process gets it: (signal, frame)
        self.session.trust_env = False

    def get(self, path: str, **more) -> requests.Response:
        return self.session.get(self.url + path, timeout=60, **more)

    def post(self, path: str, body=None, **more) -> requests.Response:
        return self.session.post(self.url + path, json=body, timeout=60, **more)

    def asking(self, path: str, body: dict, token: str = "") -> HTTPConnection:
        """A request, sent by a connection of its own: `getresponse` waits for the answer, `close` hangs up."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        connection.request("POST", path, json.dumps(body), headers)
        return connection

    def job(self, **body) -> dict:
        answer = self.post("/api/jobs", body)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def wait(self, id: str, seconds: float = 60) -> dict:
        """The job when it has ended."""
        end = time.monotonic() + seconds
        while (job := self.get(f"/api/jobs/{id}").json())["state"] in ("queued", "running"):
            assert time.monotonic() < end, job
            time.sleep(0.02)
        return job

    def drawn(self, **body) -> dict:
        job = self.wait(self.job(**body)["id"])
        assert job["state"] == "done", job
        return job

    def picture(self, id: str) -> Image.Image:
        return Image.open(BytesIO(self.get(f"/api/images/{id}.png").content))


@contextmanager
def served(
    service: Service,
    token: str | None = None,
    hosts: Hosts | None = None,
    port: int = 0,
    drain: float = 0,
    tokens: Path | None = None,
):
    sock = listening_socket("127.0.0.1", port)
    app = create_app(service, hosts or Hosts("127.0.0.1"), token, tokens=tokens)
    server = server_of(app, 1, drain)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield Server(service, f"http://127.0.0.1:{sock.getsockname()[1]}", server.handle_exit)
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
        assert not thread.is_alive()


class Brake:
    """Lets the worker take one step for each `step()`; `off()` lets it run."""

    def __init__(self, monkeypatch):
        self.steps, self.batches, self.free = queue.Queue(), [], threading.Event()
        self.began, original = queue.Queue(), drawing.batch

        def slowed(sd, each, *pictures, **more):
            events = original(sd, each, *pictures, **more)
            self.batches.append(list(each))
            self.began.put(len(each))
            return Slowed(self, events)

        monkeypatch.setattr(drawing, "batch", slowed)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps.put(None)

    def off(self) -> None:
        self.free.set()
        self.step()

    def wait(self) -> int:
        """Until the next batch has begun; how many pictures it has."""
        return self.began.get(timeout=60)


class Slowed:
    def __init__(self, brake: Brake, events):
        self.brake, self.events, self.steps = brake, events, events.steps

    def __iter__(self):
        return self

    def __next__(self):
        if not self.brake.free.is_set():
            self.brake.steps.get(timeout=60)
        return next(self.events)

    def close(self):
        self.events.close()


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def png_bytes(image: Image.Image, **more) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG", **more)
    return buffer.getvalue()


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(png_bytes(image)).decode()


def from_base64(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


def alike(a: Image.Image, b: Image.Image, most: int = 1) -> bool:
    """Equal to `most` grey levels a pixel."""
    a, b = (torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).int() for image in (a, b))
    return a.shape == b.shape and int((a - b).abs().max()) <= most
