"""Pictures of the history: rows, file names, and (de)serialized settings."""

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType

from plainsd.json_reader import parsed_json
from plainsd.pictures.settings import RANGES, ControlNote, ImagePromptNote, Resolved, plain_number

SAFE_INTEGER = 2**53 - 1  # JavaScript's


@dataclass(frozen=True)
class Picture:
    """One row of the history."""

    number: int  # increasing; the newest has the highest
    id: str
    job: str
    index: int  # in its job
    file: str  # below the data folder
    width: int
    height: int
    settings: Resolved
    loras: list[tuple[str, float]]
    created: float
    favourite: bool = False
    problem: str | None = None  # why its settings cannot be read


UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)  # what a damaged row may raise
NO_SETTINGS = Resolved(size=(8, 8), steps=1, guidance=1.0, sampler="", spacing="")  # where they cannot be read
SETTINGS = {field.name for field in fields(Resolved)}


def settings_from(data: dict, *, strict: bool = False) -> Resolved:
    """The inverse of `asdict` and JSON. Fields unknown to this version go to `other`; if strict, they are an error,
    because they would have no effect. Raises one of UNREADABLE."""
    tuples = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    pairs = {name: tuple(map(tuple, data.get(name, ()))) for name in ("hashes", "other")}
    foreign = {name: value for name, value in data.items() if name not in SETTINGS}
    if foreign and strict:
        raise ValueError(f"it is of another version, which knows {next(iter(foreign))!r}")
    pairs["control"] = tuple(ControlNote(*one)._replace(kinds=tuple(one[-1])) for one in data.get("control", ()))
    pairs["image_prompt"] = tuple(ImagePromptNote(*one) for one in data.get("image_prompt", ()))
    pairs["other"] += tuple((name, json.dumps(value)) for name, value in foreign.items())
    settings = Resolved(**{name: value for name, value in {**data, **tuples, **pairs}.items() if name in SETTINGS})
    for name in ("prompt", "negative", "sampler", "spacing"):
        if not isinstance(getattr(settings, name), str):
            raise TypeError(f"{name} is not a text")
    for name in RANGES:
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else (value,):
            if not isinstance(one, (int, float, NoneType)):
                raise TypeError(f"{name} is not a number")
    return settings


def loras_from(text: str) -> list[tuple[str, float]]:
    return [(str(name), float(strength)) for name, strength in parsed_json(text)]


def error_summary(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def with_lora_tags(settings: Resolved, loras: Sequence[tuple[str, float]]) -> Resolved:
    """As written into a picture: LoRAs as tags in the prompt, where other programs expect them."""
    tags = [f"<lora:{name}:{plain_number(strength)}>" for name, strength in loras]
    return replace(settings, prompt=" ".join(filter(None, [settings.prompt, *tags])))


def new_id() -> str:
    return secrets.token_hex(8)


def new_path_prefix(prompt: str, id: str, created: float) -> str:
    """`2026-05-14/153012-a-red-apple-1f0c...`: only letters and digits of the prompt are used."""
    when = time.localtime(created)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower().encode("ascii", "ignore").decode())[:40].strip("-")
    return "-".join(part for part in (time.strftime("%Y-%m-%d/%H%M%S", when), slug, id) if part)


def json_seed(seed: int) -> int | str:
    """A seed beyond JavaScript's safe integers is sent as a string."""
    return seed if seed <= SAFE_INTEGER else str(seed)
