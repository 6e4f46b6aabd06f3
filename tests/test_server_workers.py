"""Several workers on one queue: who takes what, and what happens when the process of one ends. Without a cluster."""

import os
import subprocess
import sys
import threading

import pytest
from serving import model_folder, until

from plainsd.server.jobs.drawing import (
    Advanced,
    Begun,
    DrawnBatch,
    LocalDrawer,
    LostWhile,
    Prepared,
    Work,
    WorkerLost,
    batch_events,
)
from plainsd.server.jobs.job import DONE, FAILED, Job, Source
from plainsd.server.jobs.queue import LOADS, Place, Queue
from plainsd.server.jobs.store import Store
from plainsd.server.limits import Limits
from plainsd.server.pool import Models, PoolOptions
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest
from plainsd.server.service import Service

CPU = PoolOptions("cpu", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two models")
    return Models([model_folder(folder, name, seed) for seed, name in enumerate(("one", "two"))], CPU)


@pytest.fixture
def queue(tmp_path):
    store = Store(tmp_path)
    yield Queue(store, 256)
    store.close()


def add(queue, models, client="me", **more) -> Job:
    job = new_job(JobRequest(prompt="p", **more), models, Limits(), client, "jobs")
    queue.add(job)
    return job


class Waiting:
    """A worker that waits for a batch in a thread of its own."""

    def __init__(self, queue, *names, size=4):
        self.place, self.got = Place("worker-0", frozenset(names)), None
        before = len(queue.idle)

        def wait():
            self.got = queue.next_batch(size, self.place)

        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()
        until(lambda: len(queue.idle) > before)

    def batch(self):
        self.thread.join(30)
        assert not self.thread.is_alive()
        return [unit.job for unit in self.got]


# --- who takes what --------------------------------------------------------------------------------------------------


def test_work_goes_where_its_model_is_loaded(queue, models):
    """Whoever of the idle workers looks first."""
    for first, second in (("one", "two"), ("two", "one")):
        workers = {name: Waiting(queue, name) for name in (first, second)}
        with queue.changed:
            jobs = {name: add(queue, models, model=name) for name in ("one", "two")}
        for name, worker in workers.items():
            assert worker.batch() == [jobs[name]]


def test_one_of_two_that_have_it_loaded_takes_it(queue, models):
    workers = [Waiting(queue, "one") for _ in range(2)]
    job = add(queue, models, model="one")
    until(lambda: any(worker.got for worker in workers))
    assert [unit.job for worker in workers for unit in worker.got or ()] == [job]
    queue.stop()


def test_an_idle_worker_takes_what_no_other_idle_one_has_loaded(queue, models):
    busy = Place("busy", frozenset({"one"}))  # it does not wait
    other = Waiting(queue, "two")
    job = add(queue, models, model="one")
    assert other.batch() == [job] and busy not in queue.idle


def test_what_is_left_to_another_is_not_left_when_that_one_takes_something_else(queue, models):
    """A worker has both models loaded and takes the older job; the idle one that stood back takes the other."""
    none, both = Waiting(queue, size=1), Waiting(queue, "one", "two", size=1)
    with queue.changed:  # the first that waits is the first that wakes, and stands back
        jobs = [add(queue, models, client, model=name) for client, name in (("a", "one"), ("b", "two"))]
        assert queue.waiting(none.place) == []
        assert [unit.job for unit in queue.waiting(both.place)] == jobs
    assert {both.batch()[0], none.batch()[0]} == set(jobs)


def test_a_lost_worker_holds_nothing_back_and_gets_nothing(queue, models):
    lost, other = Waiting(queue, "one"), Waiting(queue, "two")
    with queue.changed:
        lost.place.lost = True
        queue.changed.notify_all()
    job = add(queue, models, model="one")
    assert other.batch() == [job] and lost.batch() == []


def test_between_clients_with_equal_turns_the_loaded_model_is_first_and_no_further(queue, models):
    older = add(queue, models, "anna", model="one", count=2)
    newer = add(queue, models, "bert", model="two", count=2)
    place = Place("worker-0", frozenset({"two"}))
    taken = [queue.next_batch(1, place)[0].job for _ in range(4)]
    assert taken == [newer, older, newer, older]


def test_idle_workers_share_a_job(queue, models):
    workers = [Waiting(queue) for _ in range(3)]
    with queue.changed:
        job = add(queue, models, count=8)
    batches = [worker.batch() for worker in workers]
    assert sorted(map(len, batches)) == [2, 3, 3] and {one for batch in batches for one in batch} == {job}


def test_progress_of_two_batches_of_one_job_adds_up(queue, models):
    job = add(queue, models, count=4)
    first, second = queue.next_batch(2, Place()), queue.next_batch(2, Place())
    halves = [job.batches[units[0].index] for units in (first, second)]
    for half, step in zip(halves, (5, 10), strict=True):
        half.step, half.steps = step, 10
    assert (job.step, job.steps) == (15, 20) and job.progress() == pytest.approx(0.75)
    queue.requeue(second)
    assert (job.step, job.steps) == (5, 10) and job.drawing == {0, 1}
    queue.next_batch(2, Place())
    assert (job.step, job.steps) == (5, 10)  # the other batch goes on, the new one has not begun


# --- workers that end ------------------------------------------------------------------------------------------------


class Mortal:
    """Draws in this process, as one whose process ends when `death` says so: while it waits, loads or draws."""

    remote, ready = True, True

    def __init__(self, models, name, death):
        self.models, self.death, self.place = models, death, Place(name)
        self.opened = 0

    def open(self):
        self.opened += 1
        return True

    def draw(self, work):
        stage = self.death(work)
        if stage in (LostWhile.WAITING, LostWhile.LOADING):
            raise WorkerLost("killed", stage)
        for event in batch_events(self.models, work):
            yield event
            if isinstance(event, Advanced) and stage == LostWhile.DRAWING:
                raise WorkerLost("killed", stage)

    def idle(self):
        pass

    def close(self):
        pass


@pytest.fixture
def mortal(model, tmp_path):
    """Makes services whose workers die."""
    services = []

    def make(death, workers=1, data="data"):
        service = Service.open(
            [model],
            tmp_path / data,
            Limits(),
            CPU,
            drawers=lambda models, queue: [Mortal(models, str(number), death) for number in range(workers)],
        )
        services.append(service)
        return service

    yield make
    for service in services:
        service.close()


def ended(job):
    until(lambda: not job.active, 60)
    return job


def test_the_queue_knows_how_many_draw(mortal):
    assert [mortal(None, count, str(count)).queue.workers for count in (1, 3)] == [1, 3]


def test_a_job_that_ends_its_worker_three_times_fails_and_the_others_do_not(mortal):
    deaths = []

    def death(work):
        if any(one.prompt == "bad" for one in work.settings):
            deaths.append([one.prompt for one in work.settings])
            return LostWhile.DRAWING
        return None

    service = mortal(death)
    jobs = [add(service.queue, service.models), new_bad(service), add(service.queue, service.models, seed=5)]
    service.start()
    assert [ended(job).state for job in jobs] == [DONE, FAILED, DONE]
    assert "3 workers ended while drawing this job" in jobs[1].error and not jobs[1].bad_request
    assert [len(prompts) for prompts in deaths] == [3, 1, 1, 1]  # together, which says nothing, then alone
    assert service.worker.losses == 4 and service.worker.drawer.opened > 4
    assert service.store.job(jobs[1].id).attempts == 3


def test_losses_while_loading_do_not_count_against_a_job_but_come_to_an_end(mortal):
    """Nine in a row, and again nine after it was loaded once, are no fault of the job; ten in a row are its end."""
    good = [*[LostWhile.LOADING] * (LOADS - 1), LostWhile.DRAWING, *[LostWhile.LOADING] * (LOADS - 1), None]
    bad = []

    def death(work):
        if work.settings[0].prompt == "bad":
            bad.append(1)
            return LostWhile.LOADING
        return good.pop(0)

    service = mortal(death)
    job = add(service.queue, service.models)
    service.start()
    assert ended(job).state == DONE and job.attempts == 1 and not job.losses
    other = ended(new_bad(service))
    assert other.state == FAILED and not other.bad_request and len(bad) == LOADS
    assert f"{LOADS} workers in a row ended while loading the model" in other.error
    assert service.store.job(other.id).attempts == 0


def test_workers_that_are_lost_together_while_loading_are_one_loss_of_each_picture(queue, models):
    """Machines that go at once take all batches of a job with them."""
    job = add(queue, models, count=LOADS)
    batches = [queue.next_batch(1, Place(str(number))) for number in range(LOADS)]
    assert [queue.count_losses(batch) for batch in batches] == [1] * LOADS
    for batch in batches:
        queue.requeue(batch)
    assert job.active and queue.count_losses(queue.next_batch(1, Place())) == 2


def new_bad(service):
    job = new_job(JobRequest(prompt="bad", seed=9), service.models, service.limits, "me", "jobs")
    service.queue.add(job)
    return job


def test_workers_that_end_while_they_wait_count_for_no_job(mortal):
    left = [LostWhile.WAITING] * 5
    service = mortal(lambda work: left.pop() if left else None)
    job = add(service.queue, service.models)
    service.start()
    assert ended(job).state == DONE and not job.attempts and not job.losses and service.worker.losses == 5


def test_attempts_are_kept_when_the_front_restarts(mortal):
    """Two that ended before and one after are three; the front's own end counts for none."""
    count = []

    def death(work):
        count.append(1)
        return LostWhile.DRAWING if len(count) <= 2 else None

    service = mortal(death)
    follow = service.worker.follow

    def held(events, units):
        if len(count) > 2:
            service.queue.wait_for_stop(60)
        return follow(events, units)

    service.worker.follow = held
    job = add(service.queue, service.models)
    service.start()
    until(lambda: len(count) > 2)
    service.queue.stop()  # as a crash: nothing is put back
    service.worker.join(30)
    service.closing.set()
    service.store.close()
    service.close = lambda: None
    again = mortal(lambda work: LostWhile.DRAWING)
    assert again.queue.jobs[job.id].attempts == 2
    again.start()
    assert ended(again.queue.jobs[job.id]).state == FAILED


def test_what_is_lost_is_drawn_by_another_once(mortal):
    """Two workers, one of which dies at every other batch: no picture is missing, none is there twice."""
    calls = []

    def death(work):
        calls.append(1)
        return LostWhile.DRAWING if len(calls) % 4 == 1 else None

    service = mortal(death, workers=2)
    jobs = [add(service.queue, service.models, f"client {index % 4}", seed=10 * index, count=2) for index in range(8)]
    service.start()
    assert {ended(job).state for job in jobs} == {DONE}
    rows = service.store.pictures(limit=100)
    assert sorted(row.id for row in rows) == sorted(job.picture_id(index) for job in jobs for index in range(2))
    assert len(list(service.store.folder.rglob("pictures/*/*.png"))) == 16
    assert sum(worker.losses for worker in service.workers) == sum(len(calls) >= n for n in range(1, len(calls) + 1, 4))


# --- one process -----------------------------------------------------------------------------------------------------


def test_the_events_of_a_batch_come_in_order(models):
    one = new_job(JobRequest(prompt="p", steps=3), models, Limits(), "me", "jobs").settings[0]
    events = list(LocalDrawer(models).draw(Work("one", [], [one], Source(), {})))
    assert [type(event) for event in events] == [Prepared, Begun, Advanced, Advanced, Advanced, DrawnBatch]
    assert events[0].resident == {"one"} and events[1].steps == 3 and events[2].previews and events[-1].hashes


def test_without_the_flag_ray_is_not_imported(model, tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
import plainsd.cli, plainsd.commands.serve, plainsd.commands.generate, plainsd.commands.evaluate
from serving import open_service, served
service = open_service([{model!r}], Path({str(tmp_path)!r}))
with served(service) as server:
    server.drawn(prompt="p", steps=1)
flags = ["--steps", "1", "--model", {model!r}, "--out", {str(tmp_path / "out")!r}]
assert plainsd.cli.main(["generate", "p", *flags]) == 0
assert "ray" not in sys.modules, "ray is imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
