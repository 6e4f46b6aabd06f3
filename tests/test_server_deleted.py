"""Pictures that are deleted while their job is unfinished: they are not drawn again, whatever happens meanwhile."""

from contextlib import closing
from dataclasses import replace

import pytest
from conftest import noise_picture
from PIL import Image
from serving import Brake, model_folder, open_service, served, until

from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import Resolved
from plainsd.server.jobs import store as store_module
from plainsd.server.jobs.job import DONE, QUEUED, Job, Sheet
from plainsd.server.jobs.store import Store, thumbnail_bytes
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest
from plainsd.server.users import User

ONE = Resolved(size=(8, 8), steps=1, guidance=1.0, sampler="euler", spacing="leading")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


def begun(store, count=3, **more):
    """A job of which the first picture is drawn."""
    job = Job("a", "me", "jobs", "m", [ONE] * count, "d/a", created=1.0, **more)
    store.add(job)
    store.add_picture(job, 0, store.write(job, 0, noise_picture(8, 8)), (8, 8))
    job.done.add(0)
    return job


def in_trash(store):
    store.trash(store.pictures())
    store.db.close()  # killed: the trash is emptied by the next start


def in_trash_at_a_stop(store):
    store.trash(store.pictures())
    store.close()


def for_good(store):
    store.delete(store.pictures())
    store.close()


@pytest.mark.parametrize("deleted", [in_trash, in_trash_at_a_stop, for_good])
def test_a_deleted_picture_is_not_drawn_again_after_a_restart(tmp_path, deleted):
    store = Store(tmp_path)
    begun(store)
    deleted(store)
    for _ in range(2):  # nor after another one
        with closing(Store(tmp_path)) as store:
            (job,) = store.unfinished()
            assert (job.done, job.deleted, job.kept(), job.pending()) == ({0}, {0}, [], [1, 2])
            assert store.pictures() == [] and not list((tmp_path / "pictures" / "d").iterdir())


def test_a_thumbnail_goes_with_its_picture(tmp_path, monkeypatch):
    """Also one that was made while the picture was deleted, now or by a server before."""
    small, thumbnails = thumbnail_bytes, tmp_path / "thumbnails"
    with closing(Store(tmp_path)) as store:
        begun(store)
        (row,) = store.pictures()
        large = replace(row, width=640)
        assert store.thumbnail(large).exists()
        (thumbnails / "gone-0.webp").write_bytes(b"")
    with closing(Store(tmp_path)) as store:
        assert [path.name for path in thumbnails.iterdir()] == [f"{row.id}.webp"]
        (thumbnails / f"{row.id}.webp").unlink()

        def deleted_meanwhile(path):
            content = small(path)
            store.delete([row])
            return content

        monkeypatch.setattr(store_module, "thumbnail_bytes", deleted_meanwhile)
        with pytest.raises(FileNotFoundError):
            store.thumbnail(large)
        assert list(thumbnails.iterdir()) == []


def test_the_trash_is_found_without_a_look_at_the_history(tmp_path):
    with closing(Store(tmp_path)) as store:
        asked = []
        store.db.set_trace_callback(asked.append)
        store.empty_trash()
        plans = [store.db.execute(f"EXPLAIN QUERY PLAN {one}").fetchall() for one in asked if "SELECT" in one]
        assert [row["detail"].partition(" (")[0] for (row,) in plans] == ["SEARCH images USING INDEX images_in_trash"]


def test_a_restarted_server_draws_the_rest_and_ends_the_job(model, tmp_path, monkeypatch):
    brake = Brake(monkeypatch)
    with served(open_service([model], tmp_path, batch=1)) as server:
        id = server.job(prompt="p", count=3, steps=1)["id"]
        brake.wait()
        brake.step(2)
        until(lambda: server.get(f"/api/jobs/{id}").json()["done"] == 1)
        server.post("/api/images/delete", {"ids": [f"{id}-0"]})
        said = server.get(f"/api/jobs/{id}").json()
        assert (said["done"], said["images"]) == (1, [])
        server.service.queue.stop()
        brake.off()
    with served(open_service([model], tmp_path, batch=1)) as server:
        job = server.wait(id)
        assert (job["state"], job["images"]) == (DONE, [f"{id}-1", f"{id}-2"]) and job["progress"] == 1
        assert {one["id"] for one in server.get("/api/images").json()["images"]} == {f"{id}-1", f"{id}-2"}
    assert not list(tmp_path.rglob(f"*{id}-0.png"))


def test_what_comes_back_out_of_the_trash_keeps_its_star(tmp_path):
    with closing(Store(tmp_path)) as store:
        begun(store)
        store.mark(store.pictures(), True)
        store.trash(store.pictures())
        (job,) = store.unfinished()
        assert job.deleted == {0}
        assert store.restore(["a-0"]) == ["a-0"] and store.picture("a-0").favourite
        (job,) = store.unfinished()
        assert (job.done, job.deleted, job.kept()) == ({0}, set(), [0])


def test_a_running_job_names_what_is_there(model, tmp_path):
    service = open_service([model], tmp_path)
    with closing(service):
        job = new_job(JobRequest(prompt="p", count=2), service.models, service.limits, "me", "jobs")
        service.queue.add(job)
        service.store.add_picture(job, 0, service.store.write(job, 0, noise_picture(64, 64)), (64, 64))
        job.done.add(0)
        named = [job.picture_id(0)]
        assert service.as_json(job)["images"] == named
        service.trash([service.picture(named[0], User())])
        assert service.as_json(job)["images"] == [] and service.as_json(job)["done"] == 1
        assert service.restore(named, User()) == named and service.as_json(job)["images"] == named
        service.delete(service.picture(named[0], User()))
        assert service.as_json(job)["images"] == [] and job.pending() == [1] and job.state == QUEUED


@pytest.mark.parametrize("deleted", ["trash", "delete"])
def test_a_sheet_is_made_without_the_cell_that_was_deleted(model, tmp_path, deleted):
    """The picture stays on it while it can be restored; where it is gone for good, its cell is blank."""
    service = open_service([model], tmp_path)
    with closing(service):
        store = service.store
        job = begun(store, count=2, sheet=Sheet(["1", "2"], [""]))
        left = Image.new("RGB", (8, 8), "red")
        for index, image in enumerate((left, Image.new("RGB", (8, 8), "blue"))):
            store.add_picture(job, index, store.write(job, index, image), (8, 8))
            job.done.add(index)
        getattr(store, deleted)([store.picture("a-0")])
        assert job.pending() == [2]
        sheet = service.worker.sheet(job)
        colours = {colour for _, colour in sheet.getcolors(1 << 16)}
        assert ((255, 0, 0) in colours) == (deleted == "trash") and (0, 0, 255) in colours
        store.write(job, 2, sheet)
        assert read_settings(store.folder / "pictures/d/a-2.png").steps == 1
