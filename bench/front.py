"""What the front of a server can do without drawing: the real queue and its database, from job to finished picture.

    python bench/front.py [--queued 64,256,1024] [--workers 8] [--files] [--data FOLDER]

For each number of jobs: so many are added, then threads take batches and store their pictures at once, as workers do
that need no time to draw. With `--files` each picture is also written as a PNG file of 512x512 (soft shapes with the
grain of a photograph), flushed to the disk: encoded already, as a worker of a cluster sends it, or with `--encode`
here, as in a server of one process. Everything that one process does for a picture is in it but HTTP:
`--workers` threads share its lock. The time of a flush says how much of it is the disk's.
"""

import argparse
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from plainsd.pictures.images import PictureFile
from plainsd.pictures.settings import Resolved
from plainsd.server.jobs.job import Job
from plainsd.server.jobs.queue import Place, Queue
from plainsd.server.jobs.store import Store

SETTINGS = Resolved(size=(512, 512), steps=20, guidance=7.0, sampler="dpmpp_2m", spacing="karras", prompt="a red apple")
CLIENTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queued", default="64,256,1024,4096")
    parser.add_argument("--pictures", type=int, default=1, help="of each job")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--encode", action="store_true", help="with --files: the front makes the PNG files")
    parser.add_argument("--data", type=Path, help="on the disk that is to be measured (default: a temporary folder)")
    asked = parser.parse_args()
    files = f"PNG files of 512x512{', encoded here' if asked.encode else ''}" if asked.files else "rows alone"
    print(f"{asked.pictures} pictures a job, batches of {asked.batch}, {asked.workers} workers, {files}; "
          f"{platform.machine()}, Python {platform.python_version()}, median of {asked.rounds}; "
          f"a flush takes {1000 * flush_seconds(asked.data):.1f} ms\n")  # fmt: skip
    print(f"a PNG file of 512x512 takes {1000 * png_seconds():.0f} ms of a core\n")
    print("| jobs in the queue | jobs added a second | pictures finished a second | ms a picture |\n|---|---|---|---|")
    for count in map(int, asked.queued.split(",")):
        rounds = [measured(count, asked) for _ in range(asked.rounds)]
        added, finished = (statistics.median(one[i] for one in rounds) for i in range(2))
        print(f"| {count} | {added:.0f} | {finished:.0f} | {1000 / finished:.2f} |", flush=True)


def measured(count: int, asked: argparse.Namespace) -> tuple[float, float]:
    """Jobs added, and pictures finished, a second."""
    with tempfile.TemporaryDirectory(dir=asked.data) as folder:
        store = Store(Path(folder))
        queue = Queue(store, limit=2 * count + 2)
        jobs = [
            Job(f"{i:016x}", f"client-{i % CLIENTS}", "jobs", "m", [SETTINGS] * asked.pictures, f"day/{i}", time.time())
            for i in range(count)
        ]
        began = time.perf_counter()
        for job in jobs:
            queue.add(job)
        added = time.perf_counter() - began
        threads = [threading.Thread(target=finish, args=(queue, store, asked)) for _ in range(asked.workers)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        with queue.changed:
            queue.changed.wait_for(lambda: not queue.jobs)
        finished = time.perf_counter() - began
        queue.stop()
        for thread in threads:
            thread.join()
        assert len(store.pictures(limit=10**9)) == count * asked.pictures
        store.close()
    return count / added, count * asked.pictures / finished


def finish(queue: Queue, store: Store, asked: argparse.Namespace) -> None:
    """As a worker that draws in no time."""
    place = Place()
    picture = photograph() if asked.files else None
    if picture is not None and not asked.encode:
        picture = PictureFile.of(picture, ".png", SETTINGS)
    while units := queue.next_batch(asked.batch, place):
        for unit in units:
            file = f"pictures/{unit.job.path_prefix}-{unit.index}.png"
            if picture is not None:
                file = store.write(unit.job, unit.index, picture)
            queue.add_picture(unit, file, (512, 512))


def photograph() -> Image.Image:
    """Of about the size of a photograph's PNG: 1.3 bytes a pixel."""
    random = np.random.default_rng(0)
    shapes = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((512, 512), Image.BICUBIC)
    grain = random.normal(0, 2, (512, 512, 3))
    return Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8))


def png_seconds(rounds: int = 10) -> float:
    """Of one core, to write a picture's file: the median."""
    picture, took = photograph(), []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        job = Job("0" * 16, "client", "jobs", "m", [SETTINGS], "day/0", time.time())
        for _ in range(rounds):
            began = time.thread_time()
            (store.folder / store.write(job, 0, picture)).unlink()
            took.append(time.thread_time() - began)
        store.close()
    return statistics.median(took)


def flush_seconds(folder: Path | None, rounds: int = 50) -> float:
    """Of 4 KB that are written and flushed to the disk: the median."""
    took = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(rounds):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took)


if __name__ == "__main__":
    main()
