"""How the command line reads numbers and switches, for the dataclasses of options that tyro parses."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

Switch = Annotated[bool, arg(help_behavior_hint="")]  # off unless given, which help does not repeat


def flag(metavar: str | None = None, name: str | None = None):
    return arg(metavar=metavar, name=name, help_behavior_hint=default_hint)


def default_hint(default: str) -> str:
    return "" if default in ("", "None", "''") else f"(default: {default})"


NUMBERS = {int: "a whole number", float: "a number"}


def number_registry() -> ConstructorRegistry:
    """tyro's rules, but numbers and fixed tuples of them, or None, are read by `numbers_rule`."""
    registry = ConstructorRegistry()
    registry.primitive_rule(numbers_rule)
    return registry


def numbers_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """For int, float, tuples such as tuple[int, int], and any of them or None; None for other types."""
    kind: Any = info.type
    if get_origin(kind) in (Union, UnionType):
        options = [one for one in get_args(kind) if one is not type(None)]
        kind = options[0] if len(options) == 1 else None
    kinds = get_args(kind) if get_origin(kind) is tuple else (kind,)
    if not kinds or any(one not in NUMBERS for one in kinds):
        return None
    return number_spec(kinds, one=get_origin(kind) is not tuple)


def number_spec(kinds: tuple[type, ...], *, one: bool = False) -> PrimitiveConstructorSpec:
    """Exactly so many numbers: as a tuple or, where there is one, by itself."""
    readers = [number_reader(kind) for kind in kinds]

    def read(texts: list[str]) -> Any:
        values = tuple(reader(text) for reader, text in zip(readers, texts, strict=True))
        return values[0] if one else values

    def write(value: Any) -> list[str]:
        return [] if value is None else [str(value)] if one else [str(part) for part in value]

    return PrimitiveConstructorSpec(
        nargs=len(kinds),
        metavar=" ".join(kind.__name__.upper() for kind in kinds),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple(NUMBERS) if one else tuple),
        str_from_instance=write,
    )


def number_reader(kind: type) -> Callable[[str], Any]:
    """Text to a number. ValueError names the text and what is expected."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {NUMBERS[kind]}") from None

    return read
