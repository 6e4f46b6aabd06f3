"""The torture of tests/torture: five minutes of it, and whether it sees what it looks for."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "torture"


@pytest.fixture
def torture(monkeypatch):
    """The modules of tests/torture."""
    monkeypatch.syspath_prepend(HERE)
    import files
    import mutations

    yield files, mutations
    for name in ("files", "mutations"):
        sys.modules.pop(name, None)


def test_mutations_come_from_their_seed_alone(torture):
    _, mutations = torture
    whole = bytes(range(256)) * 8 + b'{"a": 12, "b": [1, "x"]}'
    made = [mutations.mutated(whole, f"0-{i}") for i in range(200)]
    assert made == [mutations.mutated(whole, f"0-{i}") for i in range(200)]
    assert len(set(made)) > 150 and all(len(one) <= len(whole) + 3 * mutations.MOST + 300 for one in made)
    for change in mutations.CHANGES:
        changed = set()
        for i in range(20):
            content = bytearray(whole)
            change(content, random.Random(i))
            changed.add(bytes(content))
        assert changed - {whole}, change
    assert mutations.mutated(b"", "0-1") == b""


STRANGE = """
import sys, time
sys.path[:0] = [{tests!r}, {torture!r}]
import samples, files
from plainsd.errors import UserError
def reads(path):
    content = path.read_bytes()
    if content == b"sound":
        return
    at = path.parent / "number"
    number = int(at.read_text()) if at.exists() else 0
    at.write_text(str(number + 1))
    if number == 0: raise UserError("a; b")
    if number == 1: raise KeyError("c")
    if number == 2: raise UserError("x" * 2000, most=2000)
    if number == 3: return bytearray(8 * 2**30)
    if number == 4: sys.exit(3)
samples.READERS.clear()
samples.READERS["it"] = reads
files.serve_loads(files.Path(sys.argv[1]))
"""


def test_what_is_no_plain_refusal_is_counted(torture, tmp_path):
    """In a process like those that read files, a reader that fails in every way."""
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "a.txt").write_bytes(b"sound")
    (tmp_path / "places.json").write_text('{"it": "a.txt"}')
    code = STRANGE.format(tests=str(HERE.parent), torture=str(HERE))
    asked = "".join(f'["it", "a.txt", "0-{i}"]\n' for i in range(5))
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], input=asked, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    ready, *answers = ran.stdout.splitlines()
    assert ready == "ready", ran.stderr
    for answer, wanted in zip(
        answers, ("refused", "KeyError", "message too long", "MemoryError", "SystemExit"), strict=True
    ):
        assert wanted in answer, (answer, wanted)


@pytest.mark.full
def test_five_minutes_of_torture():
    command = [sys.executable, str(HERE), "--minutes", "5", "--seed", "0", "--jobs", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert "files mutated" in ran.stdout and "wrong exceptions  0" in ran.stdout
