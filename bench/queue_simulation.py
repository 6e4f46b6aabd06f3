"""How long jobs wait at 10, 100 and 1,000 workers: a simulation by events, with the server's own queue.

    python bench/queue_simulation.py --measure                  # the times of batches, with the embedded model, here
    python bench/queue_simulation.py [--workers 10,100,1000] [--loads 0.5,0.8,0.95] [--seconds 0.37,0.50,0.58,0.66]
                                     [--front 0.0015] [--hours-between-failures 24] [--restart 60]

Which pictures make the next batch is decided by `server/jobs/queue.py` itself; only the clock and the database are not
real. Jobs arrive at random (Poisson), of one picture or four, with 20, 30 or 50 steps, from clients of whom some ask
far more often than others. A load of 1 is what all workers can draw in the batches that suit them best. `--front` is
the time that the one process with the queue takes for a picture (bench/front.py measures it); while it is busy, workers
wait. A worker that fails loses its batch, which is queued again, and is back after `--restart` seconds.
"""

import argparse
import heapq
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from plainsd.pictures.settings import Resolved
from plainsd.server.jobs.job import Job, Unit
from plainsd.server.jobs.queue import Place, Queue

STEPS, STEP_WEIGHTS = (20, 30, 50), (80, 15, 5)
COUNTS, COUNT_WEIGHTS = (1, 4), (60, 40)
SECONDS = (0.37, 0.50, 0.58, 0.66)  # of batches of 1 to 4 in 20 steps: the embedded model, by bench/scale.py


