"""Do the tests bite? Puts each fault of faults.py into a copy of the package and asks the tests that must notice.

    make mutants                                    all of them
    .venv/bin/python tests/mutants.py --only store  those whose file, text or tests contain "store"
    .venv/bin/python tests/mutants.py --jobs 4      four at a time

A fault is killed when one of its tests fails, crashes or runs into the time limit. First all those tests are run on the
package as it is: they must pass. Exit codes: 0 where at least 95 % are killed, else 1; 2 where the table does not fit
the source.
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "plainsd"
ENOUGH = 0.95
SECONDS = 300  # for the tests of one fault
IMPORTED = (  # once, before processes part: most of the time of a test goes there
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "numpy", "PIL.Image", "PIL.PngImagePlugin",
    "safetensors.torch", "tokenizers", "huggingface_hub", "tqdm", "requests", "fastapi", "uvicorn", "pytest",
    "hypothesis", "schemathesis.pytest.plugin", "peft", "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.pipelines.stable_diffusion_xl",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
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
    code: int | None  # pytest's exit code, below 0 of a signal; None: out of time
    failed: str  # the first test that failed
    output: str
    seconds: float

    @property
    def none_ran(self) -> bool:
        """No test of that name, or a package that cannot even be imported."""
        return self.code is not None and self.code > 1

    def told(self, fault: Fault) -> str:
        if self.code == 0:
            return f"SURVIVED {self.seconds:5.1f} s  {fault}  not seen by {' '.join(fault.tests)}"
        by = "time" if self.code is None else "a crash" if self.code < 0 else self.failed.removeprefix("tests/")
        return f"killed {self.seconds:5.1f} s  {fault}  by {by}"


def table() -> list[Fault]:
    return [Fault(file, old, new, tuple(tests.split())) for file, rows in FAULTS.items() for old, new, tests in rows]


# --- one run ---------------------------------------------------------------------------------------------------------


def asked(folder: Path, fault: Fault | None, tests: Sequence[str]) -> Outcome:
    """What the tests say of a copy of the package, with the fault if one is given."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        copy = Path(place) / "plainsd"
        shutil.copytree(PACKAGE, copy)
        if fault is not None:
            path = copy / fault.file
            path.write_text(path.read_text("utf-8").replace(fault.old, fault.new), "utf-8")
        return run(Path(place), tests, SECONDS if fault else None)


def run(source: Path, tests: Sequence[str], seconds: float | None) -> Outcome:
    """The tests in a process of their own that imports the package from `source`. Stops at the first that fails."""
    began, log, failed = time.monotonic(), source / "log", source / "failed"
    child = os.fork()
    if not child:
        in_child(source, tests, log, failed)
    done, late = 0, False
    while not done and not late:
        time.sleep(0.05)
        done, status = os.waitpid(child, os.WNOHANG)
        late = seconds is not None and time.monotonic() - began > seconds
    try:
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    except ProcessLookupError:
        pass
    if not done:
        os.waitpid(child, 0)
    name = failed.read_text() if failed.is_file() else ""
    code = os.waitstatus_to_exitcode(status) if done else None
    return Outcome(code, name, log.read_text("utf-8", "replace"), time.monotonic() - began)


def in_child(source: Path, tests: Sequence[str], log: Path, failed: Path) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(ROOT)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1), os.dup2(handle, 2)
        os.environ["PYTHONPATH"] = str(source)  # for processes that tests start
        sys.path.insert(0, str(source))
        import pytest

        class First:
            def pytest_runtest_logreport(self, report):
                if report.failed and not failed.exists():
                    failed.write_text(report.nodeid)

        code = pytest.main(["-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)], plugins=[First()])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(int(code))


# --- all of them -----------------------------------------------------------------------------------------------------


def passing(faults: Sequence[Fault], folder: Path, pool: ThreadPoolExecutor) -> bool:
    """Whether the tests pass on the package without a fault."""
    tests = sorted({test for fault in faults for test in fault.tests})
    files = [list(group) for _, group in groupby(tests, key=lambda test: test.partition("::")[0])]
    wrong = [outcome for outcome in pool.map(partial(asked, folder, None), files) if outcome.code]
    for outcome in wrong:
        print(f"without any fault:\n{outcome.output[-2000:]}", file=sys.stderr)
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="faults whose row contains this text")
    parser.add_argument("--jobs", metavar="N", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="at a time")
    options = parser.parse_args()
    if wrong := [error for fault in table() if (error := fault.error())]:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    faults = [fault for fault in table() if options.only in " ".join((fault.file, fault.old, *fault.tests))]
    if not faults:
        print(f"no fault contains {options.only!r}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # of compiled kernels
        if not passing(faults, folder, pool):
            return 2
        outcomes = []
        for outcome in pool.map(partial(asked, folder), faults, [fault.tests for fault in faults]):
            fault = faults[len(outcomes)]
            outcomes.append(outcome)
            print(
                f"no test ran: {fault}\n{outcome.output[-2000:]}" if outcome.none_ran else outcome.told(fault),
                flush=True,
            )
    killed = sum(outcome.code != 0 for outcome in outcomes)
    print(f"{killed} of {len(faults)} killed, {killed / len(faults):.1%}")
    return 2 if any(outcome.none_ran for outcome in outcomes) else int(killed / len(faults) < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
