"""Rows of the database as jobs and pictures.

Anything may stand in a row: settings of another version, what a disk has damaged, what somebody has edited. So every
value is checked against the type that it has here, once, for the lists, the start and the workers alike. What does not
fit is replaced by a neutral value, and `problem` says why the row cannot be read.
"""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from plainsd.json_reader import parsed_json
from plainsd.pictures.settings import Resolved
from plainsd.pictures.texts.a1111 import format_settings
from plainsd.server.jobs.job import ACTIVE, FAILED, Job, Sheet, Source
from plainsd.server.jobs.pictures import Picture, with_lora_tags
from plainsd.text.prompts import LoraTag

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)  # what a damaged row may raise
NO_SETTINGS = Resolved(size=(8, 8), steps=1, guidance=1.0, sampler="", spacing="")  # where they cannot be read
SETTING_NAMES = {field.name for field in fields(Resolved)}

TYPED = ConfigDict(strict=True, allow_inf_nan=False, validate_default=True)  # the types, and nothing like them
COMPLETE = ConfigDict(**TYPED, extra="forbid")
STORED_SETTINGS = TypeAdapter(list[Resolved], config=TYPED)
STORED_LORAS = TypeAdapter(list[tuple[str, float, float] | tuple[str, float]], config=TYPED)
STORED_SOURCES = TypeAdapter(list[Source], config=COMPLETE)
STORED_NOTES = TypeAdapter(list[str], config=TYPED)
STORED_SHEETS = TypeAdapter(list[Sheet], config=COMPLETE)

Id = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,100}$")]
Prefix = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+/[A-Za-z0-9_-]+$")]
Count = Annotated[int, Field(ge=0)]
Time = Annotated[float, Field(ge=0, le=1e11)]  # seconds since 1970
JOB_ROW: dict[str, tuple[Any, Any]] = {  # of each column its type, and what stands for a value that has another
    "number": (int, 0), "id": (Id, ""), "client": (str, ""), "api": (str, ""), "model": (str, ""),
    "place": (Prefix, ""), "state": (str, FAILED), "error": (str | None, None), "attempts": (Count, 0),
    "created": (Time, 0.0), "started": (Time | None, None), "finished": (Time | None, None), "owner": (str, ""),
}  # fmt: skip
PICTURE_ROW: dict[str, tuple[Any, Any]] = {
    "number": (int, 0), "id": (Id, ""), "job": (Id, ""), "place": (Count, 0), "file": (str, ""), "width": (Count, 0),
    "height": (Count, 0), "created": (Time, 0.0),
}  # fmt: skip
COLUMN_READERS = {kind: TypeAdapter(kind, config=TYPED) for kind, _ in (*JOB_ROW.values(), *PICTURE_ROW.values())}


def job_of(row: sqlite3.Row, drawn: Iterable[tuple[Any, Any]]) -> Job:
    """A row as an object. `drawn`: the places of its pictures that were drawn, and whether they were deleted since."""
    known, problem = columns_of(row, JOB_ROW)
    more: dict[str, Any] = {"settings": [NO_SETTINGS]}
    try:
        active = known["state"] in ACTIVE
        settings = [settings_from(one, strict=active) for one in parsed_json(row["pictures"])]
        if not settings:
            raise ValueError("it has no pictures")
        for one in settings if active else ():
            format_settings(one)  # as it is written into its picture
        more = {
            "settings": settings,
            "loras": loras_from(row["loras"]),
            "source": as_typed(STORED_SOURCES, [parsed_json(row["source"])])[0] if row["source"] else None,
            "notes": as_typed(STORED_NOTES, parsed_json(row["notes"])),
            "sheet": as_typed(STORED_SHEETS, [parsed_json(row["sheet"])])[0] if row["sheet"] else None,
        }
    except UNREADABLE as error:
        problem = problem or error_summary(error)
    job = Job(path_prefix=known.pop("place"), **known, **more)
    if problem:
        job.problem = f"its row in the database cannot be read ({problem})"
    places = [(index, gone) for index, gone in drawn if isinstance(index, int) and (problem or index in job.indices)]
    job.done, job.deleted = {index for index, _ in places}, {index for index, gone in places if gone}
    return job


def picture_of(row: sqlite3.Row) -> Picture:
    """Likewise."""
    known, problem = columns_of(row, PICTURE_ROW)
    settings, loras = NO_SETTINGS, []
    try:
        found = settings_from(parsed_json(row["settings"]))
        tags = loras_from(row["loras"])
        format_settings(with_lora_tags(found, tags))  # as the lists show it
        settings, loras = found, tags
    except UNREADABLE as error:
        problem = problem or error_summary(error)
    why = f"its settings in the database cannot be read ({problem})" if problem else None
    index, favourite = known.pop("place"), bool(row["favourite"])
    return Picture(**known, index=index, favourite=favourite, settings=settings, loras=loras, problem=why)


def columns_of(row: sqlite3.Row, columns: dict[str, tuple[Any, Any]]) -> tuple[dict[str, Any], str | None]:
    """The values of these columns, and what is wrong with the first that has none of its type. A row without a usable
    id gets one that no other has."""
    found, problem = {}, None
    for name, (kind, neutral) in columns.items():
        try:
            found[name] = COLUMN_READERS[kind].validate_python(row[name])
        except ValidationError as error:
            found[name] = neutral
            problem = problem or f"{name}: {error_summary(error)}"
    if not found["id"]:
        found["id"] = f"row-{found['number']}"
    return found, problem


def as_typed(reader: TypeAdapter, value: Any) -> Any:
    """A value of JSON in its type, its lists as tuples where the type has them. ValidationError."""
    return reader.validate_json(json.dumps(value))


def loras_from(text: str) -> list[LoraTag]:
    """Older versions had one strength. Raises one of UNREADABLE."""
    return [LoraTag(name, both[0], both[-1]) for name, *both in as_typed(STORED_LORAS, parsed_json(text))]


def settings_from(data: dict, *, strict: bool = False) -> Resolved:
    """The inverse of `asdict` and JSON. Fields unknown to this version go to `other`; if strict, they are an error,
    because they would have no effect. Raises one of UNREADABLE."""
    foreign = {name: value for name, value in data.items() if name not in SETTING_NAMES}
    if foreign and strict:
        raise ValueError(f"it is of another version, which knows {next(iter(foreign))!r}")
    (settings,) = as_typed(STORED_SETTINGS, [{name: value for name, value in data.items() if name in SETTING_NAMES}])
    pairs = tuple((name, json.dumps(value)) for name, value in foreign.items())
    return replace(settings, other=(*settings.other, *pairs)) if pairs else settings


def error_summary(error: Exception) -> str:
    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        names = ".".join(str(part) for part in first["loc"][1:])  # but the index in a list of one
        text = f"{names}: {first['msg'].lower()}" if names else first["msg"].lower()
    return " ".join(text.split())[:120]
