"""The queue of waiting and running jobs: bounded, fair to clients, and split into batches.

A batch takes pictures from one job, or from several whose settings differ only in prompts, seeds and guidance scale.
Clients take turns picture by picture, so that a request for one picture waits for one batch, not for a job of a
hundred.
"""

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from plainsd.server.errors import APIError
from plainsd.server.jobs.job import (
    ACTIVE,
    CANCELLED,
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    BatchProgress,
    Job,
    Notifier,
    Unit,
)
from plainsd.server.jobs.measures import Measures
from plainsd.server.jobs.pictures import Picture
from plainsd.server.logs import about

log = logging.getLogger("plainsd.server")
CLIENT_SHARE = 0.5  # maximum fraction of the queue for one client; with named ones, an equal share
ATTEMPTS = 3  # server crashes while one job was processed alone
LOADS = 10  # workers in a row that ended while they loaded what a picture needs
IDLE_AFTER = 30.0  # seconds
RESTART = 5  # seconds that a stop and the next start may take


@dataclass(eq=False)
class Place:
    """A worker as the queue sees it: the models that it has loaded, to choose by, and whether its process has ended.
    Where it draws in this process, its models do not matter, and are not counted here."""

    name: str = "worker-0"
    models: frozenset[str] = frozenset()
    bytes: int = 0  # their memory
    loads: int = 0  # models that were loaded, since the start, by all its processes
    lost: bool = False


