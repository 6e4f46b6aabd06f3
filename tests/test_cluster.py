"""Workers by Ray, on this machine: the pictures of one process, by several that may end at any moment."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import noise_picture
from PIL import Image
from serving import Server, base64_of, lora_file, model_folder, open_service, served, until

from plainsd.cli import main
from plainsd.cluster import connect as connecting
from plainsd.cluster import host as host_module
from plainsd.cluster import worker as worker_module
from plainsd.cluster.connect import Share, check_room, connect, share_of
from plainsd.cluster.host import Host, Taken, as_failure, versions
from plainsd.cluster.lists import Again, OfTask, TaskList
from plainsd.cluster.worker import RemoteWorker, Stopping, check_modules
from plainsd.commands.generate_cluster import RUN_RECORD, ListRun, digest_of_run
from plainsd.errors import DiskError, UserError
from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import Resolved
from plainsd.server import cluster as cluster_module
from plainsd.server.cluster import Batches, Cluster, RemoteDrawer, merged
from plainsd.server.jobs.drawing import Advanced, Begun, Prepared, Work
from plainsd.server.jobs.job import Source
from plainsd.server.limits import Limits
from plainsd.server.pool import PoolOptions, budget_of
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest
from plainsd.server.service import Service

WORKERS = 2
BY_CLUSTER = ["--cluster", "--workers", str(WORKERS), "--cpus-per-worker", "1"]


@pytest.fixture(scope="module")
def ray():
    """One Ray for all tests here."""
    connect("", cpus=4)
    import ray

    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = [model_folder(folder, name, seed) for seed, name in enumerate(("one", "two"))]
    (folder / "loras").mkdir()
    lora_file(found[0], folder / "loras" / "style.safetensors", 3)
    return found


def options_of(models):
    return PoolOptions("cpu", "float32", loras=Path(models[0]).parent / "loras")


def clustered(models, data):
    cluster = Cluster(Share(1), WORKERS)
    return Service.open(models, data, Limits(), options_of(models), drawers=cluster.drawers)


@pytest.fixture(scope="module")
def server(ray, models, tmp_path_factory):
    with served(clustered(models, tmp_path_factory.mktemp("data"))) as running:
        yield running


def drawers(server):
    return [worker.drawer for worker in server.service.workers]


def until_drawing(server, id):
    until(lambda: server.get(f"/api/jobs/{id}").json()["step"] > 0, 60)


# --- a server's workers ----------------------------------------------------------------------------------------------


def test_pictures_are_those_of_one_process(server, models, tmp_path):
    """To the last bit, settings and hashes too: from text, with a LoRA, from a picture, with a mask, and a sheet."""
    photo, mask = noise_picture(64, 64), Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 40, 48))
    bodies = [
        {"prompt": "a red apple", "seed": 3},
        {"prompt": "styled", "seed": 4, "loras": [{"name": "style", "strength": 0.7}]},
        {"prompt": "other", "model": "two", "seed": 5},
        {"prompt": "from a picture", "seed": 6, "image": base64_of(photo), "strength": 0.6},
        {"prompt": "into a hole", "seed": 7, "image": base64_of(photo), "mask": base64_of(mask)},
        {"prompt": "compared", "seed": 8, "grid": [{"name": "guidance", "values": [1, 3]}]},
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with served(open_service(models, tmp_path, batch=1, loras=options_of(models).loras)) as alone:
            for body in bodies:
                ours, theirs = (one.drawn(**body) for one in (server, alone))
                assert len(ours["images"]) == len(theirs["images"])
                for a, b in zip(ours["images"], theirs["images"], strict=True):
                    files = [one.get(f"/api/images/{id}.png").content for one, id in ((server, a), (alone, b))]
                    assert files[0] == files[1], body["prompt"]
    finally:
        torch.set_num_threads(threads)


def test_pictures_come_as_files_but_those_to_paste(models):
    """As one process writes them, so that the front encodes none."""
    batches = Batches(models[:1], options_of(models), Share(1))
    one = batches.models.known["one"]
    settings = Resolved(size=(32, 32), steps=1, guidance=2.0, sampler="ddim", spacing="trailing", prompt="a boat")
    *_, drawn = batches(Work(one.name, [], [settings], Source(), {}))
    (file,) = drawn.images
    with Image.open(BytesIO(file.content)) as image:
        assert image.size == file.size == (32, 32)
    assert read_settings(BytesIO(file.content)).hashes == drawn.hashes != ()
    *_, drawn = batches(Work(one.name, [], [settings], Source(base="x.png", alpha="y.png"), {}))
    assert isinstance(drawn.images[0], Image.Image)


def test_a_worker_has_its_part_of_the_machines_memory(models, monkeypatch):
    """For models: of the default, the part that its CPUs are of all; what --memory says is for each."""
    whole = budget_of(torch.device("cpu"))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    parts = [Batches(models[:1], options_of(models), Share(cpus)).models.budget / whole for cpus in (1, 3, 8)]
    assert parts == [0.25, 0.75, 1.0]
    given = replace(options_of(models), memory=12345.0)
    assert Batches(models[:1], given, Share(1)).models.budget == 12345.0


def test_metrics_count_the_models_of_workers(server):
    """In its process, and no longer when that has ended."""
    assert server.drawn(prompt="counted", steps=1)["state"] == "done"
    values = metrics_of(server)
    places = [drawer.place for drawer in drawers(server)]
    assert values["plainsd_model_loads_total"] == sum(place.loads for place in places) >= 1
    assert values["plainsd_model_bytes"] == sum(place.bytes for place in places) > 100_000
    assert {bool(place.models) for place in places if place.bytes} == {True}
    loaded = next(drawer for drawer in drawers(server) if drawer.place.bytes)
    had, process = loaded.place.bytes, loaded.worker.process
    os.kill(process, signal.SIGKILL)
    until(lambda: loaded.ready and loaded.worker.process != process, 60)
    after = metrics_of(server)
    assert after["plainsd_model_bytes"] == values["plainsd_model_bytes"] - had
    assert after["plainsd_model_loads_total"] == values["plainsd_model_loads_total"]


def metrics_of(server):
    lines = [line.split() for line in server.get("/metrics").text.splitlines() if line[0] != "#"]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def test_previews_and_steps_arrive(server):
    id = server.job(prompt="slow", steps=100)["id"]
    job = server.service.queue.get(id)
    until(lambda: job.previews and job.step > 1, 60)
    assert job.steps == 100 and Image.open(BytesIO(job.previews[0])).size == (8, 8)
    assert server.wait(id)["state"] == "done"
    resident = {model["name"]: model["resident"] for model in server.get("/api/models").json()["models"]}
    assert resident["one"]


def test_a_cancelled_job_ends_in_its_worker_too(server):
    before = [worker.pictures for worker in server.service.workers]
    id = server.job(prompt="cancelled", steps=150, count=8)["id"]
    until_drawing(server, id)
    server.post(f"/api/jobs/{id}/cancel")
    assert server.drawn(prompt="next", steps=2)["state"] == "done"
    job = server.service.store.job(id)
    assert job.state == "cancelled"
    assert sum(worker.pictures for worker in server.service.workers) == sum(before) + len(job.done) + 1
    assert all(drawer.ready for drawer in drawers(server))


def test_a_worker_that_is_killed_gives_its_pictures_back_and_is_replaced(server):
    processes = {drawer.worker.process for drawer in drawers(server)}
    jobs = [server.job(prompt="to be killed", steps=150, seed=seed, count=3)["id"] for seed in (100, 200)]
    until_drawing(server, jobs[0])
    victim = drawers(server)[0].worker.process
    os.kill(victim, signal.SIGKILL)
    ended = [server.wait(id, 120) for id in jobs]
    assert [job["state"] for job in ended] == ["done", "done"]
    rows = [row.id for row in server.service.store.pictures("to be killed", limit=100)]
    assert sorted(rows) == sorted(f"{id}-{index}" for id in jobs for index in range(3))
    until(lambda: all(drawer.ready for drawer in drawers(server)), 60)
    assert victim not in {drawer.worker.process for drawer in drawers(server)}
    assert len(processes & {drawer.worker.process for drawer in drawers(server)}) == WORKERS - 1
    assert server.service.workers[0].losses == 1 and "plainsd_workers_lost_total 1.0" in server.get("/metrics").text


def test_a_worker_that_is_killed_while_it_waits_is_replaced_at_once(server):
    drawer = drawers(server)[1]
    victim = drawer.worker.process
    os.kill(victim, signal.SIGKILL)
    until(lambda: drawer.ready and drawer.worker.process != victim, 60)
    assert server.drawn(prompt="after", steps=1)["state"] == "done"


def test_an_error_in_a_worker_is_the_error_of_its_job(server, models):
    """A LoRA that is gone since it was checked: the client's error, with its message."""
    path = options_of(models).loras / "gone.safetensors"
    path.write_bytes((path.parent / "style.safetensors").read_bytes())
    service = server.service
    request = JobRequest(prompt="p", loras=[{"name": "gone"}])
    job = new_job(request, service.models, service.limits, "me", "jobs")
    path.unlink()
    service.queue.add(job)
    until(lambda: not job.active, 60)
    assert job.state == "failed" and job.bad_request and "unknown LoRA 'gone'" in job.error


