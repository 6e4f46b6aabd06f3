"""Files are whole or absent: flushed before they get their name, of ordinary permissions, and what was there before
stays where that fails. A test for each kind of file that is written."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, smooth_picture, tiny_sd
from torch import nn

import plainsd
from plainsd import disk
from plainsd.adapters.embeddings import add_word, save_embedding
from plainsd.adapters.lora import inject, save_lora
from plainsd.checkpoint import add_preview, save_vae
from plainsd.disk import draft_name, draft_of, machine_tag, read_json, under_free_name, whole_folder, written_whole
from plainsd.errors import DiskError, UserError
from plainsd.files.hub import find
from plainsd.pictures.images import write_png
from plainsd.pictures.settings import Settings
from plainsd.train.checkpoints import SaveError, save_checkpoint
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_pictures
from plainsd.train.log import Log
from plainsd.train.options import FitOptions
from plainsd.train.trainer import Trainer


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    """As a number without a name, in a container: the cache is a folder that cannot be made, and not one for all."""

    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    folder = disk.cache_folder()
    assert disk.first_time("said each time") and disk.first_time("said each time") and not folder.exists()
    with pytest.raises(DiskError), written_whole(folder / "hashes.json"):
        pass


def picture(place: Path, version: int) -> None:
    write_png(smooth_picture(16), place / "a.png", Settings(seed=version))


def single_file(place: Path, version: int) -> None:
    plainsd.save(tiny_sd(seed=version), place / "m.safetensors")


def folder(place: Path, version: int) -> None:
    plainsd.save(tiny_sd(seed=version), place / "m")


def vae_alone(place: Path, version: int) -> None:
    save_vae(tiny_sd(seed=version).vae, place / "vae", TINY)


def preview(place: Path, version: int) -> None:
    if not version:
        plainsd.save(tiny_sd(), place / "m")
    add_preview(place / "m")


def lora(place: Path, version: int) -> None:
    sd = tiny_sd()
    inject(sd, 2, generator=torch.Generator().manual_seed(version))
    save_lora(sd, place / "l.safetensors")


def embedding(place: Path, version: int, name: str = "e.safetensors") -> None:
    sd = tiny_sd()
    add_word(sd, "<new>", [torch.full((1, TINY.text[0].width), float(version))])
    save_embedding(sd, "<new>", place / name)


def pickled_embedding(place: Path, version: int) -> None:
    embedding(place, version, "e.pt")


def tokenizer(place: Path, version: int) -> None:
    made = tiny_sd().tokenizers[0]
    if version:
        made.add("<new>")
    made.save(place / "tokenizer")


def pictures(place: Path, version: int) -> Path:
    place = place.parent / f"pictures-{version}"
    place.mkdir()
    for i in range(3):
        smooth_picture(16).rotate(90 * (i + version)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("a caption")
    return place


def latents(place: Path, version: int) -> None:
    cache_latents(tiny_sd().vae, read_pictures(pictures(place, version), 16), place / "cache")


def marks_of_whole_pictures(place: Path, version: int) -> None:
    read_pictures(pictures(place, version), 16, known=place / "cache" / "whole.json")


class Line:
    """A method of one layer."""

    def __init__(self):
        self.modules = nn.ModuleDict({"line": nn.Linear(2, 1)})

    def loss(self, picks):
        raise NotImplementedError("nothing is trained here")


def state(place: Path, version: int) -> None:
    trainer = Trainer(Line(), FitOptions(steps=9))
    trainer.step = version + 1
    save_checkpoint(trainer, place)


def log(place: Path, version: int) -> None:
    made = Log(place / "log.jsonl")
    if not version:
        for step in (1, 2, 3):
            made.write({"step": step, "loss": 0.5})
    made.rewind(2 - version)


WRITERS = (picture, single_file, folder, vae_alone, preview, lora, embedding, pickled_embedding, tokenizer, latents,
           marks_of_whole_pictures, state, log)  # fmt: skip
EACH = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def contents(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def unflushed(monkeypatch) -> list[str]:
    """What gets its last name before all of its bytes have been flushed."""
    flushed, found, fsync, rename = set(), [], os.fsync, os.replace

    def flush(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def named(source, target, **more):
        files = [Path(source)] if Path(source).is_file() else [p for p in Path(source).rglob("*") if p.is_file()]
        found.extend(f"{target} ({p.name})" for p in files if p.stat().st_ino not in flushed)
        found.append("" if files else f"{target} (nothing)")
        rename(source, target, **more)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", named)
    return found


@EACH
def test_bytes_are_flushed_before_they_get_their_name(place, unflushed, write):
    write(place, 0)
    assert unflushed and [what for what in unflushed if what] == []


@EACH
def test_where_the_last_step_fails_what_was_there_stays(place, monkeypatch, write):
    write(place, 0)
    before, rename = contents(place), os.replace
    assert before

    def refuse(source, target, **more):
        if Path(target).is_relative_to(place):
            raise PermissionError(13, "Permission denied")
        rename(source, target, **more)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(disk, "exchanged", lambda *names: False)
    with pytest.raises(DiskError if write is not state else SaveError, match="Permission denied"):
        write(place, 1)
    assert contents(place) == before


def modes(place: Path, write, mask: int) -> dict[str, int]:
    before = os.umask(mask)
    try:
        write(place, 0)
    finally:
        os.umask(before)
    return {str(p.relative_to(place)): stat.S_IMODE(p.stat().st_mode) for p in place.rglob("*")}


@EACH
def test_written_files_can_be_read_by_others(place, write):
    found = modes(place, write, 0o022)
    assert found and found == {name: 0o755 if (place / name).is_dir() else 0o644 for name in found}


@EACH
def test_written_files_are_as_private_as_the_user_says(place, write):
    found = modes(place, write, 0o077)
    assert found and found == {name: 0o700 if (place / name).is_dir() else 0o600 for name in found}


def test_what_the_disk_refuses_is_one_line(tmp_path):
    """A path through a file, the folder of a file that is gone; and what is refused of another file is not ours."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DiskError, match=r"^cannot write .*/file/a/b.txt: Not a directory; .*choose another folder"
    ) as told:
        with written_whole(tmp_path / "file" / "a" / "b.txt"):
            raise AssertionError("there is no draft")
    assert told.value.reason == "Not a directory" and isinstance(told.value.__cause__, NotADirectoryError)
    with written_whole(tmp_path / "new" / "folder" / "b.txt") as draft:
        draft.write_text("x")
    with pytest.raises(DiskError, match="cannot write .*/b.txt: No such file"), written_whole(tmp_path / "b.txt"):
        pass
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "b.txt"):
        open(tmp_path / "of another")
    with pytest.raises(BrokenPipeError), written_whole(tmp_path / "b.txt"):
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(OSError, match="truncated"), written_whole(tmp_path / "b.txt"):
        raise OSError("image file is truncated")  # Pillow's, of a picture that is read meanwhile
    assert contents(tmp_path) == {"file": b"x", "new/folder/b.txt": b"x"}


