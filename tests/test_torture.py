"""The torture of tests/torture: five minutes of it, and whether it sees what it looks for."""

import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import smooth_picture

from plainsd.pictures.settings import Resolved
from plainsd.server.jobs.job import CANCELLED, DONE, FAILED, Job
from plainsd.server.jobs.queue import ATTEMPTS, Queue
from plainsd.server.jobs.store import Store

HERE = Path(__file__).parent / "torture"


@pytest.fixture
def torture(monkeypatch):
    """The modules of tests/torture."""
    monkeypatch.syspath_prepend(HERE)
    import files
    import kept
    import mutations

    yield SimpleNamespace(files=files, mutations=mutations, kept=kept)
    for name in ("files", "mutations", "kept"):
        sys.modules.pop(name, None)


def test_mutations_come_from_their_seed_alone(torture):
    mutations = torture.mutations
    whole = bytes(range(256)) * 8 + b'{"a": 12, "b": [1, "x"]}'
    made = [mutations.mutated(whole, f"0-{i}") for i in range(200)]
    assert made == [mutations.mutated(whole, f"0-{i}") for i in range(200)]
    assert len(set(made)) > 150 and all(len(one) <= len(whole) + 3 * mutations.MOST + 300 for one in made)
    for change in mutations.CHANGES:
        changed = set()
        for i in range(20):
            content = bytearray(whole)
            change(content, random.Random(i))
            changed.add(bytes(content))
        assert changed - {whole}, change
    assert mutations.mutated(b"", "0-1") == b""


STRANGE = """
import sys, time
sys.path[:0] = [{tests!r}, {torture!r}]
import samples, files
from plainsd.errors import UserError
def reads(path):
    content = path.read_bytes()
    if content == b"sound":
        return
    at = path.parent / "number"
    number = int(at.read_text()) if at.exists() else 0
    at.write_text(str(number + 1))
    if number == 0: raise UserError("a; b")
    if number == 1: raise KeyError("c")
    if number == 2: raise UserError("x" * 2000, most=2000)
    if number == 3: return bytearray(8 * 2**30)
    if number == 4: sys.exit(3)
samples.READERS.clear()
samples.READERS["it"] = reads
files.serve_loads(files.Path(sys.argv[1]))
"""


def test_what_is_no_plain_refusal_is_counted(torture, tmp_path):
    """In a process like those that read files, a reader that fails in every way."""
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "a.txt").write_bytes(b"sound")
    (tmp_path / "places.json").write_text('{"it": "a.txt"}')
    code = STRANGE.format(tests=str(HERE.parent), torture=str(HERE))
    asked = "".join(f'["it", "a.txt", "0-{i}"]\n' for i in range(5))
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], input=asked, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    ready, *answers = ran.stdout.splitlines()
    assert ready == "ready", ran.stderr
    for answer, wanted in zip(
        answers, ("refused", "KeyError", "message too long", "MemoryError", "SystemExit"), strict=True
    ):
        assert wanted in answer, (answer, wanted)


@pytest.fixture
def drawn(tmp_path):
    """A store, and what puts a job of two pictures into it, of which so many are drawn."""
    with closing(Store(tmp_path)) as store:
        picture = smooth_picture(8)

        def make(id, pictures=2):
            settings = [Resolved(size=(8, 8), steps=1, guidance=1.0, sampler="", spacing="", seed=i) for i in range(2)]
            job = Job(id, "me", "jobs", "tiny", settings, f"2026-01-01/a-{id}", 0.0)
            store.add(job)
            for index in range(pictures):
                store.add_picture(job, index, store.write(job, index, picture), picture.size)
                job.done.add(index)
            return job

        yield store, make


