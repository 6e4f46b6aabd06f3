"""Files of tensors: equal to the safetensors library's, and every kind of damage told in one line."""

import argparse
import datetime
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plainsd.errors import UserError
from plainsd.files.tensorfile import STORED_DTYPES, header_bytes, open_tensors, stored, write_safetensors

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "brain": torch.randn(2, 1, 3).bfloat16(),
    "double": torch.tensor(3.25, dtype=torch.float64),
    "ids": torch.arange(5)[None],
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
}


def same(state: dict, reference: dict) -> bool:
    return state.keys() == reference.keys() and all(
        state[name].dtype == tensor.dtype
        and state[name].shape == tensor.shape
        and torch.equal(state[name].contiguous().view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for name, tensor in reference.items()
    )


def read_all(path) -> dict:
    return {name: tensor.read() for name, tensor in open_tensors(path).tensors.items()}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"note": "grüß"})
    assert same(read_all(tmp_path / "x.safetensors"), TENSORS)
    assert open_tensors(tmp_path / "x.safetensors").metadata == {"note": "grüß"}


def test_the_library_reads_what_we_write(tmp_path):
    tensors = {name: stored(tensor) for name, tensor in TENSORS.items()}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    assert same(load_file(tmp_path / "x.safetensors"), TENSORS)


def test_the_first_tensor_lies_at_a_multiple_of_8_bytes():
    """So that any of its numbers can be read where it lies (the format's advice; the library does so)."""
    lengths = {len(header_bytes({"x" * n: stored(torch.zeros(1))}, {})) for n in range(1, 20)}
    assert {length % 8 for length in lengths} == {0} and len(lengths) > 2


def test_casting_while_reading(tmp_path, monkeypatch):
    """And letting go of what was read, after every tensor."""
    monkeypatch.setattr("plainsd.files.tensorfile.WINDOW", 5)
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert same(read_all(tmp_path / "x.safetensors"), TENSORS)
    for name, tensor in open_tensors(tmp_path / "x.safetensors").tensors.items():
        assert torch.equal(tensor.read(torch.bfloat16), TENSORS[name].bfloat16())


def test_what_was_read_is_ours(tmp_path):
    """Written to, and kept when the file is gone or another."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(5000)}, path)
    tensor = open_tensors(path).tensors["x"].read()
    path.write_bytes(bytes(30_000))
    tensor += 1
    assert torch.equal(tensor, torch.full((5000,), 2.0))


def test_numbers_at_odd_places(tmp_path):
    """A header of any length is allowed, and a tensor of bytes before another."""
    for pad in range(1, 5):
        header = json.dumps(
            {
                "b": {"dtype": "U8", "shape": [pad], "data_offsets": [0, pad]},
                "x": {"dtype": "F32", "shape": [3], "data_offsets": [pad, pad + 12]},
            }
        ).encode()
        path = tmp_path / f"{pad}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(pad) + struct.pack("<3f", 1, 2, 3))
        tensors = open_tensors(path).tensors
        assert tensors["x"].read().tolist() == tensors["x"].read(torch.float64).tolist() == [1, 2, 3]


def test_strided_tensors_are_written_in_order(tmp_path):
    tensor = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    write_safetensors(tmp_path / "x.safetensors", {"x": stored(tensor), "t": stored(TENSORS["a.weight"].T)})
    assert same(load_file(tmp_path / "x.safetensors"), {"x": tensor, "t": TENSORS["a.weight"].T.contiguous()})


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [False, True])
def test_pickles(tmp_path, old, nested):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "eight"}  # older than float8
    content = {"state_dict": tensors, "epoch": 3, "callbacks": {"a": 1.5}} if nested else tensors
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old)
    assert same(read_all(tmp_path / "x.ckpt"), tensors)


def test_safetensors_under_another_name(tmp_path):
    save_file(TENSORS, tmp_path / "x.ckpt")
    assert same(read_all(tmp_path / "x.ckpt"), TENSORS)


def test_classes_left_by_training_code_do_nothing(tmp_path, monkeypatch):
    """The first public checkpoints name a class of the trainer; nothing of it is imported."""
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
    torch.save({"state_dict": TENSORS, "callbacks": {module.ModelCheckpoint: 1}}, tmp_path / "x.ckpt")
    monkeypatch.undo()
    assert same(read_all(tmp_path / "x.ckpt"), TENSORS)


class Named:
    """Pickled under a name of another program, with arguments, a state, items."""

    def __init__(self, name: str, args: tuple = (), state: object = None, items: dict | None = None):
        self.name, self.args, self.state, self.items = name, args, state, items

    def __reduce__(self):
        module, _, name = self.name.rpartition(".")
        made = type(name, (), {"__module__": module, "__qualname__": name})
        places = [".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)]
        for place in places:
            sys.modules.setdefault(place, types.ModuleType(place))
        setattr(sys.modules[module], name, made)
        return made, self.args, self.state, None, iter(self.items.items()) if self.items else None


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("style", ["numpy._core", "numpy.core", "arrays", "lightning"])
def test_what_training_programs_leave_beside_tensors(tmp_path, monkeypatch, old, style):
    """NumPy's scalars and arrays as NumPy writes them, under the names of NumPy 2 and of NumPy 1."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", "omegaconf"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    beside = {
        "numpy._core": {"best": np.float64(0.5), "step": np.int64(7), "flag": np.bool_(True), "half": np.float16(2)},
        "numpy.core": {"best": np.float64(0.5), "step": np.int64(7)},
        "arrays": {"losses": np.arange(5.0), "kind": np.dtype("float32"), "when": datetime.date(2022, 8, 22)},
        "lightning": {
            "hyper_parameters": Named("pytorch_lightning.utilities.AttributeDict", (), {"lr": 1e-4}),
            "config": Named("omegaconf.DictConfig", ({"a": 1},), {"_content": {}}),
            "place": Path("logs"),
            "args": argparse.Namespace(lr=1e-4),
            "table": Named("pytorch_lightning.utilities.AttributeDict2", (), None, {"lr": 1e-4}),
            "counts": defaultdict(None, {"a": 1}),
        },
    }[style]
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": TENSORS["a.weight"]}, **beside}, path, _use_new_zipfile_serialization=not old)
    if style == "numpy.core":
        path.write_bytes(as_numpy_1(path.read_bytes()) if old else rezipped(path))
    monkeypatch.undo()
    assert same(read_all(path), {"a": TENSORS["a.weight"]})
    assert "pytorch_lightning.utilities" not in sys.modules and "omegaconf" not in sys.modules


