"""Tokens with names: everybody has a gallery, jobs, favourites and a trash of their own, and a share of the queue."""

import base64
import json
import logging
import re
import time
from contextlib import closing

import pytest
import requests
from fastapi.routing import APIRoute
from serving import Brake, Server, model_folder, open_service, served, until

from plainsd.cli import main
from plainsd.commands.serve import Serve
from plainsd.errors import UserError
from plainsd.server import users
from plainsd.server.api.security import PROBES, PUBLIC_PATHS, Hosts
from plainsd.server.jobs.queue import Place
from plainsd.server.limits import Limits
from plainsd.server.requests import new_job
from plainsd.server.schema import JobRequest
from plainsd.server.users import Access, read_tokens

ADMIN, ANNA, BERT = "the-token-of-the-admin", "the-token-of-anna", "the-token-of-bert"
LINES = f"# friends\n\nanna {ANNA}\n  bert\t{BERT}  \r\nanna anna-has-another\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tokens").write_text(LINES, newline="")
    with served(open_service([model], folder / "data"), ADMIN, tokens=folder / "tokens") as server:
        yield server


def as_user(server, token):
    one = Server(server.service, server.url)
    one.session.headers["Authorization"] = f"Bearer {token}"
    return one


@pytest.fixture(scope="module")
def anna(server):
    return as_user(server, ANNA)


@pytest.fixture(scope="module")
def bert(server):
    return as_user(server, BERT)


@pytest.fixture(scope="module")
def admin(server):
    return as_user(server, ADMIN)


def ids(one, **params):
    return {row["id"] for row in one.get("/api/images", params={"limit": 200, **params}).json()["images"]}


# --- each sees what is theirs ----------------------------------------------------------------------------------------


def test_everybody_sees_their_own_and_the_admin_all(anna, bert, admin):
    hers, his, its = (one.drawn(prompt="p", steps=1, count=2) for one in (anna, bert, admin))
    assert ids(anna) >= set(hers["images"]) and ids(anna).isdisjoint([*his["images"], *its["images"]])
    assert ids(bert) >= set(his["images"]) and ids(bert).isdisjoint([*hers["images"], *its["images"]])
    assert ids(admin) >= {*hers["images"], *his["images"], *its["images"]}
    for one, names in ((anna, {"anna"}), (bert, {"bert"}), (admin, {"anna", "bert", ""})):
        jobs = one.get("/api/jobs").json()["ended"]
        assert {one.service.store.job(job["id"]).owner for job in jobs} == names
    assert [one.get("/api/info").json()["user"] for one in (anna, bert, admin)] == ["anna", "bert", None]


def test_favourites_and_the_trash_are_ones_own(anna, bert, admin):
    mine, hers = anna.drawn(prompt="p", steps=1)["images"], bert.drawn(prompt="p", steps=1)["images"]
    both = {"ids": mine + hers}
    assert anna.post("/api/images/favourites", both).json() == {"ids": mine}
    assert ids(anna, favourites=True) == set(mine) and ids(bert, favourites=True) == set()
    assert anna.post("/api/images/delete", both).json() == {"ids": mine}
    assert bert.post("/api/images/restore", both).json() == {"ids": []} and mine[0] not in ids(admin)
    assert anna.post("/api/images/restore", both).json() == {"ids": mine} and mine[0] in ids(anna)
    assert admin.post("/api/images/favourites", both | {"favourite": False}).json() == {"ids": mine + hers}


def test_a_running_job_is_its_owners(anna, bert, admin, monkeypatch):
    brake = Brake(monkeypatch)
    id = anna.job(prompt="p")["id"]
    brake.wait()
    active = [[job["id"] for job in one.get("/api/jobs").json()["active"]] for one in (anna, bert, admin)]
    assert active == [[id], [], [id]]
    assert bert.post(f"/api/jobs/{id}/cancel").status_code == 404 and anna.get(f"/api/jobs/{id}").json()["state"] == (
        "running"
    )
    brake.off()
    assert anna.wait(id)["state"] == "done"


