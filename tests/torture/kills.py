"""kill -9 at random moments: of training, which must end with the same bytes, and of the server, which must draw each
picture once."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from conftest import tiny_sd
from kept import drafts_in, outcome
from test_finetune import write_pictures
from test_server_crash import Process

import plainsd
from plainsd.server.jobs.job import DONE
from plainsd.server.jobs.store import Store

STEPS = 30


def training(place: Path, out: str) -> list[str]:
    flags = [
        "--steps",
        str(STEPS),
        "--save-every",
        "2",
        "--log-every",
        "1",
        "--rank",
        "1",
        "--seed",
        "5",
        "--batch",
        "1",
    ]
    paths = ["--base", str(place / "base"), "--data", str(place / "data"), "--out", str(place / out)]
    return [sys.executable, "-m", "plainsd", "train", "--method", "lora", "--device", "cpu", *paths, *flags]


def run(command: list[str], seconds: float | None = None) -> tuple[int, str]:
    """Its exit code and stderr; killed after so many seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    return process.returncode, errors


def torture_training(place: Path, seed: int, seconds: float) -> dict[str, int]:
    """Kills, runs that ended, and those that ended with other bytes, or with a traceback, or left a draft."""
    chance, found = random.Random(seed), {"kills": 0, "runs": 0, "wrong": 0}
    plainsd.save(tiny_sd(), place / "base")
    write_pictures(place / "data", count=4)
    began = time.monotonic()
    code, errors = run(training(place, "whole"))
    if code:
        raise RuntimeError(f"an ordinary training failed: {errors[-2000:]}")
    alone, end = time.monotonic() - began, time.monotonic() + seconds
    wanted = (place / "whole" / "whole.safetensors").read_bytes()
    while time.monotonic() < end:
        name = f"run-{found['runs']}"
        while True:
            over = time.monotonic() > end
            code, errors = run(training(place, name), None if over else chance.uniform(0.3, 1.1) * alone)
            if "Traceback" in errors or code not in (0, -signal.SIGKILL):
                print(f"  wrong: training ended with {code}: {errors[-1000:]}", flush=True)
                found["wrong"] += 1
                break
            if code == 0:
                left = [path.name for path in (place / name).rglob(".*") if path.name != ".lock"]
                if (place / name / f"{name}.safetensors").read_bytes() != wanted or left:
                    print(f"  wrong: {name} ended with other bytes, or left {left}", flush=True)
                    found["wrong"] += 1
                break
            found["kills"] += 1
        found["runs"] += 1
    return found


def torture_server(place: Path, seed: int, seconds: float) -> dict[str, int]:
    """Kills of a server with jobs; then jobs lost, and pictures doubled."""
    from serving import model_folder

    chance, kills, wrong = random.Random(seed), 0, 0
    model, data, jobs, end = model_folder(place), place / "data", [], time.monotonic() + seconds
    while time.monotonic() < end:
        running = Process(model, data, pause=0.01)
        for _ in range(3):
            asked = {"prompt": f"life {kills}", "count": 3, "seed": 1000 * len(jobs)}
            answer = running.server.post("/api/jobs", asked)
            if answer.status_code == 202:
                jobs.append(answer.json()["id"])
            elif answer.status_code != 429:  # the queue is full: so many wait since earlier lives
                print(f"  wrong: a job was answered with {answer.status_code}: {answer.text[:300]}", flush=True)
                wrong += 1
        time.sleep(chance.uniform(0, 3))
        running.end(signal.SIGKILL)
        kills += 1
    last = Process(model, data)
    for id in jobs:
        try:
            last.server.wait(id, 600)
        except (AssertionError, OSError, ValueError) as error:  # requests' exceptions are OSErrors
            print(f"  wrong: job {id} does not end: {error!r}", flush=True)
            wrong += 1
    last.end(signal.SIGTERM)
    wrong += len(drafts_in(data))
    with closing(Store(data)) as store:
        found = outcome(store, dict.fromkeys(jobs, DONE))
    return found | {"kills": kills, "wrong": wrong + found["failed"]}
