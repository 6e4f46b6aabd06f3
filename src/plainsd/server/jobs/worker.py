"""The worker thread, which owns the models and the device: takes batches, samples them, stores the pictures."""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from PIL import Image

from plainsd.allocator import release_freed_memory
from plainsd.diffusion.samplers import Step
from plainsd.errors import DiskError, UserError
from plainsd.generate import batch
from plainsd.pictures.drawing import Pictures
from plainsd.pictures.images import grid
from plainsd.pictures.masks import pasted
from plainsd.pictures.model import StableDiffusion
from plainsd.server.controls import control_at
from plainsd.server.image_prompts import image_prompt_at
from plainsd.server.jobs.job import FAILED, Job, Unit
from plainsd.server.jobs.queue import Queue
from plainsd.server.jobs.store import Store
from plainsd.server.limits import Limits
from plainsd.server.logs import about, log_fields
from plainsd.server.pool import Models, ServedModel
from plainsd.server.uploads import png

PREVIEW_SECONDS = 0.25  # seconds
RETRY = 1.0  # seconds, where the history cannot be written
log = logging.getLogger("plainsd.server")


class Stopped(Exception):
    """The server is stopping; the batch is abandoned and will run again."""


class Worker(threading.Thread):
    """Processes batches until the queue is stopped. An error ends a job, never the thread."""

    def __init__(self, queue: Queue, models: Models, store: Store, limits: Limits, size: int, name: str = "worker-0"):
        super().__init__(name=name, daemon=True)
        self.queue, self.models, self.store, self.limits, self.size = queue, models, store, limits, size
        self.pictures, self.failures, self.seconds = 0, 0, 0.0
        self.batches: Counter[int] = Counter()  # by their size

    def run(self) -> None:
        while True:
            units: list[Unit] = []
            try:
                units = self.queue.next_batch(self.size, idle=release_freed_memory, worker=self.name)
                if not units:
                    return
                self.process(units)
            except sqlite3.Error as error:  # disk full: the batch is retried
                jobs = about(*dict.fromkeys(unit.job for unit in units)) if units else {}
                log.error("cannot write to the data folder (%s); trying again", error, extra=jobs)
                self.queue.requeue(units)
                time.sleep(RETRY)

    def process(self, units: list[Unit]) -> None:
        began = time.monotonic()
        self.batches[len(units)] += 1
        with log_fields(**about(*dict.fromkeys(unit.job for unit in units)), worker=self.name):
            try:
                self.draw(units)
            except Stopped:
                self.queue.requeue(units)
            except Exception as error:
                self.handle_error(units, error)
        self.seconds += time.monotonic() - began

    def draw(self, units: list[Unit]) -> None:
        if units[0].is_sheet:
            return self.save(units[0], self.sheet(units[0].job))
        model, sd = self.models.prepare(units[0].job.model, units[0].job.loras, units[0].settings)
        began = time.monotonic()
        with self.recording_attempt({unit.job for unit in units}):
            pictures = self.sample_batch(model, sd, units)
        if pictures is None:
            return
        files = self.models.hashes(model, units[0].job.loras, units[0].settings)
        for unit, image in zip(units, pictures.images, strict=True):
            if unit.job.active:
                recorded = self.models.options.recorded
                unit.job.settings[unit.index] = replace(unit.settings, hashes=files, **recorded)
                self.save(unit, self.composited(unit.job, image))
        self.queue.seconds_per_picture += 0.2 * (
            (time.monotonic() - began) / len(units) - self.queue.seconds_per_picture
        )

    @contextmanager
    def recording_attempt(self, jobs: set[Job]) -> Iterator[None]:
        """While one job is processed alone, records that: if the server crashes now, this job caused it."""
        if len(jobs) > 1:
            yield
            return
        (job,) = jobs
        self.store.mark_alone(job, True)
        try:
            yield
        finally:
            if job.active and not self.queue.stopping:  # a regular shutdown resets it
                self.store.mark_alone(job, False)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def sample_batch(self, model: ServedModel, sd: StableDiffusion, units: list[Unit]) -> Pictures | None:
        """Samples the batch; None once all its jobs are cancelled."""
        source = units[0].job.source
        image = self.store.input(source.image) if source and source.image else None
        hole = self.store.input(source.hole) if source and source.hole else None
        nets, name = self.models.controls, units[0].job.model
        control = [
            control_at(one, name, sd, self.store.input(one.map) if one.map else None, nets)
            for one in (source.controls if source else ())
        ]
        prompts = [
            image_prompt_at(one, sd, self.store.input, self.models.image_adapters)
            for one in (source.image_prompts if source else ())
        ]
        here = source is None or source.base is None  # else `composited` pastes it
        events = batch(sd, [unit.settings for unit in units], image, hole, control, prompts, composed=here)
        watch = ProgressMonitor(self, model, units, events.steps)
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

    def composited(self, job: Job, image: Image.Image) -> Image.Image:
        """The final picture: pasted into the original if the job says so."""
        source = job.source
        if source is None or source.base is None or source.alpha is None:
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

    def save(self, unit: Unit, image: Image.Image) -> None:
        file = self.write_with_retries(unit, image)
        if file is None:
            return
        if self.queue.add_picture(unit, file, image.size):
            self.pictures += 1
        else:  # cancelled while it was written
            (self.store.folder / file).unlink(missing_ok=True)

    def write_with_retries(self, unit: Unit, image: Image.Image) -> str | None:
        """Writes the picture's file, and retries while the disk is full. None if its job was cancelled meanwhile."""
        while unit.job.active:
            try:
                return self.store.write(unit.job, unit.index, image)
            except DiskError as error:
                log.error("cannot write to the data folder (%s); trying again", error.reason, extra=about(unit.job))
                waits = f"a picture cannot be written ({error.reason}); it is retried until there is space"
                if waits not in unit.job.notes:
                    unit.job.notes.append(waits)
                    unit.job.notifier.notify()
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
            message = f"drawing failed ({type(error).__name__}: {why}); see the server's log"
            self.queue.end(job, FAILED, str(error) if asked else message, bad_request=asked)


class ProgressMonitor:
    """Called after each step of a batch: updates progress, previews and the time used by each job."""

    def __init__(self, worker: Worker, model: ServedModel, units: list[Unit], steps: int):
        self.worker, self.model, self.units = worker, model, units
        self.jobs = Counter(unit.job for unit in units)
        self.step_seconds = worker.queue.measures.steps.labels(model.name, worker.name)
        self.last_preview, self.last_step = 0.0, time.monotonic()
        for job in self.jobs:
            job.step, job.steps = 0, steps

    def __call__(self, event: Step) -> None:
        now, limit = time.monotonic(), self.worker.limits.seconds
        self.step_seconds.observe(now - self.last_step)
        if now - self.last_preview >= PREVIEW_SECONDS:
            self.last_preview = now
            assert self.model.preview is not None  # it is resident
            for unit, rough in zip(self.units, self.model.preview(event.denoised), strict=True):
                unit.job.previews[unit.index] = png(rough)
        for job, count in self.jobs.items():
            job.step += 1
            job.seconds += (now - self.last_step) * count / len(self.units)
            if job.seconds > limit:
                self.worker.queue.end(
                    job, FAILED, f"drawing took longer than {limit:g} s; ask for fewer steps, fewer or smaller pictures"
                )
            job.notifier.notify()
        self.last_step = now
