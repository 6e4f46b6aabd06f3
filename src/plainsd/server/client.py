"""The other end: jobs sent to a running server, pictures brought home. Only the standard library, and no torch."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from plainsd.errors import UserError

PATIENCE = 60.0                       # seconds without any sign of life; the server sends one every 15


class Progress(NamedTuple):
    step: int
    steps: int
    share: float                      # 0 to 1
    waiting: int | None               # jobs before it, while it waits
    previews: dict[int, bytes]        # rough PNGs that are new


class Finished(NamedTuple):
    id: str
    png: bytes
    settings: dict[str, Any]


@dataclass
class Remote:
    """A server by its address, such as http://127.0.0.1:7860."""

    url: str
    token: str | None = None
    opener: urllib.request.OpenerDirector = field(default_factory=urllib.request.build_opener, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"server {self.url!r} is no address; write it as http://127.0.0.1:7860")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):          # a proxy is of no use there
            self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def draw(self, **fields: Any) -> Iterator[Progress | Finished]:
        """POST /api/jobs and all that follows. Whoever stops listening cancels the job."""
        job = self.call("/api/jobs", fields)
        try:
            for name, data in self.events(job["id"]):
                if name == "end":
                    job = data
                    break
                previews = {
                    int(place): base64.b64decode(url.partition(",")[2]) for place, url in data["previews"].items()
                }
                yield Progress(data["step"], data["steps"], data["progress"], data["position"], previews)
        except GeneratorExit:
            self.call(f"/api/jobs/{job['id']}/cancel", {})
            raise
        if job["state"] != "done":
            raise UserError(f"the server's job {job['id']} {job['state']}: {job['error'] or 'somebody cancelled it'}")
        for id in job["images"]:
            yield Finished(id, self.bytes(f"/api/images/{id}.png"), self.call(f"/api/images/{id}")["settings"])

    def events(self, id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        name = ""
        with self.open(f"/api/jobs/{id}/events") as stream:
            for line in stream:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "event":
                    name = value
                elif key == "data":
                    yield name, json.loads(value)

    def call(self, path: str, body: Any = None) -> dict[str, Any]:
        return json.loads(self.bytes(path, body))

    def bytes(self, path: str, body: Any = None) -> bytes:
        with self.open(path, body) as answer:
            return answer.read()

    def open(self, path: str, body: Any = None):
        headers = {"Content-Type": "application/json"} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = None if body is None else json.dumps(body).encode()
        try:
            return self.opener.open(urllib.request.Request(self.url + path, data, headers), timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}: {message_of(error)}") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot reach {self.url} ({getattr(error, 'reason', error)}); is `plainsd serve` running there?"
            ) from None


def message_of(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        return f"it answered {error.code}; is this a plainsd server?"
