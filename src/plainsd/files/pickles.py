"""PyTorch's pickles, read safely: plain data and tensors only, and no more of them than a file can hold.

Three things look at a file, in this order: `pickle_scan` at all that the pickle would build, PyTorch's own reader with
`weights_only`, and `check_tensors` at the tensors that came of it.
"""

import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plainsd.errors import UserError, shortened
from plainsd.files.pickle_scan import (
    FILE_BYTES_A_STEP,
    LONGEST_PICKLE,
    MOST_PICKLE_STEPS,
    BadPickle,
    Scan,
    StrangeTensor,
    UnsafePickle,
)
from plainsd.files.unusable import check_kind, damaged


class Ignored:
    """Stands in for a class that training code left in a checkpoint, with any arguments."""

    def __init__(self, *args: object, **named: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class IgnoredTable:
    """Likewise for dict-like classes."""

    def __new__(cls, *args: object, **named: object) -> Any:
        return OrderedDict()


# What training programs leave in checkpoints besides tensors: numbers, paths, settings, callbacks. The unpickler gets
# an inert stand-in for these names; the module is never imported.
HARMLESS = re.compile(
    r"(numpy|pytorch_lightning|lightning|lightning_fabric|omegaconf|pathlib|datetime|typing)(\.\w+)+"
    r"|argparse\.Namespace|collections\.defaultdict"
)
MOST_NAMES = 200
_loading = threading.Lock()  # the names that torch.load takes are those of the whole process
OLD_PICKLES = 5  # of the older form: a number, a version, the machine, the content, the storages' names; then tensors


def unpickled(path: Path, stand_ins: Iterable[tuple[type, str]] = ()) -> object:
    """The contents of a PyTorch pickle, if they are plain data and tensors; other classes only if they are in
    `stand_ins`, which maps names to classes of ours, or match HARMLESS."""
    known = {name: kind for kind, name in stand_ins}
    with pickle_errors(path):
        zipped = is_zipped(path)
        names = scanned(path, zipped, lambda name: name in known or bool(HARMLESS.fullmatch(name)))
        for name in filter(HARMLESS.fullmatch, names):
            known.setdefault(name, IgnoredTable if "dict" in name.lower() else Ignored)
        if len(known) > MOST_NAMES:
            raise BadPickle(f"its pickle names {len(known)} classes")
        allowed: list[Any] = [(kind, name) for name, kind in known.items()]
        with _loading, torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            # only the newer, zipped files can be mapped
            content = torch.load(path, mmap=zipped, map_location="cpu", weights_only=True)
        check_tensors(path, content)
        return content


def check_pickle(path: Path) -> None:
    """UserError for a file that is no pickle of PyTorch's, or would build more than one of its size may."""
    with pickle_errors(path):
        scanned(path, is_zipped(path), lambda name: False)


@contextmanager
def pickle_errors(path: Path) -> Iterator[None]:
    """Turns whatever a broken file raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except StrangeTensor as error:
        raise UserError(f"{path} holds {error}, which is not supported; save it as an ordinary tensor") from error
    except UnsafePickle as error:
        raise unsafe(path, str(error)) from error
    except BadPickle as error:
        raise damaged(path, str(error)) from error
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise unsafe(path, asked[1]) from error
        raise damaged(path, f"it is not a PyTorch file ({type(error).__name__})") from error


def unsafe(path: Path, name: str) -> UserError:
    asks = f" asks for {name} and" if name else ""
    return UserError(
        f"{path} is a pickle that{asks} could run code; it is not opened; look for a .safetensors file of the model"
    )


def is_zipped(path: Path) -> bool:
    """Whether a pickle has PyTorch's newer form. UserError for files that are none."""
    with open(path, "rb") as file:
        start = file.read(64)
    check_kind(path, start)
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise UserError(f"{path} is neither a PyTorch nor a safetensors file; give a model's file or folder")
    return start[:2] == b"PK"


def scanned(path: Path, zipped: bool, harmless: Callable[[str], bool]) -> set[str]:
    """The names that a PyTorch file asks for, after a look at all that it would build: see `pickle_scan`."""
    most = MOST_PICKLE_STEPS + path.stat().st_size // FILE_BYTES_A_STEP
    if zipped:
        check_zip(path)
        content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the record that torch.load will read
        scan = Scan(BytesIO(content), most, harmless)
        scan.run()
        return scan.names
    with open(path, "rb") as file:
        scan = Scan(file, most, harmless)
        for _ in range(OLD_PICKLES):
            scan.run()
    return scan.names


def check_zip(path: Path) -> None:
    """UserError where a zipped file holds more than its own size, or a pickle too long to be read as a whole."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise damaged(path, "it is compressed, as PyTorch's files never are")
    if (total := sum(record.file_size for record in records)) > size:
        raise damaged(path, f"it has {size} bytes and claims records of {total}")
    for record in records:
        if record.filename.endswith(".pkl") and record.file_size > LONGEST_PICKLE:
            raise damaged(path, f"its pickle has {record.file_size} bytes, and at most {LONGEST_PICKLE} are read")


def check_tensors(path: Path, content: object) -> None:
    """Every tensor in a pickle's contents: UserError for kinds that are not plain numbers, and for one that shows more
    numbers than its storage holds. Together their storages are no larger than the file. Nothing is read here, and
    containers may hold themselves."""
    seen, storages, total, size = set(), set(), 0, path.stat().st_size
    waiting: list[tuple[str, object]] = [("", content)]
    while waiting:
        name, one = waiting.pop()
        if id(one) in seen:
            continue
        if isinstance(one, Tensor):
            seen.add(id(one))
            if kind := strange_kind(one):
                raise UserError(f"{path}: {name!r} is {kind}, which is not supported; save it as an ordinary tensor")
            storage = one.untyped_storage()
            total += 0 if storage.data_ptr() in storages else storage.nbytes()
            storages.add(storage.data_ptr())
            if one.numel() * one.element_size() > storage.nbytes():
                raise damaged(path, f"{name!r} of shape {list(one.shape)} shows more numbers than are stored")
            if total > size:
                raise damaged(path, f"up to {name!r} its tensors need more bytes than it has (cut short)")
        elif isinstance(one, dict | list | tuple | set):
            seen.add(id(one))
            inside: Iterable[tuple[Any, Any]] = one.items() if isinstance(one, dict) else enumerate(one)
            waiting += [(shortened(f"{name}.{key}".strip("."), 90), value) for key, value in inside]
        elif isinstance(kept := getattr(one, "tensors", None), dict):  # a stand-in's
            waiting.append((name, kept))


def strange_kind(tensor: Tensor) -> str | None:
    """What a tensor is, if not a plain array of a known type in this machine's memory."""
    if tensor.device.type != "cpu":
        return f"a tensor without numbers (device {tensor.device.type})"
    return None
