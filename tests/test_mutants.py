"""The table of faults fits the source, so that `make mutants` can run; that is hours of tests, and not done here."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants import ENOUGH, PACKAGE, Fault, table

TESTS = Path(__file__).parent
ROOMS = {fault.file.partition("/")[0] for fault in table()}


@pytest.mark.parametrize("file", sorted({fault.file for fault in table()}))
def test_every_old_text_is_in_its_file_once(file):
    assert [error for fault in table() if fault.file == file and (error := fault.error())] == []


def test_every_test_that_must_notice_is_there():
    for name in sorted({name for fault in table() for name in fault.tests}):
        file, _, test = name.partition("::")
        assert (TESTS / file).is_file(), name
        assert not test or re.search(
            rf"^def {re.escape(test.partition('[')[0])}\(", (TESTS / file).read_text(), re.M
        ), name


def test_no_fault_has_a_name_that_is_nowhere(tmp_path):
    """Such a fault is killed by a NameError, in any test that runs its line."""
    for number, fault in enumerate(table()):
        path = PACKAGE / fault.file
        if path.suffix == ".py" and fault.new != "if False:":  # its names are in what is never run
            mutated = path.read_text("utf-8").replace(fault.old, fault.new)
            (tmp_path / f"{number}-{path.name}").write_text(mutated, "utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", "--target-version"]
    done = subprocess.run([*ruff, "py311", "--output-format", "concise", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_fault_is_there_twice_and_no_room_without_any():
    assert [fault for fault, times in Counter(table()).items() if times > 1] == []
    assert len(table()) >= 200 and 0.9 < ENOUGH < 1
    package = TESTS.parent / "src" / "plainsd"
    rooms = {path.name for path in package.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    assert rooms - ROOMS == set()


def test_a_text_that_is_gone_or_there_twice_is_named():
    assert "is there 0 times" in Fault("errors.py", "no such text", "other", ()).error()
    assert "is there 0 times" in Fault("no_such_file.py", "x", "y", ()).error()
    assert re.search(r"is there \d\d+ times", Fault("errors.py", "e", "f", ()).error())
