"""Jobs and their queue: bounded, fair to every client, cut into batches that agree.

A job is a list of pictures. The unit of work is one picture; a batch takes pictures from one job or from several whose
settings differ in nothing but prompts, seeds and scale of guidance. Clients take turns picture by picture, so that somebody who asks for
one waits for one batch, not for another's hundred.
"""

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from plainsd.server.refusals import Refused
from plainsd.settings import Settings

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
ACTIVE = (QUEUED, RUNNING)
SHARE = 0.5                           # of the queue that one client may fill
ATTEMPTS = 3                          # crashes of the whole server that one job may cause


@dataclass(frozen=True)
class Source:
    """What a job draws on, as names of files in the inputs' folder."""

    image: str                        # what the model starts from
    hole: str | None = None           # of the same size, white where it is drawn anew
    base: str | None = None           # what the result is pasted into ...
    alpha: str | None = None          # ... with this opacity, of the same size as `base` ...
    box: tuple[int, int, int, int] | None = None      # ... scaled to this place: left, top, right, bottom

    def files(self) -> set[str]:
        return {name for name in (self.image, self.hole, self.base, self.alpha) if name}


@dataclass(frozen=True)
class Sheet:
    """The labels of an X/Y grid: the job's pictures on one sheet, as its last picture."""

    across: list[str]
    down: list[str]


class Bell:
    """Wakes coroutines from any thread."""

    def __init__(self):
        self.rings, self.lock, self.waiting = 0, threading.Lock(), []

    def ring(self) -> None:
        with self.lock:
            self.rings += 1
            waiting, self.waiting = self.waiting, []
        for loop, event in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    async def wait(self, heard: int, seconds: float) -> int:
        """Until it has rung more than `heard` times, or so long; how often it has rung."""
        event = asyncio.Event()
        with self.lock:
            if self.rings == heard:
                self.waiting.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            with self.lock:
                self.waiting = [one for one in self.waiting if one[1] is not event]
        return self.rings


@dataclass(eq=False)
class Job:
    """One request. The first half is written down; the second lives as long as the run."""

    id: str
    client: str
    api: str                          # through which it came: "jobs", "openai" or "a1111"
    model: str
    each: list[Settings]              # nothing left open
    place: str                        # of its files, below pictures/
    created: float
    loras: list[tuple[str, float]] = field(default_factory=list)
    source: Source | None = None
    inputs: dict[str, bytes] = field(default_factory=dict)        # its files, until they are written
    sheet: Sheet | None = None
    number: int = 0
    state: str = QUEUED
    error: str | None = None
    attempts: int = 0
    started: float | None = None
    finished: float | None = None
    done: set[int] = field(default_factory=set)       # pictures in the history

    drawing: set[int] = field(default_factory=set)
    step: int = 0                                     # of the batch under way ...
    steps: int = 0                                    # ... of so many
    previews: dict[int, bytes] = field(default_factory=dict)      # rough PNGs
    seconds: float = 0.0                              # of drawing so far
    alone: bool = False                               # after a failure together with others
    at_fault: bool = True                             # whether a failure was in the request
    bell: Bell = field(default_factory=Bell)

    @property
    def places(self) -> set[int]:
        """The numbers of its pictures; a sheet is the last."""
        return set(range(len(self.each) + (self.sheet is not None)))

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    def todo(self) -> list[int]:
        """What can be drawn now: a sheet only when its pictures are there."""
        left = sorted(self.places - self.done - self.drawing)
        ready = not self.drawing and len(self.done) == len(self.each)
        return [place for place in left if place < len(self.each) or ready]

    def settings_of(self, place: int) -> Settings:
        return self.each[min(place, len(self.each) - 1)]

    def picture_id(self, place: int) -> str:
        return f"{self.id}-{place}"

    def progress(self) -> float:
        """0 to 1, by pictures and their steps."""
        begun = len(self.drawing) * self.step / self.steps if self.steps else 0
        return (len(self.done) + begun) / len(self.places)

    def seconds_left(self) -> float | None:
        """By the time it has taken since it began; None before there is something to go by."""
        share = self.progress()
        if self.state != RUNNING or share < 0.02:
            return None
        return (time.time() - self.started) * (1 - share) / share

    @cached_property
    def alike(self) -> list[Settings]:
        """What pictures must have in common to be drawn together: all but prompts, seeds, and the scale of guidance where
        there is any."""
        own = {"prompt": "", "negative": "", "seed": 0, "variation_seed": None}
        return [replace(one, **own, guidance=float(one.guidance == 1)) for one in self.each]


class Unit(NamedTuple):
    """One picture of a job."""

    job: Job
    place: int

    @property
    def settings(self) -> Settings:
        return self.job.settings_of(self.place)

    @property
    def is_sheet(self) -> bool:
        return self.place == len(self.job.each)

    def kind(self) -> tuple:
        """Pictures of one kind may be drawn in one batch."""
        if self.is_sheet or self.job.alone:
            return (self.job.id, self.place)
        return (self.job.model, tuple(self.job.loras), self.job.source, self.job.alike[self.place])


