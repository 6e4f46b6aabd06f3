"""The front's side of a worker: starting its process, its tasks, and noticing its end."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Generator, Sequence
from itertools import count
from typing import Any

from plainsd.cluster.connect import Share, first_line, free_room, imported_ray, own_node_lives
from plainsd.cluster.host import Failure, Host, Taken, Tool, versions
from plainsd.errors import UserError

POLL = 0.2  # seconds between looks at whether the front stops
NODE_SECONDS = 5.0  # between looks at whether Ray's own process on this machine lives
SILENCE = 60.0  # seconds without an event after which a worker is asked whether it is there ...
ANSWER = 30.0  # ... and has to answer
THREADS = {"control": 1, "life": 1}  # of the actor: for `stop` and `answer`, and for `live`
LATE = (20.0, 300.0)  # seconds after which a process that has not begun is named, and between such lines
NOT_THERE = re.compile(r"No module named '([\w.]+)'")
log = logging.getLogger("plainsd.cluster")


class WorkerEnded(Exception):
    """The worker's process has ended, or no longer answers. `taken`: after it had begun with its task."""

    def __init__(self, why: str, taken: bool = False):
        super().__init__(why)
        self.taken = taken


class Stopping(Exception):
    """The front stops."""


class NodeLost(UserError):
    """Ray's own process on this machine, the raylet, has ended: nothing can be started any more."""

    def __init__(self):
        super().__init__(
            "Ray's own process on this machine (raylet) has ended; start this again, and it goes on where it stopped"
        )


class TaskError(Exception):
    """A task failed, but not by its input: `KeyError: ...`."""


