"""What runs in a worker's process: a tool made there, which does one task after the other and yields events.

`Host` becomes a Ray actor; nothing in this file needs Ray.
"""

import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple

from plainsd import __version__
from plainsd.allocator import keep_freed_memory
from plainsd.errors import DiskError, UserError

Tool = Callable[[Any], Iterator[Any]]  # a task to its events


class Taken(NamedTuple):
    """The first event of every task: the process is there, and has begun with it."""


class Failure(NamedTuple):
    """An exception as plain data, since not every exception can be sent."""

    message: str
    kind: str  # its class
    asked: bool  # it is a UserError: what was asked for is wrong
    trace: str
    field: str | None = None
    value: Any = None
    entry: int | None = None

    def error(self, where: str = "") -> UserError:
        """The same again, whole; `where` stands before its message."""
        message = f"{where}{self.message}"
        return UserError(message, field=self.field, value=self.value, entry=self.entry, most=len(message))


def as_failure(error: Exception) -> Failure:
    asked = isinstance(error, UserError) and not isinstance(error, DiskError)
    failure = Failure(str(error), type(error).__name__, asked, traceback.format_exc())
    if not isinstance(error, UserError):
        return failure
    value = error.value if is_plain(error.value) else None
    return failure._replace(field=error.field, value=value, entry=error.entry)


def is_plain(value: Any) -> bool:
    """Whether it is a text or a number, or several."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(part, (str, int, float)) for part in parts)


def versions() -> dict[str, str]:
    """What must be the same in the front and in its workers for the same pictures."""
    return {"plainsd": __version__, "torch": version("torch")}


class Host:
    """One worker's process."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.tool: Tool | None = None
        self.stopped = -1  # the number of the last task that is to stop

    def about(self) -> tuple[str, int, dict[str, str]]:
        """The machine's name, this process's number, and the versions there."""
        return socket.gethostname(), os.getpid(), versions()

    def build(self, make: Callable[[], Tool], threads: int, folder: str) -> Failure | None:
        """Makes the tool, which computes with so many threads. Relative paths are those of the front, where its folder
        is on this machine too."""
        try:
            with suppress(OSError):
                os.chdir(folder)
            import torch

            torch.set_num_threads(threads)
            self.tool = make()
        except Exception as error:
            return as_failure(error)
        return None

    def run(self, number: int, task: Any) -> Iterator[Any]:
        """The events of a task, up to its end, to a `Failure`, or to where `stop` is called with its number."""
        yield Taken()
        assert self.tool is not None  # `build` was called before
        events = self.tool(task)
        try:
            for event in events:
                if self.stopped >= number:
                    return
                yield event
        except Exception as error:
            yield as_failure(error)
        finally:
            if close := getattr(events, "close", None):
                close()

    # called while `run` runs, in threads of their own

    def stop(self, number: int) -> None:
        self.stopped = max(self.stopped, number)

    def answer(self) -> None:
        """Shows that the process is there."""

    def live(self) -> None:
        """Returns never: its end is the process's end."""
        threading.Event().wait()