NO_ID_OF_OURS = {"/page/{name}", "/v1/models/{name}"}  # names of the page's files, and of models
LISTS = {"/api/images/favourites", "/api/images/delete", "/api/images/restore"}  # of ids, in the body
BODIES = {"/api/login": {"token": ANNA}}


def routes(app):
    """(method, path) of all that the server answers."""
    found = {(method, path) for path, methods in app.openapi()["paths"].items() for method in methods}
    hidden = {(method.lower(), one.path) for one in app.routes if isinstance(one, APIRoute) for method in one.methods}
    return sorted(found | hidden)


def test_no_route_gives_a_strangers_picture_or_job(server, anna, bert):
    """All routes, those to come too: one that takes an id must be refused with a stranger's, or be named above."""
    job = anna.drawn(prompt="p", steps=1, count=2)
    first, second = job["images"]
    from plainsd.server.api.app import create_app

    app = create_app(server.service, Hosts("127.0.0.1"), ADMIN)
    walked = set()
    for method, path in routes(app):
        names = set(re.findall(r"\{(\w+)\}", path))
        call = getattr(bert.session, method)
        if names and path not in NO_ID_OF_OURS:
            assert names == {"id"}, f"{path}: how is the owner checked there?"
            own, nobody = (path.replace("{id}", id) for id in (job["id"] if "/jobs/" in path else first, "nobody"))
            more = {"json": {}} if method == "post" else {}
            refused, missing = (call(server.url + way, timeout=60, **more) for way in (own, nobody))
            assert (refused.status_code, missing.status_code) == (404, 404), (method, path)
            assert refused.json()["error"]["what"].startswith("there is no ") and refused.text.replace(
                own.split("/")[3].removesuffix(".png"), "nobody") == missing.text, path  # fmt: skip
            walked.add(path)
        operation = app.openapi()["paths"].get(path, {}).get(method, {})
        text = json.dumps(operation)
        if '"ids"' in text or "Selection" in text or "Marking" in text:
            assert path in LISTS and bert.post(path, {"ids": [first, second]}).json() == {"ids": []}, path
            walked.add(path)
        if any(one["name"] == "id" and one["in"] == "query" for one in operation.get("parameters", ())):
            answer = bert.get(path, params={"id": [first, second]})
            assert answer.status_code == 404 and answer.headers["content-type"] == "application/json", path
            walked.add(path)
        if method == "get" and not names:
            text = bert.get(path).text
            assert job["id"] not in text, path
            assert anna.get(path).text  # and it is a route at all
    assert walked >= {"/api/images/{id}.png", "/api/images/{id}", "/api/images/{id}/thumbnail", "/api/images.zip",
                      "/api/jobs/{id}", "/api/jobs/{id}/events", "/api/jobs/{id}/cancel", *LISTS}  # fmt: skip
    assert ids(anna) >= {first, second} and anna.get(f"/api/images/{first}.png").status_code == 200
    assert anna.get(f"/api/images/{first}").json()["favourite"] is False


def test_only_what_shows_nothing_is_public():
    assert set(PUBLIC_PATHS) - set(PROBES) == {"/", "/api/login"}


