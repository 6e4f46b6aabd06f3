"""The one thread that owns the models and the device: takes batches, draws them, keeps what comes out."""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from PIL import Image
from prometheus_client import Histogram

from plainsd.allocator import release_freed_memory
from plainsd.diffusion.samplers import Step
from plainsd.errors import DiskError, UserError
from plainsd.generate import batch
from plainsd.pictures.drawing import Pictures
from plainsd.pictures.images import grid
from plainsd.pictures.masks import pasted
from plainsd.pictures.model import StableDiffusion
from plainsd.server.controls import control_at
from plainsd.server.jobs.job import FAILED, Job, Unit
from plainsd.server.jobs.queue import Queue
from plainsd.server.jobs.store import Store
from plainsd.server.limits import Limits
from plainsd.server.pool import Models, ServedModel
from plainsd.server.uploads import png

PREVIEW_EVERY = 0.25  # seconds
RETRY = 1.0  # seconds, where the history cannot be written
STEPS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds, bounds of the buckets
log = logging.getLogger("plainsd.server")


class Stopped(Exception):
    """The server stops; the batch is given up and will be drawn again."""


class Worker(threading.Thread):
    """Draws until the queue is stopped. An error ends a job, never the thread."""

    def __init__(self, queue: Queue, models: Models, store: Store, limits: Limits, size: int):
        super().__init__(name="plainsd-worker", daemon=True)
        self.queue, self.models, self.store, self.limits, self.size = queue, models, store, limits, size
        self.pictures, self.failures, self.seconds = 0, 0, 0.0
        self.batches: Counter[int] = Counter()  # by their size
        self.steps = Histogram(
            "plainsd_step_seconds",
            "of one step of a batch; the first with its text and images",
            buckets=STEPS,
            registry=None,
        )

    def run(self) -> None:
        while True:
            units: list[Unit] = []
            try:
                units = self.queue.take(self.size, idle=release_freed_memory)
                if not units:
                    return
                self.serve(units)
            except sqlite3.Error as error:  # the disk is full: nothing can be written, so nothing is lost
                log.error("cannot write to the data folder (%s); trying again", error)
                self.queue.put_back(units)
                time.sleep(RETRY)

    def serve(self, units: list[Unit]) -> None:
        began = time.monotonic()
        self.batches[len(units)] += 1
        try:
            self.draw(units)
        except Stopped:
            self.queue.put_back(units)
        except Exception as error:
            self.failed(units, error)
        self.seconds += time.monotonic() - began

    def draw(self, units: list[Unit]) -> None:
        if units[0].is_sheet:
            return self.keep(units[0], self.sheet(units[0].job))
        model, sd = self.models.ready(units[0].job.model, units[0].job.loras, units[0].settings)
        began = time.monotonic()
        with self.counted({unit.job for unit in units}):
            pictures = self.sampled(model, sd, units)
        if pictures is None:
            return
        files = self.models.hashes(model, units[0].job.loras, units[0].settings)
        for unit, image in zip(units, pictures.images, strict=True):
            if unit.job.active:
                recorded = self.models.options.recorded
                unit.job.each[unit.place] = replace(unit.settings, hashes=files, **recorded)
                self.keep(unit, self.finished(unit.job, image))
        self.queue.pace += 0.2 * ((time.monotonic() - began) / len(units) - self.queue.pace)

    @contextmanager
    def counted(self, jobs: set[Job]) -> Iterator[None]:
        """While one job is drawn by itself, it is on record: should the server end now, it was the cause."""
        if len(jobs) > 1:
            yield
            return
        (job,) = jobs
        self.store.alone(job, True)
        try:
            yield
        finally:
            if job.active and not self.queue.stopping:  # a proper stop takes it off by itself
                self.store.alone(job, False)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def sampled(self, model: ServedModel, sd: StableDiffusion, units: list[Unit]) -> Pictures | None:
        """Runs the batch as long as anybody wants it."""
        source = units[0].job.source
        image = self.store.input(source.image) if source and source.image else None
        hole = self.store.input(source.hole) if source and source.hole else None
        nets, name = self.models.controls, units[0].job.model
        control = [
            control_at(one, name, sd, self.store.input(one.map), nets) for one in (source.controls if source else ())
        ]
        here = source is None or source.base is None  # else `finished` puts it into its place
        events = batch(sd, [unit.settings for unit in units], image, hole, control, composed=here)
        watch = Watch(self, model, units, events.steps)
        with closing(events):
            for event in events:
                if isinstance(event, Pictures):
                    return event
                watch(event)
                if self.queue.stopping:
                    raise Stopped
                if not any(unit.job.active for unit in units):
                    break
        return None

    # --- keeping -----------------------------------------------------------------------------------------------------

    def finished(self, job: Job, image: Image.Image) -> Image.Image:
        """As it is shown: pasted into the old picture where the job says so."""
        source = job.source
        if source is None or source.base is None or source.alpha is None:
            return image
        return pasted(image, self.store.input(source.base), self.store.input(source.alpha), source.box)

    def sheet(self, job: Job) -> Image.Image:
        """The X/Y grid, from the files of its pictures."""
        assert job.sheet is not None  # else it has no such place
        images = []
        for place in range(len(job.each)):
            row = self.store.picture(job.picture_id(place))
            if row is None:
                raise UserError("a picture of the grid was deleted before its sheet was made; draw the grid again")
            with Image.open(self.store.path(row)) as image:
                images.append(image.convert("RGB"))
        return grid(images, len(job.sheet.across), job.sheet.across, job.sheet.down)

    def keep(self, unit: Unit, image: Image.Image) -> None:
        file = self.written(unit, image)
        if file is None:
            return
        if self.queue.entered(unit, file, image.size):
            self.pictures += 1
        else:  # cancelled while it was written
            (self.store.folder / file).unlink(missing_ok=True)

    def written(self, unit: Unit, image: Image.Image) -> str | None:
        """The picture's file. Where the disk refuses it, it is tried again until there is room; None where its job was
        cancelled meanwhile."""
        while unit.job.active:
            try:
                return self.store.write(unit.job, unit.place, image)
            except DiskError as error:
                log.error("cannot write to the data folder (%s); trying again", error.reason)
                waits = f"the disk refuses a picture ({error.reason}); it is written as soon as there is room"
                if waits not in unit.job.notes:
                    unit.job.notes.append(waits)
                    unit.job.bell.ring()
                if self.queue.wait_stopped(RETRY):
                    raise Stopped from None
        return None

    def failed(self, units: list[Unit], error: Exception) -> None:
        """One job alone has failed; of several, each is tried again by itself, so that nobody pays for a neighbour."""
        jobs = dict.fromkeys(unit.job for unit in units)
        if len(units) > 1:
            return self.queue.put_back(units, alone=True)
        self.failures += 1
        asked = isinstance(error, UserError) and not isinstance(error, DiskError)  # wrongly, and not our trouble
        if not asked:
            log.error("job %s failed", units[0].job.id, exc_info=error)
        for job in jobs:
            why = error.reason if isinstance(error, DiskError) else error
            told = f"drawing failed ({type(error).__name__}: {why}); see the server's log"
            self.queue.end(job, FAILED, str(error) if asked else told, at_fault=asked)


class Watch:
    """Sees each step of a batch: progress, a preview now and then, and the time that each job has used."""

    def __init__(self, worker: Worker, model: ServedModel, units: list[Unit], steps: int):
        self.worker, self.model, self.units = worker, model, units
        self.jobs = Counter(unit.job for unit in units)
        self.shown, self.before = 0.0, time.monotonic()
        for job in self.jobs:
            job.step, job.steps = 0, steps

    def __call__(self, event: Step) -> None:
        now, limit = time.monotonic(), self.worker.limits.seconds
        self.worker.steps.observe(now - self.before)
        if now - self.shown >= PREVIEW_EVERY:
            self.shown = now
            assert self.model.preview is not None  # it is resident
            for unit, rough in zip(self.units, self.model.preview(event.denoised), strict=True):
                unit.job.previews[unit.place] = png(rough)
        for job, count in self.jobs.items():
            job.step += 1
            job.seconds += (now - self.before) * count / len(self.units)
            if job.seconds > limit:
                self.worker.queue.end(
                    job, FAILED, f"drawing took longer than {limit:g} s; ask for fewer steps, fewer or smaller pictures"
                )
            job.bell.ring()
        self.before = now
