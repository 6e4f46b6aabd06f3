"""What drawing in worker processes costs and brings: the server's queue with one process, and with workers by Ray.

    python bench/cluster.py [--model FOLDER] [--pictures 40] [--steps 20] [--rounds 3]

- a picture on one worker of one thread, against the same in the server's process with one thread: the cost of the way;
- all pictures on two workers of one thread each, against one process of two threads: the throughput;
- a job for an idle worker that has its model, from the call that queues it to the worker's first event: both flushes of
  the database are in it, and so is the way to the worker and back;
- jobs that wait for one worker: how long its process has nothing to do between two, while the front stores a picture;
- a task that does nothing, from the call to its first event: Ray's part of this.

Sides take turns, and the least time of the rounds counts.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from plainsd import __version__
from plainsd.cluster.connect import Share, connect
from plainsd.cluster.worker import RemoteWorker
from plainsd.reports.bench import processor
from plainsd.server.cluster import Cluster
from plainsd.server.jobs.drawing import DrawnBatch
from plainsd.server.jobs.job import Job
from plainsd.server.limits import Limits
from plainsd.server.pool import PoolOptions
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest
from plainsd.server.service import Service


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    connect("local", cpus=4)
    import ray

    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "one process, 1 thread": (opened(asked, Path(folder, "a")), 1),
            "one worker, 1 thread": (opened(asked, Path(folder, "b"), workers=1), 1),
            "one process, 2 threads": (opened(asked, Path(folder, "c")), 2),
            "two workers, 1 thread each": (opened(asked, Path(folder, "d"), workers=2), 1),
        }
        least = dict.fromkeys(sides, float("inf"))
        for turn in range(asked.rounds + 1):  # the first round loads the models, and does not count
            for name, (service, threads) in sides.items():
                seconds = drawn(service, asked, threads)
                if turn:
                    least[name] = min(least[name], seconds)
        for service, _ in sides.values():
            service.close()
    versions = f"plainsd {__version__}, ray {ray.__version__}, torch {torch.__version__}"
    print(f"{versions}, Python {platform.python_version()}")
    print(f"{processor()}; {asked.pictures} pictures of {asked.steps} steps, least of {asked.rounds} rounds")
    for name, seconds in least.items():
        print(f"  {name:<28} {seconds:6.2f} s  {seconds / asked.pictures:.4f} s a picture")
    alone, remote, threads, workers = least.values()
    extra = (remote - alone) / asked.pictures
    print(f"cost of the way: {1000 * extra:.1f} ms a picture, {100 * (remote / alone - 1):+.1f} %")
    print(f"two workers against two threads: {threads / workers:.2f} times the pictures")
    with tempfile.TemporaryDirectory() as folder:
        idle, between = gaps(opened(asked, Path(folder), workers=1, batch=1), asked)
    print(f"an idle worker has begun with a job after {in_ms(idle)}")
    print(f"between two batches its process waits {in_ms(between)}")
    print(f"a task without work begins after {in_ms(latencies())}")
    ray.shutdown()


def in_ms(seconds: list[float]) -> str:
    return (
        f"{1000 * statistics.median(seconds):.1f} ms (median of {len(seconds)}; at most {1000 * max(seconds):.1f} ms)"
    )


def opened(asked, data: Path, workers: int = 0, batch: int = 4) -> Service:
    options = PoolOptions("cpu", "float32")
    more = {"drawers": Cluster(Share(1), workers).drawers} if workers else {}
    service = Service.open([asked.model], data, Limits(queue=100_000), options, batch=batch, **more)
    service.start()
    return service


def drawn(service: Service, asked, threads: int) -> float:
    """Seconds from the first job to the last picture. Threads of this process; workers have their own."""
    torch.set_num_threads(threads)
    jobs = jobs_of(service, asked, asked.pictures)
    began = time.perf_counter()
    for job in jobs:
        service.queue.add(job)
    wait_for(jobs)
    return time.perf_counter() - began


def jobs_of(service: Service, asked, count: int) -> list[Job]:
    fields = {"prompt": "a red apple on a blue background", "steps": asked.steps}
    fields |= {"size": [asked.size, asked.size]} if asked.size else {}
    requests = [JobRequest(seed=seed, **fields) for seed in range(count)]
    return [new_job(request, service.models, service.limits, "bench", "jobs") for request in requests]


def wait_for(jobs: list[Job]) -> None:
    while any(job.active for job in jobs):
        time.sleep(0.005)
    assert all(job.state == "done" for job in jobs), [job.error for job in jobs]


def gaps(service: Service, asked) -> tuple[list[float], list[float]]:
    """Seconds from queueing a job to the first event of its idle worker; and, of jobs that wait, from the last event of
    one to the first of the next."""
    worker = service.worker.drawer.worker
    run, first, last = worker.run, [], []

    def timed(work):
        with closing(run(work)) as events:
            for number, event in enumerate(events):
                if not number:
                    first.append(time.perf_counter())
                elif isinstance(event, DrawnBatch):
                    last.append(time.perf_counter())
                yield event

    wait_for(added(service, jobs_of(service, asked, 1)))  # loads the model
    worker.run = timed
    queued = []
    for job in jobs_of(service, asked, 30):
        while not service.queue.idle:
            time.sleep(0.005)
        queued.append(time.perf_counter())
        wait_for(added(service, [job]))
    idle = [b - a for a, b in zip(queued, first, strict=True)]
    first.clear(), last.clear()
    wait_for(added(service, jobs_of(service, asked, 30)))
    service.close()
    return idle, [b - a for a, b in zip(last, first[1:], strict=False)]


def added(service: Service, jobs: list[Job]) -> list[Job]:
    for job in jobs:
        service.queue.add(job)
    return jobs


def latencies() -> list[float]:
    def make():
        def tool(task):
            yield task

        return tool

    worker = RemoteWorker("latency", make, Share(1))
    worker.start()
    seconds = []
    for _ in range(200):
        began = time.perf_counter()
        events = worker.run(None)
        next(events)
        seconds.append(time.perf_counter() - began)
        list(events)
    worker.end()
    return seconds


if __name__ == "__main__":
    main()
