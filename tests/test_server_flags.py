"""`plainsd serve`: each flag arrives where it acts."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from plainsd.commands.cluster import ClusterFlags
from plainsd.commands.parsing import parsed
from plainsd.commands.serve import Serve
from plainsd.server.limits import Limits
from plainsd.server.pool import PoolOptions
from plainsd.server.service import Service

TOKEN = "a-token-for-the-admin"
FOLDERS = ("loras", "embeddings", "controls", "upscalers", "wildcards")
FLAGS = [
    "--model", "a", "--model", "b", "--prediction", "v_prediction", "--zero-snr", "on", "--host", "192.0.2.7",
    "--port", "7007", "--data", "kept", "--token", TOKEN, "--tokens", "names", "--allow-host", "pictures.example",
    *(word for name in FOLDERS for word in (f"--{name}", name)), "--styles", "styles.csv", "--vae", "other-vae",
    "--preview-vae", "taesd", "--batch", "3", "--memory", "2.5", "--queue", "11", "--max-pixels", "12345",
    "--max-steps", "13", "--max-count", "14", "--max-seconds", "15.5", "--drain-seconds", "16.5", "--log-format",
    "json", "--log-level", "debug", "--plain", "--device", "cuda:1", "--dtype", "float16",
]  # fmt: skip
LIMITS = Limits(queue=11, pixels=12345, steps=13, count=14, seconds=15.5)
OPTIONS = PoolOptions(
    device="cuda:1",
    dtype="float16",
    memory=2.5e9,
    plain=True,
    **{name: Path(name) for name in FOLDERS},
    styles=Path("styles.csv"),
    vae=Path("other-vae"),
    preview_vae=Path("taesd"),
    prediction="v_prediction",
    zero_snr=True,
)


class Called(dict):
    """The arguments of functions by their names, in place of what these do."""

    def instead(self, name, answer=None):
        def keep(*given, **named):
            self[name] = given, named
            return answer

        return keep


@pytest.mark.parametrize("cluster", [[], ["--cluster", "auto", "--workers", "5"]], ids=["here", "cluster"])
def test_every_flag_arrives(tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)
    for name in FOLDERS:
        Path(name).mkdir()
    Path("styles.csv").write_text("name,prompt\n")
    Path("names").write_text("ann a-token-for-ann\n")
    called, service = Called(), SimpleNamespace(queue=SimpleNamespace(failure=None))
    workers = SimpleNamespace(workers=5, share="a share", drawers="their drawers")
    sock, server = SimpleNamespace(getsockname=lambda: ("192.0.2.7", 7008)), SimpleNamespace(run=called.instead("run"))
    for place, answer in {
        "plainsd.commands.serve.listening_socket": sock, "plainsd.commands.serve.server_of": server,
        "plainsd.server.logs.configure": None, "plainsd.server.api.app.create_app": "the app",
        "plainsd.server.cluster.Cluster": workers,
    }.items():  # fmt: skip
        monkeypatch.setattr(place, called.instead(place.rpartition(".")[2], answer))
    monkeypatch.setattr(Service, "open", called.instead("open", service))
    monkeypatch.setattr(Serve, "greet", called.instead("greet"))
    monkeypatch.setattr(ClusterFlags, "join", lambda flags: "a share")

    command = parsed(Serve, "serve", [*FLAGS, *cluster])
    usual = [one.name for one in fields(Serve) if one.name != "ray" and getattr(command, one.name) == one.default]
    usual += [one.name for one in fields(PoolOptions) if getattr(OPTIONS, one.name) == one.default]
    assert usual == []  # else nobody would notice that it is left out
    command.run()

    drawers = {"drawers": "their drawers"} if cluster else {}
    assert called["open"] == ((("a", "b"), Path("kept"), LIMITS, OPTIONS), {"batch": 3} | drawers)
    assert called.get("Cluster") == ((("a share", 5), {}) if cluster else None)
    assert called["listening_socket"] == (("192.0.2.7", 7007), {})
    assert called["configure"] == (("json", "debug"), {})
    (of, hosts, token, on_start, names), more = called["create_app"]
    assert (of, token, names, more) == (service, TOKEN, Path("names"), {})
    assert hosts.names == {"localhost", "127.0.0.1", "::1", "192.0.2.7", "pictures.example"}
    on_start()
    assert called["greet"] == ((command, service, 7008, TOKEN), {})
    assert called["server_of"] == (("the app",), {"drain": 16.5})
    assert called["run"] == ((), {"sockets": [sock]})
