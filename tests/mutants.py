"""Do the tests bite? Puts each fault of faults.py into a copy of the package and asks the tests that must notice.

    make mutants                                    all of them
    .venv/bin/python tests/mutants.py --only store  those whose file, text or tests contain "store"
    .venv/bin/python tests/mutants.py --jobs 4      four at a time

A fault is killed when one of its tests fails or runs into the time limit. First all those tests are run on the package
as it is: they must pass. Exit codes: 0 where at least 95 % are killed, else 1; 2 where the table does not fit the source.
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "plainsd"
ENOUGH = 0.95
SECONDS = 300  # for the tests of one fault
LOADED = (  # once, before the processes part
    "torch", "pytest", "numpy", "PIL.Image", "PIL.PngImagePlugin", "safetensors.torch", "requests", "fastapi", "uvicorn",
    "hypothesis", "schemathesis.pytest.plugin", "peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "transformers.models.clip.modeling_clip",
    "diffusers.schedulers.scheduling_dpmsolver_multistep", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "tqdm", "tokenizers", "huggingface_hub",
)  # fmt: skip


class Fault(NamedTuple):
    file: str  # below src/plainsd
    old: str
    new: str
    tests: tuple[str, ...]  # pytest's names, below tests/

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()}  ->  {self.new.strip() or '(nothing)'}"

    def error(self) -> str | None:
        """What is wrong with this row of the table."""
        path = PACKAGE / self.file
        found = path.read_text("utf-8").count(self.old) if path.is_file() else 0
        if found != 1 or self.old == self.new:
            return f"{self.file}: {self.old!r} is there {found} times, where it must be there once"
        return None


class Outcome(NamedTuple):
    code: int | None  # pytest's exit code; None: out of time
    failed: str  # the first test that failed
    output: str
    seconds: float


def table() -> list[Fault]:
    return [Fault(file, old, new, tuple(tests.split())) for file, rows in FAULTS.items() for old, new, tests in rows]


def run(source: Path, tests: list[str], stop: bool = True, seconds: float | None = SECONDS) -> Outcome:
    """The tests in a process of their own that imports the package from `source`."""
    began, log = time.monotonic(), source / "log"
    child = os.fork()
    if not child:
        in_child(source, tests, log, stop)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        late = seconds is not None and time.monotonic() - began > seconds
        if done or late:
            break
        time.sleep(0.05)
    for _ in range(2):  # whatever it started goes with it
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            break
    if not done:
        os.waitpid(child, 0)
    failed = (source / "failed").read_text() if (source / "failed").is_file() else ""
    code = os.waitstatus_to_exitcode(status) if done else None
    return Outcome(code, failed, log.read_text("utf-8", "replace"), time.monotonic() - began)


def in_child(source: Path, tests: list[str], log: Path, stop: bool) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(ROOT)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        os.environ["PYTHONPATH"] = str(source)
        sys.path.insert(0, str(source))
        import pytest

        class First:
            def pytest_runtest_logreport(self, report):
                if report.failed and not (source / "failed").exists():
                    (source / "failed").write_text(report.nodeid)

        names = [f"tests/{name}" for name in tests]
        code = pytest.main(["-p", "no:cacheprovider", *["-x"] * stop, *names], plugins=[First()])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(int(code))


def tried(fault: Fault, number: int, folder: Path) -> Outcome:
    source = folder / str(number)
    shutil.copytree(PACKAGE, source / "plainsd")
    path = source / "plainsd" / fault.file
    path.write_text(path.read_text("utf-8").replace(fault.old, fault.new), "utf-8")
    outcome = run(source, list(fault.tests))
    shutil.rmtree(source)
    return outcome


def passing(faults: list[Fault], folder: Path) -> bool:
    """Whether the tests pass on the package without a fault."""
    source = folder / "whole"
    shutil.copytree(PACKAGE, source / "plainsd")
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    outcome = run(source, tests, stop=False, seconds=None)
    if outcome.code:
        print(f"the tests do not pass without any fault:\n{outcome.output[-4000:]}", file=sys.stderr)
    return not outcome.code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="faults whose row contains this text")
    parser.add_argument("--jobs", metavar="N", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="at a time")
    options = parser.parse_args()
    faults = [fault for fault in table() if options.only in " ".join((fault.file, fault.old, *fault.tests))]
    if wrong := [error for fault in table() if (error := fault.error())]:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    if not faults:
        print(f"no fault contains {options.only!r}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in LOADED:
        importlib.import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # of compiled kernels
        if not passing(faults, folder):
            return 2
        outcomes = pool.map(tried, faults, range(len(faults)), [folder] * len(faults))
        for fault, outcome in zip(faults, outcomes, strict=True):
            if outcome.code in (4, 5, 70):  # no such test, no test at all
                print(f"{fault}\n{outcome.output[-2000:]}", file=sys.stderr)
                return 2
            by = outcome.failed.removeprefix("tests/") or ("time" if outcome.code is None else "its import")
            print(f"{'killed' if outcome.code != 0 else 'SURVIVED'} {outcome.seconds:5.1f} s  {fault}"
                  + (f"  by {by}" if outcome.code != 0 else f"  not seen by {' '.join(fault.tests)}"), flush=True)  # fmt: skip
            survivors += [fault] if outcome.code == 0 else []
    killed = 1 - len(survivors) / len(faults)
    print(f"{len(faults) - len(survivors)} of {len(faults)} killed, {killed:.0%}")
    return int(killed < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
