"""Pickles within bounds: what a pickle would build is counted before PyTorch builds it.

A pickle is a program for a machine with a stack. PyTorch's reader with `weights_only` runs no code of the file, but has
no bounds: an empty set is one byte of a file and 216 of memory; a tuple of a tuple twice, and so on n times, takes 2**n
steps to hash as a key; `bytearray` of a number takes as many bytes. Here the same program runs with sizes in the place
of objects. It counts its steps; an object that is used again counts as all that is in it.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickle import (
    APPEND,
    APPENDS,
    BINFLOAT,
    BINGET,
    BININT,
    BININT1,
    BININT2,
    BINPERSID,
    BINPUT,
    BINUNICODE,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_SET,
    EMPTY_TUPLE,
    GLOBAL,
    LONG1,
    LONG_BINGET,
    LONG_BINPUT,
    MARK,
    NEWFALSE,
    NEWOBJ,
    NEWTRUE,
    NONE,
    PROTO,
    REDUCE,
    SETITEM,
    SETITEMS,
    SHORT_BINSTRING,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
    TUPLE3,
)
from typing import BinaryIO, Literal

LONGEST_PICKLE = 2**25  # bytes without the tensors'; the longest known have about a million
MOST_PICKLE_STEPS = 2**20  # about 50 a tensor: 20,000 tensors. A step takes up to 250 bytes of memory
FILE_BYTES_A_STEP = 2**12  # a file of this many bytes may take one step more: optimizer states of large models
MOST_TUPLE_DEPTH = 100  # tuples in tuples, each of which a hash takes from C's stack
MOST_LONG = 10_000  # integers of more than 4 bytes: these can be chosen so that all have the same hash
LONGEST_CLASS_NAME = 1000  # bytes of a module's or a class's name


class BadPickle(ValueError):
    """The pickle is beyond a bound. The message is the reason, a part of a line."""


class UnsafePickle(BadPickle):
    """The pickle asks for something else than plain data. The message is the name of it, or empty."""


class StrangeTensor(BadPickle):
    """The message is the kind."""


# Calls that only look at a storage or at another tensor, and copy nothing
REBUILDS = frozenset(
    f"torch._utils._rebuild_{name}"
    for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "meta_tensor_no_storage",
                 "wrapper_subclass")
) | {"torch.nn.parameter.Parameter", "torch.serialization._get_layout"}  # fmt: skip
WITH_STATE = {"torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"}
COPIES = {"collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.bytearray", "builtins.complex",
          "torch.Size", "torch.device"}  # fmt: skip
STRANGE = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse or nested tensor",
    "torch._utils._rebuild_nested_tensor": "a sparse or nested tensor",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device that is not here",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device that is not here",
}

CONSTANTS = {NONE: 0, NEWTRUE: 0, NEWFALSE: 0, BINFLOAT: 8}  # and the bytes that follow
SHORT_INTEGERS = {BININT: "<i", BININT1: "<B", BININT2: "<H"}
LENGTHS = {BINUNICODE: "<I", SHORT_BINSTRING: "<B", LONG1: "<B"}
PLACES = {BINPUT: "<B", LONG_BINPUT: "<I", BINGET: "<B", LONG_BINGET: "<I"}
TUPLES = {EMPTY_TUPLE: 0, TUPLE1: 1, TUPLE2: 2, TUPLE3: 3}


@dataclass(slots=True)
class Made:
    """What stands for an object: its size, as the number of objects in it, and what calls need to know of it."""

    kind: Literal["value", "name", "tuple", "container", "object"] = "value"
    size: int = 1
    depth: int = 0  # of tuples in tuples
    value: int | bytes | str | None = None  # a number, a short text, a name
    items: tuple["Made", ...] = ()  # a tuple's


def total_size(items: tuple[Made, ...] | list[Made]) -> int:
    return sum(one.size for one in items)


class Scan:
    """Runs pickles of a file, one after the other. `harmless`: the names that get a stand-in, whatever they are called
    with. Raises BadPickle; on bytes that are no pickle also IndexError and the like."""

    def __init__(self, file: BinaryIO, most: int, harmless: Callable[[str], bool]):
        self.file, self.most, self.harmless = file, most, harmless
        self.left, self.steps, self.long = LONGEST_PICKLE, 0, 0
        self.names: set[str] = set()  # of all classes and functions

    def run(self) -> None:
        """One pickle."""
        self.stack: list[Made] = []
        self.marks: list[list[Made]] = []
        self.memo: dict[int, Made] = {}
        while (code := self.read(1)) != STOP:
            self.count(1)
            self.step(code)

    def read(self, length: int) -> bytes:
        self.left -= length
        if self.left < 0:
            raise BadPickle(f"its pickle has more than {LONGEST_PICKLE} bytes without its tensors")
        data = self.file.read(length)
        if len(data) < length:
            raise BadPickle("its pickle is cut short")
        return data

    def number(self, form: str) -> int:
        (number,) = struct.unpack(form, self.read(struct.calcsize(form)))
        return number

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most:
            raise BadPickle(f"its pickle would build more than {self.most} objects")

    def step(self, code: bytes) -> None:
        stack = self.stack
        if code in PLACES:
            place = self.number(PLACES[code])
            if code in (BINPUT, LONG_BINPUT):
                self.memo[place] = stack[-1]
            else:
                self.count(self.memo[place].size)
                stack.append(self.memo[place])
        elif code in CONSTANTS:
            self.read(CONSTANTS[code])
            stack.append(Made())
        elif code in SHORT_INTEGERS:
            stack.append(Made(value=self.number(SHORT_INTEGERS[code])))
        elif code in LENGTHS:
            stack.append(self.text(code))
        elif code in TUPLES:
            count = TUPLES[code]
            items = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            stack.append(self.tuple_of(items, count))
        elif code == MARK:
            self.marks.append(stack)
            self.stack = []
        elif code == TUPLE:
            items = self.above_mark()
            self.stack.append(self.tuple_of(items, len(items)))
        elif code in (APPENDS, SETITEMS):
            items = self.above_mark()
            self.stack[-1].size += total_size(items)
        elif code in (APPEND, SETITEM):
            items = [stack.pop() for _ in range(1 if code == APPEND else 2)]
            stack[-1].size += total_size(items)
        elif code in (EMPTY_LIST, EMPTY_DICT, EMPTY_SET):
            stack.append(Made("container"))
        elif code in (REDUCE, NEWOBJ):
            args, function = stack.pop(), stack.pop()
            stack.append(self.called(function, args))
        elif code == BINPERSID:  # a storage
            stack[-1] = Made("object")
        elif code == BUILD:
            self.count(stack.pop().size)
        elif code == GLOBAL:
            stack.append(self.named())
        elif code == PROTO:
            self.read(1)
        else:  # PyTorch reads no others
            raise UnsafePickle("")

    def above_mark(self) -> list[Made]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def text(self, code: bytes) -> Made:
        """A text, bytes, or a long integer."""
        length = self.number(LENGTHS[code])
        data = self.read(length)
        if code != LONG1:
            return Made(size=1 + length // 64, value=data if length < 16 else None)
        self.long += length > 4
        if self.long > MOST_LONG:
            raise BadPickle(f"its pickle has more than {MOST_LONG} long integers")
        return Made(value=int.from_bytes(data, "little", signed=True))

    def tuple_of(self, items: list[Made], count: int) -> Made:
        if len(items) < count:
            raise BadPickle("its pickle takes more than is there")
        depth = 1 + max((one.depth for one in items), default=0)
        if depth > MOST_TUPLE_DEPTH:
            raise BadPickle(f"its pickle has tuples more than {MOST_TUPLE_DEPTH} deep inside each other")
        return Made("tuple", 1 + total_size(items), depth, items=tuple(items))

    def named(self) -> Made:
        lines = [self.file.readline(LONGEST_CLASS_NAME) for _ in range(2)]
        if not all(line.endswith(b"\n") for line in lines):
            raise BadPickle(f"its pickle has a name of more than {LONGEST_CLASS_NAME} bytes")
        self.left -= sum(map(len, lines))
        module, name = (line[:-1].decode() for line in lines)
        self.names.add(full := f"{'builtins' if module == '__builtin__' else module}.{name}")
        return Made("name", value=full)

    def called(self, function: Made, args: Made) -> Made:
        """The result of a call, whose cost is counted."""
        if function.kind != "name" or args.kind != "tuple":
            raise UnsafePickle("")
        name, items = str(function.value), args.items
        if name in WITH_STATE and len(items) == 4:
            self.count(items[3].size)
            if name not in REBUILDS:  # function, class, its arguments, state
                return self.called(items[0], items[2])
        if name in REBUILDS or self.harmless(name) or (not items and name.endswith("Tensor")):
            return Made("object")
        if name in COPIES and all(one.kind in ("value", "tuple", "container") for one in items):
            copied = sum(abs(one.value) if isinstance(one.value, int) else one.size for one in items)
            self.count(copied)
            return Made("container", 1 + copied, args.depth)
        if name == "_codecs.encode" and len(items) == 2 and items[1].value in (b"latin1", b"latin-1"):
            return Made(size=items[0].size)  # how bytes are written; other codecs can make them longer
        raise StrangeTensor(STRANGE[name]) if name in STRANGE else UnsafePickle(name)