def test_options_of_a1111_are_ones_own(anna, bert, admin):
    assert anna.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2}).status_code == 200
    told = [one.get("/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] for one in (anna, bert, admin)]
    assert told == [2, 1, 1]


def test_progress_and_interrupt_are_ones_own(server, anna, bert, monkeypatch):
    brake = Brake(monkeypatch)
    job = new_job(JobRequest(prompt="p"), server.service.models, server.service.limits, "anna", "a1111")
    job.owner = "anna"
    server.service.queue.add(job)
    brake.wait()
    assert bert.post("/sdapi/v1/interrupt", {}).json() == {} and job.active
    jobs = [one.get("/sdapi/v1/progress").json()["state"]["job"] for one in (bert, anna)]
    assert jobs == ["", job.id]
    anna.post("/sdapi/v1/interrupt", {})
    assert job.state == "cancelled"
    brake.off()
    until(lambda: not server.service.queue.jobs)


# --- how they log in -------------------------------------------------------------------------------------------------


def test_every_way_in_leads_to_ones_own(server, anna):
    id = anna.drawn(prompt="p", steps=1)["images"][0]
    basic = base64.b64encode(f"whoever:{ANNA}".encode()).decode()
    assert server.get(f"/api/images/{id}", headers={"Authorization": f"Basic {basic}"}).status_code == 200
    assert as_user(server, "anna-has-another").get(f"/api/images/{id}").status_code == 200
    for wrong in ("", "anna", ANNA[:-1], ANNA + "x", f"{ANNA} ", "the-token-of-carl-x", "ä" * 12):
        answer = server.get(f"/api/images/{id}", headers={"Authorization": f"Bearer {wrong}".encode()})
        assert answer.status_code == (200 if wrong.strip() == ANNA else 401), wrong
    for token, status in ((ANNA, 200), (ADMIN, 200), (BERT, 404)):
        for way in ("link", "form"):
            browser = requests.Session()
            browser.trust_env = False
            if way == "link":
                assert browser.get(f"{server.url}/?token={token}").status_code == 200
            else:
                assert browser.post(f"{server.url}/api/login", json={"token": token}).status_code == 204
            assert token not in str(browser.cookies.get_dict())
            assert browser.get(f"{server.url}/api/images/{id}").status_code == status, (token, way)
    assert server.get(f"/api/images/{id}").status_code == 401


def test_all_tokens_are_compared_whichever_it_is(monkeypatch, tmp_path):
    """By `compare_digest`, of digests of one length: the time says nothing about them."""
    (tmp_path / "t").write_text(LINES)
    access, compared = Access(ADMIN, tmp_path / "t"), []
    monkeypatch.setattr(users.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    for given in (ADMIN, ANNA, BERT, "x"):
        compared.clear()
        assert getattr(access.user_of_token(given), "name", "?") == {ADMIN: None, ANNA: "anna", BERT: "bert"}.get(
            given, "?"
        )
        assert compared == [(32, 32)] * 4
    compared.clear()
    assert access.user_of_session(users.session_of(ADMIN)).name is None and len(compared) == 4


# --- the file --------------------------------------------------------------------------------------------------------


def test_lines_and_json_say_the_same(tmp_path):
    file = tmp_path / "tokens"
    pairs = [("anna", ANNA), ("bert", BERT), ("anna", "anna-has-another")]
    file.write_bytes(b"\xef\xbb\xbf" + LINES.encode())  # as Windows' Notepad saves it
    assert read_tokens(file) == pairs
    file.write_text(json.dumps({"anna": [ANNA, "anna-has-another"], "bert": BERT}))
    assert sorted(read_tokens(file)) == sorted(pairs)
    file.write_text("# nobody yet\n")
    assert read_tokens(file) == []


@pytest.mark.parametrize(("text", "says"), [
    ("anna\n", "line 1 has 1 words"), (f"anna {ANNA} x\n", "line 1 has 3 words"),
    (f"\nanna short-{'x' * 5}\n", "line 2: the token of 'anna' must be 12 or more"),
    (f"1.2.3.4 {ANNA}", "name '1.2.3.4' is not allowed"), (f"an/na {ANNA}", "name 'an/na' is not allowed"),
    (f"anna {ANNA}\nbert {ANNA}\n", "line 2: the token of 'bert' is there twice"), (f"anna {'ä' * 12}", "ASCII"),
    ("{", "mend its JSON"), ('{"anna": 5}', "is no token"), ('{"anna": []}', "is no token"),
    (f'{{"anna": ["{ANNA}", "x"]}}', "must be 12 or more"), (b"anna \xff", "not UTF-8"), ("x" * 1_000_001, "at most"),
])  # fmt: skip
def test_a_wrong_file_is_one_line_that_shows_no_token(tmp_path, capsys, text, says):
    file = tmp_path / "tokens"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["serve", "--tokens", str(file), "--data", str(tmp_path / "data")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and ANNA not in line and not (tmp_path / "data").exists()


def test_no_file_and_the_admins_token_in_it(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokens"):
        read_tokens(tmp_path / "none")
    (tmp_path / "t").write_text(f"anna {ADMIN}\n")
    with pytest.raises(UserError, match="is the admin's too"):
        Access(ADMIN, tmp_path / "t")


def test_with_a_file_the_admin_needs_a_token_too():
    assert Serve().checked_token() is None
    assert len(Serve(tokens="somewhere").checked_token()) >= 20 and Serve(token=ADMIN, tokens="x").checked_token() == (
        ADMIN
    )


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(users, "LOOK_SECONDS", 0)
    file = tmp_path / "tokens"
    file.write_text(f"anna {ANNA}\n")
    with served(open_service([model], tmp_path / "data"), ADMIN, tokens=file) as server:
        browser = requests.Session()
        browser.trust_env = False
        browser.get(f"{server.url}/?token={ANNA}")

        def status(token):
            return as_user(server, token).get("/api/info").status_code

        assert (status(ANNA), status(BERT), server.service.queue.share) == (200, 401, 1 / 2)
        file.write_text(f"anna {ANNA}\nbert {BERT}\ncarl the-token-of-carl\n")
        assert (status(ANNA), status(BERT), server.service.queue.share) == (200, 200, 1 / 4)
        with caplog.at_level(logging.ERROR, "plainsd.server"):
            file.write_text(f"bert {BERT}\nanna\n")
            assert (status(ANNA), status(BERT)) == (200, 200)
            file.unlink()
            assert (status(ANNA), status(BERT)) == (200, 200)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 and "line 2 has 1 words" in said[0] and "No such file" in said[1]
        file.write_text(f"bert {BERT}\n")
        assert (status(ANNA), status(BERT), status(ADMIN)) == (401, 200, 200)
        assert browser.get(f"{server.url}/api/info").status_code == 401  # her cookie ends with her token


# --- the queue -------------------------------------------------------------------------------------------------------


def test_names_take_turns_whatever_they_say_and_wherever_they_are(model, tmp_path):
    """Anna's jobs, sent under three names of clients, are one client's."""
    (tmp_path / "t").write_text(LINES)
    service = open_service([model], tmp_path / "data")
    start, service.worker.start = service.worker.start, lambda: None
    with served(service, ADMIN, tokens=tmp_path / "t") as server:
        anna, bert = as_user(server, ANNA), as_user(server, BERT)
        for said in ("x", "y", "z"):
            answer = anna.post("/api/jobs", {"prompt": "p", "seed": 1}, headers={"X-Client": said})
            assert answer.status_code == 202
        bert.job(prompt="p", count=3)
        assert [job.client for job in service.queue.jobs.values()] == ["anna"] * 3 + ["bert"]
        drawn = [service.queue.next_batch(1, Place())[0].job.client for _ in range(6)]
        assert drawn == ["anna", "bert"] * 3
        start()
        service.queue.stop()


def test_there_is_room_for_every_name(model, tmp_path):
    (tmp_path / "t").write_text(f"anna {ANNA}\nbert {BERT}\ncarl the-token-of-carl\n")
    service = open_service([model], tmp_path / "data", Limits(queue=8))
    start, service.worker.start = service.worker.start, lambda: None
    with served(service, ADMIN, tokens=tmp_path / "t") as server:
        for token in (ANNA, BERT, "the-token-of-carl", ADMIN):
            one = as_user(server, token)
            for _ in range(2):
                one.job(prompt="p")
            refused = one.post("/api/jobs", {"prompt": "p"})
            assert refused.status_code == 429 and "2 of them yours" in refused.json()["error"]["message"]
        start()
        service.queue.stop()


def test_owners_survive_a_restart_and_an_older_database(model, tmp_path):
    service = open_service([model], tmp_path)
    job = new_job(JobRequest(prompt="p"), service.models, service.limits, "anna", "jobs")
    job.owner = "anna"
    service.queue.add(job)
    service.close()
    with closing(open_service([model], tmp_path)) as service:
        assert service.queue.jobs[job.id].owner == "anna"
        assert [one.id for one in service.store.jobs(("queued",), owner="anna")] == [job.id]
        assert service.store.jobs(("queued",), owner="bert") == [] and time.time() > job.created
