"""Whether jobs should be sent to this server now, for `/readyz`."""

import math
import sqlite3
import time
from tempfile import TemporaryFile

from plainsd.server.jobs.store import Store
from plainsd.server.service import Service

PROBE_SECONDS, PROBE_BYTES = 1.0, 4096
LOCK_SECONDS = 2.0  # for which a probe waits for the database


class Readiness:
    """Of one server."""

    def __init__(self, service: Service):
        self.service = service
        self.when = -math.inf  # of the last probe of the disk: anybody may ask, so it is not done for each
        self.found: str | None = None

    def problem(self) -> str | None:
        """Why no jobs should be sent here; None if it is ready."""
        queue = self.service.queue
        if queue.stopping or queue.closes is not None:
            return "the server is about to stop"
        if not all(worker.is_alive() for worker in self.service.workers):
            return "the worker has ended; restart the server"
        if not any(worker.drawer.ready for worker in self.service.workers):
            return "no worker is ready yet; they are being started"
        if time.monotonic() - self.when >= PROBE_SECONDS:
            self.found, self.when = unwritable(self.service.store), time.monotonic()
        return self.found


def unwritable(store: Store) -> str | None:
    """Why the data folder, or the pictures' in it, cannot be written; None if both can."""
    if not store.lock.acquire(timeout=LOCK_SECONDS):
        return f"the database has been busy for {LOCK_SECONDS:g} s"
    try:
        store.db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()
        for folder in (store.folder, store.folder / "pictures"):
            with TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))  # an empty file may still fit on a full disk
                file.flush()
    except (sqlite3.Error, OSError) as error:
        return f"the data folder cannot be written ({getattr(error, 'strerror', None) or error})"
    finally:
        store.lock.release()
    return None
