"""Routes of the history: pictures one by one and several at once, and the settings embedded in uploaded files."""

import time
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.background import BackgroundTask

from plainsd.errors import DiskError, UserError
from plainsd.server.controls import map_within
from plainsd.server.errors import APIError
from plainsd.server.jobs.pictures import Picture
from plainsd.server.jobs.store import thumbnail_bytes
from plainsd.server.restore import picture_as_json, settings_in_file
from plainsd.server.schema import MapRequest, Text
from plainsd.server.service import CurrentUser, Service
from plainsd.server.uploads import decoded, picture, png
from plainsd.server.zips import zipped

PICTURE_HEADERS = {"Cache-Control": "private, max-age=31536000, immutable"}


class Upload(BaseModel):
    image: Text


class Selection(BaseModel):
    """Pictures of the history by their ids, as many as `limits.selection` in GET /api/info."""

    model_config = ConfigDict(extra="forbid")
    ids: list[Text]


class Marking(Selection):
    favourite: bool = True


def add_pictures(app: FastAPI, service: Service) -> None:
    def found(id: Text, user: CurrentUser) -> Picture:
        return service.picture(id, user)

    FoundPicture = Annotated[Picture, Depends(found)]

    @app.get("/api/images", tags=["pictures"])
    def images(
        user: CurrentUser,
        search: Annotated[Text, Query(max_length=500)] = "",
        before: Annotated[int | None, Query(ge=0, lt=2**62)] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 48,
        favourites: bool = False,
    ) -> dict:
        """The history, newest first. `before` is the `next` of the answer before."""
        rows = service.store.pictures(search, before, limit, favourites=favourites, owner=user.scope)
        return {
            "images": [picture_as_json(row) for row in rows],
            "next": rows[-1].number if len(rows) == limit else None,
        }

    @app.get(
        "/api/images/{id}.png",
        tags=["pictures"],
        response_class=FileResponse,
        responses={200: {"content": {"image/png": {}}}},
    )
    def image(row: FoundPicture) -> FileResponse:
        return sent(service.store.path(row), "image/png")

    @app.get(
        "/api/images/{id}/thumbnail",
        tags=["pictures"],
        response_class=FileResponse,
        responses={200: {"content": {"image/png": {}, "image/webp": {}}}},
    )
    def thumbnail(row: FoundPicture) -> Response:
        try:
            path = service.store.thumbnail(row)
        except DiskError:  # it is not kept then
            content = thumbnail_bytes(service.store.path(row))
            return Response(content, media_type="image/webp", headers=PICTURE_HEADERS)
        return sent(path, "image/webp" if path.suffix == ".webp" else "image/png")

    @app.get("/api/images/{id}", tags=["pictures"])
    def image_settings(row: FoundPicture) -> dict:
        return picture_as_json(row)

    @app.delete("/api/images/{id}", tags=["pictures"], status_code=204)
    def delete(row: FoundPicture) -> Response:
        """For good, at once."""
        service.delete(row)
        return Response(status_code=204)

    @app.post("/api/settings", tags=["pictures"])
    def settings(body: Upload) -> dict:
        """The settings inside a PNG file of plainsd or A1111, as POST /api/jobs takes them."""
        return settings_in_file(decoded(body.image, "image"), service.limits, service.models)

    @app.post(
        "/api/preprocess",
        tags=["pictures"],
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}},
    )
    def preprocess(body: MapRequest) -> Response:
        """The control map that a job would make of a picture, as a PNG."""
        given = picture(body.image, "image", service.limits, "black")
        try:
            made = map_within(service.limits, given, body.preprocess, (body.low, body.high), body.resolution)
        except UserError as error:
            raise APIError(422, str(error), "preprocess", body.preprocess) from None
        return Response(png(made), media_type="image/png")

    add_selections(app, service)


def add_selections(app: FastAPI, service: Service) -> None:
    @app.post("/api/images/favourites", tags=["pictures"])
    def mark(body: Marking, user: CurrentUser) -> dict:
        """Mark pictures as favourites, or no longer. The answer has the ids of those that are there."""
        found = service.selected(body.ids, "ids", user)
        service.store.mark(found, body.favourite)
        return {"ids": [one.id for one in found]}

    @app.post("/api/images/delete", tags=["pictures"])
    def delete_selected(body: Selection, user: CurrentUser) -> dict:
        """Delete pictures and their files. For `limits.undo` seconds (GET /api/info), or until the server stops, they
        can be restored. The answer has the ids of those that were there."""
        found = service.selected(body.ids, "ids", user)
        service.trash(found)
        return {"ids": [one.id for one in found]}

    @app.post("/api/images/restore", tags=["pictures"])
    def restore(body: Selection, user: CurrentUser) -> dict:
        """Restore pictures that were deleted a moment ago. The answer has the ids of those that it was still possible
        for."""
        return {"ids": service.restore(service.selection(body.ids, "ids"), user)}

    @app.get(
        "/api/images.zip",
        tags=["pictures"],
        response_class=StreamingResponse,
        responses={200: {"content": {"application/zip": {}}}},
    )
    def download(id: Annotated[list[Text], Query()], user: CurrentUser) -> StreamingResponse:
        """The files of these pictures (`?id=A&id=B`) in one zip, each under its own name and with its settings inside.
        It is written while it is sent."""
        found = service.selected(id, "id", user)
        if missing := set(id) - {one.id for one in found}:
            raise APIError(404, f"there is no picture {min(missing)!r}; GET /api/images lists them", "id", min(missing))
        files = [(service.store.path(one), one.created) for one in found]
        if gone := next((path for path, _ in files if not path.is_file()), None):
            raise APIError(404, f"the file {gone.name!r} is gone; delete its picture from the history", "id")
        name = time.strftime("plainsd-%Y%m%d-%H%M%S.zip")
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        pieces = zipped(files)
        closing = BackgroundTask(pieces.close)  # the file under way, of a client that has hung up
        return StreamingResponse(pieces, media_type="application/zip", headers=headers, background=closing)


def sent(path: Path, kind: str) -> FileResponse:
    if not path.is_file():
        raise APIError(404, "the file of this picture is gone; delete it from the history")
    return FileResponse(path, media_type=kind, headers=PICTURE_HEADERS)