@pytest.mark.parametrize("links", (True, False))
def test_a_free_name_is_taken_and_no_file_replaced(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(
            os, "link", lambda *names: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted"))
        )
    names = []
    for version in range(3):
        with draft_of(tmp_path / "x.txt") as draft:
            draft.write_text(str(version))
            names.append(under_free_name(draft, tmp_path / "x.txt").name)
    assert names == ["x.txt", "x-2.txt", "x-3.txt"]
    assert contents(tmp_path) == {"x.txt": b"0", "x-2.txt": b"1", "x-3.txt": b"2"}


def test_there_is_one_writer():
    """No other file gives a finished file its name."""
    source = Path(plainsd.__file__).parent
    allowed = {"disk.py", "train/checkpoints.py"}  # the latter's folders are written by several processes together
    for path in source.rglob("*.py"):
        name = path.relative_to(source).as_posix()
        found = re.findall(r"os\.(?:replace|rename|link|fsync)|mkstemp", path.read_text("utf-8"))
        assert name in allowed or not found, name


def test_where_the_new_folder_cannot_get_its_name_the_old_one_is_back(place, monkeypatch):
    """The first rename has taken the old one away already."""
    folder(place, 0)
    before, rename, refused = contents(place), os.replace, []

    def once(source, target, **more):
        if Path(target) == place / "m" and not refused:
            refused.append(source)
            assert not (place / "m").exists()
            raise OSError(28, "No space left on device")
        rename(source, target, **more)

    monkeypatch.setattr(os, "replace", once)
    monkeypatch.setattr(disk, "exchanged", lambda *names: False)
    with pytest.raises(UserError, match="No space left on device; nothing was written"):
        folder(place, 1)
    assert refused and contents(place) == before


def test_an_index_of_shards_names_no_file_of_another_folder(place):
    plainsd.save(tiny_sd(), place / "m")
    whole = place / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(place / "outside.safetensors")
    names = {"conv_in.weight": "../../outside.safetensors"}
    (whole.parent / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="outside.safetensors"):
        plainsd.load(place / "m", device="cpu", dtype="float32")
    names = {"conv_in.weight": str(place / "outside.safetensors")}
    (whole.parent / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="outside.safetensors"):
        plainsd.load(place / "m", device="cpu", dtype="float32")


def test_latents_of_a_run_that_was_cut_short_are_made_again(place, monkeypatch):
    """Encoding ends amid the pictures: no file, and the next run has all of them."""
    vae, data = tiny_sd().vae, read_pictures(pictures(place, 0), 16)
    encode, calls = vae.encode, []

    def breaks(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", breaks)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(vae, data, place / "cache", batch=2)
    assert contents(place) == {}
    made = cache_latents(vae, data, place / "cache", batch=2)
    assert calls == [2, 1, 2, 1] and made.data.float().std() > 0.1


# --- kill -9 ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from plainsd import disk
target, exchanges, at = Path(sys.argv[1]), sys.argv[2] == "exchanges", int(sys.argv[3])
if not exchanges:
    disk.exchanged = lambda a, b: False
calls = 0
def audit(event, given):                     # before every rename, removal and new folder
    global calls
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym", "shutil.rmtree"):
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
disk.machine_tag()
sys.addaudithook(audit)
with disk.whole_folder(target) as draft:
    for name in ("model_index.json", "b"):
        (draft / name).write_text('{"_class_name": "new"}')
print(calls)
"""


def killed_at(target: Path, how: str, at: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, str(target), how, str(at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", ("exchanges", "renames"))
def test_a_model_that_is_replaced_is_there_whenever_its_writer_is_killed(tmp_path, how):
    """Before each change of the folder: the old model or the new one has the name, or gets it back at the next load."""
    target, ends = tmp_path / "m", []
    for at in range(1, 30):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in ("model_index.json", "b"):
            (target / name).write_text('{"_class_name": "old"}')
        ran = killed_at(target, how, at)
        assert ran.returncode in (0, -9), ran.stderr
        if how == "exchanges" and disk.exchanged(target, target):
            assert (target / "b").is_file()
        assert find(str(target)) == target
        found = {path.name: read_json(path)["_class_name"] for path in target.iterdir()}
        assert found in ({"model_index.json": "old", "b": "old"}, {"model_index.json": "new", "b": "new"})
        ends.append(found["b"])
        with whole_folder(target) as draft:  # the next one that writes there sweeps
            (draft / "model_index.json").write_text("third")
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
        disk.swept.clear()
        if ran.returncode == 0:
            break
    assert len(ends) >= 4 and ends[0] == "old" and ends[-1] == "new"


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = machine_tag()
    ours, gone_ours = f"plainsd-{here}", f"plainsd-{here}-{ended.pid}"
    gone = [f".a.png.{gone_ours}.part", f".m.{gone_ours}.part", ".b.plainsd-0123abcd-1.part",
            f".mine.{ours}-{os.getpid()}.part", f".m.{gone_ours}.old"]  # fmt: skip
    persons = [".c.77.part", ".zshrc.20240101.old", ".vimrc.20240101.old", ".notes.20240101-12.old", "vimrc"]
    kept = [f".d.plainsd-{here}-{os.getppid()}.part", ".e.plainsd-0123abcd-1.part", ".note.part", "f.part",
            f"a.plainsd-{here}-1.part", "m", *persons]  # fmt: skip
    for name in (*gone, *kept):
        if name.startswith(".m."):
            (tmp_path / name / "unet").mkdir(parents=True)
        else:
            (tmp_path / name).write_text("x")
    for name in (".b.plainsd-0123abcd-1.part", *persons):  # of another machine, and long ago
        os.utime(tmp_path / name, (1e9, 1e9))
    disk.swept.clear()
    with written_whole(tmp_path / "new") as draft:
        draft.write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "new"])
    left = draft_name(tmp_path / "later")
    left.write_text("x")  # as another thread's
    with written_whole(tmp_path / "newer") as draft:
        draft.write_text("x")
    assert left.exists()


def test_a_draft_under_way_is_safe_from_a_write_to_the_same_folder_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with written_whole(tmp_path / "real" / "a") as draft:
        draft.write_text("a")
        for folder in (tmp_path / "link", tmp_path / "real" / ".." / "real"):
            with written_whole(folder / "b") as other:
                other.write_text("b")
    assert {path.name: path.read_text() for path in (tmp_path / "real").iterdir()} == {"a": "a", "b": "b"}


def test_a_folder_that_is_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "m").symlink_to("real")
    for text in ('{"_class_name": "first"}', '{"_class_name": "second"}'):
        with whole_folder(tmp_path / "m") as draft:
            (draft / "model_index.json").write_text(text)
        assert (tmp_path / "m").is_symlink() and (tmp_path / "real" / "model_index.json").read_text() == text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "real"]


def test_an_old_folder_gets_its_name_back_and_no_living_process_loses_its_own(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, process in (("m", ended.pid), ("n", os.getppid()), ("o", os.getpid())):
        (tmp_path / f".{name}.plainsd-{machine_tag()}-{process}.old").mkdir()
        (tmp_path / f".{name}.plainsd-{machine_tag()}-{process}.old" / "model_index.json").write_text("{}")
    assert find(str(tmp_path / "m")) == tmp_path / "m"
    for name in "no":
        with pytest.raises(UserError, match="there is no model"):
            find(str(tmp_path / name))
