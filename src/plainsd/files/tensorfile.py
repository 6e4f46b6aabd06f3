"""Files of named tensors: safetensors read and written one tensor at a time, and the tensors of PyTorch's pickles.

A safetensors file is eight bytes with the length of a header, the header (JSON: name -> dtype, shape, two offsets), and
the tensors' bytes. Our own reader keeps a few tensors in memory; the library's memory map counts as the whole file.
"""

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plainsd.errors import UserError, shortened
from plainsd.files.pickles import unpickled
from plainsd.files.unusable import check_kind, damaged
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
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
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


MOST_WRAPPERS = 8  # state_dict inside state_dict
LONGEST_TENSOR_NAME = 1000  # characters of a tensor's


def open_pickle(path: Path) -> TensorFile:
    """A .ckpt, .bin or .pt: tensors by name, perhaps under `state_dict`, or in groups, as `image_proj` and `ip_adapter`
    are; then the names have the group's before them. Only plain data is ever unpickled."""
    content = unpickled(path)
    for _ in range(MOST_WRAPPERS):  # a dict may hold itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    table = content if isinstance(content, dict) else {}
    tensors = tensors_by_name(path, table)
    for group, inside in table.items() if not tensors else ():
        if isinstance(inside, dict) and (named := tensors_by_name(path, inside)):
            group = readable_name(path, group)
            tensors |= {f"{group}.{name}": tensor for name, tensor in named.items()}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; it is not a checkpoint")
    if unknown := next(((name, one.dtype) for name, one in tensors.items() if one.dtype not in DTYPE_NAMES), None):
        name, kind = unknown
        raise UserError(f"{path}: {shortened(name, 90)!r} has the type {kind}, which is not supported; "
                        "give the model in another precision")  # fmt: skip
    return TensorFile(path, tensors, {})


def tensors_by_name(path: Path, table: Mapping[Any, object]) -> dict[str, Stored]:
    found = ((name, value) for name, value in table.items() if isinstance(value, Tensor))
    return {readable_name(path, name): stored(value, copy=True) for name, value in found}


def readable_name(path: Path, key: object) -> str:
    name = str(key)
    if len(name) > LONGEST_TENSOR_NAME:
        raise damaged(path, f"it has a name of {len(name)} characters")
    return name


def stored(tensor: Tensor, *, copy: bool = False) -> Stored:
    """A Stored for a tensor in memory; `copy` where that is a file's, mapped: the file may be overwritten later."""
    return Stored(tensor.dtype, tuple(tensor.shape), lambda dtype=None: tensor.to(dtype or tensor.dtype, copy=copy))


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
        if (twice := next((name for name in file.tensors if name in tensors), None)) is not None:
            raise UserError(f"{file.path}: {twice!r} is in another file of the same model too; download them again")
        tensors |= file.tensors
    return TensorFile(files[0].path, tensors, files[0].metadata)