class NoStore:
    """In place of the database."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)

    def unfinished(self) -> list[Job]:
        return []

    def add(self, job: Job) -> None:
        job.number = next(self.numbers)

    def mark_started(self, job: Job, when: float) -> None: ...

    def mark_ended(self, job: Job, state: str, error: str | None, finished: float) -> None: ...

    def add_picture(self, job: Job, index: int, file: str, size: tuple[int, int]) -> None: ...


class Event(NamedTuple):
    when: float
    order: int
    kind: str  # "arrival", "end" of a batch, "ready" again
    place: Place | None = None
    units: tuple[Unit, ...] = ()


@dataclass
class Result:
    """Of one run; seconds."""

    waits: list[float] = field(default_factory=list)  # from a job's arrival to its first batch
    times: list[float] = field(default_factory=list)  # ... to its end
    busy: float = 0.0  # of all workers together
    lost: int = 0  # pictures that were drawn again
    pictures: int = 0
    failures: int = 0
    end: float = 0.0


@dataclass(frozen=True)
class World:
    workers: int
    load: float
    seconds: tuple[float, ...] = SECONDS
    batch: int = 4
    jobs: int = 5000
    front: float = 0.0  # seconds for a picture, in the one process of the queue
    between_failures: float = float("inf")  # seconds, of one worker
    restart: float = 60.0
    clients: int = 100
    seed: int = 0
    mixed: bool = True  # counts and steps; else all jobs are one picture of 20 steps


class Simulation:
    def __init__(self, world: World):
        self.world, self.random = world, random.Random(world.seed)
        self.queue = Queue(NoStore(), limit=10**9)
        self.queue.share = 1.0
        self.events: list[Event] = []
        self.order = itertools.count()
        self.idle = self.queue.idle  # as the queue sees them: it leaves each its share
        self.idle += [Place(f"worker-{number}") for number in range(world.workers)]
        self.front_free = 0.0
        self.arrived: dict[str, float] = {}
        self.started: set[str] = set()
        self.keys = {steps: [settings_with(steps)] for steps in STEPS}
        self.found = Result()

    def run(self) -> Result:
        self.add_arrivals()
        while self.events:
            event = heapq.heappop(self.events)
            getattr(self, f"on_{event.kind}")(event)
            while self.idle and any(job.pending() for job in self.queue.jobs.values()):
                self.begin(event.when)
        self.found.end = event.when
        return self.found

    def push(self, when: float, kind: str, place: Place | None, units: tuple[Unit, ...] = ()) -> None:
        heapq.heappush(self.events, Event(when, next(self.order), kind, place, units))

    def add_arrivals(self) -> None:
        world, mixed = self.world, self.world.mixed
        work = mean(COUNTS, COUNT_WEIGHTS) * mean(STEPS, STEP_WEIGHTS) / 20 if mixed else 1.0
        best = min(seconds / count for count, seconds in enumerate(world.seconds[: world.batch], 1))  # of a picture
        rate = world.load * world.workers / (best * work)  # jobs a second
        weights = [1 / (rank + 1) for rank in range(world.clients)]
        now = 0.0
        for number in range(world.jobs):
            now += self.random.expovariate(rate)
            steps = self.random.choices(STEPS, STEP_WEIGHTS)[0] if mixed else 20
            count = self.random.choices(COUNTS, COUNT_WEIGHTS)[0] if mixed else 1
            client = self.random.choices(range(world.clients), weights)[0]
            job = Job(f"{number}", f"{client}", "jobs", "m", self.keys[steps] * count, "", created=now)
            job.__dict__["batch_keys"] = job.settings  # the cached property: all prompts and seeds are alike here
            self.arrived[job.id] = now
            self.push(now, "arrival", None, (Unit(job, 0),))

    # --- events ------------------------------------------------------------------------------------------------------

    def on_arrival(self, event: Event) -> None:
        self.queue.add(event.units[0].job)

    def on_ready(self, event: Event) -> None:
        self.idle.append(event.place)

    def on_end(self, event: Event) -> None:
        """Stores the pictures, one after the other in the one front; then the worker is free."""
        done = max(event.when, self.front_free)
        for unit in event.units:
            done += self.world.front
            self.queue.add_picture(unit, "", (0, 0))
            self.found.pictures += 1
            if not unit.job.active:
                self.found.times.append(done - self.arrived[unit.job.id])
        self.front_free = done
        self.push(done, "ready", event.place)

    def on_failure(self, event: Event) -> None:
        self.found.failures += 1
        self.found.lost += len(event.units)
        self.queue.requeue(list(event.units))
        self.push(event.when + self.world.restart, "ready", event.place)

    def begin(self, now: float) -> None:
        place = self.idle.pop()
        units = tuple(self.queue.next_batch(self.world.batch, place))
        for job in {unit.job.id for unit in units} - self.started:
            self.started.add(job)
            self.found.waits.append(now - self.arrived[job])
        seconds = self.world.seconds[len(units) - 1] * units[0].settings.steps / 20
        fails = self.random.expovariate(1.0) * self.world.between_failures
        self.found.busy += min(seconds, fails)
        self.push(now + min(seconds, fails), "failure" if fails < seconds else "end", place, units)


def settings_with(steps: int) -> Resolved:
    return Resolved(size=(512, 512), steps=steps, guidance=7.0, sampler="dpmpp_2m", spacing="karras")


def mean(values: tuple[int, ...], weights: tuple[int, ...]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# --- as a command ----------------------------------------------------------------------------------------------------


def measured_seconds(batch: int, rounds: int = 5) -> tuple[float, ...]:
    """Of batches of the embedded model, 20 steps, as the server draws them: the least of some rounds."""
    from plainsd.checkpoint import load
    from plainsd.generate import final, text_to_image
    from plainsd.speed.model import faster

    sd = faster(load())
    least = []
    for count in range(1, batch + 1):
        took = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            final(text_to_image(sd, "a red apple on a blue background", steps=20, count=count))
            took.append(time.perf_counter() - began)
        least.append(min(took[1:]))
    return tuple(least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--workers", default="10,100,1000")
    parser.add_argument("--loads", default="0.5,0.8,0.95,1.1")
    parser.add_argument("--seconds", default=",".join(map(str, SECONDS)), help="of batches of 1, 2, ... pictures")
    parser.add_argument("--front", type=float, default=0.0)
    parser.add_argument("--hours-between-failures", type=float, default=float("inf"))
    parser.add_argument("--restart", type=float, default=60.0)
    parser.add_argument("--jobs-per-worker", type=int, default=20, help="but at least 5000 jobs")
    asked = parser.parse_args()
    if asked.measure:
        print("seconds of batches of 1, 2, 3, 4: " + ",".join(f"{one:.3f}" for one in measured_seconds(4)))
        return
    seconds = tuple(map(float, asked.seconds.split(",")))
    print(f"a batch of 1 to {len(seconds)} takes {asked.seconds} s; front {asked.front * 1000:g} ms a picture\n")
    print("| workers | load | pictures a second | wait p50 | wait p95 | to the end p50 | p95 | workers busy | "
          "failures | drawn again |\n" + "|---" * 10 + "|")  # fmt: skip
    for workers, load in itertools.product(map(int, asked.workers.split(",")), map(float, asked.loads.split(","))):
        jobs = max(5000, asked.jobs_per_worker * workers)
        world = World(workers, load, seconds, len(seconds), jobs, asked.front, asked.hours_between_failures * 3600,
                      asked.restart)  # fmt: skip
        print(row(world, Simulation(world).run()), flush=True)


def row(world: World, found: Result) -> str:
    waits, times = ([f"{quantile(values, q):.2f} s" for q in (0.5, 0.95)] for values in (found.waits, found.times))
    again = f"{found.lost / found.pictures:.2%}"
    busy = f"{found.busy / found.end / world.workers:.0%}"
    cells = [
        world.workers,
        world.load,
        f"{found.pictures / found.end:.1f}",
        *waits,
        *times,
        busy,
        found.failures,
        again,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
