"""Folders of adapters and files of styles that change or fail while the server runs: the rest of it goes on."""

import errno
import os
import threading

import pytest
from serving import embedding_file, lora_file, model_folder, open_service, served

from plainsd.server import folders
from plainsd.server.folders import changed_at, read_cached, readable_files


def failing(times, error):
    """A reader that fails so many times, then reads."""
    left = iter(range(times))

    def read(path):
        if next(left, None) is not None:
            raise error
        return path.read_text()

    return read


def test_a_file_that_failed_is_tried_again(tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.safetensors"
    path.write_text("content")
    busy = failing(3, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    now = 1000.0
    monkeypatch.setattr(folders.time, "monotonic", lambda: now)
    for _ in range(2):
        assert "Too many open files" in read_cached(busy, path, 1)[1]  # read once
    for _ in range(2):
        now += folders.UNUSABLE_SECONDS
        assert "Too many open files" in read_cached(busy, path, 1)[1]
    now += folders.UNUSABLE_SECONDS
    assert read_cached(busy, path, 1) == ("content", "")
    assert len([one for one in caplog.records if "skipped" in one.getMessage()]) == 1  # named once


def test_permissions_that_were_mended_are_noticed_at_once(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("content")
    refused = failing(1, PermissionError(errno.EACCES, "Permission denied"))
    path.chmod(0o000)
    assert "Permission denied" in read_cached(refused, path, changed_at(path))[1]
    before = changed_at(path)
    while changed_at(path) == before:  # as fine as the disk counts
        path.chmod(0o644)
    assert read_cached(refused, path, changed_at(path)) == ("content", "")


def test_any_number_of_files_is_read_once(tmp_path):
    read = []

    def reading(path):
        read.append(path)
        return True

    for number in range(5000):
        (tmp_path / f"{number}.safetensors").touch()
    for _ in range(3):
        assert len(readable_files(reading, tmp_path, {})) == 5000
    assert len(read) == 5000


@pytest.fixture
def folder(tmp_path):
    for name in ("loras", "controls", "upscalers", "embeddings"):
        (tmp_path / name).mkdir()
    lora_file(model_folder(tmp_path), tmp_path / "loras" / "ink.safetensors", 1)
    embedding_file(tmp_path / "embeddings" / "cat.safetensors", 1)
    (tmp_path / "styles.csv").write_text("name,prompt,negative_prompt\nfilm,a still of {prompt},\n")
    return tmp_path


@pytest.fixture
def server(folder):
    more = {name: folder / name for name in ("loras", "controls", "embeddings")} | {"styles": folder / "styles.csv"}
    with served(open_service([model_folder(folder)], folder / "data", **more)) as server:
        yield server


@pytest.mark.parametrize("content", [None, b"what,ever\n", b"\xff", b"name,prompt\n" + b"a" * 1_000_001])
def test_a_bad_file_of_styles_is_named_and_the_rest_goes_on(server, folder, content):
    path = folder / "styles.csv"
    good = path.read_bytes()
    assert server.get("/api/info").json()["styles"] == ["film"]
    path.unlink() if content is None else path.write_bytes(content)
    info = server.get("/api/info").json()
    assert info["styles"] == [] and info["loras"] == ["ink"]
    why = info["unusable"]["styles"]["styles.csv"]
    assert why and str(folder) not in why
    assert server.get("/sdapi/v1/prompt-styles").json() == []
    assert server.drawn(prompt="a", steps=1)["state"] == "done"
    error = server.post("/api/jobs", {"prompt": "a", "styles": ["film"]}).json()["error"]
    assert error["field"] == "styles" and f"styles cannot be used: {why}" in error["message"]
    path.write_bytes(good)
    info = server.get("/api/info").json()
    assert info["styles"] == ["film"] and info["unusable"]["styles"] == {}


def test_a_folder_that_is_gone_is_named_and_the_rest_goes_on(server, folder):
    for name in ("loras", "controls", "embeddings"):
        (folder / name).rename(folder / f"{name} away")
    info = server.get("/api/info")
    assert info.status_code == 200
    for name in ("loras", "controls", "embeddings"):
        assert info.json()["unusable"][name] == {
            name: "the folder cannot be read (No such file or directory); make it readable"
        }
    assert server.get("/controlnet/model_list").status_code == 200
    assert server.drawn(prompt="a cat", steps=1)["state"] == "done"
    for name in ("loras", "controls", "embeddings"):
        (folder / f"{name} away").rename(folder / name)
    info = server.get("/api/info").json()
    assert info["loras"] == ["ink"] and info["unusable"]["controls"] == info["unusable"]["loras"] == {}


def test_what_cannot_be_used_is_whole_while_others_scan(server, folder):
    """Each scan makes a new table; nobody's answer is written from one that changes."""
    (folder / "controls" / "torn.safetensors").write_bytes(b"x")
    controls = server.service.models.controls
    controls.known()
    before = controls.unusable
    (folder / "controls" / "bad.safetensors").write_bytes(b"x")
    thread = threading.Thread(target=controls.known)
    thread.start()
    thread.join()
    assert before.keys() == {"torn"} and controls.unusable.keys() == {"torn", "bad"}
