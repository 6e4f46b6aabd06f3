"""A worker thread: takes batches, has them drawn, stores the pictures."""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TypeVar

from PIL import Image

from plainsd.errors import DiskError, UserError
from plainsd.pictures.images import PictureFile, grid
from plainsd.pictures.masks import pasted
from plainsd.server.jobs.drawing import (
    Advanced,
    Begun,
    Drawer,
    DrawnBatch,
    Event,
    LostWhile,
    RemoteError,
    Stopped,
    Work,
    WorkerLost,
    with_record,
)
from plainsd.server.jobs.job import FAILED, Job, Source, Unit
from plainsd.server.jobs.queue import ATTEMPTS, LOADS, Queue
from plainsd.server.jobs.store import Store
from plainsd.server.limits import Limits
from plainsd.server.logs import about, log_fields
from plainsd.server.pool import PoolOptions

RETRY = 1.0  # seconds, where the history cannot be written, or something else is wrong that is no job's error
Written = TypeVar("Written")
log = logging.getLogger("plainsd.server")


class Worker(threading.Thread):
    """Processes batches until the queue is stopped. An error ends a job, never the thread."""

    def __init__(self, queue: Queue, drawer: Drawer, store: Store, limits: Limits, options: PoolOptions, size: int):
        super().__init__(name=drawer.place.name, daemon=True)
        self.queue, self.drawer, self.store, self.limits = queue, drawer, store, limits
        self.options, self.size = options, size
        self.pictures, self.failures, self.losses, self.seconds = 0, 0, 0, 0.0
        self.batches: Counter[int] = Counter()  # by their size

    def run(self) -> None:
        units: list[Unit] = []
        while not self.queue.stopping:
            try:
                units = []
                if not self.drawer.open():
                    return
                units = self.queue.next_batch(self.size, self.drawer.place, idle=self.drawer.idle)
                if units:
                    self.process(units)
            except Exception as error:  # disk full: the batch is retried
                jobs = about(*dict.fromkeys(unit.job for unit in units)) if units else {}
                if isinstance(error, sqlite3.Error):
                    log.error("cannot write to the data folder (%s); trying again", error, extra=jobs)
                else:
                    log.error("%s cannot go on; trying again", self.name, exc_info=error, extra=jobs)
                self.queue.requeue(units)
                self.queue.wait_for_stop(RETRY)

    def process(self, units: list[Unit]) -> None:
        began = time.monotonic()
        self.batches[len(units)] += 1
        with log_fields(**about(*dict.fromkeys(unit.job for unit in units)), worker=self.name):
            try:
                self.draw(units)
            except Stopped:
                self.queue.requeue(units)
            except WorkerLost as lost:
                self.handle_loss(units, lost)
            except Exception as error:
                self.handle_error(units, error)
        self.seconds += time.monotonic() - began

    def draw(self, units: list[Unit]) -> None:
        if units[0].is_sheet:
            with self.recording_attempt({units[0].job}, here=True):
                sheet = self.sheet(units[0].job)
            return self.save(units[0], sheet)
        events = self.drawer.draw(self.work_of(units))
        with closing(events):
            next(events)  # `Prepared`
            self.queue.forget_losses(units)
            with self.recording_attempt({unit.job for unit in units}, here=not self.drawer.remote):
                began = time.monotonic()
                drawn = self.follow(events, units)
                seconds = time.monotonic() - began  # without a wait for the disk
        if drawn is None:
            return
        for unit, image in zip(units, drawn.images, strict=True):
            if unit.job.active:
                recorded = self.options.recorded
                unit.job.settings[unit.index] = with_record(unit.settings, drawn.hashes, recorded)
                self.save(unit, self.composited(unit.job, image))
        self.queue.seconds_per_picture += 0.2 * (seconds / len(units) - self.queue.seconds_per_picture)

    @contextmanager
    def recording_attempt(self, jobs: set[Job], *, here: bool) -> Iterator[None]:
        """While one job is processed alone in this process, records that: if it crashes now, this job caused it. The
        end of another process is seen: see `handle_loss`."""
        if len(jobs) > 1 or not here:
            yield
            return
        (job,) = jobs
        self.with_retries(job, lambda: self.store.mark_alone(job, True))
        try:
            yield
        finally:
            if job.active and not self.queue.stopping:  # a regular shutdown resets it
                self.with_retries(job, lambda: self.store.mark_alone(job, False))

    # --- drawing -----------------------------------------------------------------------------------------------------

    def work_of(self, units: list[Unit]) -> Work:
        job = units[0].job
        source = job.source or Source()
        needed = replace(source, base=None, alpha=None).files()  # what is pasted into is needed here alone
        inputs = {name: self.store.input_bytes(name) for name in needed}
        return Work(job.model, job.loras, [unit.settings for unit in units], source, inputs)

    def follow(self, events: Generator[Event], units: list[Unit]) -> DrawnBatch | None:
        """Samples the batch; None once all its jobs are cancelled."""
        watch = ProgressMonitor(self, units)
        for event in events:
            if isinstance(event, DrawnBatch):
                return event
            if isinstance(event, Begun):
                watch.begin(event.steps)
            elif isinstance(event, Advanced):
                watch(event)
                if self.queue.stopping:
                    raise Stopped
                if not any(unit.job.active for unit in units):
                    break
        return None

    # --- keeping -----------------------------------------------------------------------------------------------------

    def composited(self, job: Job, image: Image.Image | PictureFile) -> Image.Image | PictureFile:
        """The final picture: pasted into the original if the job says so."""
        source = job.source
        if source is None or source.base is None or source.alpha is None or isinstance(image, PictureFile):
            return image
        return pasted(image, self.store.input(source.base), self.store.input(source.alpha), source.box)

    def sheet(self, job: Job) -> Image.Image:
        """The X/Y grid, read from the files of its pictures, also of those in the trash. The cell of one that has been
        deleted for good is blank."""
        assert job.sheet is not None  # else it has no such index
        images = []
        for index, settings in enumerate(job.settings):
            row = self.store.picture(job.picture_id(index), trash=True)
            try:
                with Image.open(self.store.path(row) if row else "") as image:
                    images.append(image.convert("RGB"))
            except FileNotFoundError:
                images.append(Image.new("RGB", settings.size, "white"))
        return grid(images, len(job.sheet.across), job.sheet.across, job.sheet.down)

    def save(self, unit: Unit, image: Image.Image | PictureFile) -> None:
        file = self.with_retries(unit.job, lambda: self.store.write(unit.job, unit.index, image))
        if file is None:
            return
        if self.with_retries(unit.job, lambda: self.queue.add_picture(unit, file, image.size)):
            self.pictures += 1
        else:  # cancelled while it was written
            (self.store.folder / file).unlink(missing_ok=True)

    def with_retries(self, job: Job, write: Callable[[], Written]) -> Written | None:
        """Writes a file or a row of a job, and retries while the disk is full. None if it was cancelled meanwhile."""
        while job.active:
            try:
                return write()
            except (DiskError, sqlite3.OperationalError) as error:
                why = error.reason if isinstance(error, DiskError) else error
                log.error("cannot write to the data folder (%s); trying again", why, extra=about(job))
                waits = f"a picture cannot be written ({why}); it is retried until there is space"
                if waits not in job.notes:
                    job.notes.append(waits)
                    job.notifier.notify()
                if self.queue.wait_for_stop(RETRY):
                    raise Stopped from None
        return None

    def handle_error(self, units: list[Unit], error: Exception) -> None:
        """Fails a job that ran alone; the jobs of a mixed batch are retried one by one."""
        jobs = dict.fromkeys(unit.job for unit in units)
        if len(units) > 1:
            return self.queue.requeue(units, alone=True)
        self.failures += 1
        asked = isinstance(error, UserError) and not isinstance(error, DiskError)  # the client's error
        if not asked:
            log.error("job %s failed", units[0].job.id, exc_info=error, extra=about(units[0].job))
        for job in jobs:
            why = error.reason if isinstance(error, DiskError) else error
            what = why if isinstance(error, RemoteError) else f"{type(error).__name__}: {why}"
            message = f"drawing failed ({what}); see the server's log"
            self.queue.end(job, FAILED, str(error) if asked else message, bad_request=asked)

    def handle_loss(self, units: list[Unit], lost: WorkerLost) -> None:
        """The process that drew has ended. Its pictures are queued again; a job that was drawn alone in it counts as
        the cause, and fails at the third time. While something is loaded the job may well not be the cause, but there
        is an end to that too, see LOADS."""
        self.losses += 1
        jobs = dict.fromkeys(unit.job for unit in units)
        log.warning("%s was lost while %s (%s); its pictures are queued again", self.name, lost.stage, lost)
        if len(jobs) == 1 and lost.stage != LostWhile.WAITING:
            (job,) = jobs
            why = None
            if lost.stage == LostWhile.DRAWING and self.queue.count_attempt(job) >= ATTEMPTS:
                why = f"{ATTEMPTS} workers ended while drawing this job; try smaller pictures"
            if lost.stage == LostWhile.LOADING and self.queue.count_losses(units) >= LOADS:
                why = f"{LOADS} workers in a row ended while loading the model for this job; give workers more memory"
            if why:
                self.failures += 1
                self.queue.end(job, FAILED, why, bad_request=False)
        self.queue.requeue(units, alone=lost.stage != LostWhile.WAITING and len(units) > 1)


class ProgressMonitor:
    """Called after steps of a batch: updates progress, previews and the time used by each job."""

    def __init__(self, worker: Worker, units: list[Unit]):
        self.worker, self.units = worker, units
        self.jobs = Counter(unit.job for unit in units)
        self.batches = {job: job.batches[min(unit.index for unit in units if unit.job is job)] for job in self.jobs}
        self.steps = worker.queue.measures.steps.labels(units[0].job.model, worker.name)

    def begin(self, steps: int) -> None:
        for batch in self.batches.values():
            batch.step, batch.steps = 0, steps

    def __call__(self, event: Advanced) -> None:
        limit = self.worker.limits.seconds
        for seconds in event.seconds:
            self.steps.observe(seconds)
        for unit, preview in zip(self.units, event.previews, strict=False):
            unit.job.previews[unit.index] = preview
        for job, count in self.jobs.items():
            self.batches[job].step += len(event.seconds)
            with self.worker.queue.changed:  # other workers may draw of this job too
                job.seconds += sum(event.seconds) * count / len(self.units)
            if job.seconds > limit:
                self.worker.queue.end(
                    job, FAILED, f"drawing took longer than {limit:g} s; ask for fewer steps, fewer or smaller pictures"
                )
            job.notifier.notify()
