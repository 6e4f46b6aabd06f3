"""Whether a server is ready, and how it stops: what is under way ends, the rest waits for the next start."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
import requests
from serving import Brake, Server, model_folder, open_service, served, until

from plainsd.cli import main
from plainsd.server import readiness
from plainsd.server.jobs.job import DONE, QUEUED
from plainsd.server.jobs.store import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def left_in(folder):
    """The unfinished jobs of a server that has stopped: (state, attempts, what is drawn), oldest first."""
    store = Store(folder)
    found = [(job.state, job.attempts, sorted(job.done)) for job in store.unfinished()]
    store.db.close()
    return found


def gone(server):
    try:
        server.get("/healthz")
    except requests.exceptions.ConnectionError:
        return True
    return False


def let_go(server, brake):
    """Lets the worker take its next step once the server is stopping."""
    threading.Thread(target=lambda: (until(lambda: server.service.queue.stopping), brake.off())).start()


# --- readyz ----------------------------------------------------------------------------------------------------------


def test_ready_while_the_worker_lives_and_the_folder_can_be_written(model, tmp_path, monkeypatch):
    with served(open_service([model], tmp_path), "a-token-of-some-length") as server:
        anybody = {"Host": "10.0.0.7:7860"}  # a probe knows no name and no token
        assert server.get("/readyz", headers=anybody).json() == {"status": "ok"}
        assert server.get("/api/info", headers=anybody).status_code == 403

        def full(**more):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(readiness, "TemporaryFile", full)
            patch.setattr(readiness, "PROBE_SECONDS", 3600)
            assert server.get("/readyz").status_code == 200  # it has just been tried
            patch.setattr(readiness, "PROBE_SECONDS", 0)
            answer = server.get("/readyz")
            assert answer.status_code == 503
            assert answer.json() == {"status": "the data folder cannot be written (No space left on device)"}
            assert server.get("/healthz").status_code == 200  # a restart would not help
        monkeypatch.setattr(readiness, "PROBE_SECONDS", 0)
        assert server.get("/readyz").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(server.service.worker, "is_alive", lambda: False)
            assert "worker has ended" in server.get("/readyz").json()["status"]
        assert [*(tmp_path / "pictures").iterdir()] == []


def test_a_database_that_is_held_is_not_ready(model, tmp_path, monkeypatch):
    monkeypatch.setattr(readiness, "LOCK_SECONDS", 0.05)
    with served(open_service([model], tmp_path)) as server:
        held, free = threading.Event(), threading.Event()

        def hold():
            with server.service.store.lock:
                held.set()
                free.wait(60)

        threading.Thread(target=hold).start()
        held.wait(60)
        answer = server.get("/readyz")
        free.set()
        assert answer.status_code == 503 and "busy" in answer.json()["status"]


# --- stopping --------------------------------------------------------------------------------------------------------


def test_the_batch_under_way_ends_and_the_rest_waits(model, tmp_path, brake):
    with served(open_service([model], tmp_path, batch=1), drain=600) as server:
        first, second = (server.job(prompt=f"p{i}", count=2, steps=2)["id"] for i in range(2))
        brake.wait()
        server.on_signal(signal.SIGTERM, None)
        until(lambda: server.get("/readyz").status_code == 503)
        assert server.get("/healthz").status_code == 200
        refused = server.post("/api/jobs", {"prompt": "late"})
        assert refused.status_code == 503 and 500 < int(refused.headers["Retry-After"]) <= 605
        assert "about to stop" in refused.json()["error"]["message"]
        late = server.post("/v1/images/generations", {"prompt": "late"})
        assert late.status_code == 503 and "Retry-After" in late.headers
        assert server.get(f"/api/jobs/{first}").json()["state"] == "running"
        brake.step(3)  # two steps, and the picture
        until(lambda: gone(server))
        assert server.service.store.folder == tmp_path
    assert left_in(tmp_path) == [(QUEUED, 0, [0]), (QUEUED, 0, [])]
    brake.off()
    with served(open_service([model], tmp_path)) as server:
        assert [server.wait(id)["state"] for id in (first, second)] == [DONE, DONE]


@pytest.mark.parametrize("how", ["time", "again", "interrupt"])
def test_what_takes_too_long_stops_at_the_next_step(model, tmp_path, brake, how):
    with served(open_service([model], tmp_path), drain=0.3 if how == "time" else 600) as server:
        server.job(prompt="p", steps=20)
        brake.wait()
        brake.step()
        let_go(server, brake)
        server.on_signal(signal.SIGINT if how == "interrupt" else signal.SIGTERM, None)
        if how == "again":
            until(lambda: server.get("/readyz").status_code == 503)
            server.on_signal(signal.SIGTERM, None)
        until(lambda: gone(server))
    assert left_in(tmp_path) == [(QUEUED, 0, [])]


def test_a_server_with_nothing_to_do_stops_at_once(model, tmp_path):
    with served(open_service([model], tmp_path), drain=600) as server:
        assert server.get("/readyz").status_code == 200
        server.on_signal(signal.SIGTERM, None)
        until(lambda: gone(server))


def test_the_command_drains(model, tmp_path):
    """SIGTERM to the process itself: the picture under way is kept, none is begun after it."""
    command = [sys.executable, "-m", "plainsd", "serve", "--model", model, "--data", str(tmp_path / "data"), "--port",
               "0", "--batch", "1", "--device", "cpu", "--drain-seconds", "120"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with process:
        server = Server(None, process.stdout.readline().strip().rstrip("/"))
        job = server.job(prompt="p", count=64, steps=150)
        while job["step"] < 2:
            job = server.get(f"/api/jobs/{job['id']}").json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == -signal.SIGTERM
    ((state, attempts, done),) = left_in(tmp_path / "data")
    assert (state, attempts) == (QUEUED, 0) and job["done"] < len(done) < 64


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_wrong_time_limit_is_one_line(tmp_path, capsys, seconds):
    assert main(["serve", "--data", str(tmp_path), "--drain-seconds", seconds]) == 2
    assert "drain_seconds" in capsys.readouterr().err and not list(tmp_path.iterdir())