@pytest.mark.full
def test_a_front_that_stops_ends_its_workers_and_draws_the_rest_at_its_next_start(ray, models, tmp_path):
    service = clustered(models[:1], tmp_path)
    processes = [worker.drawer.worker.process for worker in service.workers]
    with served(service) as first:
        id = first.job(prompt="unfinished", steps=150, count=4)["id"]
        until_drawing(first, id)
    until(lambda: not any(map(alive, processes)), 30)
    with served(clustered(models[:1], tmp_path)) as second:
        assert second.wait(id, 120)["state"] == "done"
        assert len(second.get("/api/images").json()["images"]) == 4
        assert second.service.store.job(id).attempts == 0


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- what cannot work is one line ------------------------------------------------------------------------------------


def test_wrong_flags_are_one_line(tmp_path, capsys):
    for flags, says in (
        (["--workers", "2"], "--workers needs --cluster"), (["--cluster"], "--cluster needs --workers"),
        (["--cluster", "--workers", "0"], "workers 0 is out of range"),
        (["--cluster", "a:1", "b:2", "--workers", "1"], "takes one address"),
        (["--cluster", "--workers", "1", "--gpus-per-worker", "1.5"], "a whole number, or a fraction below 1"),
        (["--cluster", "--workers", "1", "--gpus-per-worker", "0.00009"], "below 1 and not below 0.0001"),
        (["--cluster", "ray://head:10001", "--workers", "1"], "Ray's client protocol"),
        (["--cluster", "head", "--workers", "1"], "is no address"),
        (["--cluster", "a..b:6379", "--workers", "1"], "'a..b:6379' is no address"),
        (["--cluster", f"{'a' * 64}.org:6379", "--workers", "1"], "is no address"),
        (["--cluster", f"127.0.0.1:{free_port()}", "--workers", "1"], "nothing answers there"),
    ):  # fmt: skip
        assert main(["serve", "--data", str(tmp_path / "data"), "--port", "0", *flags]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("plainsd:") == 1, err
    assert main(["generate", "p", "--server", "http://127.0.0.1:1", "--cluster", "--workers", "1"]) == 2
    assert "--server does not go with --cluster" in capsys.readouterr().err


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_without_ray_the_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["generate", "p", "--cluster", "--workers", "1", "--out", str(tmp_path)]) == 2
    assert "pip install 'plainsd[cluster]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_listens_but_is_no_head_is_named(monkeypatch):
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        connecting.check_address(address)
        with pytest.raises(UserError, match="is not the head of a Ray cluster; give the address"):
            connecting.check_head(address)


