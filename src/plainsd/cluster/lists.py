"""A list of tasks, done by several workers: each takes the next task when it is idle."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from plainsd.cluster.connect import Share
from plainsd.cluster.host import Tool
from plainsd.cluster.worker import RemoteWorker, Stopping, WorkerEnded
from plainsd.errors import UserError

TRIES = 3  # workers that may end during one task, or one after the other without having begun with one
log = logging.getLogger("plainsd.cluster")


class OfTask(NamedTuple):
    """An event, and which task it is of. A task that is begun anew, since its worker ended, starts with `Again`."""

    task: int
    event: Any


class Again(NamedTuple):
    """What came of this task before does not count."""


class TaskList:
    """Tasks that wait, and the threads that have them done, one for each worker."""

    def __init__(self, make: Callable[[], Tool], share: Share, workers: int, tasks: Sequence[Any]):
        self.tasks, self.waiting = tasks, deque(range(len(tasks)))
        self.out: queue.Queue[OfTask | Exception | None] = queue.Queue()  # None: a task is done
        self.ends: Counter[int] = Counter()  # of workers, by the task they had
        self.closing = threading.Event()
        self.lock = threading.Lock()
        count = min(workers, len(tasks))
        self.workers = [
            RemoteWorker(f"worker-{number}", make, share, stopping=self.closing.is_set) for number in range(count)
        ]

    def events(self) -> Iterator[OfTask]:
        """Those of all tasks as they come. UserError where a task, or a worker, cannot be done."""
        threads = [threading.Thread(target=self.work, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads:
            thread.start()
        try:
            left = len(self.tasks)  # threads may still wait for room for their workers when all are done
            while left:
                item = self.out.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            self.closing.set()
            for thread in threads:
                thread.join(10)
            for worker in self.workers:
                worker.end()

    def work(self, worker: RemoteWorker) -> None:
        """One worker's tasks until none is left."""
        fruitless = 0  # ends one after the other, without an event of a task
        try:
            while not self.closing.is_set() and (task := self.next_task()) is not None:
                begun = False
                try:
                    if worker.actor is None:
                        worker.start()
                    for event in worker.run(self.tasks[task]):
                        begun, fruitless = True, 0
                        self.out.put(OfTask(task, event))
                    self.out.put(None)
                except WorkerEnded as ended:
                    worker.end()
                    log.warning("%s ended (%s); another is started", worker.name, ended)
                    fruitless += not begun
                    self.give_back(task, counts=ended.taken)
                    if fruitless >= TRIES:
                        raise UserError(f"{TRIES} workers ended one after the other, the last with: {ended}") from None
        except Stopping:
            pass
        except Exception as error:
            self.out.put(error)

    def next_task(self) -> int | None:
        with self.lock:
            return self.waiting.popleft() if self.waiting else None

    def give_back(self, task: int, *, counts: bool) -> None:
        """To be done anew, first of those that wait. UserError where it ends every worker that has it."""
        with self.lock:
            self.ends[task] += counts
            if self.ends[task] >= TRIES:
                raise UserError(
                    f"{TRIES} workers ended during the same batch; try a smaller --batch, or give them more"
                )
            self.out.put(OfTask(task, Again()))
            self.waiting.appendleft(task)
