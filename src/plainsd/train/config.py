"""A run's options as a TOML file: `plainsd train --config run.toml` reads one, and every run's folder holds one.

    method = "lora"
    data = ["pictures"]
    out = "runs/mine"
    rank = 8
    text-encoder = true

The names are those of the flags; flags on the command line take precedence, and `--no-text-encoder` there leaves out
what the file says of text-encoder. This module needs no torch.
"""

import json
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from plainsd.errors import UserError, unknown

OPTION = "--config"
NOT = "--no-"
EITHER = ("--steps", "--epochs")  # one given as a flag replaces the other in the file
LARGEST_CONFIG = 2**16  # bytes; tomllib takes time with the square of a dotted name's length


def with_config(arguments: list[str], kind: type) -> list[str]:
    """The flags from the --config file, followed by the given ones; of these --no-NAME leaves out what the file says of
    NAME. `kind`: the command's dataclass."""
    path, known = config_path(arguments), options_of(kind)
    arguments = lists_joined(arguments, {f"--{name}" for name, its in known.items() if get_args(its)[-1:] == (...,)})
    if path is None:
        return arguments
    names = {one: one.removeprefix(NOT).replace("_", "-") for one in arguments if one.startswith(NOT)}
    without = {one: name for one, name in names.items() if name in known}
    given = [one for one in arguments if one not in without]
    for one, name in without.items():
        if f"--{name}" in (argument.split("=")[0] for argument in given):
            raise UserError(f"--{name} and {one} contradict each other; leave one of them out")
    return flags_of(path, known, given, set(without.values())) + given


def lists_joined(arguments: list[str], lists: set[str]) -> list[str]:
    """Each list's flag once, with all its values: of several the parser knows only the last."""
    rest: list[str] = []
    given: dict[str, list[str]] = {}
    into = rest
    for one in arguments:
        name, equals, value = one.partition("=")
        if name in lists:
            into = given.setdefault(name, [])
            into += [value] if equals else []
        else:
            into = rest if one.startswith("--") else into
            into.append(one)
    return rest + [part for name, values in given.items() for part in (name, *values)]


def config_path(arguments: list[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument == OPTION and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if argument.startswith(f"{OPTION}="):
            return Path(argument.partition("=")[2])
    return None


def flags_of(path: Path, known: dict[str, Any], given: list[str], without: set[str]) -> list[str]:
    found = []
    for written, value in read_config(path).items():
        name = written.replace("_", "-")
        if name not in known:
            raise UserError(f"{path}: {unknown('option', written, known)}")
        if name in without:
            continue
        if f"--{name}" in EITHER and any(argument.split("=")[0] in EITHER for argument in given):
            continue
        if isinstance(value, bool) != (known[name] is bool) or not isinstance(value, (str, int, float, list)):
            wanted = "true or false" if known[name] is bool else "a number, a text, or a list of texts"
            raise UserError(f"{path}: {written} = {value!r} cannot be read; give {wanted}")
        if isinstance(value, list):
            found += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, bool):
            found += [f"--{name}"] if value else []
        else:
            found.append(f"--{name}={value}")
    return found


def read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise UserError(f"{path} has more than {LARGEST_CONFIG} bytes; give {OPTION} a TOML file of options")
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give {OPTION} a TOML file of options") from error
    except RecursionError as error:
        raise UserError(f"{path} has lists too deep inside each other; write lines such as rank = 8") from error
    except UserError:
        raise
    except ValueError as error:  # no UTF-8, or no TOML
        raise UserError(f"{path} is not a TOML file: {error}; write lines such as rank = 8") from error


def options_of(kind: type) -> dict[str, Any]:
    """Every flag of a command except --config, by name, with its type."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        inner = field.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            found |= options_of(inner)
        elif field.name != OPTION.strip("-"):
            annotated = getattr(field.type, "__origin__", None)  # bool of Annotated[bool, ...]
            found[field.name.replace("_", "-")] = bool if annotated is bool else field.type
    return found


def config_text(options: Any, comment: str) -> str:
    """Options as a config file, without those that are not set."""
    lines = [f"# {line}" for line in comment.splitlines()]

    def write(part: Any) -> None:
        for field in fields(part):
            value = getattr(part, field.name)
            if is_dataclass(value):
                write(value)
            elif value is not None and field.name != OPTION.strip("-"):
                lines.append(f"{field.name.replace('_', '-')} = {in_toml(value)}")

    write(options)
    return "\n".join(lines) + "\n"


def in_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(in_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # else TOML's strings are JSON's
