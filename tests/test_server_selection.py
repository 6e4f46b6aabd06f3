"""Several pictures of the history at once: favourites, deletion, and one zip of their files."""

import sqlite3
import threading
import zipfile
from contextlib import closing
from io import BytesIO

import pytest
from conftest import noise_picture
from serving import model_folder, open_service, png_bytes, served

from plainsd.pictures.images import read_settings
from plainsd.server import zips
from plainsd.server.jobs.store import MIGRATIONS, Store
from plainsd.server.limits import Limits


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    with served(open_service([model_folder(folder)], data, Limits(selection=4))) as server:
        yield server


def drawn(server, count=3, **more):
    return server.drawn(prompt="several", steps=1, count=count, **more)["images"]


def packed(server, ids):
    return server.get("/api/images.zip", params={"id": ids})


# --- favourites ------------------------------------------------------------------------------------------------------


def test_favourites_are_kept_with_the_picture_and_filter_the_history(server):
    ids = drawn(server)
    answer = server.post("/api/images/favourites", {"ids": [ids[2], "nobody", ids[0], ids[0]]})
    assert answer.json() == {"ids": [ids[2], ids[0]]}
    told = {one["id"]: one["favourite"] for one in server.get("/api/images").json()["images"]}
    assert [told[id] for id in ids] == [True, False, True]
    assert server.get(f"/api/images/{ids[0]}").json()["favourite"] is True
    found = server.get("/api/images", params={"favourites": True, "limit": 1}).json()
    assert [one["id"] for one in found["images"]] == [ids[2]]
    rest = server.get("/api/images", params={"favourites": True, "before": found["next"]}).json()
    assert [one["id"] for one in rest["images"]] == [ids[0]]
    assert server.post("/api/images/favourites", {"ids": ids, "favourite": False}).json() == {"ids": ids}
    assert server.get("/api/images", params={"favourites": True}).json()["images"] == []


def test_a_database_of_before_gets_its_column(tmp_path):
    with closing(sqlite3.connect(tmp_path / "plainsd.sqlite")) as db, db:
        db.executescript(MIGRATIONS[0] + MIGRATIONS[1] + "PRAGMA user_version = 2;")
        values = ("a-0", "a", 0, "pictures/d/a-0.png", 8, 8, "{}", "[]", "", 1.0)
        names = "id, job, place, file, width, height, settings, loras, search, created"
        db.execute(f"INSERT INTO images ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    with closing(Store(tmp_path)) as store:
        (picture,) = store.pictures()
        assert picture.favourite is False
        store.mark([picture], True)
        assert store.picture("a-0").favourite is True


# --- deletion --------------------------------------------------------------------------------------------------------


def test_a_selection_is_deleted_with_its_files(server):
    ids = drawn(server)
    paths = [server.service.store.path(server.service.picture(id)) for id in ids]
    answer = server.post("/api/images/delete", {"ids": [ids[0], "nobody", ids[2]]})
    assert answer.json() == {"ids": [ids[0], ids[2]]}
    assert [path.exists() for path in paths] == [False, True, False]
    assert server.get(f"/api/images/{ids[0]}").status_code == 404
    assert server.get(f"/api/images/{ids[1]}").status_code == 200


@pytest.mark.parametrize("path", ["/api/images/delete", "/api/images/favourites"])
@pytest.mark.parametrize("ids", [[], ["a"] * 5])
def test_a_selection_has_limits(server, path, ids):
    error = server.post(path, {"ids": ids}).json()["error"]
    assert error["message"] == f"ids names {len(ids)} pictures; give 1 to 4" and error["field"] == "ids"


# --- zip -------------------------------------------------------------------------------------------------------------


def test_a_zip_has_the_files_as_they_are(server):
    ids = drawn(server, 2, seed=5)
    answer = packed(server, [*ids, ids[0]])
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/zip"
    assert answer.headers["Content-Disposition"].startswith('attachment; filename="plainsd-')
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
    archive = zipfile.ZipFile(BytesIO(answer.content))
    assert archive.testzip() is None
    paths = [server.service.store.path(server.service.picture(id)) for id in ids]
    assert archive.namelist() == [path.name for path in paths]
    assert [archive.read(path.name) for path in paths] == [path.read_bytes() for path in paths]
    assert read_settings(BytesIO(archive.read(paths[1].name))).seed == 6
    assert archive.infolist()[0].date_time[0] > 2020


def test_a_zip_of_nothing_of_too_many_of_strangers(server):
    (id,) = drawn(server, 1)
    error = packed(server, [id, "nobody"]).json()["error"]
    assert (error["message"], error["field"]) == ("there is no picture 'nobody'; GET /api/images lists them", "id")
    assert packed(server, ["a"] * 5).json()["error"]["message"] == "id names 5 pictures; give 1 to 4"
    assert server.get("/api/images.zip").status_code == 422
    path = server.service.store.path(server.service.picture(id))
    path.unlink()
    answer = packed(server, [id])
    assert answer.status_code == 404 and "is gone; delete its picture" in answer.json()["error"]["message"]


def test_a_zip_is_made_piece_by_piece(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(png_bytes(noise_picture(600, 400, i)))
        assert path.stat().st_size > 2 * zips.PIECE_READ
    pieces = list(zips.zipped([(path, 0.0) for path in paths]))
    assert max(map(len, pieces)) < zips.PIECE_READ + 2000 and len(pieces) > 8
    whole = b"".join(pieces)
    assert len(whole) < sum(path.stat().st_size for path in paths) + 4000  # nothing is packed a second time
    assert len(whole) > sum(path.stat().st_size for path in paths)
    archive = zipfile.ZipFile(BytesIO(whole))
    assert archive.testzip() is None and archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)


def test_whoever_hangs_up_ends_the_packing(server, monkeypatch):
    ended = threading.Event()

    def endless(files):
        try:
            while True:
                yield bytes(zips.PIECE_READ)
        finally:
            ended.set()

    monkeypatch.setattr("plainsd.server.api.pictures.zipped", endless)
    (id,) = drawn(server, 1)
    answer = server.get("/api/images.zip", params={"id": id}, stream=True)
    next(answer.iter_content(1000))
    answer.close()
    assert ended.wait(60)
