"""What a pickle would build is bounded before it is built. All files here are small: the bounds are lowered."""

import io
import os
import pickle
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import pytest
import torch
import torch.distributed.checkpoint as dcp

from plainsd.errors import UserError
from plainsd.files import pickle_scan, pickles
from plainsd.files.pickle_scan import FILE_BYTES_A_STEP, MOST_PICKLE_STEPS, Scan
from plainsd.files.pickles import unpickled
from plainsd.files.tensorfile import LONGEST_TENSOR_NAME, open_pickle
from plainsd.train.shard_reader import SafePlanner, SafeReader, read_table

OLD = [False, True]


def program(path: Path, body: bytes, old: bool) -> Path:
    """A file of PyTorch's, whose content is made by this program."""
    torch.save({}, path, _use_new_zipfile_serialization=not old)
    empty = pickle.dumps({}, 2)
    if old:
        path.write_bytes(path.read_bytes().replace(empty, b"\x80\x02" + body, 1))
        return path
    with zipfile.ZipFile(path) as before:
        records = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w") as after:
        for name, content in records.items():
            after.writestr(name, b"\x80\x02" + body if name.endswith("data.pkl") else content)
    return path


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def doubled(levels: int) -> bytes:
    """A table whose key is a tuple of a tuple twice, of a tuple twice, ..."""
    return b"})" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(levels)) + b"Ns."


HUNDRED = b"](" + b"".join(b"K" + bytes([n]) for n in range(100)) + b"e"
SET, BYTEARRAY, ENCODE = b"c__builtin__\nset\n", b"c__builtin__\nbytearray\n", b"c_codecs\nencode\n"
TOO_MUCH = {
    "a key of a thousand million parts": (doubled(30), "more than 100. objects"),
    "two thousand empty sets": (b"(" + b"\x8f" * 2000 + b"t.", "more than 100. objects"),
    "two thousand names of one object": (b")" + b"".join(b"r" + n.to_bytes(4, "little") for n in range(2000)) + b".",
                                         "more than 100. objects"),
    "a list copied twenty times": (HUNDRED + b"\x85q\x00" + (SET + b"h\x00R") * 20 + b".", "more than 100. objects"),
    "a number of bytes": (BYTEARRAY + b"M\x10\x27\x85R.", "more than 100. objects"),
    "a long number of bytes": (BYTEARRAY + b"\x8a\x05" + (10_000).to_bytes(5, "little") + b"\x85R.", "objects"),
    "bytes that a codec makes longer": (ENCODE + text("abc") + text("hex") + b"\x86R.", "_codecs.encode"),
    "tuples a hundred deep": (b")" + b"\x85" * 100 + b".", "more than 100 deep"),
    "a state that is given many times": (
        b"ccollections\nOrderedDict\n)R" + HUNDRED + b"q\x00b" + b"h\x00b" * 20 + b".", "more than 100. objects"),
    "storage of any size": (b"ctorch.storage\nUntypedStorage\nM\x10\x27\x85R.", "torch.storage.UntypedStorage"),
    "a tensor of any size": (b"ctorch\nFloatTensor\nM\x10\x27\x85R.", "torch.FloatTensor"),
    "a call that is hidden in a call": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + BYTEARRAY + BYTEARRAY + b"M\x10\x27\x85}tR.", "objects"),
    "long integers": (b"(" + b"\x8a\x05\x01\x00\x00\x00\x01" * 51 + b"t.", "more than 50 long integers"),
    "a long name of a class": (b"c" + b"m" * 2000 + b"\nname\n.", "a name of more than 1000 bytes"),
    "more bytes than are read": (text("a" * 60_000) + b".", "50000"),
}  # fmt: skip


