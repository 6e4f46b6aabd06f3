"""Who may ask: the security list of the server, a test each."""

import base64
import socket
import subprocess
import sys
from http.client import HTTPResponse

import pytest
import requests
from serving import model_folder, open_service, served

from plainsd.cli import main
from plainsd.commands.serve import Serve, url
from plainsd.errors import UserError
from plainsd.server.api import security
from plainsd.server.api.security import COOKIE, Hosts, is_loopback
from plainsd.server.client import Remote

TOKEN = "correct horse battery".replace(" ", "-")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with served(open_service([model], tmp_path_factory.mktemp("data"))) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(model, tmp_path_factory):
    with served(open_service([model], tmp_path_factory.mktemp("guarded")), TOKEN) as server:
        yield server


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("localhost:7860", 200), ("LOCALHOST", 200), ("[::1]:7860", 200), ("localhost.", 200),
    ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("192.168.1.7", 403),
    ("localhost@evil.example", 403), ("", 403), ("[", 403), ("evil.example:7860", 403),
])  # fmt: skip
def test_only_known_hosts_are_answered(server, host, status):
    assert server.get("/api/info", headers={"Host": host}).status_code == status


def test_a_request_with_no_host_or_two_is_refused(server):
    for head in (
        b"GET /api/info HTTP/1.0\r\n\r\n",
        b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
            connection.sendall(head)
            assert connection.recv(200).split()[1] in (b"400", b"403")


def test_on_all_addresses_any_bare_address_will_do_but_no_strange_name():
    hosts = Hosts("0.0.0.0", ["pictures.example"])
    assert "192.168.1.7:7860" in hosts and "pictures.example" in hosts and socket.gethostname() in hosts
    assert "evil.example" not in hosts and "192.168.1.7.evil.example" not in hosts


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "file://"]
)
def test_foreign_origins_are_refused_also_for_reading(server, origin):
    for answer in (
        server.get("/api/images", headers={"Origin": origin}),
        server.post("/api/jobs", {"prompt": "p"}, headers={"Origin": origin}),
    ):
        assert answer.status_code == 403 and "is not allowed" in answer.json()["error"]["message"]
    assert server.get("/api/images", headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_browser_calls_cross_site_is_refused(server, site):
    navigation = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.get("/api/images", headers={"Sec-Fetch-Site": site}).status_code == 403
    assert server.get("/api/images", headers=navigation).status_code == 403
    assert server.post("/api/jobs", {"prompt": "p"}, headers=navigation).status_code == 403
    assert server.get("/", headers=navigation).status_code == 200  # a link to the page may be followed
    assert server.get("/", headers=navigation | {"Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert server.get("/api/images", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_no_answer_allows_another_origin(server):
    asked = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    refused = server.session.options(server.url + "/api/jobs", headers=asked)
    assert refused.status_code == 403
    for answer in (refused, server.get("/api/info", headers={"Origin": server.url})):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_post_takes_json_only(server):
    for path in ("/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/interrupt", "/api/settings"):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            answer = server.session.post(server.url + path, data=b'{"prompt": "p"}', headers={"Content-Type": kind})
            assert answer.status_code == 415, (path, kind)
    assert server.post("/v1/images/edits", {"prompt": "p"}).status_code == 415  # a form, and nothing else


def test_a_body_that_does_not_come_in_time_is_refused(server, monkeypatch):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.3)
    head = (
        b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head)
        answer = HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408 and b"took longer than 0.3 s to come" in answer.read()


def test_every_answer_has_the_headers_that_keep_browsers_honest(server):
    for path in ("/", "/page/app.js", "/api/info", "/nowhere", "/healthz", "/metrics", "/openapi.json"):
        headers = server.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["cross-origin-resource-policy"] == "same-origin" and "server" not in headers
        assert headers["x-frame-options"] == "DENY" and headers["cross-origin-opener-policy"] == "same-origin"
    refused = server.get("/", headers={"Host": "evil.example"}).headers
    assert refused["x-content-type-options"] == "nosniff" and refused["cache-control"] == "no-store"


def test_content_types_are_fixed(server):
    kinds = {
        "/": "text/html; charset=utf-8",
        "/page/app.js": "text/javascript; charset=utf-8",
        "/page/style.css": "text/css; charset=utf-8",
    }
    for path, kind in kinds.items():
        assert server.get(path).headers["content-type"] == kind


def test_websockets_are_closed(server):
    head = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "eA=="}
    assert server.get("/", headers=head).status_code in (200, 400, 403, 426)  # never 101


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pictures.example:8443", "https://pictures.example", "pictures.example/draw"])
def test_what_is_no_name_of_a_host_is_refused(name):
    """It would never fit what browsers ask for."""
    with pytest.raises(UserError, match="no host's name; leave scheme, port and path out"):
        Hosts("0.0.0.0", [name])
    assert "Pictures.example:8443" in Hosts("127.0.0.1", ["PICTURES.example", "::2", "10.0.0.1"])


def test_with_a_token_nothing_else_opens(guarded):
    basic = "Basic " + base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    for path in ("/api/info", "/api/images", "/metrics", "/openapi.json", "/docs", "/v1/models", "/sdapi/v1/options"):
        refused = guarded.get(path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer", path
        assert TOKEN not in refused.text
        for given in (
            "Bearer wrong",
            "Bearer",
            f"Bearer {TOKEN}x",
            "Basic !!!",
            "Basic " + base64.b64encode(b"a:b").decode(),
            TOKEN,
        ):
            assert guarded.get(path, headers={"Authorization": given}).status_code == 401, given
        for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic):
            assert guarded.get(path, headers={"Authorization": given}).status_code == 200, given
    assert guarded.get("/api/info", cookies={COOKIE: TOKEN}).status_code == 401
    assert guarded.post("/api/jobs", {"prompt": "p"}).status_code == 401
    assert guarded.get("/").status_code == 200 and guarded.get("/healthz").status_code == 200


def test_the_page_logs_in_with_a_link_or_a_form(guarded):
    browser = requests.Session()
    browser.trust_env = False
    assert browser.get(guarded.url + "/?token=wrong").status_code == 401
    answer = browser.get(guarded.url + f"/?token={TOKEN}", allow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert "secure" not in cookie and browser.get(guarded.url + "/api/info").status_code == 200
    for other in (("a", "b"), ("a", TOKEN)):  # a proxy's own password, which browsers send along
        assert browser.get(guarded.url + "/api/info", auth=other).status_code == 200
    browser.cookies.clear()
    assert browser.get(guarded.url + "/api/info", auth=("a", "b")).status_code == 401
    behind = {"X-Forwarded-Proto": "https", "Host": "127.0.0.1"}  # a proxy with TLS, on this machine
    answer = browser.get(guarded.url + f"/?token={TOKEN}", headers=behind, allow_redirects=False)
    assert "secure" in answer.headers["set-cookie"].lower()
    answer = browser.post(guarded.url + "/api/login", json={"token": TOKEN}, headers=behind)
    assert "secure" in answer.headers["set-cookie"].lower()
    browser.cookies.clear()
    assert browser.post(guarded.url + "/api/login", json={"token": "wrong"}).status_code == 401
    assert browser.post(guarded.url + "/api/login", json={"token": TOKEN}).status_code == 204
    assert browser.get(guarded.url + "/api/info").status_code == 200


def test_two_servers_of_one_host_do_not_log_each_other_out(guarded):
    """Browsers send a host's cookies to all its ports; requests do, too."""
    port = guarded.url.rpartition(":")[2]
    browser = requests.Session()
    browser.trust_env = False
    browser.post(guarded.url + "/api/login", json={"token": TOKEN})
    assert browser.cookies.keys() == [f"{COOKIE}_{port}"]
    for name in (COOKIE, f"{COOKIE}_{int(port) + 1}"):  # of a server before, and of another one
        browser.cookies.set(name, "another", domain="127.0.0.1")
    assert browser.get(guarded.url + "/api/info").status_code == 200
    session = browser.cookies[f"{COOKIE}_{port}"]
    assert guarded.get("/api/info", cookies={COOKIE: session}).status_code == 200  # it goes on being read
    assert guarded.get("/api/info", cookies={COOKIE: "another"}).status_code == 401


def test_beyond_this_machine_a_token_is_required(model, tmp_path):
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1")] == [True] * 4
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"))
    from plainsd.commands.serve import Serve

    assert Serve().checked_token() is None and len(Serve(host="0.0.0.0").checked_token()) >= 20
    assert Serve(host="0.0.0.0").checked_token() != Serve(host="0.0.0.0").checked_token()


def test_wrong_flags_are_one_line_and_code_2(model, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = {
            "must be 12 or more": ["--token", "short"], "port 99999 is out of range": ["--port", "99999"],
            "no such folder": ["--loras", str(tmp_path / "none")],
            "no model at": ["--model", "no/such/model/here", "--port", "0"],
            "choose others with --host and --port": ["--port", str(taken.getsockname()[1])],
            "batch 0": ["--batch", "0"], "memory -1.0": ["--memory", "-1"],
        }  # fmt: skip
        for says, flags in wrong.items():
            assert main(["serve", "--data", str(tmp_path / "data"), *flags]) == 2
            error = capsys.readouterr().err.strip().splitlines()
            assert says in error[-1] and "Traceback" not in "".join(error), error
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "pip install 'plainsd[serve]'" in capsys.readouterr().err


def test_fastapi_is_imported_only_when_serving():
    code = (
        "import sys, plainsd.cli, plainsd.commands.serve; sys.exit('fastapi' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_any_token_goes_into_an_address():
    token = "pJ7+x/Qe1Zk9+aaa==#&%41"
    assert Remote(url("127.0.0.1", 7860, token)).token == token


@pytest.mark.parametrize(("host", "opens"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("192.0.2.7", "192.0.2.7")])
def test_the_address_that_is_printed_opens(host, opens, tmp_path, capsys):
    service = open_service([], tmp_path)
    Serve(host=host).greet(service, 7860, "a-long-token")
    service.close()
    told = capsys.readouterr()
    assert told.out == f"http://{opens}:7860/?token=a-long-token\n"
    assert ("from other machines: http://" in told.err) == (host != opens) and f"//{host}:" not in told.err
