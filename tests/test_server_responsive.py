"""The event loop takes no lock: while the queue is held, the server answers what needs no queue."""

import signal
import socket
import threading
from contextlib import ExitStack, closing, contextmanager

import pytest
import requests
from serving import Brake, model_folder, open_service, served, until

SECONDS = 15  # for which a server that hangs is waited for


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@contextmanager
def held(server):
    """The queue, as by a thread that writes to a slow disk."""
    release, taken = threading.Event(), threading.Event()

    def hold():
        with server.service.queue.changed:
            taken.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        release.set()
        thread.join()


def answers(server):
    """Whether the event loop is free."""
    with requests.Session() as session:
        session.trust_env = False
        try:
            return session.get(server.url + "/healthz", timeout=SECONDS).status_code == 200
        except requests.exceptions.Timeout:
            return False


def has_ended(server):
    try:
        return not answers(server)
    except requests.exceptions.ConnectionError:
        return True


def called(monkeypatch, owner, name):
    """An event that is set when this method is called."""
    event, original = threading.Event(), getattr(owner, name)

    def calling(*given):
        event.set()
        return original(*given)

    monkeypatch.setattr(owner, name, calling)
    return event


def test_progress_holds_up_nobody(model, tmp_path):
    with served(open_service([model], tmp_path)) as server, ExitStack() as stack:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with held(server):
            asking = [stack.enter_context(socket.create_connection(address, SECONDS)) for _ in range(50)]
            for connection in asking:  # more than there are threads for routes
                connection.sendall(b"GET /sdapi/v1/progress HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert all(answers(server) for _ in range(5))
        assert {connection.recv(100).split()[1] for connection in asking} == {b"200"}


@pytest.mark.parametrize(("path", "more"), [
    ("/sdapi/v1/txt2img", {}), ("/v1/images/generations", {}), ("/v1/images/generations", {"stream": True}),
])  # fmt: skip
def test_a_client_that_hangs_up_holds_up_nobody(model, tmp_path, monkeypatch, path, more):
    brake = Brake(monkeypatch)
    with served(open_service([model], tmp_path)) as server:
        noticed = called(monkeypatch, server.service, "abandon")

        with closing(server.asking(path, {"prompt": "a", "steps": 4} | more)) as client:
            brake.wait()
            (job,) = server.service.queue.jobs.values()
            until(lambda: job.notifier.waiting)  # its news are told, which takes the queue too
            with held(server):
                client.close()
                assert noticed.wait(SECONDS) and answers(server)
        until(lambda: server.service.store.counts().get("cancelled") == 1)
        brake.off()


@pytest.mark.parametrize(("sign", "method"), [(signal.SIGTERM, "drain"), (signal.SIGINT, "stop")])
def test_a_signal_holds_up_nobody(model, tmp_path, monkeypatch, sign, method):
    with served(open_service([model], tmp_path), drain=60) as server:
        begun = called(monkeypatch, server.service.queue, method)
        with held(server):
            server.on_signal(sign, None)
            assert begun.wait(SECONDS) and answers(server)
        until(lambda: has_ended(server))