@pytest.fixture
def lowered(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_PICKLE_STEPS", 1000)
    for module in (pickles, pickle_scan):
        monkeypatch.setattr(module, "LONGEST_PICKLE", 50_000)
    monkeypatch.setattr(pickle_scan, "MOST_LONG", 50)


@pytest.mark.parametrize("old", OLD, ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", TOO_MUCH)
def test_what_would_take_too_much_is_not_built(tmp_path, lowered, monkeypatch, kind, old):
    body, why = TOO_MUCH[kind]
    path = program(tmp_path / "a.ckpt", body, old)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match=why) as error:
        open_pickle(path)
    assert len(str(error.value)) <= 300 and "a.ckpt" in str(error.value) and "; " in str(error.value)


def steps_of(path: Path) -> int:
    content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    scan = Scan(io.BytesIO(content), 10**9, lambda name: True)
    scan.run()
    return scan.steps


def test_a_part_that_is_used_again_counts_again(tmp_path):
    """As a hash of it does; without tuples inside each other the count is that of the opcodes."""
    few, more = (steps_of(program(tmp_path / "a.ckpt", doubled(n), old=False)) for n in (10, 12))
    assert 3.9 < more / few < 4.1
    few, more = (steps_of(program(tmp_path / "a.ckpt", b"(" + b"]" * n + b"t.", old=False)) for n in (10, 20))
    assert more - few == 10


def a_run(tensors: int) -> dict:
    """What trainers save: weights, their average, AdamW's moments, and the odds and ends beside them."""
    weights = {f"model.diffusion_model.output_blocks.{n}.1.transformer_blocks.0.attn2.to_out.0.weight":
               torch.full((2, 2), float(n)) for n in range(tensors)}  # fmt: skip
    optimizer = torch.optim.AdamW([torch.nn.Parameter(tensor.clone()) for tensor in weights.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "state_dict": {**weights, **{f"model_ema.{name}": tensor.clone() for name, tensor in weights.items()}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"milestones": Counter({10: 1}), "_last_lr": [1e-4]}],
        "noise": torch.get_rng_state(),
        "seeds": [2**31 + n for n in range(624)],
        "ids": {1, 2},
        "kind": torch.float16,
        "shape": torch.Size((2, 3)),
        "raw": b"bytes",
        "complex": 1j,
        "frozen": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", OLD, ids=["zip", "legacy"])
def test_checkpoints_with_all_that_a_trainer_saves_are_read(tmp_path, old):
    content = a_run(20)
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    found = unpickled(tmp_path / "a.ckpt")
    assert isinstance(found, dict) and found.keys() == content.keys()
    for part in ("seeds", "ids", "kind", "shape", "raw", "complex"):
        assert found[part] == content[part], part
    moments = found["optimizer_states"][0]["state"], content["optimizer_states"][0]["state"]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in range(20))
    tensors = open_pickle(tmp_path / "a.ckpt").tensors
    assert all(torch.equal(tensors[name].read(), tensor) for name, tensor in content["state_dict"].items())


@pytest.mark.parametrize("old", OLD, ids=["zip", "legacy"])
def test_the_bound_has_room_for_the_largest_checkpoints(tmp_path, old):
    """SDXL has 2,515 tensors; with their averages, both moments and a count of steps there are five times as many."""

    def steps(tensors: int) -> int:
        torch.save(a_run(tensors), tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
        with open(tmp_path / "a.ckpt", "rb") as file:
            record = torch._C.PyTorchFileReader(file.name).get_record("data.pkl") if not old else None
            scan = Scan(io.BytesIO(record) if record else file, 10**9, lambda name: False)
            for _ in range(5 if old else 1):
                scan.run()
        return scan.steps

    each = (steps(30) - steps(20)) / 10
    assert 2515 * each < 0.6 * MOST_PICKLE_STEPS
    assert FILE_BYTES_A_STEP * each < 2**20  # and a network of larger tensors may have any number of them


def test_a_larger_file_may_have_more(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2**14)}, tmp_path / "a.ckpt")
    monkeypatch.setattr(pickles, "MOST_PICKLE_STEPS", 10)
    with pytest.raises(UserError, match="would build more than 26 objects"):
        unpickled(tmp_path / "a.ckpt")
    torch.save({"a": torch.zeros(2**18)}, tmp_path / "a.ckpt")
    assert unpickled(tmp_path / "a.ckpt")


def test_one_is_read_at_a_time(tmp_path, monkeypatch):
    """The classes that PyTorch lets pass while it reads one are those of the whole process."""
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    load, together, met = torch.load, Barrier(2), []

    def watched(*arguments, **options):
        with suppress(BrokenBarrierError):
            met.append(together.wait(timeout=0.5))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(unpickled, [tmp_path / "a.ckpt"] * 2))
    assert not met


def test_long_names(tmp_path):
    for name in (
        {"a" * (LONGEST_TENSOR_NAME + 1): torch.ones(1)},
        {"a" * (LONGEST_TENSOR_NAME + 1): {"b": torch.ones(1)}},
    ):
        torch.save(name, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match="a name of 1001 characters"):
            open_pickle(tmp_path / "a.ckpt")


# --- states in parts -------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def load_parts(folder: Path, state: dict) -> dict:
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore")
def test_states_in_parts_run_no_code(tmp_path):
    dcp.save({"a": torch.arange(3.0), "n": (1, 2.5, None, "x")}, checkpoint_id=tmp_path / "good", no_dist=True)
    found = load_parts(tmp_path / "good", {"a": torch.zeros(3), "n": 0})
    assert found["a"].tolist() == [0, 1, 2] and found["n"] == (1, 2.5, None, "x")

    dcp.save({"a": torch.arange(3.0), "n": Evil(tmp_path / "trace")}, checkpoint_id=tmp_path / "bad", no_dist=True)
    with pytest.raises(dcp.api.CheckpointException, match="its 'n' is no plain value"):
        load_parts(tmp_path / "bad", {"a": torch.zeros(3), "n": 0})
    (tmp_path / "good" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with pytest.raises(dcp.api.CheckpointException, match="could run code"):
        load_parts(tmp_path / "good", {"a": torch.zeros(3), "n": 0})
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["os.system", "nn.functional.relu", "load"])
def test_a_table_of_parts_names_its_own_classes_only(name):
    module, _, function = f"torch.{name}".partition(".")
    table = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(one)]) + one.encode() for one in (module, function)) + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="could run code"):
        read_table(io.BytesIO(table))
