"""Exception handlers: errors in the form of each API."""

from __future__ import annotations

import sqlite3

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from plainsd.errors import DiskError, UserError
from plainsd.server.errors import APIError


def add_errors(app: FastAPI) -> None:
    """Installs the exception handlers."""

    @app.exception_handler(APIError)
    def refused(request: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body(request.url.path), error.status, error.headers)

    @app.exception_handler(UserError)
    def wrong(request: Request, error: UserError) -> JSONResponse:
        return refused(request, APIError.from_user_error(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refused(request, APIError(400, "the body is not JSON; send one object"))
        place = [str(part) for part in first["loc"][1:]]
        said = first["msg"].removeprefix("Value error, ")
        what = f"{'.'.join(place) or 'the body'}: {said[:1].lower()}{said[1:]}"
        message = what if ";" in said else f"{what}; see /docs for what it takes"
        entry = next((part for part in first["loc"][2:3] if isinstance(part, int)), None)
        field = place[0] if place else None
        return refused(request, APIError(422, message, field, first.get("input"), entry=entry))

    @app.exception_handler(HTTPException)
    def plain(request: Request, error: HTTPException) -> JSONResponse:
        says = {404: f"there is no route {request.url.path}; see /docs",
                405: f"method {request.method} is not allowed for {request.url.path}; see /docs"}  # fmt: skip
        message = says.get(error.status_code, f"{error.detail}; see /docs")
        return refused(request, APIError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(DiskError)
    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.OperationalError)
    def disk(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, FileNotFoundError):
            return refused(request, APIError(404, "the file of a picture is gone; delete it from the history"))
        if isinstance(error, OSError) and error.errno is None:  # of Pillow, not of the system
            message = f"the file of a picture is broken ({error}); restore it, or delete it from the history"
            return refused(request, APIError(500, message))
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        return refused(request, APIError(507, f"the server cannot write ({why}); make room in its data folder"))