def test_a_worker_that_has_no_room_is_named(ray):
    with pytest.raises(UserError, match="a worker needs 4000 CPUs, and no machine of the cluster has more than 4 CPUs"):
        check_room(Share(4000))
    assert share_of(2, None, None) == Share(2) and share_of(8, None, None) == Share(1)


@pytest.mark.parametrize(
    "cpus, workers, part",
    [([8], 2, 4), ([8, 8], 1, 8), ([8, 8], 2, 8), ([8, 8], 3, 4), ([8, 4], 2, 4), ([8, 4, 0.5], 3, 4), ([2], 3, 1),
     ([0.5, 0], 1, 1), ([], 1, 1)],
)  # fmt: skip
def test_an_equal_part_fits_on_machines(monkeypatch, cpus, workers, part):
    """A worker is on one of them. Machines that have gone count for nothing."""
    nodes = [{"Alive": True, "Resources": {"CPU": count} if count else {}} for count in cpus]
    nodes.append({"Alive": False, "Resources": {"CPU": 64, "GPU": 8}})
    monkeypatch.setattr(connecting, "imported_ray", lambda: SimpleNamespace(nodes=lambda: nodes))
    assert share_of(workers, None, None) == Share(part)
    if part <= max(cpus, default=0):
        check_room(share_of(workers, None, None))
    nodes.append({"Alive": True, "Resources": {"CPU": 1, "GPU": 1}})
    assert share_of(workers, None, None) == Share(1, 1.0) and share_of(workers, 3, 0.5) == Share(3, 0.5)


def test_another_cluster_than_this_process_is_in_is_refused(ray, monkeypatch):
    monkeypatch.setattr(connecting, "check_address", lambda address: None)
    monkeypatch.setattr(connecting, "check_head", lambda address: None)
    head = connect()
    assert head == connect(head) == connect("auto") == connect(connecting.LOCAL)
    monkeypatch.setitem(connecting.joined, "localhost:6379", head)
    assert connect("localhost:6379") == head
    with pytest.raises(UserError, match=f"--cluster 10.9.9.9:6379: this process is in the Ray cluster at {head}; give"):
        connect("10.9.9.9:6379")


def test_other_versions_are_refused(ray, monkeypatch):
    monkeypatch.setattr(worker_module, "versions", lambda: versions() | {"plainsd": "9.9"})
    worker = RemoteWorker("1", list, Share(1))
    with pytest.raises(UserError, match=r"other versions: plainsd .* there, 9\.9 here; install the same"):
        worker.start()
    worker.end()


def test_a_worker_without_the_model_is_named(ray, models, tmp_path):
    """The front has it, that machine has not: here a name that leads nowhere in the worker."""

    def make():
        raise UserError("there is no model at 'x'; give a model's folder")

    worker = RemoteWorker("1", make, Share(1))
    with pytest.raises(UserError, match=r"the worker on .*: there is no model at 'x'; give"):
        worker.start()
    worker.end()


def test_a_server_whose_workers_have_not_its_model_says_so(ray, models, tmp_path, monkeypatch):
    """By what really runs there: a folder that the front has, and the machine of the worker has not."""
    moved = Path(models[0]).with_name("moved")

    def elsewhere(service_models, queue):
        Path(models[0]).rename(moved)
        try:
            return Cluster(Share(1), 1).drawers(service_models, queue)
        finally:
            moved.rename(models[0])

    with pytest.raises(UserError, match=r"the worker on .*: there is no model at '.*one'; give a model's folder"):
        Service.open(models[:1], tmp_path, Limits(), options_of(models), drawers=elsewhere)


