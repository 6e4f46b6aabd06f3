"""A folder belongs to one run, and to one process at a time.

    RUN/options.json       the options of the run; it resumes only with the same ones
    RUN/run.toml           the same, as a config file that starts it again
    RUN/.lock              held while a process trains; the system releases it when the process ends, however it ends

A refused start writes none of these.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.train.checkpoints import saving
from plainsd.train.processes import World

OPTIONS_FILE, CONFIG_FILE, LOCK_FILE = "options.json", "run.toml", ".lock"


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Holds the folder's lock."""
    lock, taken = FileLock(folder / LOCK_FILE), False
    made = [place for place in (folder, *folder.parents) if not place.exists()] if world.first else []
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken = True
    if world.any(taken):
        raise UserError(f"another training is at work in {folder}; wait until it has ended, or give another --out")
    try:
        yield
    finally:
        if world.first:
            if not (folder / OPTIONS_FILE).exists():
                (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):  # what is not empty stays
                for place in made:
                    place.rmdir()


def claim(folder: Path, identity: Mapping[str, str], config: str) -> None:
    """Writes the options of the run."""
    with saving("the options"):
        for name, text in ((OPTIONS_FILE, json.dumps(identity, indent=1)), (CONFIG_FILE, config)):
            with written_whole(folder / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