def as_numpy_1(pickled: bytes) -> bytes:
    assert b"cnumpy._core.multiarray\nscalar\n" in pickled
    return pickled.replace(b"cnumpy._core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nscalar\n")


def rezipped(path: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, as_numpy_1(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


@pytest.mark.parametrize("kind,shape,size", [("U16", [3], 6), ("C64", [2], 16), ("F8_E8M0", [4], 4), ("F4", [4], 2)])
def test_a_tensor_of_a_type_unknown_here_is_copied_and_not_computed_with(tmp_path, kind, shape, size):
    data = bytes(range(size))
    content = header({"a": entry([1], 0, 4), "b": entry(shape, 4, 4 + size, kind)}, b"abcd" + data)
    (tmp_path / "x.safetensors").write_bytes(content)
    file = open_tensors(tmp_path / "x.safetensors")
    write_safetensors(tmp_path / "y.safetensors", file.tensors)
    assert file.tensors["b"].nbytes == size and (tmp_path / "y.safetensors").read_bytes().endswith(b"abcd" + data)
    again = open_tensors(tmp_path / "y.safetensors").tensors["b"]
    assert again.foreign == (kind, tuple(shape))
    with pytest.raises(UserError, match=f"'b' has the type '{kind}', which is not supported; known: F64, .*precision"):
        again.read(torch.float32)


# --- damage ----------------------------------------------------------------------------------------------------------


def header(entries: dict, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD = {
    "empty": (b"", "only 0 bytes"),
    "short": (b"\x01\x00\x00", "only 3 bytes"),
    "absurd header length": (header({}, b"", 2**62), "claims a header of 4611686018427387904"),
    "header past the end": (header({"a": entry([1], 0, 4)}, b"1234", 5000), "claims a header of 5000"),
    "header is no JSON": (struct.pack("<Q", 8) + b"{]{]{]{]", "its header is not JSON"),
    "header is no text": (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "its header is not JSON"),
    "header is a list": (struct.pack("<Q", 2) + b"[]", "not a table"),
    "deep header": (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header is not JSON"),
    "truncated": (header({"a": entry([4], 0, 16)}, b"x" * 9), "cut short"),
    "too long": (header({"a": entry([1], 0, 4)}, b"x" * 9), "need 4 bytes and it has 9"),
    "shape lies": (header({"a": entry([5], 0, 16)}, b"x" * 16), "'a' of shape [5]"),
    "dtype lies": (header({"a": entry([4], 0, 16, "F64")}, b"x" * 16), "'a' of shape [4] and type F64"),
    "overlap": (header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"x" * 12), "'b' begins at byte 4"),
    "hole": (header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"x" * 12), "'b' begins at byte 8"),
    "out of range": (header({"a": entry([1], 0, 4), "b": entry([2**40], 4, 4 + 2**42)}, b"x" * 12), "cut short"),
    "negative offset": (header({"a": entry([1], -4, 0)}, b"x" * 4), "'a' of shape [1]"),
    "negative shape": (header({"a": entry([-1, -1], 0, 4)}, b"x" * 4), "'a' of shape"),
    "huge shape": (header({"a": entry([2**63, 2**63], 0, 4)}, b"x" * 4), "'a' of shape"),
    "offsets are no numbers": (header({"a": entry([1], "0", 4)}, b"x" * 4), "'a' of shape"),
    "three offsets": (header({"a": entry([1], 0, 4) | {"data_offsets": [0, 2, 4]}}, b"x" * 4), "entry for 'a'"),
    "no dtype": (header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"x" * 4), "entry for 'a'"),
    "entry is a number": (header({"a": 7}, b""), "entry for 'a'"),
    "unknown dtype, offsets lie": (header({"a": entry([1], 4, 0, "Q4")}, b"x" * 4), "'a' of shape [1] and type Q4"),
    "unknown dtype, cut short": (header({"a": entry([9], 0, 9, "Q4")}, b"x" * 4), "cut short"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n",
        "git lfs pull",
    ),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file"),
    "web page": (b"\n<!DOCTYPE html>\n<html><title>Log in</title></html>", "is a web page"),
    "metadata is a list": (header({"__metadata__": [], "a": entry([1], 0, 4)}, b"x" * 4), "metadata is not a table"),
}


def one_line(error) -> str:
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("kind", BAD)
def test_bad_safetensors(tmp_path, kind):
    content, message = BAD[kind]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tensors(tmp_path / "x.safetensors")
    assert message in one_line(error) and "x.safetensors" in str(error.value)


def test_every_truncation_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.arange(3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            open_tensors(path)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("left", [0, 1000])
def test_file_that_shrinks_while_it_is_read(tmp_path, begun, left):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(1000.0), "b": torch.arange(1000.0)}, path)
    file = open_tensors(path)
    if begun:
        file.tensors["a"].read()
    os.truncate(path, left)
    with pytest.raises(UserError, match="became shorter"):
        file.tensors["b"].read()


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot read") as error:
            open_tensors(path)
        one_line(error)


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "save",
    [
        lambda content, path: path.write_bytes(pickle.dumps(content, 4)),
        lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
        lambda content, path: torch.save(content, path),
    ],
    ids=["4", "2", "torch"],
)
def test_a_pickle_that_would_run_code(tmp_path, save):
    save({"state_dict": {"a": Evil(tmp_path / "trace")}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="could run code; it is not opened") as error:
        open_tensors(tmp_path / "x.ckpt")
    assert "system" in one_line(error) or "is a pickle that could run code" in str(error.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_function_that_a_pickle_only_names(tmp_path, old):
    """It is called nowhere in the file; PyTorch's reader refuses the name."""
    torch.save({"a": TENSORS["half"], "b": os.system}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="asks for posix.system and could run code; it is not opened"):
        open_tensors(tmp_path / "x.ckpt")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_pickle_where_safetensors_is_expected(tmp_path, old):
    torch.save(TENSORS, tmp_path / "x.safetensors", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="is a pickle, not safetensors") as error:
        open_tensors(tmp_path / "x.safetensors")
    one_line(error)


def test_what_is_neither_is_called_neither(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match="is neither a PyTorch nor a safetensors file"):
        open_tensors(tmp_path / "picture.png")


def test_a_small_pickle_where_safetensors_is_expected(tmp_path):
    """Its frame's length makes a small number of what would be the header's upper bytes."""
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps({"x": [1] * 20}, 4))
    with pytest.raises(UserError, match="is a pickle, not safetensors"):
        open_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and then nothing", b"\x80\x02}q\x00."])
def test_broken_pickles(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tensors(tmp_path / "x.ckpt")
    assert "x.ckpt" in one_line(error)


def test_truncated_pickle(tmp_path):
    torch.save(TENSORS, tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        open_tensors(tmp_path / "x.ckpt")


def test_all_types_are_named_as_in_the_format(tmp_path):
    for name, dtype in STORED_DTYPES.items():
        save_file({"x": torch.zeros(2).to(dtype)}, tmp_path / f"{name}.safetensors")
        with open(tmp_path / f"{name}.safetensors", "rb") as file:
            assert f'"dtype":"{name}"' in file.read(200).decode("utf-8", "replace")


def test_no_metadata_may_be_written_as_null(tmp_path):
    """As the safetensors library reads it."""
    (tmp_path / "a.safetensors").write_bytes(header({"__metadata__": None, "a": entry([1], 0, 4)}, b"x" * 4))
    assert list(open_tensors(tmp_path / "a.safetensors").tensors) == ["a"]
