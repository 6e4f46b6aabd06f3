"""Several pictures of the history at once: favourites, deletion, and one zip of their files."""

import sqlite3
import threading
import time
import zipfile
from contextlib import closing
from io import BytesIO

import pytest
from conftest import noise_picture
from serving import model_folder, open_service, png_bytes, served, until

from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import Resolved
from plainsd.server import zips
from plainsd.server.jobs.job import Job
from plainsd.server.jobs.migrations import MIGRATIONS
from plainsd.server.jobs.store import Store
from plainsd.server.limits import Limits
from plainsd.server.users import User

ROW = ("a-0", "a", 0, "pictures/d/a-0.png", 8, 8, "{}", "[]", "", 1.0)
ENTERED = (
    "INSERT INTO images (id, job, place, file, width, height, settings, loras, search, created) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


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
        db.execute(ENTERED, ROW)
    with closing(Store(tmp_path)) as store:
        (picture,) = store.pictures()
        assert picture.favourite is False
        store.mark([picture], True)
        assert store.picture("a-0").favourite is True
        assert store.db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS) == 6


# --- deletion --------------------------------------------------------------------------------------------------------


def listed(server):
    return {one["id"] for one in server.get("/api/images", params={"limit": 200}).json()["images"]}


def test_a_selection_is_deleted_and_restored(server):
    ids = drawn(server)
    server.post("/api/images/favourites", {"ids": [ids[0]]})
    answer = server.post("/api/images/delete", {"ids": [ids[0], "nobody", ids[2]]})
    assert answer.json() == {"ids": [ids[0], ids[2]]} and listed(server).isdisjoint({ids[0], ids[2]})
    for path in (f"/api/images/{ids[0]}", f"/api/images/{ids[0]}.png", f"/api/images/{ids[0]}/thumbnail"):
        assert server.get(path).status_code == 404
    assert packed(server, [ids[0]]).status_code == 404
    assert server.get("/api/images", params={"favourites": True}).json()["images"] == []
    server.service.store.empty_trash(server.service.limits.undo)  # too early
    restored = server.post("/api/images/restore", {"ids": [ids[0], "nobody", ids[2]]})
    assert restored.json() == {"ids": [ids[0], ids[2]]} and listed(server) >= set(ids)
    assert server.get(f"/api/images/{ids[0]}").json()["favourite"] is True
    assert server.picture(ids[2]).size == (64, 64)


def test_the_trash_is_emptied_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("plainsd.server.service.TRASH_ROUND", 0.1)
    service = open_service([model_folder(tmp_path)], tmp_path / "data", Limits(undo=2))
    with served(service) as server:
        kept, gone = drawn(server, 2)
        path = service.store.path(service.picture(gone, User()))
        start = time.monotonic()
        server.post("/api/images/delete", {"ids": [gone]})
        until(lambda: not path.exists())
        assert time.monotonic() - start > 1.9
        assert server.post("/api/images/restore", {"ids": [gone]}).json() == {"ids": []}
        assert listed(server) == {kept} and service.store.path(service.picture(kept, User())).is_file()


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_that_stops_empties_the_trash(tmp_path, killed):
    store = Store(tmp_path)
    (tmp_path / "pictures" / "d").mkdir()
    path = tmp_path / "pictures" / "d" / "a-0.png"
    path.write_bytes(b"png")
    with store.transaction() as db:
        db.execute(ENTERED.replace("created)", "created, deleted)").replace("?)", "?, 1.0)"), ROW)
    store.db.close() if killed else store.close()
    assert path.exists() == killed
    with closing(Store(tmp_path)) as store:
        assert not path.exists() and store.restore(["a-0"]) == []


def test_what_the_disk_refuses_to_delete_stays_in_the_trash_and_is_tried_again(tmp_path):
    with closing(Store(tmp_path)) as store:
        for id in ("a-0", "a-1"):
            path = tmp_path / "pictures" / f"{id}.png"
            path.mkdir() if id == "a-0" else path.write_bytes(b"png")  # a folder cannot be unlinked, whoever asks
            with store.transaction() as db:
                db.execute(ENTERED, (id, "a", int(id[2]), f"pictures/{id}.png", *ROW[4:]))
        store.trash(store.pictures())
        with pytest.raises(OSError, match="a-0"):
            store.empty_trash()
        assert not path.exists() and [*store.db.execute("SELECT id FROM images").fetchone()] == ["a-0"]
    with closing(Store(tmp_path)) as store:
        (tmp_path / "pictures" / "a-0.png").rmdir()
        store.empty_trash()
        assert store.db.execute("SELECT id FROM images").fetchall() == []


def test_a_picture_in_the_trash_that_is_drawn_again_is_there_again(tmp_path):
    one = Resolved(size=(8, 8), steps=1, guidance=1.0, sampler="euler", spacing="leading")
    with closing(Store(tmp_path)) as store:
        job = Job("a", "c", "jobs", "m", [one, one], "d/a", created=1.0)
        store.add(job)
        for _ in range(2):
            store.add_picture(job, 0, "pictures/d/a-0.png", (8, 8))
            assert [picture.id for picture in store.pictures()] == ["a-0"]
            store.trash(store.pictures())


def test_a_picture_of_a_job_that_has_ended_is_not_named_any_more(server):
    job = server.drawn(prompt="several", steps=1, count=2)
    server.post("/api/images/delete", {"ids": [job["images"][0]]})
    ended = server.service.store.job(job["id"])
    assert (ended.done, ended.kept()) == ({0, 1}, [1])
    assert server.get(f"/api/jobs/{job['id']}").json()["images"] == job["images"][1:]


@pytest.mark.parametrize("path", ["/api/images/delete", "/api/images/favourites", "/api/images/restore"])
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
    paths = [server.service.store.path(server.service.picture(id, User())) for id in ids]
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
    path = server.service.store.path(server.service.picture(id, User()))
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
