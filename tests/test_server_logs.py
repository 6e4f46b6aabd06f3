"""Log lines: JSON objects that carry job, client and model, one a line; or text that nobody else can break."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest
from serving import Server, model_folder, open_service, served, until

from plainsd.cli import main
from plainsd.commands.serve import Serve
from plainsd.server import logs
from plainsd.server.jobs import drawing
from plainsd.server.logs import JSONLines, TextLines, access_log, log_fields, note
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest

TOKEN = "a-token-that-no-log-shows"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@contextmanager
def written(formatter, level=logging.INFO):
    """What our loggers write, in this form."""
    stream = io.StringIO()
    handler, ours = logging.StreamHandler(stream), logging.getLogger("plainsd")
    handler.setFormatter(formatter)
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(level)
    try:
        yield stream
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)


def objects(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_about_a_job_says_which_and_whose(model, tmp_path):
    with written(JSONLines()) as stream, served(open_service([model], tmp_path), TOKEN) as server:
        server.session.get(f"{server.url}/?token={TOKEN}", allow_redirects=False)
        answer = server.post("/api/jobs", {"prompt": "p", "count": 2, "steps": 1}, headers={"X-Client": "anna"})
        id = answer.json()["id"]
        server.wait(id)
        server.service.queue.limit = 0
        server.post("/api/jobs", {"prompt": "p"})
        server.get("/api/images/nobody")
        until(lambda: '"job ended"' in stream.getvalue() and "nobody" in stream.getvalue())
    lines = objects(stream)
    about = {"job": id, "client": "127.0.0.1/anna", "model": server.service.models.default}
    mine = [line for line in lines if line.get("job") == id]
    assert all(about.items() <= line.items() for line in mine) and id not in str([x for x in lines if x not in mine])
    events = [line["message"] for line in mine if line["logger"] == "plainsd.server"]
    assert events == ["job queued", "job started", "picture finished", "picture finished", "job ended"]
    of = {line["message"]: line for line in mine}
    assert of["job queued"]["pictures"] == 2 and of["job started"]["worker"] == "worker-0"
    assert of["job started"]["waited"] >= 0 and of["picture finished"]["picture"] == f"{id}-1"
    assert of["job ended"]["state"] == "done" and of["job ended"]["seconds"] >= of["job started"]["waited"]
    (post,) = [line for line in mine if line.get("method") == "POST"]
    assert ["job" in line for line in lines if line.get("status") == 429] == [False]  # there is none
    assert post["message"] == "POST /api/jobs 202" and post["status"] == 202 and post["address"] == "127.0.0.1"
    assert post["seconds"] >= 0 and post["logger"] == "plainsd.access" and post["level"] == "info"
    assert [line["status"] for line in lines if line.get("path") == "/api/images/nobody"] == [404]
    assert [line["status"] for line in lines if line.get("path") == "/"] == [303]
    assert TOKEN not in stream.getvalue() and all(line["time"].endswith("Z") for line in lines)


def test_probes_are_logged_for_debugging_alone(model, tmp_path):
    with served(open_service([model], tmp_path)) as server:
        for level, count in ((logging.INFO, 0), (logging.DEBUG, 3)):
            with written(JSONLines(), level) as stream:
                for path in logs.QUIET_PATHS:
                    server.get(path)
                server.get("/api/models")  # its line is the last
                until(lambda stream=stream: "/api/models" in stream.getvalue())
            assert len(objects(stream)) == count + 1


def test_a_name_of_a_token_is_in_the_access_line(model, tmp_path):
    (tmp_path / "tokens").write_text(f"anna {TOKEN}\n")
    with written(JSONLines()) as stream:
        with served(open_service([model], tmp_path / "data"), tokens=tmp_path / "tokens") as server:
            server.get("/api/info", headers={"Authorization": f"Bearer {TOKEN}"})
            server.get("/api/info", headers={"Authorization": "Bearer wrong"})
            until(lambda: stream.getvalue().count("/api/info") >= 2)
        told = [(line["status"], line.get("user")) for line in objects(stream) if line.get("path") == "/api/info"]
    assert told == [(200, "anna"), (401, None)] and TOKEN not in stream.getvalue()


def test_a_failure_and_its_traceback_are_one_line(model, tmp_path, monkeypatch):
    def broken(*args, **more):
        logging.getLogger("plainsd.server").warning("about to break")
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(drawing, "batch", broken)
    with written(JSONLines()) as stream, served(open_service([model], tmp_path)) as server:
        job = server.wait(server.job(prompt="p")["id"])
        assert job["state"] == "failed"
        until(lambda: '"job ended"' in stream.getvalue())
    lines = objects(stream)
    (failed,) = [line for line in lines if "exception" in line]
    about = {"job": job["id"], "client": "127.0.0.1", "model": job["model"]}
    assert about.items() <= failed.items() and failed["level"] == "error"
    assert failed["exception"].endswith("RuntimeError: first line\nsecond line")
    (warned,) = [line for line in lines if line["message"] == "about to break"]
    assert about.items() <= warned.items() and warned["worker"] == "worker-0"
    (last,) = [line for line in lines if line["message"] == "job ended"]
    assert last["state"] == "failed" and "RuntimeError" in last["error"]


def test_a_line_about_a_batch_names_all_its_jobs(model, tmp_path, monkeypatch):
    original = drawing.batch

    def telling(*args, **more):
        logging.getLogger("plainsd.server").warning("drawing")
        return original(*args, **more)

    monkeypatch.setattr(drawing, "batch", telling)
    service = open_service([model], tmp_path)
    wanted = JobRequest(prompt="p", steps=1)
    jobs = [new_job(wanted, service.models, service.limits, name, "jobs") for name in ("anna", "bert")]
    with written(JSONLines()) as stream, closing(service):
        for job in jobs:
            service.queue.add(job)
        service.worker.start()
        until(lambda: not service.queue.jobs)
    (line,) = [line for line in objects(stream) if line["message"] == "drawing"]
    assert (line["jobs"], line["clients"]) == ([job.id for job in jobs], ["anna", "bert"])
    assert line["model"] == jobs[0].model and "job" not in line


def test_fields_end_with_their_request():
    with written(JSONLines()) as stream:
        note(job="nobody's")  # outside of all requests
        with log_fields(a=1):
            note(b=2)
            access_log.info("inside", extra={"c": {1, 2}})
        access_log.info("outside")
    inside, outside = objects(stream)
    assert (inside["a"], inside["b"], inside["c"]) == (1, 2, "{1, 2}") and not {"a", "b", "job"} & set(outside)


def test_a_line_of_text_stays_one_line():
    with written(TextLines()) as stream, log_fields(client="anna\nerror: x"):
        extra = {"_private": 1}  # such as Ray's, which it gives to every record once it is imported
        logging.getLogger("plainsd.server").warning("said \x1b[31m\r\n%s", "ünï", extra=extra)
    (line,) = stream.getvalue().splitlines()
    assert line[8:] == " warning: said \\x1b[31m\\r\\nünï (client=anna\\nerror: x)"


@pytest.mark.parametrize(("flags", "level"), [((), "info"), (("--log-level", "error"), "error")])
def test_the_command_writes_nothing_but_objects(model, tmp_path, flags, level):
    command = [sys.executable, "-W", "always", "-m", "plainsd", "serve", "--model", model, "--data",
               str(tmp_path / "data"), "--port", "0", "--device", "cpu", "--log-format", "json", *flags]  # fmt: skip
    environment = os.environ | {"PLAINSD_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    for line in process.stderr:
        lines.append(json.loads(line))
        if lines[-1]["message"].startswith("listening on "):
            break
    server = Server(None, lines[-1]["message"].removeprefix("listening on ").rstrip("/"))
    server.session.headers["Authorization"] = f"Bearer {TOKEN}"
    id = server.drawn(prompt="p", steps=1)["id"]
    process.send_signal(signal.SIGTERM)
    out, rest = process.communicate(timeout=60)
    lines += [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == -signal.SIGTERM and out == "" and TOKEN not in rest
    assert any(line.get("job") == id for line in lines) == (level == "info")
    assert [line["message"].split()[0] for line in lines[:3]] == ["inspecting", "models:", "pictures"]


def test_a_token_is_shown_where_it_was_given_by_nobody(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("PLAINSD_TOKEN", raising=False)
    service = open_service([], tmp_path)
    with written(JSONLines(), logging.ERROR) as stream:  # whatever the level
        Serve(log_format="json").greet(service, 7860, "made-up-by-us")
        Serve(log_format="json", token=TOKEN).greet(service, 7860, TOKEN)
    service.close()
    messages = [line["message"] for line in objects(stream)]
    assert "listening on http://127.0.0.1:7860/?token=made-up-by-us" in messages and TOKEN not in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_a_wrong_format_is_one_line(capsys):
    assert main(["serve", "--log-format", "xml"]) == 2
    assert "'xml'" in capsys.readouterr().err
