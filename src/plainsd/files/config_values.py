"""Single values of a config.json, each of them checked: what is wrong is one line that names file and setting."""

from collections.abc import Mapping
from typing import Any

from plainsd.errors import UserError
from plainsd.files.checked import MOST, WIDEST

Config = Mapping[str, Any]  # one config.json


def check_fixed(config: Config, fixed: Config, where: str) -> None:
    for name, value in fixed.items():
        found = config.get(name, value)
        if found != value and not (found in (None, False) and value in (None, False)):
            raise UserError(f"{where}: {name} is {found!r}, and only {value!r} is supported")


def setting(config: Config, name: str, where: str, default: Any = None) -> Any:
    value = config.get(name, default)
    if value is None:
        raise UserError(f"{where}: the setting {name!r} is missing; download the file again")
    return value


def whole_number(
    config: Config, name: str, where: str, default: int | None = None, most: int = WIDEST, least: int = 1
) -> int:
    value = setting(config, name, where, default)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{where}: {name} is {value!r}, and must be a whole number from {least} to {most}")
    return value


def real_number(config: Config, name: str, where: str, default: float | None, most: float = 1e3) -> float:
    value = setting(config, name, where, default)
    if type(value) not in (int, float) or not 0 < value <= most:  # nan included
        raise UserError(f"{where}: {name} is {value!r}, and must be a number above 0 and up to {most:g}")
    return float(value)


def one_of(config: Config, name: str, where: str, default: str, choices: Mapping[str, Any]) -> str:
    value = setting(config, name, where, default)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{where}: {name} {value!r} is not supported, only {', '.join(choices)}")
    return value


def wholes(
    config: Config, name: str, where: str, count: int | None = None, default: int | None = None, most: int = WIDEST
) -> tuple[int, ...]:
    """One number a level; a single number applies to all levels."""
    value = setting(config, name, where, default)
    values = value if isinstance(value, (list, tuple)) else [value] * (count or 1)
    if len(values) != (count or len(values)) or not 0 < len(values) <= MOST:
        raise UserError(f"{where}: {name} is {value!r}, and must be a number a level, of which there are {count}")
    return tuple(whole_number({name: one}, name, where, most=most) for one in values)


def divides(number: int, widths: tuple[int, ...], what: str, where: str) -> None:
    if bad := next((width for width in widths if width % number), None):
        raise UserError(f"{where}: {number} {what} do not divide a width of {bad}")
