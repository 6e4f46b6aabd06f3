"""Files of named tensors: safetensors read and written one tensor at a time, and PyTorch pickles read safely.

A safetensors file is eight bytes with the length of a header, the header (JSON: name -> dtype, shape, two offsets), and
the tensors' bytes. Our own reader keeps a few tensors in memory; the library's memory map counts as the whole file.
"""

import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plainsd.errors import UserError, shortened
from plainsd.json_reader import LONGEST_JSON, BadJSON, parsed_json
from plainsd.listing import suffix_of

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
HEADER_LIMIT = LONGEST_JSON  # bytes; the largest known have a few millions, the format allows 100
MOST_DIMENSIONS, MOST_NUMBERS = 64, 2**56  # of a tensor
WINDOW = 2**26  # bytes of a file that stay mapped after reading


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet. `read()` returns it unchanged, `read(dtype)` casts while reading."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[..., Tensor]
    foreign: tuple[str, tuple[int, ...]] | None = (
        None  # an unsupported dtype and the shape: copied as bytes, never cast
    )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


NOT_WEIGHTS = {  # first bytes of files that are no weights, and what to do
    b"version https://git-lfs": "is a Git LFS pointer and holds no weights; run `git lfs pull` there, or download it",
    b"gguf": "is a GGUF file, whose weights are quantised for other programs; give the model as .safetensors",
    b"<!doctype html": "is a web page, not a model; the download went wrong, or asks for a login: download it again",
    b"<html": "is a web page, not a model; the download went wrong, or asks for a login: download it again",
}


def check_kind(path: Path, head: bytes) -> None:
    """UserError for files that are neither safetensors nor PyTorch's, by their first bytes."""
    if what := next((what for begins, what in NOT_WEIGHTS.items() if head.lstrip().lower().startswith(begins)), None):
        raise UserError(f"{path} {what}")


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; download or save it again")


def read_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file, and the offset of the tensors' bytes."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            check_kind(path, file.read(64))
            file.seek(0)
            start = file.read(8)
            if len(start) < 8:
                raise damaged(path, f"it has only {size} bytes")
            (length,) = struct.unpack("<Q", start)
            if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and length > HEADER_LIMIT):  # PyTorch's, new, old
                raise UserError(f"{path} is a pickle, not safetensors; give it the ending .ckpt, or download it again")
            if length > min(size - 8, HEADER_LIMIT):
                raise damaged(path, f"it has {size} bytes and claims a header of {length}")
            header = parsed_json(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except BadJSON as error:
        raise damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a table of names")
    return header, 8 + length


def check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and the two offsets of one tensor, which must agree with each other."""
    name = shortened(name, 90)
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        if not isinstance(dtype, str) or len(dtype) > 32 or len(shape) > MOST_DIMENSIONS:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(path, f"the header's entry for {name!r} is incomplete") from error
    possible = numbers and math.prod(max(side, 1) for side in shape) <= MOST_NUMBERS  # torch's limit, empty or not
    itemsize = STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else None
    if not possible or begin > end or (itemsize and end - begin != math.prod(shape) * itemsize):
        raise damaged(path, f"{name!r} of shape {list(shape)} and type {dtype} cannot fill bytes {begin} to {end}")
    return dtype, shape, begin, end


def unread(path: Path, name: str, kind: str, pages: "_Pages", start: int, size: int) -> Callable[..., Tensor]:
    """The reader of a tensor of an unsupported dtype: its raw bytes, for copying."""

    def read(dtype: torch.dtype | None = None) -> Tensor:
        if dtype not in (None, torch.uint8):
            raise UserError(
                f"{path}: {shortened(name, 90)!r} has the type {kind!r}, which is not supported; known: "
                f"{', '.join(STORED_DTYPES)}; give the model in another precision"
            )
        return pages.read(start, torch.uint8, (size,))

    return read


def open_safetensors(path: Path) -> TensorFile:
    """Reads and checks the header: all tensors lie inside the file, do not overlap, and cover every byte."""
    header, base = read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged(path, "its metadata is not a table of names")
    entries = {name: check_entry(path, name, entry) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise damaged(path, f"{shortened(name, 90)!r} begins at byte {begin} where byte {at} is due")
        at = end
    size = path.stat().st_size - base
    if at != size:
        raise damaged(path, f"its tensors need {at} bytes and it has {size}" + (" (cut short)" if at > size else ""))
    pages = _Pages(path)
    tensors = {}
    for name, (kind, shape, begin, end) in entries.items():
        if kind in STORED_DTYPES:
            tensors[name] = Stored(
                STORED_DTYPES[kind], shape, partial(pages.read, base + begin, STORED_DTYPES[kind], shape)
            )
        else:
            bare = unread(path, name, kind, pages, base + begin, end - begin)
            tensors[name] = Stored(torch.uint8, (end - begin,), bare, foreign=(kind, shape))
    return TensorFile(path, tensors, {str(key): str(value) for key, value in metadata.items()})


class _Pages:
    """A file's bytes, mapped at the first read, so that casting copies them once. Pages that were read count as memory
    of the process, so they are released every WINDOW bytes."""

    def __init__(self, path: Path):
        self.path, self.passed = path, 0
        self.map: mmap.mmap | None = None

    def read(self, start: int, dtype: torch.dtype, shape: tuple[int, ...], wanted: torch.dtype | None = None) -> Tensor:
        count = math.prod(shape) * dtype.itemsize
        self.make_room(start, count)
        part = self.bytes[start : start + count]
        part = part if start % dtype.itemsize == 0 else part.clone()  # no number may straddle the border
        return part.view(dtype).view(shape).to(wanted or dtype, copy=True)

    def make_room(self, start: int, count: int) -> None:
        if self.map is None:
            with open(self.path, "rb") as file, warnings.catch_warnings(action="ignore"):  # of bytes that are read only
                if os.fstat(file.fileno()).st_size:  # an empty file can't be mapped
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    self.bytes, self.map = torch.frombuffer(mapped, dtype=torch.uint8), mapped
        if self.map is None or self.map.size() < start + count:
            raise damaged(self.path, "it became shorter while it was read")
        self.passed += count
        if self.passed > WINDOW and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
            self.passed = count


def header_bytes(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """The header with its length, as bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name, stored in tensors.items():
        end = at + stored.nbytes
        kind, shape = stored.foreign or (DTYPE_NAMES[stored.dtype], stored.shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] = {}) -> None:
    """Writes tensors one at a time, in the order given, into `path` itself: see `plainsd.disk`."""
    with open(path, "wb") as file:
        file.write(header_bytes(tensors, metadata))
        for stored in tensors.values():
            tensor = stored.read().detach().cpu().contiguous()
            if tensor.numel():
                file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))


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
MOST_WRAPPERS = 8  # state_dict inside state_dict
PICKLE_LIMIT = 2**27  # bytes without the tensors'