class Queue:
    """The jobs that wait and run. Every change is in the store before anybody is told."""

    def __init__(self, store, limit: int):
        self.store, self.limit = store, limit
        self.changed, self.bell = threading.Condition(threading.RLock()), Bell()
        self.jobs: dict[str, Job] = {}                   # oldest first
        self.served: Counter[str] = Counter()            # pictures begun for each client, as long as it has jobs
        self.ended: Counter[str] = Counter()             # states, since the start
        self.seconds = 0.0                               # from arrival to end, of all these
        self.stopping = False
        self.pace = 1.0                                  # seconds a picture, smoothed
        for job in store.unfinished():
            job.alone = job.attempts > 0                 # it may have been the cause
            job.state = QUEUED
            self.jobs[job.id] = job
            if job.attempts >= ATTEMPTS:
                self.end(job, FAILED, f"the server ended {job.attempts} times while drawing this; try it smaller")

    # --- from clients ------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        with self.changed:
            mine = sum(other.client == job.client for other in self.jobs.values())
            if len(self.jobs) >= self.limit or mine >= max(1, self.limit * SHARE):
                whose = f"{mine} of them yours" if mine else "none of them yours"
                wait = max(1, round(self.pace * len(self.jobs) / 4))
                raise Refused(429, f"the queue is full with {len(self.jobs)} jobs, {whose}; try again in {wait} s",
                              headers={"Retry-After": str(wait)})
            self.store.add(job)
            if not mine:                                 # a newcomer starts level with those who wait, not ahead of them
                self.served[job.client] = min((self.served[other.client] for other in self.jobs.values()), default=0)
            self.jobs[job.id] = job
            self.changed.notify_all()
        self.bell.ring()

    def get(self, id: str) -> Job | None:
        with self.changed:
            return self.jobs.get(id) or self.store.job(id)

    def position(self, job: Job) -> int:
        """How many jobs wait before it."""
        with self.changed:
            return sum(other.number < job.number and other.state == QUEUED for other in self.jobs.values())

    def cancel(self, id: str) -> Job | None:
        """At once, whether it waits or runs; what it has finished stays. None: there is no such job."""
        with self.changed:
            job = self.get(id)
            if job is not None:
                if not job.active:
                    raise Refused(409, f"job {id} is {job.state} already; there is nothing to cancel")
                self.end(job, CANCELLED)
            return job

    # --- from the worker ---------------------------------------------------------------------------------------------

    def take(self, size: int) -> list[Unit]:
        """The next batch, waiting for one; empty when the server stops."""
        with self.changed:
            while not self.stopping and not (waiting := self.waiting()):
                self.changed.wait()
            if self.stopping:
                return []
            batch: list[Unit] = []
            while waiting and len(batch) < size:
                unit = min(waiting, key=lambda unit: (self.served[unit.job.client], unit.job.number, unit.place))
                batch.append(unit)
                self.served[unit.job.client] += 1
                waiting = [other for other in waiting if other != unit and other.kind() == unit.kind()]
            for unit in batch:
                unit.job.drawing.add(unit.place)
            for job in dict.fromkeys(unit.job for unit in batch):
                if job.state == QUEUED:
                    job.state, job.started = RUNNING, time.time()
                    self.store.started(job)
                job.bell.ring()
            return batch

    def waiting(self) -> list[Unit]:
        return [Unit(job, place) for job in self.jobs.values() for place in job.todo()]

    def entered(self, unit: Unit, file: str, size: tuple[int, int]) -> bool:
        """A picture's file is written: its row too, unless its job was cancelled meanwhile."""
        job = unit.job
        with self.changed:
            if not job.active:
                return False
            self.store.enter(job, unit.place, file, size)
            job.done.add(unit.place)
            job.drawing.discard(unit.place)
            job.previews.pop(unit.place, None)
            if job.done == job.places:
                self.end(job, DONE)
            self.changed.notify_all()
            job.bell.ring()
            return True

    def put_back(self, units: list[Unit], *, alone: bool = False) -> None:
        """A batch was given up; its pictures wait again."""
        with self.changed:
            for job, place in units:
                job.drawing.discard(place)
                job.step = job.steps = 0
                job.alone = job.alone or alone
            self.changed.notify_all()

    def end(self, job: Job, state: str, error: str | None = None, *, at_fault: bool = True) -> None:
        with self.changed:
            if not job.active:
                return
            finished = time.time()
            self.store.ended(job, state, error, finished)
            job.error, job.finished, job.at_fault = error, finished, at_fault
            job.state = state
            del self.jobs[job.id]
            if all(other.client != job.client for other in self.jobs.values()):
                del self.served[job.client]
            self.ended[state] += 1
            self.seconds += job.finished - job.created
            self.changed.notify_all()
        job.bell.ring()
        self.bell.ring()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()

    def counts(self) -> dict[str, int]:
        with self.changed:
            states = Counter(job.state for job in self.jobs.values())
            return {state: states[state] for state in ACTIVE}
