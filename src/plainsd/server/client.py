"""Client of a running server: submits jobs and downloads their pictures. Standard library only, without torch."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlsplit

from plainsd.errors import UserError
from plainsd.json_reader import BadJSON, parsed_json

TIMEOUT = 60.0  # seconds without data; the server sends a keep-alive every 15
RETRY_AFTER = 5.0  # seconds, where nothing else is said
MOST_LOSSES = 12  # of the connection in a row, until a job is left to the server
GATEWAY_ERRORS = (502, 503, 504)  # of a proxy whose server is away


class Busy(UserError):
    """The server's queue is full, or it is about to stop; it says for how many seconds."""

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


class Lost(UserError):
    """The server does not answer, or no longer. Its jobs are not cancelled: they go on when it runs."""

    seconds = RETRY_AFTER


class Progress(NamedTuple):
    step: int
    steps: int
    share: float  # 0 to 1
    waiting: int | None  # jobs before it, while it waits
    previews: dict[int, bytes]  # rough PNGs that are new


class Finished(NamedTuple):
    id: str
    png: bytes
    settings: dict[str, Any]


@dataclass
class Remote:
    """A server by its address, such as http://127.0.0.1:7860, or as it printed it: with `?token=...`."""

    url: str
    token: str | None = None
    opener: urllib.request.OpenerDirector = field(default_factory=urllib.request.build_opener, repr=False)

    def __post_init__(self) -> None:
        parts = address_parts(self.url)
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self.token = self.token or dict(parse_qsl(parts.query)).get("token")
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):  # no proxy for loopback
            self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def draw(self, **fields: Any) -> Iterator[Progress | Finished]:
        """Submits a job and follows it. Closing the generator cancels the job."""
        id = self.submit(**fields)
        with cancelling(self, [id]):
            yield from self.follow(id)

    def submit(self, **fields: Any) -> str:
        """POST /api/jobs. Returns the id. Busy if the queue is full or the server stops."""
        job = self.call("/api/jobs", fields)
        if not isinstance(job, dict) or not isinstance(job.get("id"), str):
            raise UserError(f"{self.url} answered what is not a job; is this a plainsd server?")
        return job["id"]

    def follow(self, id: str) -> Iterator[Progress | Finished]:
        """Progress until the job ends, then its pictures. UserError if it failed or was cancelled; Lost where the
        server does not come back."""
        name, losses = "", 0
        job: dict[str, Any] = {}
        while True:
            with suppress(Busy, Lost):
                for name, job in self.events(id):
                    losses = 0
                    if name == "progress":
                        urls = job["previews"].items()
                        rough = {int(index): base64.b64decode(url.partition(",")[2]) for index, url in urls}
                        yield Progress(job["step"], job["steps"], job["progress"], job["position"], rough)
            if name == "end":
                break
            if losses == MOST_LOSSES:
                raise Lost(
                    f"lost the connection to {self.url}; job {id} resumes when the server runs again; see its gallery"
                )
            losses += 1
            time.sleep(RETRY_AFTER)
        if job["state"] != "done":
            raise UserError(f"the server's job {id} {job['state']}: {job['error'] or 'it was cancelled'}")
        for picture in job["images"]:
            png, details = self.bytes(f"/api/images/{picture}.png"), self.call(f"/api/images/{picture}")
            yield Finished(picture, png, details["settings"])

    def cancel(self, id: str) -> None:
        """Cancels the job; no effect if it has ended or the server is not reachable."""
        with suppress(UserError):
            self.call(f"/api/jobs/{id}/cancel", {})

    def events(self, id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events of a job, until it ends or the connection does."""
        name = ""
        with self.open(f"/api/jobs/{id}/events") as stream, suppress(OSError, HTTPException):
            for line in stream:
                if not line.endswith(b"\n"):
                    return  # cut off
                key, _, value = line.rstrip(b"\n").partition(b": ")
                if key == b"event":
                    name = value.decode("utf-8", "replace")
                elif key == b"data":
                    yield name, self.parsed(value)

    def call(self, path: str, body: Any = None) -> dict[str, Any]:
        return self.parsed(self.bytes(path, body))

    def parsed(self, answer: bytes) -> Any:
        try:
            return parsed_json(answer)
        except BadJSON as error:
            raise UserError(f"{self.url} answered what is not JSON ({error}); is this a plainsd server?") from None

    def bytes(self, path: str, body: Any = None) -> bytes:
        with self.open(path, body) as answer:
            try:
                return answer.read()
            except (OSError, HTTPException) as error:
                raise Lost(f"lost the connection to {self.url} ({error!r}); try again") from None

    def open(self, path: str, body: Any = None):
        headers = {"Content-Type": "application/json"} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = None if body is None else json.dumps(body).encode()
        try:
            return self.opener.open(urllib.request.Request(self.url + path, data, headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            message = f"{self.url}: {message_of(error)}"
            again = error.headers.get("Retry-After")
            if error.code == 429 or (error.code == 503 and again):
                raise Busy(message, seconds_of(again or "")) from None
            raise (Lost if error.code in GATEWAY_ERRORS else UserError)(message) from None
        except (OSError, ValueError, HTTPException) as error:
            why = repr(error) if isinstance(error, HTTPException) else getattr(error, "reason", error)
            raise Lost(f"cannot reach {self.url} ({why}); is `plainsd serve` running there?") from None


@contextmanager
def cancelling(remote: Remote, ids: Sequence[str]) -> Iterator[None]:
    """Where it is left early, cancels these jobs, unless the server was lost."""
    try:
        yield
    except Lost:
        raise
    except BaseException:
        for id in ids:
            remote.cancel(id)
        raise


def address_parts(url: str) -> SplitResult:
    """UserError if it is not an address of a server."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # of the port or the brackets
        pass
    raise UserError(f"server {url!r} is not a URL; write it as http://127.0.0.1:7860")


def seconds_of(text: str) -> float:
    """Of Retry-After."""
    return float(text) if text.isdecimal() and len(text) < 9 else RETRY_AFTER


def message_of(error: urllib.error.HTTPError) -> str:
    try:
        return parsed_json(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        return f"it answered {error.code}; is this a plainsd server?"