def test_a_package_that_a_worker_lacks_is_named(ray, monkeypatch):
    """The extra of the server, for instance, on a machine that was set up for lists."""
    with pytest.raises(UserError, match="a machine of the cluster has no plainsd, or an older one.*pip install"):
        check_modules("ray.exceptions.RaySystemError: No module named 'plainsd.server'")

    def make():
        import starlette_is_missing  # noqa: F401

    worker = RemoteWorker("1", make, Share(1))
    with pytest.raises(UserError, match=r"no package 'starlette_is_missing'; .* 'plainsd\[serve,cluster\]'"):
        worker.start()
    worker.end()


def test_where_there_is_no_free_room_that_is_said(ray, monkeypatch, caplog):
    """A CPU belongs to others, who may keep it for as long as they like, and each worker needs all."""
    monkeypatch.setattr(worker_module, "LATE", (0.3, 1e9))
    monkeypatch.setattr(RemoteWorker, "said_late", -float("inf"))
    holder = ray.remote(num_cpus=1)(Host).remote()
    ray.get(holder.answer.remote())
    stop = threading.Event()
    workers = [RemoteWorker(f"worker-{number}", list, Share(4), stopping=stop.is_set) for number in range(2)]
    threads = [threading.Thread(target=starting, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        until(lambda: caplog.messages, 60)
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        for worker in workers:
            worker.end()
        ray.kill(holder)
    (said,) = [message for message in caplog.messages if "has not begun" in message]  # of both one line
    assert re.search(
        r"needs 4 CPUs of one machine, and of the cluster's there are [123] of 4 CPUs free; it waits", said
    )


def starting(worker):
    with pytest.raises(Stopping):
        worker.start()


def test_a_worker_that_cannot_even_be_asked_for_is_an_error(ray, models, tmp_path):
    """What is to be sent cannot be: no server starts that has no worker."""
    service = open_service(models[:1], tmp_path)
    lock = threading.Lock()
    drawer = RemoteDrawer("worker-0", lambda: lock, Share(1), service.queue)
    with pytest.raises(TypeError, match="pickle|serialize"):
        Cluster(Share(1), 1).start([drawer])
    service.close()


def test_an_open_drawer_is_tried_again_whatever_is_wrong(ray, models, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cluster_module, "RETRY_SECONDS", (0.01, 0.01))
    service = open_service(models[:1], tmp_path)
    drawer, failed = RemoteDrawer("worker-0", list, Share(1), service.queue), []

    def start():
        if len(failed) == 2:
            drawer.worker.life = object()
            return
        failed.append(1)
        raise KeyError("strange")

    monkeypatch.setattr(drawer.worker, "start", start)
    assert drawer.open() and len(failed) == 2
    assert sum("cannot be started ('strange'); trying again" in message for message in caplog.messages) == 2
    drawer.worker.life = None
    service.close()


def test_where_this_machine_is_of_no_cluster_any_more_nothing_waits_for_ever(ray, models, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "own_node_lives", lambda: False)
    with pytest.raises(UserError, match=r"Ray's own process on this machine \(raylet\) has ended; start this again"):
        list(TaskList(list, Share(1), 1, ["x"]).events())
    service = open_service(models[:1], tmp_path)
    drawer = RemoteDrawer("worker-0", list, Share(1), service.queue)
    assert not drawer.open() and service.queue.failure.startswith("Ray's own process")
    drawer.close()
    service.close()


# --- a host, without Ray ---------------------------------------------------------------------------------------------


@pytest.fixture
def host_of(monkeypatch):
    monkeypatch.setattr(host_module, "keep_freed_memory", lambda: None)

    def make(tool):
        host = Host()
        assert host.build(lambda: tool, torch.get_num_threads(), os.getcwd()) is None
        return host

    return make


def test_a_host_runs_a_task_to_its_end_its_failure_or_its_stop(host_of):
    closed = []

    def tool(task):
        try:
            yield from range(task)
            if task == 2:
                raise UserError("wrong", field="seed")
        finally:
            closed.append(task)

    host = host_of(tool)
    assert list(host.run(0, 1)) == [Taken(), 0]
    *events, failure = host.run(1, 2)
    assert events == [Taken(), 0, 1]
    assert (failure.message, failure.kind, failure.asked, failure.field) == ("wrong", "UserError", True, "seed")
    running = host.run(2, 3)
    assert [next(running), next(running)] == [Taken(), 0]
    host.stop(2)
    assert list(running) == []
    assert list(host.run(3, 1)) == [Taken(), 0]  # the next is not stopped
    assert closed == [1, 2, 3, 1]


def test_what_is_no_fault_of_the_task_is_no_input_error(host_of):
    def tool(task):
        yield 1
        raise task

    host = host_of(tool)
    for error in (KeyError("x"), DiskError(Path("x"), "full")):
        failure = list(host.run(0, error))[-1]
        assert not failure.asked and failure.kind == type(error).__name__ and "Traceback" in failure.trace


@pytest.mark.parametrize("value", [1.5, "x", (512, 8), object()], ids=["number", "text", "size", "other"])
def test_an_error_arrives_whole(host_of, value):
    """Its message, field, value and entry; a value that is no text or number stays where it is."""

    def tool(task):
        yield 1
        raise UserError("wrong; choose from " + ", ".join(f"name-{k}" for k in range(200)),
                        field="loras", value=value, entry=3, most=10**4)  # fmt: skip

    failure = list(host_of(tool).run(0, "x"))[-1]
    error = RemoteWorker.error_of(SimpleNamespace(name="worker-0"), failure)
    assert type(error) is UserError and str(error).endswith("name-198, name-199")
    assert (error.field, error.entry) == ("loras", 3)
    assert error.value == (value if type(value) is not object else None)
    with pytest.raises(UserError, match="^the worker on there: wrong; .*name-100,.*name-199$"):
        raise failure.error("the worker on there: ")


def test_a_servers_first_error_arrives_whole():
    def start():
        raise UserError("wrong; choose from " + 500 * "x, ", most=10**4)

    with pytest.raises(UserError, match="^wrong; choose from (x, ){500}$"):
        Cluster(Share(1), 1).start([SimpleNamespace(start=start, close=lambda: None, ready=False)])


def test_what_cannot_be_made_is_a_failure_too():
    def make():
        raise UserError("there is no model")

    assert Host.build(object.__new__(Host), make, torch.get_num_threads(), "/no/such/folder").asked


def test_quick_steps_share_an_event_and_none_is_lost():
    def events():
        yield Prepared(frozenset())
        yield Begun(200)
        for step in range(200):
            yield Advanced([0.5], [b"preview"] if step == 100 else [])
        yield "the end"

    found = list(merged(events()))
    steps = [event for event in found if isinstance(event, Advanced)]
    assert isinstance(found[0], Prepared) and isinstance(found[1], Begun) and found[-1] == "the end"
    assert sum(len(event.seconds) for event in steps) == 200 and len(steps) < 200
    assert [preview for event in steps for preview in event.previews] == [b"preview"]


# --- plainsd generate, plainsd eval ----------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {number}\n" for number in range(7)))
    return file


def test_a_list_is_that_of_one_process_and_goes_on_where_it_stopped(ray, models, prompts, tmp_path, monkeypatch):
    flags = ["generate", "--prompts", str(prompts), "--model", str(models[0]), "--device", "cpu"]
    flags += ["--batch", "2", "--steps", "3", "--seed", "5"]
    by_cluster = [*flags, "--out", str(tmp_path / "cluster"), *BY_CLUSTER]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*flags, "--out", str(tmp_path / "alone")]) == 0
    finally:
        torch.set_num_threads(threads)
    write, written = ListRun.write, []

    def killed(run, number, *more):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        return write(run, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(ListRun, "write", killed)
        assert main(by_cluster) == 130
    assert len(list((tmp_path / "cluster").glob("*.png"))) == 3 and (tmp_path / "cluster" / RUN_RECORD).exists()
    assert main([*by_cluster, "--steps", "4"]) == 2  # another run
    assert main(by_cluster) == 0
    alone, ours = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("alone", "cluster")
    )
    assert ours == alone and len(ours) == 7
    assert main(by_cluster) == 0  # a run that has ended is not resumed: the next one has numbers of its own
    assert len(list((tmp_path / "cluster").glob("*.png"))) == 14


