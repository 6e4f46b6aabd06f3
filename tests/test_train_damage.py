"""A run's folder in which something has changed: a line that says what and what to do, never a traceback."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_sd
from PIL import Image
from test_finetune import write_pictures
from test_pickles import program

import plainsd
from plainsd.cli import main
from plainsd.errors import DiskError, UserError
from plainsd.pictures.images import open_picture
from plainsd.train.checkpoints import SaveError, checkpoints, restore, saving
from plainsd.train.data.pictures import Item
from plainsd.train.log import read_log

FAST = ["--device", "cpu", "--dtype", "float32", "--log-every", "1", "--save-every", "1", "--rank", "1", "--seed", "0"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps, and what it was trained on."""
    place = tmp_path_factory.mktemp("begun")
    plainsd.save(tiny_sd(), place / "base")
    write_pictures(place / "data", count=4)
    assert main(command(place, 2)) == 0
    return place


def command(place, steps: int, *more: str) -> list[str]:
    paths = ["--base", str(place / "base"), "--data", str(place / "data"), "--out", str(place / "run")]
    return ["train", "--method", "lora", *paths, *FAST, "--steps", str(steps), "--hold-out", "0.25", *more]


@pytest.fixture
def place(begun, tmp_path):
    for name in ("base", "data", "run"):
        shutil.copytree(begun / name, tmp_path / name)  # with times of change, so that what is known stays known
    for name in ("options.json", "run.toml", "heldout.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(begun), str(tmp_path)))
    return tmp_path


@pytest.fixture
def go_on(place, capsys):
    """The run with a step more; the exit code, the lines of stdout, and those of stderr that are ours."""

    def run(steps: int = 3, *more: str):
        capsys.readouterr()
        code = main(command(place, steps, *more))
        told = capsys.readouterr()
        return code, told.out.splitlines(), [line for line in told.err.splitlines() if line.startswith("plainsd:")]

    return run


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --- states ----------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_a_state_is_noticed(place, go_on):
    state = checkpoints(place / "run" / "checkpoints")[-1] / "state.pt"
    whole = state.read_bytes()
    for at in range(0, len(whole), len(whole) // 7):
        flip(state, at)
        code, _, errors = go_on()
        assert code == 2 and len(errors) == 1, at
        assert "state.pt is damaged" in errors[0] and "go on from the state before" in errors[0]
        state.write_bytes(whole)
    assert go_on()[0] == 0


def test_the_remedy_helps(place, go_on):
    for path in checkpoints(place / "run" / "checkpoints"):
        flip(path / "state.pt", 1000)
    while (found := go_on())[0] == 2:
        newest = checkpoints(place / "run" / "checkpoints")[-1]
        assert f"remove {newest}" in found[2][0]
        shutil.rmtree(newest)
    assert read_log(place / "run" / "log.jsonl")[-1]["step"] == 3


def too_many(path) -> None:
    """A state that asks for two million bytes, and no more: the bound is one million."""
    program(path, b"c__builtin__\nbytearray\nJ\x80\x84\x1e\x00\x85R.", old=True)


STATES = {
    "a sum that is none": lambda state: (state / "sums-0.json").write_text("{"),
    "sums of other files": lambda state: (state / "sums-0.json").write_text('{"state.pt": 1, "more": 2}'),
    "no state": lambda state: (state / "state.pt").unlink() or (state / "sums-0.json").unlink(),
    "another thing": lambda state: torch.save([1], state / "state.pt") or (state / "sums-0.json").unlink(),
    "parts missing": lambda state: torch.save({"ema": None}, state / "state.pt") or (state / "sums-0.json").unlink(),
    "no file of PyTorch's": lambda s: (s / "state.pt").write_bytes(b"x" * 99) or (s / "sums-0.json").unlink(),
    "too many objects": lambda state: too_many(state / "state.pt") or (state / "sums-0.json").unlink(),
    "an empty file": lambda state: (state / "state.pt").write_bytes(b"") or (state / "sums-0.json").unlink(),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_none_is_one_line(place, go_on, kind):
    STATES[kind](checkpoints(place / "run" / "checkpoints")[-1])
    code, _, errors = go_on()
    assert code == 2 and len(errors) == 1 and "remove" in errors[0] and len(errors[0]) < 320
    assert ("would build more than" in errors[0]) == (kind == "too many objects")


def test_a_state_without_sums_is_read(place, go_on):
    """As older versions wrote it."""
    for path in checkpoints(place / "run" / "checkpoints"):
        (path / "sums-0.json").unlink()
    assert go_on()[0] == 0


def test_what_else_lies_among_the_states_is_passed_over(place, go_on):
    states = place / "run" / "checkpoints"
    (states / "step-99999999").write_text("a file")
    (states / "step-backup-7").mkdir()
    (states / "note.txt").write_text("x")
    assert go_on()[0] == 0 and (states / "step-99999999").is_file()


def test_a_picture_that_cannot_be_read_is_no_full_disk(tmp_path):
    with pytest.raises(UserError, match="none.png' does not exist"), saving("x"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot read"), saving("x"):
        Item(tmp_path / "none.png", ("a",)).content()
    with pytest.raises(SaveError, match="cannot write x: no space"), saving("x"):
        raise DiskError(tmp_path, "no space")
    with pytest.raises(SaveError, match="cannot write x: no space"), saving("x"):
        try:
            raise OSError(28, "no space")
        except OSError:
            raise RuntimeError("a wrapper")  # noqa: B904


# --- the data --------------------------------------------------------------------------------------------------------


def changed(place, how: str) -> None:
    data = place / "data"
    if how == "a picture more":
        Image.new("RGB", (64, 64)).save(data / "new.png")
        (data / "new.txt").write_text("colour 9")
    elif how == "a picture less":
        for name in ("1.png", "1.txt", "2.png", "2.txt"):  # at least one of them is trained on
            (data / name).unlink()
    elif how == "another picture":
        for i in range(4):
            Image.new("RGB", (64, 64), (200, 10 * i, 0)).save(data / f"{i}.png")
    elif how == "another caption":
        for path in data.glob("*.txt"):
            path.write_text("something else")
    elif how == "another order":
        for i in range(4):
            for end in ("png", "txt"):
                (data / f"{i}.{end}").rename(data / f"{9 - i}.{end}")


@pytest.mark.parametrize(
    "how", ("a picture more", "a picture less", "another picture", "another caption", "another order")
)
def test_a_run_says_that_its_pictures_have_changed(place, go_on, how):
    changed(place, how)
    code, lines, _ = go_on()
    said = [line for line in lines if "was trained on so far" in line]
    assert code == 0 and len(said) == 1, lines
    code, lines, _ = go_on(4)
    assert code == 0 and not [line for line in lines if "trained on so far" in line]  # it is said once


def test_a_run_whose_pictures_are_the_same_says_nothing(place, go_on):
    for path in (place / "data").iterdir():
        path.touch()
    code, lines, _ = go_on()
    assert code == 0 and not [line for line in lines if "trained on so far" in line]
    (place / "run" / "data.json").unlink()  # as of an older version
    code, lines, _ = go_on(4)
    assert code == 0 and not [line for line in lines if "trained on so far" in line or "its prompts" in line]


@pytest.fixture(scope="module")
def fed(begun, tmp_path_factory):
    """A run with held-out pictures, prior pictures and prompts."""
    place = tmp_path_factory.mktemp("fed")
    for name in ("data", "held", "prior"):
        write_pictures(place / name, count=2)
    (place / "prompts.txt").write_text("colour 1\ncolour 2\n")
    shutil.copytree(begun / "base", place / "base")
    assert main(fed_command(place, 2)) == 0
    return place


def fed_command(place, steps: int) -> list[str]:
    kept = [one for one in command(place, steps) if one not in ("--hold-out", "0.25")]
    own = {"--heldout": "held", "--prior": "prior", "--prompts": "prompts.txt"}
    return [*kept, *(text for flag, name in own.items() for text in (flag, str(place / name))), "--sample-every", "99"]


def recaption(folder) -> None:
    (next(iter(sorted(folder.glob("*.txt"))))).write_text("another caption")


def test_a_run_says_that_what_else_it_reads_has_changed(fed, capsys):
    def lines(steps: int) -> list[str]:
        capsys.readouterr()
        assert main(fed_command(fed, steps)) == 0
        return [line for line in capsys.readouterr().out.splitlines() if str(fed / "run") in line]

    assert not [line for line in lines(3) if " so far: " in line or "not known" in line]
    recaption(fed / "held")
    recaption(fed / "prior")
    (fed / "prompts.txt").write_text("colour 1\ncolour 3\ncolour 4\n")
    goes_on = "it goes on with these"
    changed = "1 new or with another caption or mask, 1 gone or changed"
    assert [line for line in lines(4) if "not those that" in line] == [
        f"the held-out pictures are not those that {fed / 'run'} was validated on so far: {changed}; {goes_on}",
        f"the prior pictures are not those that {fed / 'run'} was trained on so far: {changed}; {goes_on}",
        f"the prompts are not those that {fed / 'run'} drew so far: 2 new, 1 gone; {goes_on}",
    ]
    assert not [line for line in lines(5) if " so far: " in line]
    record = fed / "run" / "data.json"
    record.write_text(json.dumps({"pictures": json.loads(record.read_text())["pictures"]}))  # as of an older version
    unknown = "as of an older version: whether they have changed is not known"
    assert [line for line in lines(6) if "not known" in line] == [
        f"{fed / 'run'} did not write down its {what}, {unknown}"
        for what in ("held-out pictures", "prior pictures", "prompts")
    ]


def test_a_flipped_byte_of_a_runs_latents_is_made_good(place, go_on):
    assert go_on()[0] == 0  # the pictures lie in another place than those of `begun`, so there are new latents
    for file in (place / "run" / "cache").glob("*.f16"):
        flip(file, file.stat().st_size // 2)
    code, lines, errors = go_on(4)
    assert code == 0 and errors == []
    assert len([line for line in lines if ".f16 is damaged: 1 of" in line and "they are made again" in line]) == 2


# --- everything else in the folder -----------------------------------------------------------------------------------

GARBAGE = (b"", b"[1, 2]", b"\xff\xfe\0", b'{"a": ' * 2000, b'{"pictures": [1]}')
REFUSED = ("options.json", "heldout.json", "data.json")  # what cannot be made again


@pytest.mark.parametrize(
    "name", ["log.jsonl", "cache/whole.json", "cache/digests.json", "cache/*.keys", "cache/*.f16", *REFUSED]
)
def test_garbage_is_one_line_or_made_again(place, go_on, name):
    files = list((place / "run").glob(name)) or [place / "run" / name]
    whole = {path: path.read_bytes() if path.exists() else None for path in files}
    steps = 2
    for content in GARBAGE:
        for path in files:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        steps += 1
        code, _, errors = go_on(steps)
        if name in REFUSED and code:
            assert code == 2 and len(errors) == 1 and name in errors[0] and len(errors[0]) < 320
            for path, before in whole.items():
                path.write_bytes(before)
            steps -= 1
        else:
            assert (code, errors) == (0, []), (name, content)


def test_strange_lines_of_a_log_are_left_out_and_counted(place, go_on, capsys):
    log = place / "run" / "log.jsonl"
    before = read_log(log)
    with open(log, "ab") as file:
        file.write(b'garbage\n{"step": "x"}\n{"loss": 1}\n[1]\n{"step": 1, "loss": [2]}\n\xff\n{"step": 2, "los')
    assert main(command(place, 3)) == 0
    assert "log.jsonl: 6 lines cannot be read; they are left out" in capsys.readouterr().err
    lines = read_log(log)
    assert lines[: len(before)] == before and lines[-1]["step"] == 3
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_seed_that_is_none_is_one_line(place, capsys):
    options = place / "run" / "options.json"
    table = json.loads(options.read_text())
    for seed in ("x", -5, [1], "9" * 5000):
        options.write_text(json.dumps(table | {"seed": seed}))
        capsys.readouterr()
        assert main(command(place, 3, "--seed", "random")) == 2
        assert "options.json is damaged: it has the seed" in capsys.readouterr().err


def test_step_0_is_validated_once(place, go_on):
    """A run that was killed before its first state validates anew, and the log has it once."""
    shutil.rmtree(place / "run" / "checkpoints")
    log = place / "run" / "log.jsonl"
    assert [line["step"] for line in read_log(log) if "validation" in line].count(0) == 1
    assert go_on()[0] == 0
    steps = [line["step"] for line in read_log(log) if "validation" in line]
    assert steps.count(0) == 1 and steps[-1] == 3
    assert [line["step"] for line in read_log(log) if "loss" in line] == [1, 2, 3]


def test_a_full_gpu_is_no_damage(tmp_path):
    def full(state):
        raise torch.OutOfMemoryError("full")

    (tmp_path / "step-00000001").mkdir()
    torch.save({}, tmp_path / "step-00000001" / "state.pt")
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        restore(SimpleNamespace(world=SimpleNamespace(sharded=False), load_state=full), tmp_path)
