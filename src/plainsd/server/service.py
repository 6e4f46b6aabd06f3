"""What all routes share: models, store, queue, workers, limits, and jobs as JSON."""

import asyncio
import base64
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from plainsd.errors import UserError
from plainsd.server.canvas import InitImages
from plainsd.server.errors import APIError
from plainsd.server.jobs.drawing import Drawer, LocalDrawer
from plainsd.server.jobs.job import DONE, FAILED, QUEUED, Job
from plainsd.server.jobs.pictures import Picture, json_seed
from plainsd.server.jobs.queue import Queue
from plainsd.server.jobs.store import Store
from plainsd.server.jobs.worker import Worker
from plainsd.server.limits import Limits
from plainsd.server.logs import about, note
from plainsd.server.pool import Models, PoolOptions
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest
from plainsd.server.users import User

log = logging.getLogger("plainsd.server")
HEARTBEAT = 15.0  # seconds between keep-alives of an event stream
TRASH_ROUND = 15.0  # seconds between looks at what is in the trash
LAST_STEP = 30.0  # seconds that shutdown waits for the current step
ENDED = {"x-should-retry": "false"}  # for OpenAI's clients, which else send a 409 or 500 again: the job has ended


@dataclass
class Service:
    """One server."""

    models: Models
    store: Store
    queue: Queue
    workers: list[Worker]
    limits: Limits
    closing: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(
        cls,
        sources: Sequence[str | None],
        data: Path,
        limits: Limits = Limits(),
        options: PoolOptions = PoolOptions(),
        *,
        batch: int = 4,
        drawers: Callable[[Models, Queue], Sequence[Drawer]] = lambda models, queue: [LocalDrawer(models)],
    ) -> "Service":
        """Opens everything without starting the workers, one for each of `drawers`; by default there is one, and it
        draws in this process. UserError if a model or the data folder cannot be used."""
        models = Models(sources, options)
        store = Store(data)
        try:
            queue = Queue(store, limits.queue)
        except sqlite3.Error as error:
            store.close()
            what = f"cannot read the database in '{data}' ({error})"
            raise UserError(f"{what}; repair it or move it away, or choose another folder with --data") from None
        try:
            made = drawers(models, queue)
        except BaseException:
            queue.stop()
            store.close()
            raise
        workers = [Worker(queue, one, store, limits, options, batch) for one in made]
        queue.workers = len(workers)
        return cls(models, store, queue, workers, limits)

    @property
    def worker(self) -> Worker:
        """The first, and often the only one."""
        return self.workers[0]

    def resident(self, name: str) -> bool:
        """Whether a model is loaded, here or in a worker's process."""
        return self.models.known[name].sd is not None or any(name in one.drawer.place.models for one in self.workers)

    def start(self) -> None:
        """Draws what waits, and empties the trash from time to time."""
        for worker in self.workers:
            worker.start()
        threading.Thread(target=self.keep_trash, name="trash", daemon=True).start()

    def keep_trash(self) -> None:
        while not self.closing.wait(min(TRASH_ROUND, self.limits.undo)):
            try:
                with self.store.lock:  # `close` takes it too
                    if not self.closing.is_set():
                        self.store.empty_trash(self.limits.undo)
            except (sqlite3.Error, OSError) as error:
                log.warning("the trash cannot be emptied (%s); it is tried again", error)

    def stop(self) -> None:
        """Stops the workers after the current step, and ends all event streams and waits."""
        self.queue.stop()
        for job in list(self.queue.jobs.values()):
            job.notifier.notify()

    def close(self) -> None:
        """Stops, and queues running jobs again for the next start."""
        self.stop()
        end = time.monotonic() + LAST_STEP
        for worker in self.workers:
            if worker.is_alive():
                worker.join(max(0.0, end - time.monotonic()))
            worker.drawer.close()
        try:
            self.store.requeue_running()
        except sqlite3.Error as error:  # the next start does it
            log.error("cannot write to the data folder (%s); a job that was drawn counts as interrupted", error)
        self.closing.set()
        self.store.close()

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def submit(
        self, request: JobRequest, client: str, api: str, init: InitImages | None = None, *, owner: str
    ) -> Job:
        """Checks, stores and queues a request."""

        def create() -> Job:
            job = new_job(request, self.models, self.limits, client, api, init)
            job.owner = owner
            self.queue.add(job)
            note(**about(job))
            return job

        return await run_in_threadpool(create)

    def job(self, id: str, user: User) -> Job:
        """APIError if there is none, or it is somebody else's."""
        job = self.queue.get(id)
        if job is None or not user.sees(job.owner):
            raise APIError(404, f"there is no job {id!r}; GET /api/jobs lists them")
        note(**about(job))
        return job

    async def wait_for_end(self, job: Job, request: Request) -> Job:
        """Waits for the end of a job, or of the server. If the client disconnects, the job is cancelled."""
        seen = 0
        while job.active and not self.queue.stopping:
            seen = await job.notifier.wait(seen, 0.5)
            if await request.is_disconnected():
                await run_in_threadpool(self.abandon, job)
        return job

    def abandon(self, job: Job) -> None:
        """Cancels a job whose client has disconnected, unless the server is stopping."""
        if not self.queue.stopping:
            with suppress(APIError):  # it has ended meanwhile
                self.queue.cancel(job.id)

    def as_json(self, job: Job) -> dict[str, Any]:
        """A job as JSON."""
        with self.queue.changed:  # a consistent state
            return {
                "id": job.id, "state": job.state, "api": job.api, "model": job.model, "prompt": job.settings[0].prompt,
                "count": len(job.indices), "done": len(job.done), "progress": round(job.progress(), 4),
                "step": job.step, "steps": job.steps, "seconds_left": job.seconds_left(),
                "position": self.queue.position(job) if job.state == QUEUED else None,
                "seeds": [json_seed(one.seed) for one in job.settings], "notes": job.notes,
                "images": [job.picture_id(index) for index in job.kept()],
                "error": job.error or job.problem,
                "created": job.created, "started": job.started, "finished": job.finished,
            }  # fmt: skip

    async def events(self, job: Job) -> AsyncIterator[tuple[str, dict]]:
        """`progress` after each change, `beat` as a keep-alive, `end` at the end of the job. When the server stops,
        only the stream ends: browsers reconnect by themselves."""
        seen = -1
        shown: dict[int, bytes] = {}
        while not self.queue.stopping:
            if not job.active:
                yield "end", await run_in_threadpool(self.as_json, job)
                return
            fresh = {index: image for index, image in list(job.previews.items()) if shown.get(index) is not image}
            shown |= fresh
            previews = {str(index): data_url(image) for index, image in fresh.items()}
            yield "progress", await run_in_threadpool(self.as_json, job) | {"previews": previews}
            while (count := await job.notifier.wait(seen, HEARTBEAT)) == seen:
                yield "beat", {}
            seen = count
            await asyncio.sleep(0.05)  # faster steps share one event

    # --- pictures ----------------------------------------------------------------------------------------------------

    def picture(self, id: str, user: User) -> Picture:
        """APIError if there is none, or it is somebody else's."""
        found = self.store.picture(id, owner=user.scope)
        if found is None:
            raise APIError(404, f"there is no picture {id!r}; GET /api/images lists them")
        return found

    def trash(self, pictures: list[Picture]) -> None:
        """Out of the history; `restore` brings them back for `limits.undo` seconds."""
        self.store.trash(pictures)
        self.queue.forget(pictures)

    def delete(self, picture: Picture) -> None:
        """For good, at once."""
        self.store.delete([picture])
        self.queue.forget([picture])

    def restore(self, ids: list[str], user: User) -> list[str]:
        """Back into the history; the ids of those that were in the trash."""
        restored = self.store.restore(ids, user.scope)
        self.queue.remember(restored)
        return restored

    def selected(self, ids: list[str], field: str, user: User) -> list[Picture]:
        """Those of these that are there for this user, in this order, each once."""
        ids = self.selection(ids, field)
        return [found for id in ids if (found := self.store.picture(id, owner=user.scope))]

    def selection(self, ids: list[str], field: str) -> list[str]:
        """Each once; APIError where they are too many, or none."""
        if not 1 <= len(ids) <= self.limits.selection:
            what = f"{field} names {len(ids)} pictures"
            raise APIError(422, f"{what}; give 1 to {self.limits.selection}", field, len(ids))
        return [*dict.fromkeys(ids)]

    def files(self, job: Job) -> list[tuple[Picture, bytes]]:
        """The finished pictures of a job with the contents of their files, in order."""
        rows = sorted(self.store.pictures(job=job.id, limit=len(job.indices)), key=lambda row: row.index)
        return [(row, self.store.path(row).read_bytes()) for row in rows]


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def failure_of(job: Job) -> APIError | None:
    """For blocking APIs: the error to answer with, or None if the job is done."""
    if job.state == DONE:
        return None
    if job.state == FAILED:
        return APIError(422 if job.bad_request else 500, str(job.error), headers={} if job.bad_request else ENDED)
    if job.active:
        return APIError(503, f"the server is stopping; job {job.id} resumes when it runs again")
    return APIError(409, f"job {job.id} was {job.state}; submit it again", headers=ENDED)


def user_of(request: Request) -> User:
    """As `SecurityMiddleware` has found."""
    return request.scope["user"]


CurrentUser = Annotated[User, Depends(user_of)]


def client_of(request: Request, said: str | None = None) -> str:
    """Identifies the client for fair scheduling: by the name of its token; else by its address, and the name that it
    says it has."""
    if name := user_of(request).name:
        return name
    address = request.client.host if request.client else "unknown"
    return f"{address}/{said}" if said else address


def now() -> int:
    return int(time.time())