def test_a_list_outlives_its_workers(ray, models, prompts, tmp_path):
    def make():
        def tool(task):
            number, file = task
            yield number
            with open(file, "a") as calls:
                calls.write(f"{number}\n")
            if number == 1 and open(file).read().split().count("1") < 3:
                os._exit(1)
            yield -number

        return tool

    file = str(tmp_path / "calls")
    events = list(TaskList(make, Share(1), WORKERS, [(number, file) for number in range(3)]).events())
    last = {task: [event for of, event in events if of == task] for task in range(3)}
    assert last[0] == [0, 0] and last[2] == [2, -2]
    assert last[1].count(Again()) == 2 and last[1][-3:] == [Again(), 1, -1]


@pytest.mark.full
def test_eval_by_a_cluster_scores_the_same(ray, tmp_path):
    flags = ["eval", "--prompts", "4", "--steps", "2", "--device", "cpu"]
    if main([*flags, "--out", str(tmp_path / "alone")]) != 0:
        pytest.skip("needs the Noto Color Emoji font")
    assert main([*flags, "--out", str(tmp_path / "cluster"), *BY_CLUSTER]) == 0
    found = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("alone", "cluster")]
    assert found[0] == found[1] and sorted(path.name for path in (tmp_path / "cluster").iterdir()) == [
        "contact-sheet.png", "scores.json", "scores.txt"]  # fmt: skip