def test_a_sound_folder_has_lost_and_doubled_nothing(torture, drawn):
    """With a job that was given up as the queue does it, whose last file has no row: it was killed in between."""
    store, make = drawn
    make("a")
    given_up = make("b", 1)
    store.write(given_up, 1, smooth_picture(8))
    for _ in range(ATTEMPTS):
        store.count_attempt(given_up)
    Queue(store, 9)
    store.mark_ended(make("c", 1), CANCELLED, None, 1.0)
    found = torture.kept.outcome(store, {"a": DONE, "b": DONE, "c": CANCELLED})
    assert found == {"jobs": 3, "lost": 0, "doubled": 0, "given up": 1, "failed": 0}


@pytest.mark.parametrize("fault", ["absent", "unfinished", "other end", "failed", "no file", "no row", "no file of one "
                                   "given up", "two files", "file of nobody", "file of one cancelled"])  # fmt: skip
def test_each_loss_and_each_double_is_counted(torture, drawn, fault):
    store, make = drawn
    job, other = make("a"), make("b", 1)
    asked = {"a": DONE, "b": CANCELLED}
    store.mark_ended(other, CANCELLED, None, 1.0)
    first, last = (store.folder / f"pictures/{job.path_prefix}-{index}.png" for index in range(2))
    wanted = {"lost": 1, "doubled": 0, "failed": 0}
    if fault == "absent":
        asked["c"] = DONE
    elif fault == "unfinished":
        make("c", 1)  # nobody waits for it
    elif fault == "other end":
        asked["b"] = DONE
    elif fault == "failed":
        store.mark_ended(make("c", 1), FAILED, "drawing failed", 1.0)
        asked["c"], wanted["failed"] = DONE, 1
    elif fault == "no file":
        last.unlink()
    elif fault == "no row":
        store.db.execute("DELETE FROM images WHERE id = 'a-1'")
    elif fault == "no file of one given up":  # what it has must not hide what is missing of others
        given_up = make("c", 1)
        for _ in range(ATTEMPTS):
            store.count_attempt(given_up)
        Queue(store, 9)
        last.unlink()
    else:
        wanted = {"lost": 0, "doubled": 1, "failed": 0}
        name = {"two files": first.name, "file of nobody": "a-9-0.png", "file of one cancelled": "a-b-1.png"}[fault]
        (store.folder / "pictures" / "2026-01-02").mkdir()
        (store.folder / "pictures" / "2026-01-02" / name).write_bytes(first.read_bytes())
    found = torture.kept.outcome(store, asked)
    assert {name: found[name] for name in wanted} == wanted


def test_what_is_printed_is_what_was_found(torture):
    files = torture.files.Figures()
    for what in ("read", "read", "refused", "KeyError"):
        files.note("it", "a.txt", "0-1", what, 1.25, 2 * 10**9)
    server = {"kills": 7, "jobs": 11, "lost": 13, "doubled": 17, "given up": 2, "wrong": 19}
    clients = {"clients": 64, "jobs": 23, "lost": 29, "doubled": 31, "given up": 0, "wrong": 37}
    text, sound = torture.kept.summary(files, {"kills": 3, "runs": 5, "wrong": 41}, server, clients)
    lines = {line[:17].strip(): line[18:] for line in text.splitlines()}
    assert not sound and lines == {
        "files mutated": "4 (2 read, 1 refused in one line)",
        "longest load": "1.2 s",
        "most memory": "2.00 GB, of a process that reads files",
        "kills": "3 of training in 5 runs, 7 of the server",
        "clients": "64",
        "jobs": "34, of which 2 were given up after 3 kills",
        "lost": "42",
        "doubled": "48",
        "wrong exceptions": "98",
    }
    nothing = dict.fromkeys(server | clients | {"runs": 0}, 0)
    assert torture.kept.summary(torture.files.Figures(), nothing, nothing, nothing)[1]
    for name in ("lost", "doubled", "wrong"):
        assert not torture.kept.summary(torture.files.Figures(), nothing, nothing | {name: 1}, nothing)[1]


@pytest.mark.full
def test_five_minutes_of_torture():
    command = [sys.executable, str(HERE), "--minutes", "5", "--seed", "0", "--jobs", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert "files mutated" in ran.stdout and "wrong exceptions  0" in ran.stdout
