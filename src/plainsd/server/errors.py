"""What a client did wrong, as one JSON error: what, which value, what to do. Each API has its own form of it."""

import math
import re
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from plainsd.errors import UserError

FIELDS = (                            # a message that begins with one of these is about that field
    "prompt", "negative", "size", "steps", "guidance", "sampler", "spacing", "seed", "clip skip", "eta", "strength",
    "variation seed", "variation strength", "hires", "upscaler", "rescale", "interval", "perturbed", "threshold",
    "cache", "model", "count", "image", "mask", "loras", "grid", "refiner", "handover", "embeddings", "outpaint",
)  # fmt: skip
ABOUT = re.compile(rf"(?:unknown |the )?({'|'.join(sorted(FIELDS, key=len, reverse=True))})\b")
LONGEST = 1000  # characters of a message
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for code, text in {400: "not JSON", 401: "the token is missing or wrong", 403: "a foreign host or origin",
                       404: "no such thing", 409: "not in this state", 413: "too large", 415: "not JSON",
                       422: "a field is wrong", 429: "the queue is full"}.items()
}  # fmt: skip


class Refused(Exception):
    """A request that is answered with an error. The message is one line: what, which value; what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        value: Any = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, printable(message), field, headers or {}
        self.value = shown(value)

    @classmethod
    def from_user_error(cls, error: UserError, values: dict[str, Any] | None = None) -> "Refused":
        """The field is told by the first words of the message."""
        message = str(error)
        found = ABOUT.match(message)
        field = found[1].replace(" ", "_") if found else None
        return cls(422, message, field, (values or {}).get(field))

    def body(self, path: str) -> dict:
        """The error as the API of that path puts it."""
        what, _, remedy = self.message.partition("; ")
        if path.startswith("/v1/"):
            kind = OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
            code = "model_not_found" if (self.status, self.field) == (404, "model") else None
            return {"error": {"message": self.message, "type": kind, "param": self.field, "code": code}}
        if path.startswith("/sdapi/"):
            return {"error": "HTTPException", "detail": self.message, "body": "", "errors": self.message}
        told = {"message": self.message, "what": what, "value": self.value, "remedy": remedy or None}
        return {"error": told | {"field": self.field}}


def printable(text: str) -> str:
    """One line of sound Unicode, however hostile the input that it quotes."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:LONGEST]


def shown(value: Any) -> Any:
    """A value as it can stand in JSON."""
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return [shown(one) for one in value]
    return printable(str(value))[:200]


# --- as answers ------------------------------------------------------------------------------------------------------


def add_errors(app: FastAPI) -> None:
    """Every error in the one form of its API."""

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(request.url.path), error.status, error.headers)

    @app.exception_handler(UserError)
    def wrong(request: Request, error: UserError) -> JSONResponse:
        return refused(request, Refused.from_user_error(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refused(request, Refused(400, "the body is not JSON; send one object"))
        place = [str(part) for part in first["loc"][1:]]
        said = first["msg"].removeprefix("Value error, ")
        what = f"{'.'.join(place) or 'the body'}: {said[:1].lower()}{said[1:]}"
        message = what if ";" in said else f"{what}; see /docs for what it takes"
        return refused(request, Refused(422, message, place[0] if place else None, first.get("input")))

    @app.exception_handler(HTTPException)
    def plain(request: Request, error: HTTPException) -> JSONResponse:
        says = {404: f"there is no {request.url.path}; see /docs for what there is",
                405: f"{request.method} is not for {request.url.path}; see /docs for what is"}  # fmt: skip
        message = says.get(error.status_code, f"{error.detail}; see /docs")
        return refused(request, Refused(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.OperationalError)
    def disk(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, FileNotFoundError):
            return refused(request, Refused(404, "the file of a picture is gone; delete it from the history"))
        why = getattr(error, "strerror", None) or error
        return refused(request, Refused(507, f"the server cannot write ({why}); make room in its data folder"))