class Queue:
    """The waiting and running jobs. Every change is stored before anyone is notified."""

    def __init__(self, store, limit: int):
        self.store, self.limit = store, limit
        self.changed, self.notifier = threading.Condition(threading.RLock()), Notifier()
        self.jobs: dict[str, Job] = {}  # oldest first
        self.queued: list[int] = []  # the numbers of those that have not started, in order
        self.served: Counter[str] = Counter()  # pictures started for each client, as long as it has jobs
        self.ended: Counter[str] = Counter()  # states, since the start
        self.seconds = 0.0  # from arrival to end, of all these
        self.measures = Measures()
        self.share = CLIENT_SHARE
        self.workers = 1
        self.idle: list[Place] = []  # of those that wait for a batch
        self.stopping = False
        self.failure: str | None = None  # why the server cannot go on, and ends
        self.closes: float | None = None  # while it drains: when the server stops at the latest, as time.monotonic()
        self.seconds_per_picture = 1.0  # moving average
        for job in store.unfinished():
            job.alone = job.state == RUNNING or job.attempts > 0  # at the time of the crash: it may have caused it
            job.state = QUEUED
            self.jobs[job.id] = job
            self.queued.append(job.number)
            if job.problem:
                self.end(job, FAILED, f"{job.problem}; submit it again")
            elif job.attempts >= ATTEMPTS:
                self.end(
                    job, FAILED, f"the server crashed {job.attempts} times while drawing this job; try smaller pictures"
                )

    # --- from clients ------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        with self.changed:
            self.check_open()
            mine = sum(other.client == job.client for other in self.jobs.values())
            if len(self.jobs) >= self.limit or mine >= max(1, self.limit * self.share):
                whose = f"{mine} of them yours" if mine else "none of them yours"
                left = sum(len(other.indices - other.done) for other in self.jobs.values())
                wait = self.seconds_per_picture * left / 4 / self.workers  # until a quarter of them is drawn
                wait = max(1, round(wait))
                raise APIError(
                    429,
                    f"the queue is full with {len(self.jobs)} jobs, {whose}; try again in {wait} s",
                    headers={"Retry-After": str(wait)},
                )
            self.store.add(job)
            if not mine:  # a new client starts level with the others, not ahead of them
                self.served[job.client] = min((self.served[other.client] for other in self.jobs.values()), default=0)
            self.jobs[job.id] = job
            self.queued.append(job.number)  # the highest yet
            self.changed.notify_all()
        log.info("job queued", extra=about(job) | {"pictures": len(job.indices)})
        self.notifier.notify()

    def set_names(self, count: int) -> None:
        """How many clients have names: however full it is, there is room for each of them, and for one more."""
        self.share = min(CLIENT_SHARE, 1 / (count + 1))

    def check_open(self) -> None:
        """APIError while the server drains or stops: what it took now would wait for the next start."""
        if self.stopping or self.closes is not None:
            left = 0.0 if self.stopping or self.closes is None else max(0.0, self.closes - time.monotonic())
            wait = round(left) + RESTART
            raise APIError(
                503, f"the server is about to stop; try again in {wait} s", headers={"Retry-After": str(wait)}
            )

    def get(self, id: str) -> Job | None:
        with self.changed:
            return self.jobs.get(id) or self.store.job(id)

    def position(self, job: Job) -> int:
        """How many jobs are ahead of it."""
        with self.changed:
            return bisect_left(self.queued, job.number)

    def leave_queued(self, job: Job) -> None:
        """It has started, or ended before it did."""
        place = bisect_left(self.queued, job.number)
        if self.queued[place : place + 1] == [job.number]:
            del self.queued[place]

    def cancel(self, id: str) -> Job | None:
        """Cancels a waiting or running job at once; its finished pictures are kept. None if there is no such job."""
        with self.changed:
            job = self.get(id)
            if job is not None:
                if not job.active:
                    raise APIError(409, f"job {id} is already {job.state}; there is nothing to cancel")
                self.end(job, CANCELLED)
            return job

    def forget(self, pictures: list[Picture]) -> None:
        """Pictures that were deleted: their jobs, if they are unfinished, no longer name them."""
        self._mark_deleted([(picture.job, picture.index) for picture in pictures], True)

    def remember(self, ids: list[str]) -> None:
        """Pictures that were restored, by their ids."""
        places = [(job, int(index)) for job, _, index in (id.rpartition("-") for id in ids) if index.isdecimal()]
        self._mark_deleted(places, False)

    def _mark_deleted(self, places: list[tuple[str, int]], is_deleted: bool) -> None:
        with self.changed:
            for id, index in places:
                if (job := self.jobs.get(id)) is not None:
                    job.deleted.add(index) if is_deleted else job.deleted.discard(index)
                    job.notifier.notify()

    # --- from the worker ---------------------------------------------------------------------------------------------

    def next_batch(self, size: int, place: Place, idle: Callable[[], object] = bool) -> list[Unit]:
        """The next batch for the worker at this place, waiting for one; empty when the server stops or that worker is
        lost. `idle` is called once if none comes for IDLE_AFTER seconds; it may take long, and others have the queue
        meanwhile."""
        with self.changed, self.waiting_at(place):
            rest: float | None = IDLE_AFTER
            while not (self.stopping or place.lost) and not (waiting := self.waiting(place)):
                if not self.changed.wait(rest):
                    rest = None
                    self.changed.release()
                    try:
                        idle()
                    finally:
                        self.changed.acquire()
            if self.stopping or place.lost:
                return []
            first = self.first_of(waiting, place)
            fitting = [unit for unit in waiting if unit.batch_key() == first.batch_key()]
            size = min(size, -(-len(fitting) // len(self.idle)))  # other idle workers have their share
            batch: list[Unit] = []
            while fitting and len(batch) < size:
                unit = first if not batch else min(fitting, key=self.turn)
                batch.append(unit)
                self.served[unit.job.client] += 1
                fitting.remove(unit)
            for job in dict.fromkeys(unit.job for unit in batch):
                if job.state == QUEUED:
                    now = time.time()
                    self.store.mark_started(job, now)
                    if job.started is None:  # not one that a stopped server had begun
                        self.measures.waits.labels(job.model, place.name).observe(now - job.created)
                    job.state, job.started = RUNNING, now
                    self.leave_queued(job)
                    log.info(
                        "job started", extra=about(job) | {"worker": place.name, "waited": round(now - job.created, 3)}
                    )
                under_way = {index: one for index, one in job.batches.items() if index in job.drawing}
                job.batches = under_way | {min(unit.index for unit in batch if unit.job is job): BatchProgress()}
                job.notifier.notify()
            for unit in batch:
                unit.job.drawing.add(unit.index)
            return batch

    @contextmanager
    def waiting_at(self, place: Place) -> Iterator[None]:
        """Meanwhile the worker at this place counts as idle."""
        self.idle.append(place)
        try:
            yield
        finally:
            self.idle.remove(place)
            if self.idle:  # what was left to this worker may be theirs now
                self.changed.notify_all()

    def waiting(self, place: Place) -> list[Unit]:
        """What the worker at this place may take: pictures whose model is loaded in another idle worker, and not in
        this one, are left to that one. Nothing more while the server drains."""
        if self.closes is not None:
            return []
        others = {name for other in self.idle if not other.lost for name in other.models} - place.models
        return [
            Unit(job, index)
            for job in self.jobs.values()
            for index in job.pending()
            if job.model not in others or index == len(job.settings)
        ]

    def first_of(self, waiting: list[Unit], place: Place) -> Unit:
        """Clients take turns; between those who had equally many, the one whose next picture needs no loading."""
        heads: dict[str, Unit] = {}
        for unit in sorted(waiting, key=lambda unit: (unit.job.number, unit.index)):
            heads.setdefault(unit.job.client, unit)
        loads = bool(place.models)  # else nothing is known, or nothing is loaded
        return min(
            heads.values(),
            key=lambda unit: (
                self.served[unit.job.client],
                loads and unit.job.model not in place.models,
                unit.job.number,
            ),
        )

    def turn(self, unit: Unit) -> tuple[int, int, int]:
        return self.served[unit.job.client], unit.job.number, unit.index

    def add_picture(self, unit: Unit, file: str, size: tuple[int, int]) -> bool:
        """Stores the row of a picture whose file is written. False if its job was cancelled meanwhile."""
        job = unit.job
        with self.changed:
            if not job.active:
                return False
            self.store.add_picture(job, unit.index, file, size)
            job.done.add(unit.index)
            log.info("picture finished", extra=about(job) | {"picture": job.picture_id(unit.index)})
            job.drawing.discard(unit.index)
            job.previews.pop(unit.index, None)
            if job.done == job.indices:
                self.end(job, DONE)
            self.changed.notify_all()
            job.notifier.notify()
            return True

    def requeue(self, units: list[Unit], *, alone: bool = False) -> None:
        """Returns the pictures of an abandoned batch to the queue."""
        with self.changed:
            for job, index in units:
                job.drawing.discard(index)
                job.batches.pop(index, None)
                job.alone = job.alone or alone
            self.changed.notify_all()

    def count_attempt(self, job: Job) -> int:
        """Counts a worker that ended while it drew this job alone, also for the next starts. Returns how many did."""
        with self.changed:
            self.store.count_attempt(job)
            job.attempts += 1
            return job.attempts

    def count_losses(self, units: list[Unit]) -> int:
        """Counts a worker that ended while it loaded what these pictures of one job need. Returns how many did so one
        after the other for one of them; those of other batches of the job, lost at the same time, are not among
        them."""
        with self.changed:
            for job, index in units:
                job.losses[index] += 1
            return max(job.losses[index] for job, index in units)

    def forget_losses(self, units: list[Unit]) -> None:
        """What these pictures need has been loaded."""
        with self.changed:
            for job, index in units:
                job.losses.pop(index, None)

    def end(self, job: Job, state: str, error: str | None = None, *, bad_request: bool = True) -> None:
        with self.changed:
            if not job.active:
                return
            finished = time.time()
            self.store.mark_ended(job, state, error, finished)
            job.error, job.finished, job.bad_request = error, finished, bad_request
            job.state = state
            del self.jobs[job.id]
            self.leave_queued(job)
            if all(other.client != job.client for other in self.jobs.values()):
                del self.served[job.client]
            self.ended[state] += 1
            self.seconds += job.finished - job.created
            self.changed.notify_all()
        ending = {"state": state, "seconds": round(finished - job.created, 3)} | ({"error": error} if error else {})
        log.info("job ended", extra=about(job) | ending)
        job.notifier.notify()
        self.notifier.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more jobs and starts no more batches; the server stops within so many seconds."""
        with self.changed:
            self.closes = time.monotonic() + seconds
            self.changed.notify_all()

    def drained(self) -> bool:
        """Whether no batch is drawn any more, or the time for it is over."""
        with self.changed:
            over = self.closes is not None and time.monotonic() >= self.closes
            return over or not any(job.drawing for job in self.jobs.values())

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()

    def fail(self, why: str) -> None:
        """Stops, as the server cannot go on; it ends, and says why."""
        with self.changed:
            self.failure = self.failure or why
            self.stop()

    def wait_for_stop(self, seconds: float) -> bool:
        """Waits at most so long; whether the server is stopping."""
        with self.changed:
            return self.changed.wait_for(lambda: self.stopping, seconds)

    def counts(self) -> dict[str, int]:
        with self.changed:
            states = Counter(job.state for job in self.jobs.values())
            return {state: states[state] for state in ACTIVE}
