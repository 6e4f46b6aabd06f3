"""What a hostile or mistaken request could cost: numbers that are none, texts without end, silent connections."""

import asyncio
import base64
import json
import resource
import socket
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPResponse

import pytest
from PIL import Image, PngImagePlugin
from serving import model_folder, open_service, png_bytes, served, until

from plainsd.server.api import connections, security
from plainsd.server.api.connections import network_of
from plainsd.server.api.security import Hosts, SecurityMiddleware
from plainsd.server.limits import Limits
from plainsd.server.prompt_checks import nesting
from plainsd.server.schema import clean
from plainsd.server.users import Access

LONG = "9" * 4000
LIMITS = Limits(pixels=128 * 128, steps=20, prompt=2000)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(
        open_service([model_folder(tmp_path_factory.mktemp("m"))], tmp_path_factory.mktemp("d"), LIMITS)
    ) as one:
        yield one


def sent(server, path, text):
    return server.session.post(server.url + path, data=text, headers={"Content-Type": "application/json"}, timeout=60)


NUMBERS = {
    "/api/jobs": ["steps", "guidance", "image_guidance", "seed", "count", "handover", "strength", "hires",
                  "variation_seed", "variation_strength", "clip_skip", "eta", "rescale", "perturbed", "threshold",
                  "apg", "apg_parallel", "apg_momentum", "cache", "mask_blur"],
    "/sdapi/v1/txt2img": ["seed", "subseed", "subseed_strength", "batch_size", "n_iter", "steps", "cfg_scale", "width",
                          "height", "eta", "refiner_switch_at"],
    "/v1/images/generations": ["n", "steps", "guidance", "seed", "strength", "partial_images", "output_compression"],
}  # fmt: skip
HIRES = '"enable_hr": true, "hr_upscaler": "Latent", "denoising_strength": 0.5, '


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_are_checked_as_numbers(server, path):
    for name in NUMBERS[path]:
        for value in ("NaN", "Infinity", "-Infinity", "1e308", "-1e308", LONG, "-" + LONG, "1e999", '"x"', "[1]", "{}"):
            more = HIRES if "sdapi" in path else ""
            answer = sent(server, path, f'{{"prompt": "p", {more}"{name}": {value}}}')
            assert 400 <= answer.status_code < 500, (name, value[:20], answer.status_code, answer.text[:300])
            assert "nosniff" in answer.headers["x-content-type-options"] and len(answer.text) < 10_000


@pytest.mark.parametrize(("path", "text"), [
    ("/api/jobs", '{"prompt": "p", "interval": [NaN, 1]}'), ("/api/jobs", '{"prompt": "p", "size": [1e308, 64]}'),
    ("/api/jobs", f'{{"prompt": "p", "size": [{LONG}, 64]}}'), ("/api/jobs", '{"prompt": "p", "size": [NaN, NaN]}'),
    ("/api/jobs", f'{{"prompt": "p", "grid": [{{"name": "hires", "values": [NaN, 1e308, {LONG}]}}]}}'),
    ("/api/jobs", f'{{"prompt": "p", "grid": [{{"name": "steps", "values": [{LONG}]}}]}}'),
    ("/api/jobs", '{"prompt": "p", "grid": [{"name": "guidance", "values": ["nan"]}]}'),
    ("/api/jobs", '{"prompt": "p", "loras": [{"name": "x", "strength": NaN}]}'),
    ("/api/jobs", f'{{"prompt": "p (a:{LONG[:300]})"}}'), ("/api/jobs", f'{{"prompt": "p AND a:{LONG[:400]}"}}'),
    ("/api/jobs", '{"prompt": "p", "seed": 18446744073709551615, "count": 2}'),
    ("/api/jobs", '{"prompt": "p", "seed": 18446744073709551616}'),
    ("/api/jobs", '{"prompt": "p", "variation_strength": 0.5, "variation_seed": 18446744073709551615, "count": 2}'),
    ("/sdapi/v1/txt2img", '{"enable_hr": true, "hr_scale": NaN}'),
    ("/sdapi/v1/txt2img", '{"enable_hr": true, "hr_scale": 1e308}'),
    ("/sdapi/v1/txt2img", f'{{"enable_hr": true, "hr_resize_x": {LONG}}}'),
    ("/sdapi/v1/txt2img", '{"batch_size": -5, "n_iter": -5}'),
    ("/sdapi/v1/txt2img", '{"infotext": "p\\nSteps: 9, CFG scale: nan, Hires upscale: 1e308, Seed: 1"}'),
    ("/sdapi/v1/options", f'{{"CLIP_stop_at_last_layers": {LONG}}}'),
    ("/v1/images/generations", '{"prompt": "p", "size": "99999x99999"}'),
    ("/api/jobs", "[" * 100_000), ("/api/jobs", '{"prompt": ' + "9" * 100_000 + "}"),
])  # fmt: skip
def test_no_number_is_a_fault_of_the_server(server, path, text):
    answer = sent(server, path, text)
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//[x]:y", "http://a:b:c", "\xff"])
def test_a_malformed_origin_is_foreign(server, origin):
    answer = server.get("/api/info", headers={"Origin": origin.encode("latin-1")})
    assert answer.status_code == 403 and answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    ("path", "form"), [("/api/info", "what"), ("/sdapi/v1/loras", "detail"), ("/v1/models", "type")]
)
def test_a_fault_of_ours_has_the_headers_and_the_form_of_its_api(server, monkeypatch, path, form):
    def broken(*given):
        raise ArithmeticError("private")

    monkeypatch.setattr(server.service.models.loras, "known", broken)
    monkeypatch.setattr(type(server.service.models), "known", property(broken), raising=False)
    answer = server.get(path)
    assert answer.status_code == 500 and answer.headers["x-frame-options"] == "DENY"
    assert form in answer.text and "ArithmeticError" in answer.text and "private" not in answer.text


