"""Freed memory is kept for the next allocation where malloc is glibc's, and given back when asked. All of it happens in
processes of its own; this one's allocator stays as it is."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from serving import model_folder, open_service

from plainsd import allocator, cli
from plainsd.pictures import memory

GLIBC = pytest.mark.skipif(allocator.glibc() is None, reason="malloc is not glibc's")
SMALL_PAGES = pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") != 4096, reason="counts pages of 4 kB")
MINE = ("MALLOC_", "GLIBC_TUNABLES", allocator.VARIABLE)  # variables that a user sets


def process(code, *arguments, **environment):
    """What Python code in a process of its own prints, as JSON."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(MINE)}
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=outside | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A decoder whose maps are 67 MB, more than a piece of another thread's heap, in the main thread or another. Page faults
# of the third decode, and bytes that are resident before and after freed memory is given back. Huge pages are off
# (prctl 41): every page counts.
DECODES = """
import ctypes, json, resource, sys, threading
from plainsd import allocator
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
kept = allocator.keep_freed_memory()
import torch
from plainsd.models.vae import VAE, VAEConfig
torch.manual_seed(0)
vae, z = VAE(VAEConfig(channels=(64, 8, 8, 8), groups=4, layers=1)).eval(), torch.randn(1, 4, 64, 64)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def decodes():
    with torch.inference_mode():
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            vae.decode(z)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    used = resident()
    given = allocator.release_freed_memory()
    print(json.dumps({"kept": kept, "faults": faults, "released": used - resident() if given else 0}))

if sys.argv[1] == "main":
    decodes()
else:
    other = threading.Thread(target=decodes)
    other.start(), other.join()
"""


@GLIBC
@SMALL_PAGES
@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_decode_takes_no_new_pages(thread):
    """By default each of its maps is 16,000 new pages; kept, their pages are there from the decode before. What is
    kept, several maps, goes back when asked."""
    default, kept = process(DECODES, thread, **{allocator.VARIABLE: "0"}), process(DECODES, thread)
    assert not default["kept"] and kept["kept"]
    assert default["faults"] > 50_000 and 20 * kept["faults"] < default["faults"]
    assert kept["released"] > 100e6 > default["released"]


FREED = """
import ctypes, json, sys
from plainsd import allocator
allocator.keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.argtypes, malloc.restype, free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
before = resident()
blocks = [malloc(30_000_000) for _ in range(10)]
above = malloc(100_000)  # so that the heap cannot simply shrink
for block in [*blocks, above]:
    ctypes.memset(block, 1, 100_000 if block == above else 30_000_000)
full = resident() - before
for block in blocks:
    free(block)
kept = resident() - before
allocator.release_freed_memory()
print(json.dumps([full, kept, resident() - before]))
"""


@GLIBC
@SMALL_PAGES
def test_memory_below_a_block_in_use_is_given_back():
    full, kept, released = process(FREED)
    assert full > 300e6 and kept > 300e6 and released < 5e6


ASKED = """
import json
from plainsd import allocator
print(json.dumps([allocator.keep_freed_memory(), allocator.why_not_kept()]))
"""


@GLIBC
@pytest.mark.parametrize(
    "environment, why",
    [
        ({}, None),
        ({allocator.VARIABLE: "1"}, None),
        ({allocator.VARIABLE: "0"}, "PLAINSD_KEEP_MEMORY is 0"),
        ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX is set"),
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, "MALLOC_TRIM_THRESHOLD_ is set"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}, "GLIBC_TUNABLES is set"),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=2"}, None),
    ],
    ids=str,
)
def test_what_the_user_has_set_stays(environment, why):
    assert process(ASKED, **environment) == [why is None, why]


@GLIBC
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_another_malloc_is_left_alone(tmp_path):
    """As jemalloc and tcmalloc are preloaded."""
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert process(ASKED, LD_PRELOAD=str(library)) == [False, "malloc is not glibc's"]


@pytest.fixture
def elsewhere(monkeypatch):
    for name in [name for name in os.environ if name.startswith(MINE)]:
        monkeypatch.delenv(name)
    allocator.glibc.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    allocator.glibc.cache_clear()


@pytest.mark.parametrize("system", ["macOS", "Windows", "musl", "musl with gcompat"])
def test_nothing_happens_without_glibc(elsewhere, system):
    def opened(name, *arguments, **named):
        assert system.startswith("musl")
        if name == "libc.so.6" and system == "musl":
            raise OSError("libc.so.6: cannot open shared object file: No such file or directory")
        return object()

    elsewhere.setattr(ctypes, "CDLL", opened)
    elsewhere.setattr(sys, "platform", {"macOS": "darwin", "Windows": "win32"}.get(system, "linux"))
    assert allocator.why_not_kept() == "malloc is not glibc's"
    assert allocator.keep_freed_memory() is False and allocator.release_freed_memory() is False


# ---- who asks for it


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_that_compute_keep_it(monkeypatch, name):
    """Before they begin, and the others not at all."""
    called = []

    class Command:
        def run(self):
            called.append("runs")

    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: called.append("keeps"))
    monkeypatch.setattr(cli, "parsed", lambda *arguments: Command())
    assert cli.main([name]) == 0
    keeping = name in ("generate", "upscale", "explain", "eval", "train", "serve")
    assert called == (["keeps", "runs"] if keeping else ["runs"])


@pytest.mark.parametrize("statement", ["import plainsd; plainsd.load(device='cpu')", "import plainsd.cli"])
def test_importing_and_loading_change_nothing(statement):
    code = f"""
import json
from plainsd import allocator
library = allocator.glibc()
class Watched:
    def mallopt(self, *arguments): raise AssertionError("mallopt")
allocator.glibc = lambda: Watched()
{statement}
print(json.dumps("unchanged"))
"""
    assert process(code) == "unchanged"


def test_a_server_gives_memory_back_when_a_model_goes_and_when_it_is_idle(tmp_path, monkeypatch):
    from plainsd.server import pool
    from plainsd.server.jobs import drawing, queue

    calls, idle, asked = [], threading.Event(), threading.Event()

    def release():
        threading.Thread(target=lambda: (service.queue.counts(), asked.set())).start()
        assert asked.wait(30)  # others have the queue meanwhile
        idle.set()

    monkeypatch.setattr(queue, "IDLE_AFTER", 0.05)
    monkeypatch.setattr(drawing, "release_freed_memory", release)
    service = open_service([model_folder(tmp_path)], tmp_path / "data")
    try:
        monkeypatch.setattr(pool, "release_freed_memory", lambda: calls.append(model.sd is not None))
        model = service.models[None]
        service.models.resident(model.name)
        assert calls == [True]  # after loading and packing, what they took
        service.models.unload(model)
        assert calls == [True, False]  # after the networks are gone
        service.worker.start()
        assert idle.wait(30)
    finally:
        service.close()


def test_memory_that_is_kept_counts_as_free(monkeypatch):
    """Where little seems to be free, what is kept goes back first; else nothing does."""
    released = []
    monkeypatch.setattr(memory, "free", lambda device: 10e9 if released else 1e9)
    monkeypatch.setattr(memory, "release_freed_memory", lambda: not released.append(1))
    cpu = torch.device("cpu")
    assert memory._free_for(0.5e9, cpu) == 1e9 and not released
    assert memory._free_for(5e9, torch.device("meta")) == 1e9 and not released
    assert memory._free_for(5e9, cpu) == 10e9 and released == [1]
