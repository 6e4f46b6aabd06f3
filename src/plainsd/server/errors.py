"""API errors: what is wrong, which value, what to do, in the JSON form of each API."""

import math
from typing import Any

from plainsd.errors import UserError

MAX_MESSAGE = 1000  # characters of a message
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for code, text in {400: "not JSON", 401: "the token is missing or wrong", 403: "a foreign host or origin",
                       404: "no such thing", 409: "not in this state", 413: "too large", 415: "not JSON",
                       422: "a field is wrong", 429: "the queue is full"}.items()
}  # fmt: skip


class APIError(Exception):
    """An error response. The message is one line: what, which value; what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        value: Any = None,
        headers: dict[str, str] | None = None,
        entry: int | None = None,
    ):
        super().__init__(message)
        self.entry = entry  # of a field that is a list, from 0
        self.status, self.message, self.field, self.headers = status, printable(message), field, headers or {}
        self.value = json_value(value)

    @classmethod
    def from_user_error(cls, error: UserError, values: dict[str, Any] | None = None) -> "APIError":
        """With the field of the error; the value is that of the request, else that of the error."""
        value = (values or {}).get(error.field) if error.field else None
        return cls(422, str(error), error.field, error.value if value is None else value, entry=error.entry)

    def body(self, path: str) -> dict:
        """The JSON body, in the form of the API of that path."""
        what, _, remedy = self.message.partition("; ")
        if path.startswith("/v1/"):
            kind = OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
            code = "model_not_found" if (self.status, self.field) == (404, "model") else None
            return {"error": {"message": self.message, "type": kind, "param": self.field, "code": code}}
        if path.startswith(("/sdapi/", "/controlnet/")):
            return {"error": "HTTPException", "detail": self.message, "body": "", "errors": self.message}
        error = {"message": self.message, "what": what, "value": self.value, "remedy": remedy or None}
        return {"error": error | {"field": self.field, "entry": self.entry}}


def printable(text: str) -> str:
    """One line of valid Unicode, whatever input it quotes."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:MAX_MESSAGE]


def json_value(value: Any) -> Any:
    """A value that can be encoded in JSON."""
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return [json_value(one) for one in value]
    return printable(str(value))[:200]


# --- as answers ------------------------------------------------------------------------------------------------------