# --- texts -----------------------------------------------------------------------------------------------------------


def test_brackets_and_the_cells_of_a_grid_have_a_budget(server):
    assert nesting("((a) [b (c)])") == 3 and nesting(r"\(\(a") == 0 and nesting(")))(") == 1
    deep = server.post("/api/jobs", {"prompt": "(" * 65 + "a"})
    assert deep.status_code == 422 and "65 brackets inside each other; at most 64" in deep.text
    words = {"prompt": "[a|b] " * 300, "size": [32, 32]}
    assert server.post("/api/jobs", words | {"steps": 20}).status_code == 202
    grid = [{"name": "steps", "values": [16, 17, 18, 19, 20]}]
    much = server.post("/api/jobs", words | {"grid": grid})
    assert much.status_code == 422 and "162000 characters" in much.text and "fewer cells" in much.text
    seeds = [{"name": "seed", "values": list(range(30))}]  # which are read once
    assert server.post("/api/jobs", words | {"steps": 2, "grid": seeds}).status_code == 202


def test_a_text_that_a_picture_carries_is_bounded(server):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "p\n" + "word " * 20_000 + ", Steps: 3, Sampler: Euler, Seed: 1")
    image = base64.b64encode(png_bytes(Image.new("RGB", (8, 8)), pnginfo=info)).decode()
    told = server.post("/sdapi/v1/png-info", {"image": image})
    assert told.status_code == 422 and "at most 65536 are read" in told.text
    told = server.post("/sdapi/v1/txt2img", {"infotext": "a" * 70_000})
    assert told.status_code == 422 and "70000 characters" in told.text


def test_a_body_holds_no_more_values_than_a_request_needs(server):
    told = sent(server, "/api/jobs", '{"prompt": "p", "x": [' + "[]," * 60_000 + "1]}")
    assert told.status_code == 413 and "more than 100000 values" in told.text
    told = sent(server, "/api/jobs", json.dumps({"prompt": "[,{" * 60_000}))
    assert told.status_code == 422 and "180000 characters" in told.text  # which are one value


def loop_turns_of(body, app):
    """How often other tasks had their turn until the gate answered a request with this body, or `app` did."""

    async def count():
        turns, done, sent = 0, False, []

        async def others():
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        gate = SecurityMiddleware(app, Hosts("127.0.0.1"), Access(None), Limits())
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/api/jobs", "headers": headers, "query_string": b""}
        other = asyncio.create_task(others())
        await asyncio.sleep(0)
        await gate(scope, receive, send)
        done = True
        await other
        return turns, sent

    return asyncio.run(count())


def test_a_body_is_looked_through_in_pieces_and_others_have_their_turn():
    async def never(scope, receive, send):
        raise AssertionError("the request is refused before")

    body = b"[" + b'"",' * 400_000 + b"1]"
    turns, sent = loop_turns_of(body, never)
    assert sent[0]["status"] == 413 and b"more than 100000 values" in sent[1]["body"]
    refused_at = 3 * 100_000  # bytes
    assert refused_at // security.BODY_PIECE <= turns < len(body) // security.BODY_PIECE

    async def reading(scope, receive, send):
        whole = b"".join([message["body"] async for message in messages(receive)])
        await send({"type": "http.response.start", "status": 200 if whole == body else 400, "headers": []})

    async def messages(receive):
        more = True
        while more:
            message = await receive()
            assert len(message["body"]) <= security.BODY_PIECE
            yield message
            more = message["more_body"]

    for body in (b"", b'"' + b"a" * 1_000_000 + b'"'):
        turns, sent = loop_turns_of(body, reading)
        assert sent[0]["status"] == 200 and turns >= 2 * len(body) // security.BODY_PIECE


def test_what_anybody_may_send_is_small(server):
    """And refused by its size, before it is read."""
    with connected(server) as connection:
        head = "POST /api/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {security.PUBLIC_BODY + 1}\r\n\r\n".encode())
        assert answer_of(connection) == 413
    told = sent(server, "/api/login", '{"token": "' + "a" * security.PUBLIC_BODY + '"}')
    assert told.status_code == 413 and f"more than {security.PUBLIC_BODY} bytes" in told.text
    assert sent(server, "/api/login", '{"token": "' + "a" * 1000 + '"}').status_code == 204