@pytest.mark.full
def test_eval_by_a_cluster_goes_on_where_it_stopped(ray, tmp_path, monkeypatch):
    """Pictures that were drawn before it was interrupted are not drawn again, and the scores are those of one run."""
    flags = ["eval", "--prompts", "4", "--steps", "2", "--device", "cpu", *BY_CLUSTER]
    if main([*flags, "--out", str(tmp_path / "whole")]) != 0:
        pytest.skip("needs the Noto Color Emoji font")
    write, written = ListRun.write, []

    def killed(run, number, *more):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(run.paths[number])
        return write(run, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(ListRun, "write", killed)
        assert main([*flags, "--out", str(tmp_path / "twice")]) == 130
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "twice" / "drawn").glob("*.png")}
    assert set(kept) == set(written) and len(kept) == 5
    seen = []
    monkeypatch.setattr(ListRun, "finish", lambda run: None)
    monkeypatch.setattr(ListRun, "remove", lambda run: seen.append(run.target.folder))
    assert main([*flags, "--out", str(tmp_path / "twice")]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and seen == [tmp_path / "twice" / "drawn"]
    found = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "twice")]
    assert found[0] == found[1]


@pytest.mark.full
def test_clip_scores_of_a_cluster_are_those_of_one_process(ray, models, prompts, tmp_path):
    from test_clip_score import clip_of_transformers

    clip_of_transformers().save_pretrained(tmp_path / "clip")
    flags = ["eval", "--clip-score", str(tmp_path / "clip"), models[0], "--prompt-file", str(prompts)]
    flags += ["--steps", "2", "--batch", "2", "--seed", "5", "--device", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*flags, "--out", str(tmp_path / "alone")]) == 0
        assert main([*flags, "--out", str(tmp_path / "cluster"), *BY_CLUSTER]) == 0
    finally:
        torch.set_num_threads(threads)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("alone", "cluster")]
    assert names[0] == names[1] and len(names[0]) > 7
    for path in (tmp_path / "alone").iterdir():
        other = tmp_path / "cluster" / path.name
        if path.suffix != ".png":
            assert path.read_bytes() == other.read_bytes(), path.name
            continue
        assert Image.open(path).tobytes() == Image.open(other).tobytes(), path.name
        one, same = (read_settings(file) for file in (path, other))  # but for hashes, which a worker adds
        assert (one.prompt, one.seed, one.steps) == (same.prompt, same.seed, same.steps)


def test_a_run_knows_the_files_that_it_read(models, tmp_path):
    """Their contents have changed where their times have: a folder that was replaced is another model."""
    from plainsd.commands.flags import GenerateFlags
    from plainsd.commands.setup import DrawingSetup

    model, lora, net = tmp_path / "model", tmp_path / "style.safetensors", tmp_path / "net.safetensors"
    (model / "unet").mkdir(parents=True)
    for path in (model / "unet" / "weights.safetensors", lora, net):
        path.write_bytes(b"x")
    command = GenerateFlags(model=str(model), control=(f"{net}:0.5",), image=net)
    setup = DrawingSetup(command, "cpu", [(lora, 1.0)], [], {}, (), ())
    first = digest_of_run(setup, ["p"], {})
    assert digest_of_run(setup, ["p"], {}) == first
    for path in (model / "unet" / "weights.safetensors", lora, net):
        old = path.stat()
        path.write_bytes(b"xy")
        assert digest_of_run(setup, ["p"], {}) != first, path
        path.write_bytes(b"y")
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
        assert digest_of_run(setup, ["p"], {}) != first, path
        path.write_bytes(b"x")
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert digest_of_run(setup, ["p"], {}) == first, path
    elsewhere = DrawingSetup(replace(command, device="cuda"), "cpu", [(lora, 1.0)], [], {}, (), ())
    assert digest_of_run(elsewhere, ["p"], {}) != first  # which may have another precision
    embedded, hub = (DrawingSetup(GenerateFlags(model=name), "cpu", [], [], {}, (), ()) for name in (None, "a/b"))
    assert digest_of_run(embedded, ["p"], {}) != digest_of_run(hub, ["p"], {})


@pytest.fixture
def in_this_process(monkeypatch):
    """Workers without Ray: what `plainsd generate --cluster` does besides."""

    class Tasks:
        def __init__(self, make, share, workers, tasks):
            self.make, self.tasks = make, tasks

        def events(self):
            tool = self.make()
            for number, task in enumerate(self.tasks):
                try:
                    yield from (OfTask(number, event) for event in tool(task))
                except Exception as error:
                    raise RemoteWorker.error_of(SimpleNamespace(name="worker-0"), as_failure(error)) from None

    monkeypatch.setattr("plainsd.commands.generate_cluster.TaskList", Tasks)
    monkeypatch.setattr("plainsd.commands.cluster.ClusterFlags.join", lambda flags: Share(1))


def list_of(models, prompts, out):
    flags = ["generate", "--prompts", str(prompts), "--model", str(models[0]), "--device", "cpu", "--steps", "1"]
    return [*flags, "--batch", "2", "--out", str(out), *BY_CLUSTER]


