"""Mutated files, each read in a process that may take so much time and memory.

python tests/torture/files.py FOLDER        reads lines of JSON (kind, file, seed) from stdin, answers each with one
"""

import json
import os
import queue
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

SECONDS = 30.0  # of one load, on a busy machine
MEMORY = 2 * 2**30  # bytes of address space that one load may add
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]


def serve_loads(folder: Path) -> None:
    """The process that reads: a private copy of the samples, in which one file at a time is another."""
    from mutations import mutated
    from samples import READERS

    from plainsd.errors import UserError

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    places = json.loads((folder / "places.json").read_text())
    copy = Path(tempfile.mkdtemp(dir=folder))
    answers.write("ready\n")
    answers.flush()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for line in sys.stdin:
        kind, file, seed = json.loads(line)
        source = folder / "sound" / file
        target = copy / places[kind]
        root = target if (folder / "sound" / places[kind]).is_dir() else target.parent
        if not root.exists():
            shutil.copytree(folder / "sound" / root.relative_to(copy), root)
        (copy / file).write_bytes(mutated(source.read_bytes(), seed))
        began = time.monotonic()
        try:
            READERS[kind](target)
            what = "read"
        except UserError as error:
            what = "refused" if len(str(error)) <= 1500 and "\n" not in str(error) else "a message too long"
        except BaseException as error:  # a panic of Rust's is one too
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno} ({str(error)[:150]})"
        shutil.copyfile(source, copy / file)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        answers.write(json.dumps([what, time.monotonic() - began, peak]) + "\n")
        answers.flush()


class Loader:
    """One such process, which is replaced where it ends or takes too long."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                        stderr=subprocess.DEVNULL)  # fmt: skip
        if self.answer(300) != "ready":
            raise RuntimeError("the process that reads did not start")

    def answer(self, seconds: float) -> str | None:
        """Its next line; None where it has ended, or has taken too long."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self.process.stdout.readline().decode().strip() or None

    def load(self, kind: str, file: str, seed: str) -> tuple[str, float, int]:
        """What became of it, its seconds, and the process's peak memory."""
        if self.process is None:
            self.start()
        self.process.stdin.write((json.dumps([kind, file, seed]) + "\n").encode())
        self.process.stdin.flush()
        answer = self.answer(SECONDS)
        if answer is not None:
            return tuple(json.loads(answer))
        time.sleep(0.1)
        ended = self.process.poll()
        self.end()
        return (f"more than {SECONDS:g} s" if ended is None else f"the process ended with {ended}"), SECONDS, 0

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


class Figures:
    def __init__(self):
        self.files, self.seconds, self.peak = Counter(), 0.0, 0
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def note(self, kind: str, file: str, seed: str, what: str, seconds: float, peak: int) -> None:
        with self.lock:
            self.files[what if what in ("read", "refused") else "wrong"] += 1
            self.seconds, self.peak = max(self.seconds, seconds), max(self.peak, peak)
            if what not in ("read", "refused"):
                self.wrong.append(f"{kind}, {file}, seed {seed}: {what}")
                print(f"  wrong: {self.wrong[-1]}", flush=True)


def prepared(folder: Path) -> dict[str, list[str]]:
    """The samples below `folder`/sound; of each kind its files. Every one is read once as it is."""
    from samples import READERS, make_samples

    (folder / "sound").mkdir()
    made = make_samples(folder / "sound")
    for kind, path in made.items():
        READERS[kind](path)
    places = {kind: path.relative_to(folder / "sound").as_posix() for kind, path in made.items()}
    (folder / "places.json").write_text(json.dumps(places))
    return {
        kind: [
            one.relative_to(folder / "sound").as_posix()
            for one in (sorted(path.rglob("*")) if path.is_dir() else [path])
            if one.is_file()
        ]
        for kind, path in made.items()
    }


def torture_files(seed: int, seconds: float, most: int, jobs: int) -> Figures:
    """Reads mutated files for so long, or so many."""
    from samples import WEIGHTS

    figures, tasks = Figures(), queue.Queue(maxsize=4 * jobs)
    with tempfile.TemporaryDirectory() as place:
        files = prepared(Path(place))

        def work() -> None:
            loader = Loader(Path(place))
            while (task := tasks.get()) is not None:
                try:
                    figures.note(*task, *loader.load(*task))
                except (OSError, RuntimeError) as error:  # its process cannot be started, or has gone since
                    figures.note(*task, f"the process that reads: {error}", 0.0, 0)
                    loader.end()
            loader.end()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        chance, end = random.Random(seed), time.monotonic() + seconds
        kinds = list(files)
        for number in range(most):
            if time.monotonic() > end:
                break
            (kind,) = chance.choices(kinds, [WEIGHTS.get(kind, 1) for kind in kinds])
            tasks.put((kind, chance.choice(files[kind]), f"{seed}-{number}"))
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()
    return figures


if __name__ == "__main__":
    serve_loads(Path(sys.argv[1]))