def unpickled(path: Path, stand_ins: Iterable[tuple[type, str]] = ()) -> object:
    """The contents of a PyTorch pickle, if they are plain data and tensors; other classes only if they are in
    `stand_ins`, which maps names to classes of ours, or match HARMLESS."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        check_kind(path, start)
        if start[:2] != b"PK" and start[:1] != b"\x80":
            raise UserError(f"{path} is neither a PyTorch nor a safetensors file; give a model's file or folder")
        zipped = start[:2] == b"PK"
        if zipped:
            check_zip(path)
        content = _loaded(path, list(stand_ins), mapped=zipped)  # only the newer, zipped files can be mapped
        check_tensors(path, content)
        return content
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a broken file can raise anything
        asked = re.search(r"GLOBAL (\S+)|nsupported operand \d+", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            name = f" asks for {asked[1]} and" if asked[1] else ""
            raise UserError(
                f"{path} is a pickle that{name} could run code; it is not opened; look for a .safetensors "
                "file of the model"
            ) from error
        raise damaged(path, f"it is not a PyTorch file ({type(error).__name__})") from error


def _loaded(path: Path, allowed: list[tuple[type, str]], *, mapped: bool) -> object:
    """torch.load with weights_only, allowing harmless names as it asks for them."""
    while True:
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
                return torch.load(path, mmap=mapped, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if not asked or not HARMLESS.fullmatch(asked[1]) or len(allowed) > MOST_NAMES:
                raise
            allowed = [*allowed, (IgnoredTable if "dict" in asked[1].lower() else Ignored, asked[1])]


def check_zip(path: Path) -> None:
    """UserError where a zipped file holds more than its own size, or a pickle of more than PICKLE_LIMIT: that pickle is
    read as a whole, and its objects take many times its length."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise damaged(path, "it is compressed, as PyTorch's files never are")
    if (total := sum(record.file_size for record in records)) > size:
        raise damaged(path, f"it has {size} bytes and claims records of {total}")
    for record in records:
        if record.filename.endswith(".pkl") and record.file_size > PICKLE_LIMIT:
            raise damaged(path, f"its pickle has {record.file_size} bytes, and at most {PICKLE_LIMIT} are read")


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
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "a sparse or nested tensor"
    if tensor.device.type != "cpu":
        return f"a tensor without numbers (device {tensor.device.type})"
    return None


def open_pickle(path: Path) -> TensorFile:
    """A .ckpt, .bin or .pt: tensors by name, perhaps under `state_dict`, or in groups, as `image_proj` and `ip_adapter`
    are; then the names have the group's before them. Only plain data is ever unpickled."""
    content = unpickled(path)
    for _ in range(MOST_WRAPPERS):  # a dict may hold itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    table = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): stored(value) for name, value in table if isinstance(value, Tensor)}
    if not tensors:
        groups = [(name, value) for name, value in table if isinstance(value, dict)]
        inside = [(f"{group}.{name}", value) for group, named in groups for name, value in named.items()]
        tensors = {name: stored(value) for name, value in inside if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; it is not a checkpoint")
    if unknown := next(((name, one.dtype) for name, one in tensors.items() if one.dtype not in DTYPE_NAMES), None):
        name, kind = unknown
        raise UserError(f"{path}: {shortened(name, 90)!r} has the type {kind}, which is not supported; "
                        "give the model in another precision")  # fmt: skip
    return TensorFile(path, tensors, {})


def stored(tensor: Tensor) -> Stored:
    """A Stored for a tensor in memory."""
    return Stored(tensor.dtype, tuple(tensor.shape), lambda dtype=None: tensor.to(dtype or tensor.dtype))


def open_tensors(path: Path) -> TensorFile:
    """Opens a file by its content; a pickle only if its suffix says so."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return open_safetensors(path) if suffix_of(path) == ".safetensors" or start[8:] == b"{" else open_pickle(path)


def joined_files(files: Iterable[TensorFile]) -> TensorFile:
    """Several files as one: the shards of a network."""
    files = list(files)
    tensors: dict[str, Stored] = {}
    for file in files:
        if twice := next((name for name in file.tensors if name in tensors), None):
            raise UserError(f"{file.path}: {twice!r} is in another file of the same model too; download them again")
        tensors |= file.tensors
    return TensorFile(files[0].path, tensors, files[0].metadata)