def test_a_list_of_random_seeds_goes_on_with_its_own(in_this_process, models, prompts, tmp_path, monkeypatch, capsys):
    command = list_of(models, prompts, tmp_path / "out")
    command += ["--seed", "random", "--variation-seed", "-1", "--variation-strength", "0.5"]
    write = ListRun.write

    def killed(run, number, *more):
        if number == 3:
            raise KeyboardInterrupt
        return write(run, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(ListRun, "write", killed)
        assert main(command) == 130
    said = re.findall(r"seed \d+", capsys.readouterr().err)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert len(said) == 2 and len(kept) == 3
    assert main(command) == 0
    assert re.findall(r"seed \d+", capsys.readouterr().err) == said
    found = sorted((tmp_path / "out").iterdir())
    seed, first = (int(one.split()[1]) for one in said)
    assert [path.name for path in found] == [f"{k + 1:05d}-{seed}.png" for k in range(7)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [read_settings(path).variation_seed for path in found] == [first + k for k in range(7)]


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("no room"), "out of memory on a batch of 2 pictures; try a smaller --batch\n"),
    (KeyError("x"), "a worker failed (KeyError: 'x'); repeat the command, and in the same folder it goes on"),
], ids=["memory", "other"])  # fmt: skip
def test_a_batch_that_fails_is_one_line(in_this_process, models, prompts, tmp_path, monkeypatch, capsys, error, says):
    def fails(*given, **choices):
        raise error

    command = list_of(models, prompts, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("plainsd.generate.text_to_image", fails)
        assert main(command) == 2
    err = capsys.readouterr().err
    assert f"\nplainsd: {says}" in f"\n{err}"
    assert main(command) == 0 and len(list((tmp_path / "out").glob("*.png"))) == 7


def test_of_a_folder_of_drawn_pictures_only_those_are_removed(tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    run = ListRun.named(folder, "digest", ["00000.png", "00001.png"], {"seed": 3})
    run.paths[0].write_bytes(b"drawn")
    run.remove()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    ListRun.named(folder, "digest", ["00000.png"], {"seed": 3}).remove()
    assert not folder.exists()


def test_eval_by_a_cluster_draws_with_its_loras(models, tmp_path, monkeypatch, capsys):
    from plainsd.commands.evaluate import Evaluate
    from plainsd.commands.generate_cluster import files_read

    lora, setups = tmp_path / "style.safetensors", []
    lora_file(models[0], lora, 1)

    def stub(setup, *given):
        setups.append(setup)
        return iter(())

    monkeypatch.setattr("plainsd.commands.cluster.ClusterFlags.join", lambda flags: Share(1))
    monkeypatch.setattr("plainsd.commands.generate_cluster.generate_on_cluster", stub)
    command = Evaluate(model=str(models[0]), lora=(f"{lora}:0.5",))
    command.rows_by_cluster(["p"], [1.0], 3, 2, tmp_path / "drawn")
    (setup,) = setups
    assert setup.loras == [(lora, (0.5, 0.5))] and lora in files_read(setup)
    record = json.loads((tmp_path / "drawn" / RUN_RECORD).read_text())
    assert record["seeds"] == {"seed": 3}

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluate, "loaded", stop)
    assert main(["eval", "--seed", "random", "--out", str(tmp_path), *BY_CLUSTER]) == 130  # goes on with that seed
    assert main(["eval", "--seed", "random", "--out", str(tmp_path / "new")]) == 130
    own, other = re.findall(r"^seed (\d+)$", capsys.readouterr().err, re.M)
    assert own == "3" != other


# --- longer ones -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_two_hundred_jobs_of_32_clients_while_workers_are_killed(server):
    ids: list[str] = []
    lock = threading.Lock()

    def client(number):
        own = Server(None, server.url)
        for job in range(number, 200, 32):
            id = own.job(prompt=f"load {number}", seed=job, steps=10, model=("one", "two")[job % 2])["id"]
            with lock:
                ids.append(id)
            own.wait(id, 300)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    killed = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(3)
        ready = [drawer for drawer in drawers(server) if drawer.ready]
        if ready and killed < 6:
            os.kill(ready[killed % len(ready)].worker.process, signal.SIGKILL)
            killed += 1
    jobs = [server.get(f"/api/jobs/{id}").json() for id in ids]
    assert len(jobs) == 200 and {job["state"] for job in jobs} == {"done"} and killed >= 2
    rows = server.service.store.pictures("load", limit=1000)
    assert sorted(row.id for row in rows) == sorted(f"{id}-0" for id in ids)
    assert all(server.service.store.path(row).is_file() for row in rows)


FRONT = ["-m", "plainsd", "serve", "--port", "0", *BY_CLUSTER]


def started_front(models, data):
    """A server with workers of its own Ray, in a process."""
    command = [sys.executable, *FRONT, "--model", models[0], "--data", str(data), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RAY_ADDRESS": ""})
    return process, Server(None, process.stdout.readline().strip().rstrip("/"))


@pytest.mark.full
def test_a_front_that_is_killed_takes_its_workers_with_it_and_loses_nothing(models, tmp_path):
    process, server = started_front(models, tmp_path)
    ids = [server.job(prompt="killed", steps=100, count=4, seed=seed)["id"] for seed in (1, 100)]
    until_drawing(server, ids[0])
    below = children(process.pid)
    assert len(below) > WORKERS
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, below)), 150)  # the last of them are Ray's agents, which look for its head first
    process, server = started_front(models, tmp_path)
    assert [server.wait(id, 120)["state"] for id in ids] == ["done", "done"]
    rows = [row["id"] for row in server.get("/api/images?limit=100").json()["images"]]
    assert sorted(rows) == sorted(f"{id}-{index}" for id in ids for index in range(4))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, signal.SIGTERM, -signal.SIGTERM)  # Ray exits with the number of the signal


