"""Rows of the database with strange values: that row alone is marked; the lists, the start and the workers go on."""

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict

import pytest
from conftest import smooth_picture
from serving import model_folder, open_service, served

from plainsd.pictures.settings import ControlNote, ImagePromptNote, Resolved
from plainsd.server.jobs.job import CANCELLED, DONE, FAILED, ControlInput, ImagePromptInput, Job, Sheet, Source
from plainsd.server.jobs.queue import Place, Queue
from plainsd.server.jobs.rows import loras_from, settings_from
from plainsd.server.jobs.store import Store
from plainsd.server.jobs.worker import Worker
from plainsd.text.prompts import LoraTag

SETTINGS = {  # a field of a picture's settings, and JSON that has no meaning there
    "seed": "null", "like": '"forge"', "interval": "[1]", "size": "[64]", "outpaint": "5", "embeddings": "[1]",
    "other": '[["a"]]', "hashes": '[["a"]]', "upscaler": "5", "hires_sampler": "5", "masked_content": "7",
    "control": '[["none", "None", 1, 0, 1, "sideways", false, []]]', "image_prompt": '[["None", "strong"]]',
    "guidance": "NaN", "rescale": "1e999", "steps": "true", "prompt": "[]", "tiling": '"yes"', "vae": '{"a": 1}',
    "sampler": "null", "variation_seed": "1.5", "ensd": "9" * 39 + ".5",
}  # fmt: skip
JOBS = {  # likewise of columns
    "client": "x'00'", "api": "x'00'", "model": "x'ff'", "loras": "'[[1, 2]]'", "pictures": "'[]'", "source": "x'00'",
    "sheet": "'[]'", "place": "'../../x'", "error": "x'00'", "attempts": "'x'", "created": "'x'", "started": "'x'",
    "finished": "9e999", "owner": "x'00'", "notes": "'[1]'", "id": "x'00'",
}  # fmt: skip
IMAGES = {"id": "x'00'", "job": "'../x'", "place": "'x'", "file": "x'00'", "width": "'x'", "height": "-1.5",
          "settings": "x'00'", "loras": "'[[\"a\", NaN]]'", "created": "9e999"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


def asked(id, **more) -> Job:
    settings = [Resolved(size=(8, 8), steps=1, guidance=1.0, sampler="euler", spacing="leading", seed=7)]
    return Job(id, "me", "jobs", "tiny", settings, f"2026-01-01/a-{id}", 1.0, **more)


def drawn(store, id):
    job = asked(id)
    store.add(job)
    store.add_picture(job, 0, store.write(job, 0, smooth_picture(8)), (8, 8))


def change(folder, *statements):
    """By somebody, while no server runs."""
    with closing(sqlite3.connect(folder / "plainsd.sqlite")) as db, db:
        for statement in statements:
            db.execute(*statement)


@pytest.fixture
def filled(tmp_path):
    """A folder with two pictures, of jobs that are done, and two jobs that wait."""
    with closing(Store(tmp_path)) as store:
        for id in ("a", "b"):
            drawn(store, id)
        for id in ("c", "d"):
            store.add(asked(id))
    return tmp_path


def listed(model, folder):
    """Both lists of a server, strictly as JSON, and with them each picture and job, all after the start."""

    def refuse(value):
        raise ValueError(f"{value} is no JSON")

    service = open_service([model], folder)
    service.start = lambda: None  # nothing is drawn meanwhile
    with served(service) as server:
        answers = {name: server.get(f"/api/{name}") for name in ("images", "jobs")}
        for name, answer in answers.items():
            assert answer.status_code == 200, (name, answer.text)
        found = {name: json.loads(answer.text, parse_constant=refuse) for name, answer in answers.items()}
        for row in found["images"]["images"]:
            if not row["id"].startswith("row-"):
                assert server.get(f"/api/images/{row['id']}").status_code == 200
        pictures = {row["id"]: row for row in found["images"]["images"]}
        return pictures, {job["id"]: job for job in (*found["jobs"]["active"], *found["jobs"]["ended"])}


def with_value(name, text):
    """The settings of one picture as JSON, with this in place of a field's value."""
    settings = asdict(asked("x").settings[0]) | {name: "HERE"}
    return json.dumps(settings).replace('"HERE"', text)


@pytest.mark.parametrize("name", SETTINGS)
def test_strange_settings_mark_their_own_row(model, filled, name):
    text = with_value(name, SETTINGS[name])
    change(filled, ("UPDATE images SET settings = ? WHERE job = 'a'", (text,)),
           ("UPDATE jobs SET pictures = ? WHERE id IN ('a', 'c')", (f"[{text}]",)))  # fmt: skip
    pictures, jobs = listed(model, filled)
    assert "cannot be read" in pictures["a-0"]["problem"] and pictures["b-0"]["problem"] is None
    assert "cannot be read" in jobs["c"]["error"] and jobs["c"]["state"] == FAILED
    assert jobs["d"]["error"] is None and jobs["d"]["state"] == "queued" and jobs["b"]["error"] is None


@pytest.mark.parametrize("column", JOBS)
def test_strange_columns_of_a_job_mark_it_alone(model, filled, column):
    change(filled, (f"UPDATE jobs SET {column} = {JOBS[column]} WHERE id = 'a'",))
    other = "x'01'" if column == "id" else JOBS[column]  # ids are unique
    change(filled, (f"UPDATE jobs SET {column} = {other} WHERE id = 'c'",))
    pictures, jobs = listed(model, filled)
    assert len(pictures) == 2 and len(jobs) == 4
    marked = {id: job["error"] for id, job in jobs.items() if job["error"]}
    assert len(marked) == 2 and all("cannot be read" in error for error in marked.values())
    assert not {"b", "d"} & set(marked) and jobs["d"]["state"] == "queued"
    with closing(Store(filled)) as store:  # and is not tried again
        assert [job.id for job in store.jobs(("queued", "running"))] == ["d"]


@pytest.mark.parametrize("column", IMAGES)
def test_strange_columns_of_a_picture_mark_it_alone(model, filled, column):
    change(filled, (f"UPDATE images SET {column} = {IMAGES[column]} WHERE job = 'a'",))
    pictures, jobs = listed(model, filled)
    marked = [row["problem"] for row in pictures.values() if row["problem"]]
    assert len(pictures) == 2 and len(marked) == 1 and "cannot be read" in marked[0]
    assert pictures["b-0"]["problem"] is None and len(jobs) == 4


@pytest.mark.parametrize("column", IMAGES)
def test_the_trash_is_emptied_whatever_a_row_holds(filled, column):
    change(filled, (f"UPDATE images SET {column} = {IMAGES[column]}, deleted = 1 WHERE job = 'a'",))
    with closing(Store(filled)) as store:
        assert [row.id for row in store.pictures()] == ["b-0"]
        assert store.db.execute("SELECT count(*) FROM images").fetchone()[0] == 1


def test_what_lies_among_the_inputs_does_not_stop_the_start(filled):
    for name in ("lost+found", "0" * 32 + ".png"):
        (filled / "inputs" / name / "inside").mkdir(parents=True)
    (filled / "inputs" / "notes.txt").write_text("mine")
    unused, used = ("1" * 32 + ".png"), ("2" * 32 + ".png")
    for name in (unused, used):
        (filled / "inputs" / name).write_bytes(b"x")
    change(filled, ("UPDATE jobs SET source = ? WHERE id = 'd'", (json.dumps(asdict(Source(image=used))),)),
           ("UPDATE jobs SET source = x'00ff' WHERE id = 'c'",))  # fmt: skip
    with closing(Store(filled)) as store:
        assert [job.problem is None for job in store.unfinished()] == [False, True]
    left = {path.name for path in (filled / "inputs").iterdir()}
    assert left == {"lost+found", "0" * 32 + ".png", "notes.txt", used}


def test_a_place_that_the_job_has_not_is_no_picture_of_it(filled):
    """Else it would count as drawn, and the job that waits would never be drawn to its end."""
    change(filled, ("INSERT INTO removed VALUES ('c', 5), ('c', 'x'), ('c', x'00')",))
    with closing(Store(filled)) as store:
        assert store.job("c").pending() == [0] and store.job("c").done == set()


def test_everything_that_is_stored_comes_back(tmp_path):
    controls = (ControlInput("net", None, 0.5, 0.0, 1.0, True, "balanced", (1, 2), "canny"),)
    prompts = (ImagePromptInput("plus", ("0.png",), (), 1, 0.0, 1, None),)
    source = Source("0.png", None, "1.png", "2.png", (1, 2, 3, 4), controls, prompts)
    sheet = Sheet(["steps 1", "steps 2"], [], [("steps", ["1", "2"])])
    job = asked(
        "a", loras=[LoraTag("style", 0.5, 0.5), LoraTag("other", 1, 0.25)], source=source, sheet=sheet, owner="anna"
    )
    job.notes = ["the seed is long"]
    notes = {"control": (ControlNote(kinds=(3,)),), "image_prompt": (ImagePromptNote("y", 0.5, 2),)}
    more = {"interval": (0.5, 2), "hashes": (("model", "ab"),), "other": (("x", "y"),), "seed": 2**64 - 1}
    settings = Resolved(size=(8, 8), steps=1, guidance=7, sampler="ddim", spacing="leading", **more, **notes)
    job.settings = [settings, settings]
    with closing(Store(tmp_path)) as store:
        store.add(job)
        found = store.job("a")
        assert found.problem is None and found.settings == job.settings and found.source == source
        assert found.sheet.axes == sheet.axes and found.loras == job.loras and found.owner == "anna"
        assert found.notes == job.notes
    assert settings_from(json.loads(json.dumps(asdict(settings))), strict=True) == settings
    assert loras_from('[["style", 0.5], ["other", 1, 0.25]]') == job.loras  # older versions had one strength


@pytest.mark.parametrize("where", ["open", "next_batch", "process"])
def test_a_worker_outlives_whatever_goes_wrong(model, tmp_path, monkeypatch, where):
    service = open_service([model], tmp_path)
    failed, of = [], {"open": type(service.worker.drawer), "process": Worker, "next_batch": type(service.queue)}[where]
    original = getattr(of, where)

    def once(*given, **more):
        if len(failed) < 2:
            failed.append(1)
            raise RuntimeError("strange")
        return original(*given, **more)

    monkeypatch.setattr(of, where, once)
    monkeypatch.setattr("plainsd.server.jobs.worker.RETRY", 0.01)
    with served(service) as server:
        assert server.drawn(prompt="after", steps=1)["state"] == DONE and len(failed) == 2
        assert server.get("/healthz").status_code == 200


def test_positions_are_those_in_the_queue(tmp_path):
    """Of jobs that wait, whoever has started or ended before."""
    with closing(Store(tmp_path)) as store:
        queue = Queue(store, 100)
        queue.share = 1.0
        jobs = [asked(f"j{number}") for number in range(6)]
        for job in jobs[:4]:
            queue.add(job)
        queue.next_batch(1, Place())
        queue.end(jobs[2], CANCELLED)
        for job in jobs[4:]:
            queue.add(job)
        waiting = [jobs[1], *jobs[3:]]
        assert [queue.position(job) for job in waiting] == [0, 1, 2, 3]
        again = Queue(store, 100)  # as after a crash: what had started waits again
        assert [again.position(job) for job in again.jobs.values()] == [0, 1, 2, 3, 4]


def test_a_list_of_jobs_takes_time_in_proportion(tmp_path):
    """Each position is looked up, not counted: the comparisons of all of them are of the order of n log n."""

    class Counted(int):
        compared = 0

        def __lt__(self, other):
            Counted.compared += 1
            return int(self) < int(other)

    with closing(Store(tmp_path)) as store:
        queue = Queue(store, 10)
        jobs = [asked(f"j{number}") for number in range(512)]
        for number, job in enumerate(jobs):
            job.number = Counted(number)
            queue.jobs[job.id] = job
            queue.queued.append(job.number)
        assert [queue.position(job) for job in jobs] == list(range(512))
        assert Counted.compared < 512 * 20
