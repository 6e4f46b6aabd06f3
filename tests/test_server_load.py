"""Many clients at once, some of which cancel, hang up or stop listening: nothing is lost, nothing is doubled."""

import threading
import time
from collections import Counter

import pytest
import requests
from serving import Server, model_folder, open_service, served, until

from plainsd.server.jobs.job import CANCELLED, DONE, FAILED
from plainsd.server.limits import Limits

BOUND = 240  # seconds, also on a slow and busy machine


class Client(threading.Thread):
    """Asks for pictures in turn, and behaves differently each time."""

    def __init__(self, url: str, number: int, turns: int):
        super().__init__()
        self.server, self.number, self.turns = Server(None, url), number, turns
        self.expected, self.problem = {}, None  # job -> state

    def run(self):
        try:
            for turn in range(self.turns):
                (self.waits, self.cancels, self.stops_listening, self.hangs_up)[(self.number + turn) % 4](turn)
        except Exception as error:
            self.problem = error

    def ask(self, turn):
        body = {"prompt": f"client {self.number} turn {turn}", "seed": self.number, "steps": 1 + self.number % 2}
        headers = {"X-Client": str(self.number)}
        while (answer := self.server.post("/api/jobs", body, headers=headers)).status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            time.sleep(0.2)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def waits(self, turn):
        self.expected[self.ask(turn)] = DONE

    def cancels(self, turn):
        id = self.ask(turn)
        answer = self.server.post(f"/api/jobs/{id}/cancel")
        assert answer.status_code in (200, 409)
        self.expected[id] = CANCELLED if answer.status_code == 200 else DONE

    def stops_listening(self, turn):
        id = self.ask(turn)
        with self.server.get(f"/api/jobs/{id}/events", stream=True) as stream:
            next(stream.iter_lines())
        self.expected[id] = DONE

    def hangs_up(self, turn):
        try:
            answer = self.server.session.post(
                self.server.url + "/v1/images/generations", json={"prompt": "nobody waits"}, timeout=(30, 0.05)
            )
        except requests.exceptions.RequestException:
            return
        assert answer.status_code in (200, 429), answer.text  # it was answered before it could hang up


@pytest.mark.parametrize(("clients", "turns"), [(64, 2), pytest.param(64, 20, marks=pytest.mark.full)])
def test_nothing_is_lost_and_nothing_is_doubled(tmp_path, clients, turns):
    service = open_service([model_folder(tmp_path)], tmp_path / "data", Limits(queue=4 * clients), batch=8)
    with served(service) as server:
        began = time.monotonic()
        threads = [Client(server.url, number, turns) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
        assert [thread.problem for thread in threads if thread.problem or thread.is_alive()] == []
        until(lambda: not service.queue.jobs, BOUND)
        assert time.monotonic() - began < BOUND * (1 if turns == 2 else 4)

        jobs = {job.id: job for job in service.store.jobs((DONE, FAILED, CANCELLED))}
        rows = service.store.pictures(limit=10**6)
        for thread in threads:
            for id, state in thread.expected.items():
                assert jobs[id].state == state, (id, jobs[id].error)
        assert not [job for job in jobs.values() if job.state == FAILED]
        done = {id for id, job in jobs.items() if job.state == DONE}
        assert Counter(row.job for row in rows) == Counter(done)  # a picture for each job that is done, and no other
        assert {row.settings.prompt for row in rows} == {jobs[id].settings[0].prompt for id in done}
        assert {path.name for path in service.store.folder.rglob("pictures/*/*")} == {
            service.store.path(row).name for row in rows
        }
        waited = sum(state == DONE for thread in threads for state in thread.expected.values())
        assert sum(service.worker.batches.values()) < waited  # batches, not one after the other
        assert server.get("/healthz").json() == {"status": "ok"}