@pytest.mark.full
def test_a_front_whose_own_raylet_dies_ends_and_draws_the_rest_at_its_next_start(models, tmp_path):
    """Ray itself would wait for ever. Whoever watches over the front, such as Docker, starts it again."""

    process, server = started_front(models, tmp_path)
    try:
        ids = [server.job(prompt="raylet", steps=100, count=4, seed=seed)["id"] for seed in (1, 100)]
        until_drawing(server, ids[0])
        below = children(process.pid)
        names = {one: Path(f"/proc/{one}/comm").read_text().strip() for one in below}
        (raylet,) = [one for one, name in names.items() if name == "raylet"]
        os.kill(raylet, signal.SIGKILL)
        assert process.wait(120) != 0
        until(lambda: not any(map(alive, below)), 150)
        process, server = started_front(models, tmp_path)
        assert [server.wait(id, 120)["state"] for id in ids] == ["done", "done"]
        rows = [row["id"] for row in server.get("/api/images?limit=100").json()["images"]]
        assert sorted(rows) == sorted(f"{id}-{index}" for id in ids for index in range(4))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.full
def test_machines_come_and_go(models, tmp_path):
    """A cluster of three: one with the front, and two with a worker each, whose raylets are killed, one after the
    other, while the second has been replaced."""
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [machines.add_node(num_cpus=1) for _ in range(WORKERS)]
    command = [sys.executable, *FRONT, "--model", models[0], "--data", str(tmp_path), "--device", "cpu"]
    command.insert(command.index("--cluster") + 1, machines.address)
    front = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        server = Server(None, front.stdout.readline().strip().rstrip("/"))
        ids = [server.job(prompt="machines", steps=150, count=4, seed=seed)["id"] for seed in (1, 100)]
        until_drawing(server, ids[0])
        machines.remove_node(nodes[0], allow_graceful=False)
        until(lambda: "plainsd_workers_lost_total 1.0" in server.get("/metrics").text, 60)
        machines.add_node(num_cpus=1)
        until(lambda: "plainsd_workers 2.0" in server.get("/metrics").text, 60)
        machines.remove_node(nodes[1], allow_graceful=False)
        assert [server.wait(id, 120)["state"] for id in ids] == ["done", "done"]
        rows = [row["id"] for row in server.get("/api/images?limit=100").json()["images"]]
        assert sorted(rows) == sorted(f"{id}-{index}" for id in ids for index in range(4))
        front.send_signal(signal.SIGTERM)
        front.wait(60)
    finally:
        front.kill()
        machines.shutdown()


@pytest.mark.full
def test_a_front_that_is_killed_frees_what_it_had_of_a_cluster_of_others(models, tmp_path):
    """The cluster lives on, the workers of the front do not; the next one has room for its own, and draws the rest."""
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": WORKERS, "include_dashboard": False})
    command = [sys.executable, *FRONT, "--model", models[0], "--data", str(tmp_path), "--device", "cpu"]
    command.insert(command.index("--cluster") + 1, machines.address)
    fronts = []

    def front():
        fronts.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return Server(None, fronts[-1].stdout.readline().strip().rstrip("/"))

    try:
        server = front()
        ids = [server.job(prompt="killed", steps=100, count=4, seed=seed)["id"] for seed in (1, 100)]
        until_drawing(server, ids[0])
        fronts[0].kill()
        fronts[0].wait()
        server = front()
        assert [server.wait(id, 120)["state"] for id in ids] == ["done", "done"]
        until(lambda: "plainsd_workers 2.0" in server.get("/metrics").text, 120)
        rows = [row["id"] for row in server.get("/api/images?limit=100").json()["images"]]
        assert sorted(rows) == sorted(f"{id}-{index}" for id in ids for index in range(4))
        fronts[1].send_signal(signal.SIGTERM)
        fronts[1].wait(60)
    finally:
        for one in fronts:
            one.kill()
        machines.shutdown()


def children(process):
    """All processes below this one."""
    found = [
        int(one) for one in subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()
    ]
    return found + [deeper for one in found for deeper in children(one)]


@pytest.mark.full
def test_a_worker_that_hangs_is_given_up(server, monkeypatch):
    monkeypatch.setattr(worker_module, "SILENCE", 2.0)
    monkeypatch.setattr(worker_module, "ANSWER", 2.0)
    idle = server.service.queue.idle
    until(lambda: len(idle) == WORKERS, 60)
    id = server.job(prompt="hangs", steps=150)["id"]
    until_drawing(server, id)
    (victim,) = (drawer for drawer in drawers(server) if drawer.place not in idle)  # one picture: one has it
    process = victim.worker.process
    os.kill(process, signal.SIGSTOP)
    try:
        assert server.wait(id, 120)["state"] == "done"
        until(lambda: victim.ready and victim.worker.process != process, 120)
    finally:
        if alive(process):
            os.kill(process, signal.SIGCONT)
