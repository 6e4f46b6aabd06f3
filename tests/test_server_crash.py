"""kill -9 while jobs wait and run; then a restart."""

import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from serving import Server, alike, model_folder, until

import plainsd

CODE = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from serving import open_service
from plainsd.server.jobs import worker
from plainsd.server.api.app import create_app
from plainsd.commands.serve import listening_socket, server_of
from plainsd.server.api.security import Hosts
keep = worker.Worker.save
def slowly(*given):                   # room for a kill between the file, the row and the next picture
    time.sleep({pause})
    keep(*given)
    time.sleep({pause})
worker.Worker.save = slowly
service = open_service([{model!r}], Path({data!r}), batch=2)
sock = listening_socket("127.0.0.1", 0)
app = create_app(service, Hosts("127.0.0.1"), None, lambda: print(sock.getsockname()[1], flush=True))
server_of(app, 1).run(sockets=[sock])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


class Process:
    """A server in a process of its own, which can be killed."""

    def __init__(self, model, data, pause=0.0):
        code = CODE.format(tests=os.path.dirname(__file__), model=model, data=str(data), pause=pause)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        )
        port = self.process.stdout.readline().strip()
        assert port, "the server did not start"
        self.server = Server(None, f"http://127.0.0.1:{port}")

    def end(self, how):
        self.process.send_signal(how)
        self.process.stdout.close()
        return self.process.wait(60)


def test_killed_and_restarted_everything_is_drawn_exactly_once(model, tmp_path):
    first = Process(model, tmp_path, pause=0.1)
    jobs = [first.server.job(prompt=f"picture {i}", count=3, seed=10 * i) for i in range(4)]
    until(lambda: len(first.server.get("/api/images").json()["images"]) >= 3, 60)
    first.end(signal.SIGKILL)

    second = Process(model, tmp_path)
    assert len(second.server.get("/api/jobs").json()["active"]) >= 1
    ended = [second.server.wait(job["id"]) for job in jobs]
    assert [job["state"] for job in ended] == ["done"] * 4
    rows = second.server.get("/api/images?limit=200").json()["images"]
    assert sorted(row["id"] for row in rows) == sorted(f"{job['id']}-{i}" for job in jobs for i in range(3))
    sd = plainsd.load(model, device="cpu", dtype="float32")
    for i, job in enumerate(jobs):
        alone = plainsd.final(plainsd.text_to_image(sd, f"picture {i}", seed=10 * i, count=3))
        assert all(alike(second.server.picture(f"{job['id']}-{j}"), alone[j]) for j in range(3))
    files = sorted(path.name for path in tmp_path.rglob("pictures/*/*"))
    assert len(files) == 12 and all(name.endswith(".png") for name in files)  # nothing half-written, nothing twice
    second.end(signal.SIGTERM)


@pytest.mark.full
def test_killed_at_random_moments_again_and_again(model, tmp_path):
    jobs = []
    for life in range(8):
        running = Process(model, tmp_path, pause=0.01)
        jobs += [running.server.job(prompt=f"life {life}", count=4, seed=100 * life) for _ in range(2)]
        time.sleep(0.3 * life)
        running.end(signal.SIGKILL)
    last = Process(model, tmp_path)
    ended = [last.server.wait(job["id"], 300) for job in jobs]
    last.end(signal.SIGTERM)
    whole = {job["id"] for job in ended if job["state"] == "done"}
    assert all("crashed 3 times" in job["error"] for job in ended if job["id"] not in whole)
    files = list(tmp_path.rglob("pictures/*/*.png"))
    for path in files:
        Image.open(path).load()
    names = ["-".join(path.stem.split("-")[-2:]) for path in files]  # of the pictures: job and index
    assert len(set(names)) == len(names) and set(names) >= {f"{id}-{index}" for id in whole for index in range(4)}