def test_a_large_body_is_looked_through_at_the_speed_of_memory():
    """`clean` runs on the event loop: a picture in base64 must not hold up the others."""
    text = "A" * 30_000_000
    began = time.process_time()
    assert clean(text) is text
    assert time.process_time() - began < 1.0
    for bad in ("\0", "\x1f", "\ud800"):
        with pytest.raises(ValueError, match="control characters"):
            clean("a" + bad)
    assert clean("a\n\r\tb\U0001f600")


# --- connections -----------------------------------------------------------------------------------------------------


def connected(server):
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)


def answer_of(connection):
    answer = HTTPResponse(connection)
    answer.fp = connection.makefile("rb", buffering=0)  # nothing of the next answer
    answer.begin()
    answer.read()
    assert answer.headers["x-frame-options"] == "DENY"
    return answer.status


def healthy(connection):
    connection.sendall(HEAD + b"localhost\r\n\r\n")
    return answer_of(connection)


HEAD = b"GET /healthz HTTP/1.1\r\nHost: "


@pytest.mark.parametrize("words", [b"", HEAD + b"loc", HEAD + b"a\r\n\r\nGET"])
def test_silent_connections_are_let_go(server, monkeypatch, words):
    """At the beginning, amid a head, and amid the head of a second request."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with connected(server) as connection:
        connection.sendall(words)
        if words.endswith(b"GET"):
            assert answer_of(connection) == 200
        assert answer_of(connection) == 408
        assert connection.recv(10) == b""


def test_a_slow_head_has_no_more_time_than_a_silent_one(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with connected(server) as connection:
        with suppress(OSError):
            for _ in range(400):
                connection.sendall(b"X")
                time.sleep(0.05)
            pytest.fail("its connection is still there after 20 s")
        with suppress(ConnectionResetError):
            assert answer_of(connection) == 408


def test_no_address_takes_all_connections(server, monkeypatch):
    monkeypatch.setattr(connections, "OF_ONE_ADDRESS", 6)
    crowd, status = [], 200
    while status == 200 and len(crowd) < 10:
        crowd.append(connected(server))
        status = healthy(crowd[-1])
    assert status == 503 and len(crowd) <= 7
    other = socket.socket()
    other.bind(("127.0.0.2", 0))
    other.connect(crowd[0].getpeername())
    assert healthy(other) == 200
    for connection in (*crowd, other):
        connection.close()
    until(lambda: server.get("/healthz").status_code == 200)


def test_a_client_has_one_ipv6_network(server, monkeypatch):
    assert network_of("2001:db8:1:2:3:4:5:6") == network_of("2001:db8:1:2::9") == "2001:db8:1:2::"
    assert network_of("2001:db8:1:3::9") != network_of("2001:db8:1:2::9")
    assert network_of("fe80::1%eth0") == network_of("fe80::2%eth0") and network_of("::ffff:10.0.0.7") == "10.0.0.7"
    assert network_of("10.0.0.7") == "10.0.0.7" and network_of("") == "" and network_of("unix") == "unix"
    monkeypatch.setattr(connections, "OF_ONE_ADDRESS", 2)
    monkeypatch.setattr(connections, "network_of", lambda address: "one")
    server.session.close()
    until(lambda: healthy_from(server, "127.0.0.1") == 200)
    with connected(server) as first, connected(server) as second:
        assert healthy(first) == healthy(second) == 200 and healthy_from(server, "127.0.0.2") == 503
    until(lambda: healthy_from(server, "127.0.0.2") == 200)


def healthy_from(server, address):
    with socket.socket() as connection:
        connection.bind((address, 0))
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        return healthy(connection)


def test_there_are_no_more_connections_than_files(server, monkeypatch):
    for soft, most in ((300, 44), (100, 1), (4096, connections.CONNECTIONS)):
        with monkeypatch.context() as patch:
            patch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
            assert connections.most_connections() == most
    server.session.close()
    until(lambda: healthy_from(server, "127.0.0.1") == 200)
    monkeypatch.setattr(connections, "most_connections", lambda: 2)
    with connected(server) as first, connected(server) as second:
        assert healthy(first) == healthy(second) == 200 and healthy_from(server, "127.0.0.2") == 503


def test_the_server_raises_the_limit_of_files():
    code = (
        "import resource; from plainsd.server.api import connections; kind = resource.RLIMIT_NOFILE;"
        "hard = resource.getrlimit(kind)[1]; resource.setrlimit(kind, (64, hard)); connections.raise_file_limit();"
        "most = connections.MOST_FILES; wanted = most if hard < 0 else min(most, hard);"
        "assert resource.getrlimit(kind) == (wanted, hard), resource.getrlimit(kind)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_answers_to_what_is_no_http_have_the_headers(server):
    with connected(server) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert answer_of(connection) == 400
