"""The server's workers in a cluster: each holds models in a process of its own, on this machine or another."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from plainsd.cluster.connect import Share
from plainsd.cluster.worker import NodeLost, RemoteWorker, Stopping, TaskError, WorkerEnded, watch
from plainsd.errors import UserError
from plainsd.server.jobs.drawing import (
    Advanced,
    DrawnBatch,
    Event,
    LostWhile,
    Prepared,
    RemoteError,
    Stopped,
    Work,
    WorkerLost,
    as_files,
    batch_events,
)
from plainsd.server.jobs.queue import Place, Queue
from plainsd.server.pool import Models, PoolOptions, budget_of

EVENT_SECONDS = 0.05  # between events of steps: faster steps share one
FIRST_SECONDS = 60.0  # for all workers to be ready, once the first is: the others may have to wait for machines
RETRY_SECONDS = (1.0, 30.0)  # between attempts to start a worker, growing
log = logging.getLogger("plainsd.cluster")


# --- in the worker's process -----------------------------------------------------------------------------------------


class Batches:
    """Draws batches with models of its own."""

    def __init__(self, sources: Sequence[str | None], options: PoolOptions, share: Share):
        self.models = Models(sources, options)
        if options.memory is None:  # of the machine's, its part
            part = min(1.0, share.gpus) if self.models.device.type == "cuda" else share.cpus / (os.cpu_count() or 1)
            self.models.budget = budget_of(self.models.device) * min(1.0, part)

    def __call__(self, work: Work) -> Iterator[Event]:
        recorded = self.models.options.recorded
        with closing(merged(batch_events(self.models, work))) as events:
            for event in events:
                yield as_files(event, work, recorded) if isinstance(event, DrawnBatch) else event


def merged(events: Generator[Event]) -> Generator[Event]:
    """The same events, but steps that follow each other quickly are one: each event costs a message."""
    waiting, last = Advanced([]), 0.0
    with closing(events):
        for event in events:
            if isinstance(event, Advanced):
                waiting = Advanced([*waiting.seconds, *event.seconds], event.previews or waiting.previews)
                if time.monotonic() - last < EVENT_SECONDS:
                    continue
                event = waiting
            elif waiting.seconds:
                yield waiting
            waiting, last = Advanced([]), time.monotonic()
            yield event


# --- in the front ----------------------------------------------------------------------------------------------------


class RemoteDrawer:
    """Has batches drawn by a worker's process, and replaces that when it ends."""

    remote = True

    def __init__(self, name: str, make: Callable[[], Batches], share: Share, queue: Queue):
        self.queue, self.place = queue, Place(name)
        self.worker = RemoteWorker(name, make, share, stopping=lambda: queue.stopping, on_end=self.lose)
        self.starting = threading.Lock()

    @property
    def ready(self) -> bool:
        return self.worker.life is not None

    def start(self) -> None:
        """Starts its process, unless another thread has. UserError, WorkerEnded, Stopping."""
        with self.starting:
            if not self.ready:
                self.worker.start()
                self.forget_models(lost=False)

    def lose(self) -> None:
        """Its process has ended: where its thread waits for a batch, it gets none, but starts another process."""
        self.forget_models(lost=True)

    def forget_models(self, *, lost: bool) -> None:
        with self.queue.changed:
            self.place.models, self.place.bytes, self.place.lost = frozenset(), 0, lost
            self.queue.changed.notify_all()

    def open(self) -> bool:
        """Starts its process where there is none, until that works; False where the server stops before."""
        wait, longest = RETRY_SECONDS
        while not self.ready:
            try:
                self.start()
            except Stopping:
                return False
            except NodeLost as error:
                self.queue.fail(str(error))
                return False
            except Exception as error:
                expected = isinstance(error, (UserError, WorkerEnded))
                log.error(
                    "%s cannot be started (%s); trying again",
                    self.place.name, error, exc_info=None if expected else error,
                )  # fmt: skip
                if self.queue.wait_for_stop(wait):
                    return False
                wait = min(2 * wait, longest)
        return not self.queue.stopping

    def draw(self, work: Work) -> Generator[Event]:
        stage = LostWhile.LOADING
        try:
            with closing(self.worker.run(work)) as events:
                for event in events:
                    if isinstance(event, Prepared):
                        stage = LostWhile.DRAWING
                        with self.queue.changed:
                            self.place.models, self.place.bytes = event.resident, event.bytes
                            self.place.loads += event.loads
                    yield event
        except WorkerEnded as ended:
            self.lose()
            raise WorkerLost(str(ended), stage if ended.taken else LostWhile.WAITING) from None
        except TaskError as error:
            raise RemoteError(str(error)) from None
        except NodeLost as error:
            self.queue.fail(str(error))
            raise Stopped from None
        except Stopping:
            raise Stopped from None

    def idle(self) -> None:
        pass

    def close(self) -> None:
        self.worker.end()


@dataclass
class Cluster:
    """The workers of one server."""

    share: Share
    workers: int

    def drawers(self, models: Models, queue: Queue) -> list[RemoteDrawer]:
        """For `Service.open`: starts the workers. UserError where one of them cannot work."""
        make = partial(Batches, [model.source for model in models.known.values()], models.options, self.share)
        drawers = [RemoteDrawer(f"worker-{number}", make, self.share, queue) for number in range(self.workers)]
        self.start(drawers)
        arguments = ([drawer.worker for drawer in drawers], lambda: queue.stopping)
        threading.Thread(target=watch, args=arguments, name="plainsd-cluster", daemon=True).start()
        return drawers

    def start(self, drawers: Sequence[RemoteDrawer]) -> None:
        """Starts all at once, and waits until the first is ready, and a while for the others. UserError of the first
        that cannot work; all are ended then."""
        errors: list[Exception] = []

        def begin(drawer: RemoteDrawer) -> None:
            try:
                drawer.start()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=begin, args=(drawer,), daemon=True) for drawer in drawers]
        for thread in threads:
            thread.start()
        end = None
        while any(thread.is_alive() for thread in threads) and not errors and (end is None or time.monotonic() < end):
            time.sleep(0.05)
            if end is None and any(drawer.ready for drawer in drawers):
                end = time.monotonic() + FIRST_SECONDS
        if errors:
            for drawer in drawers:
                drawer.close()
            first = errors[0]
            if not isinstance(first, (UserError, WorkerEnded, Stopping)):
                raise first
            why = first if isinstance(first, UserError) else f"a worker ended as it was started: {first}"
            raise UserError(str(why), field="cluster", most=len(str(why))) from None