class RemoteWorker:
    """One worker: a process at a time, which ends with this one. Its tool is made there, by `make`."""

    said_late = -math.inf  # when one of them was named last that waits for room

    def __init__(
        self,
        name: str,
        make: Callable[[], Tool],
        share: Share,
        *,
        stopping: Callable[[], bool] = bool,
        on_end: Callable[[], object] = bool,
    ):
        self.name, self.make, self.share, self.stopping, self.on_end = name, make, share, stopping, on_end
        self.ray = imported_ray()
        self.actor: Any = None
        self.life: Any = None  # of the process that is ready; its result is its end
        self.where, self.process = "", 0  # the machine's name, and the process's number there
        self.numbers = count()
        self.looked = 0.0  # when it last saw that this machine is still of the cluster

    def start(self) -> None:
        """Starts its process, after ending one that it has. UserError where that cannot work, NodeLost, WorkerEnded
        where the process ends, Stopping."""
        self.end()
        kind = self.ray.remote(concurrency_groups=THREADS, num_cpus=self.share.cpus, num_gpus=self.share.gpus)(Host)
        actor = self.actor = kind.options(max_restarts=0, max_task_retries=0).remote()
        self.where, self.process, found = self.result(actor.about.remote(), say_late=True)
        if found != (wanted := versions()):
            differ = "; ".join(
                f"{name} {found[name]} there, {wanted[name]} here" for name in wanted if found[name] != wanted[name]
            )
            raise UserError(
                f"the worker on {self.where} has other versions: {differ}; install the same on all machines",
                field="cluster",
            )
        failure = self.result(actor.build.remote(self.make, self.share.cpus, os.getcwd()))
        if failure is not None:
            if failure.asked:
                raise failure.error(f"the worker on {self.where}: ")
            check_modules(failure.message)
            log.error("%s cannot be made:\n%s", self.name, failure.trace)
            raise WorkerEnded(f"{failure.kind}: {failure.message}")
        self.life = actor.live.options(concurrency_group="life").remote()

    def result(self, ref: Any, *, say_late: bool = False) -> Any:
        """What a call returns; while it waits for room, that is said. WorkerEnded, UserError, NodeLost, Stopping."""
        began = time.monotonic()
        while not self.ray.wait([ref], timeout=POLL)[0]:
            if self.stopping():
                raise Stopping
            self.check_node()
            if say_late:
                self.say_late(time.monotonic() - began)
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            check_modules(str(error))
            raise WorkerEnded(first_line(error)) from None

    def say_late(self, seconds: float) -> None:
        """That its process has not begun, where that takes long; of all workers of this process one line at a time."""
        now = time.monotonic()
        if seconds > LATE[0] and now - RemoteWorker.said_late > LATE[1]:
            RemoteWorker.said_late = now
            log.warning(
                "%s has not begun after %d s: it needs %s of one machine, and of the cluster's there are %s free; it "
                "waits. End what has the others, add a machine, or give fewer --workers or --cpus-per-worker",
                self.name, seconds, self.share, free_room(),
            )  # fmt: skip

    def check_node(self) -> None:
        if time.monotonic() - self.looked > NODE_SECONDS:
            if not own_node_lives():
                raise NodeLost
            self.looked = time.monotonic()

    # --- tasks -------------------------------------------------------------------------------------------------------

    def run(self, task: Any) -> Generator[Any]:
        """The events of a task. Closing this stops it at its next event. WorkerEnded, UserError, TaskError; Stopping
        and NodeLost while it waits for an event."""
        number, taken, whole = next(self.numbers), False, False
        exceptions = self.ray.exceptions
        stream = self.actor.run.options(num_returns="streaming").remote(number, task)
        try:
            while True:
                self.wait_for_event(stream, taken)
                try:
                    event = self.ray.get(next(stream))
                except StopIteration:
                    whole = True
                    return
                except exceptions.RayTaskError as error:  # the event could not be sent
                    raise TaskError(first_line(error)) from None
                except exceptions.RayError as error:
                    raise self.ended(first_line(error), taken) from None
                if isinstance(event, Taken):
                    taken = True
                elif isinstance(event, Failure):
                    raise self.error_of(event)
                else:
                    yield event
        finally:
            if self.actor is not None and not whole:
                self.actor.stop.options(concurrency_group="control").remote(number)

    def wait_for_event(self, stream: Any, taken: bool) -> None:
        """Until there is one. A process that hangs, or whose machine is cut off, is ended."""
        since = time.monotonic()
        while not self.ray.wait([stream], timeout=POLL)[0]:
            if self.stopping():
                raise Stopping
            self.check_node()
            if time.monotonic() - since > SILENCE:
                answer = self.actor.answer.options(concurrency_group="control").remote()
                if not self.ray.wait([answer], timeout=ANSWER)[0]:
                    raise self.ended(f"no answer for {ANSWER:g} s", taken)
                since = time.monotonic()

    def error_of(self, failure: Failure) -> Exception:
        if failure.asked:
            return failure.error()
        log.error("%s:\n%s", self.name, failure.trace)
        return TaskError(f"{failure.kind}: {failure.message}")

    def ended(self, why: str, taken: bool) -> WorkerEnded:
        """Notes the end of its process. Where that is only cut off, it is killed, or kills itself once it is not."""
        self.end()
        return WorkerEnded(why, taken)

    def end(self) -> None:
        """Ends its process, if it has one."""
        actor, self.actor, self.life = self.actor, None, None
        if actor is not None:
            self.ray.kill(actor)

    def lost(self) -> None:
        """Called when its process has ended by itself."""
        self.life = None
        self.on_end()


def check_modules(message: str) -> None:
    """UserError if an error of a worker is that a part of plainsd, or a package that it needs, is not there."""
    if lacks := NOT_THERE.search(message):
        name = lacks[1].partition(".")[0]
        what = "no plainsd, or an older one without clusters" if name == "plainsd" else f"no package {name!r}"
        raise UserError(
            f"a machine of the cluster has {what}; install this version on all machines, with "
            "pip install 'plainsd[serve,cluster]'",
            field="cluster",
        ) from None


def watch(workers: Sequence[RemoteWorker], stopping: Callable[[], bool]) -> None:
    """Calls `lost` of each whose process ends by itself, until the front stops. For a thread of its own."""
    ray = imported_ray()
    while not stopping():
        lives = {life: worker for worker in workers if (life := worker.life) is not None}
        if not lives:
            time.sleep(POLL)
            continue
        for life in ray.wait(list(lives), timeout=POLL)[0]:
            if lives[life].life == life:
                lives[life].lost()
