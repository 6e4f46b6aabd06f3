"""A model's settings from JSON into our frozen dataclasses: each value is checked against the type of its field and its
bounds, and an error is one line. Lists become tuples, objects the dataclasses that fields are annotated with."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from plainsd.errors import WITH_CHOICES, UserError, unknown

TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
WIDEST, MOST = 2**20, 100  # limits of widths; of layers, levels and blocks
FEW = (0, MOST)
BOUNDS = {  # of a field's numbers, inclusive; other integers are 1 to WIDEST, other floats up to 1000
    "depth": FEW, "up_depth": FEW, "mid_depth": FEW, "layers": (1, MOST), "eos": (0, WIDEST), "eps": (1e-12, 1),
    "latents_mean": (-1e3, 1e3), "beta_start": (1e-9, 0.999), "beta_end": (1e-9, 0.999), "count": (1, 100_000),
    "guidance": (0, 100), "steps": (1, 1000), "size": (8, 4096), "sigma_max": (1e-9, 1e6),
}  # fmt: skip


def read_fields(kind: type, value: Any, where: str, at: str = "") -> Any:
    """A dataclass `kind` from a JSON object of its fields, nested ones too; missing fields keep their defaults. `where`
    begins every error message."""
    if not isinstance(value, Mapping):
        raise wrong(where, at or "the whole", value, "a table of settings")
    hints, start = typing.get_type_hints(kind), f"{at}." if at else ""
    if (strange := next((name for name in value if name not in hints), None)) is not None:  # it may be ""
        raise UserError(f"{where}: {unknown('setting', start + strange, [start + name for name in hints])}",
                        most=WITH_CHOICES)  # fmt: skip
    for field in fields(kind):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}: the setting {start + field.name!r} is missing; give it")
    return kind(**{name: read_value(hints[name], given, where, start + name) for name, given in value.items()})


def read_value(hint: Any, value: Any, where: str, at: str) -> Any:
    """A value as the type `hint`; `at` is its place, as in `unet.depth[1]`."""
    if isinstance(hint, types.UnionType):
        return read_value(_chosen(hint, value), value, where, at)
    if isinstance(hint, type) and is_dataclass(hint):
        return read_fields(hint, value, where, at)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise wrong(where, at, value, "a list")
        inner = typing.get_args(hint)[0]
        return tuple(read_value(inner, one, where, f"{at}[{i}]") for i, one in enumerate(value))
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise wrong(where, at, value, TYPE_NAMES[hint])
    if hint in (int, float):
        low, high = BOUNDS.get(at.rpartition(".")[2].partition("[")[0], (1, WIDEST) if hint is int else (1e-9, 1e3))
        if not low <= value <= high:  # nan included
            raise wrong(where, at, value, f"{TYPE_NAMES[hint]} from {low:g} to {high:g}")
    return float(value) if hint is float else value


def _chosen(union: types.UnionType, value: Any) -> Any:
    """Which type of a union the value has: None for null, the dataclass that has its names."""
    kinds = [kind for kind in union.__args__ if kind is not type(None)]
    if value is None and len(kinds) < len(union.__args__):
        return type(None)
    names = set(value) if isinstance(value, Mapping) else set()
    return max(kinds, key=lambda kind: len(names & set(typing.get_type_hints(kind))) if is_dataclass(kind) else 0)


def wrong(where: str, at: str, value: Any, must: str) -> UserError:
    return UserError(f"{where}: {at} is {value!r}, and must be {must}")
