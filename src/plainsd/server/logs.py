"""Log lines as text or as JSON, one object a line, with the job, the client and the model that a line is about.

Lines are those of Python's `logging`. What stands in their `extra`, and the fields of the request or batch in which
they are written, become fields of the object.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from plainsd.server.jobs.job import Job

DEFAULT_LEVELS = {"text": "warning", "json": "info"}
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}  # not an `extra`
QUIET_PATHS = ("/healthz", "/readyz", "/metrics")  # asked every few seconds: their lines are for debugging
LINE_FIELDS: ContextVar[dict[str, Any] | None] = ContextVar("plainsd_log_fields", default=None)
access_log = logging.getLogger("plainsd.access")


def about(*jobs: Job) -> dict[str, Any]:
    """The fields of a line about one job, or about the jobs of a batch, which share their model."""
    if len(jobs) == 1:
        return {"job": jobs[0].id, "client": jobs[0].client, "model": jobs[0].model}
    return {"jobs": [job.id for job in jobs], "clients": [job.client for job in jobs], "model": jobs[0].model}


@contextmanager
def log_fields(**fields: Any) -> Iterator[dict[str, Any]]:
    """Lines written inside, in this thread or request, have these fields."""
    token = LINE_FIELDS.set(fields)
    try:
        yield fields
    finally:
        LINE_FIELDS.reset(token)


def note(**fields: Any) -> None:
    """More fields for the lines of this request, its access line too."""
    if (known := LINE_FIELDS.get()) is not None:
        known.update(fields)


# --- formats ---------------------------------------------------------------------------------------------------------


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Ray puts a time of its own into every record of its process, `_ray_timestamp_ns`: names like it are left out."""
    own = {name: value for name, value in vars(record).items() if name not in STANDARD and not name.startswith("_")}
    return {**(LINE_FIELDS.get() or {}), **own}


class JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= {name: value for name, value in fields_of(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """`12:30:01 warning: message (job=1f0c, client=anna)`; an exception's traceback follows."""

    def format(self, record: logging.LogRecord) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in fields_of(record).items())
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{when} {record.levelname.lower()}: {record.getMessage()}{f' ({fields})' if fields else ''}"
        line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)  # no line breaks of others'
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(form: str, level: str | None = None) -> None:
    """Sends all lines of this process to stderr: ours from `level` on, others' from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines() if form == "json" else TextLines())
    handler.set_name("plainsd")
    root = logging.getLogger()
    for old in [one for one in root.handlers if one.get_name() == handler.get_name()]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("plainsd").setLevel((level or DEFAULT_LEVELS[form]).upper())
    if form == "json":
        logging.captureWarnings(True)
        threading.excepthook = log_exception


def log_exception(args: threading.ExceptHookArgs) -> None:
    """Of a thread that has ended by an exception."""
    name = args.thread.name if args.thread else "?"
    kind, error = args.exc_type, args.exc_value or args.exc_type()
    logging.getLogger("plainsd").error("thread %s has ended", name, exc_info=(kind, error, args.exc_traceback))


# --- requests --------------------------------------------------------------------------------------------------------


class AccessLog:
    """ASGI middleware: a line for each request, at its end: method, path, status, seconds, address, and the name of its
    token; of a request about a job also that. Query strings, which may hold a token, are left out."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with log_fields():
            try:
                await self.app(scope, receive, watched)
            finally:
                level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
                if access_log.isEnabledFor(level):
                    fields = request_fields(scope) | {"status": status, "seconds": round(time.monotonic() - began, 4)}
                    access_log.log(level, "%s %s %s", scope["method"], scope["path"], status or "-", extra=fields)


def request_fields(scope: Scope) -> dict[str, Any]:
    address = scope["client"][0] if scope.get("client") else None
    fields = {"method": scope["method"], "path": scope["path"], "address": address}
    user = scope.get("user")
    return fields | ({"user": user.name} if user and user.name else {})
