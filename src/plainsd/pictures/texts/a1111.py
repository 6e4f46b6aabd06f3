"""Settings as AUTOMATIC1111's web UI writes them, and most tools read them: what stands in a PNG under `parameters`.

a red apple
Negative prompt: blurred
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: emoji, Version: plainsd 0.1.0
"""

import json
import re
from dataclasses import replace
from typing import Any

from plainsd import __version__
from plainsd.errors import UserError
from plainsd.pictures.settings import DEFAULTS, Settings, plain_number
from plainsd.pictures.texts.fields import FIELDS, read_size
from plainsd.pictures.texts.labels import SAMPLER_LABELS, SPACING_LABELS, SUFFIXES, sampler_label, spacing_label

HASHES = {"model": "Model hash", "vae": "VAE hash"}  # A1111's keys for one ...
SEVERAL = {"lora:": "Lora hashes", "embed:": "TI hashes"}  # ... and for "name: hash, name: hash"
ALWAYS = ("seed",)  # written even where they have their default value


def quote(text: str) -> str:
    """A value with a comma, a colon, a quote or a line break is written as a JSON string; others bare."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def unquote(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:  # another program's bare value that starts with a quote
        return text


def format_settings(settings: Settings) -> str:
    """Settings -> A1111's text, three parts: the prompt, the negative prompt, one line of `key: value`."""
    entries = []
    for key, name, _, write in FIELDS:
        value = getattr(settings, name)
        if value != DEFAULTS[name] or name in ALWAYS:
            entries.append(f"{key}: {quote(write(value))}")
    sampler = sampler_label(settings.sampler) if settings.sampler else None
    if settings.spacing in SUFFIXES:
        sampler = f"{sampler} {spacing_label(settings.spacing)}"
    elif settings.spacing:
        entries.insert(1, f"Schedule type: {spacing_label(settings.spacing)}")
    if sampler:
        entries.insert(1, f"Sampler: {sampler}")
    entries += _hash_entries(settings.hashes)
    entries.append(f"Version: plainsd {__version__}")
    parts = [settings.prompt] if settings.prompt else []
    parts += [f"Negative prompt: {settings.negative}"] if settings.negative else []
    return "\n".join([*parts, ", ".join(entries)])


def _hash_entries(hashes: tuple[tuple[str, str], ...]) -> list[str]:
    entries = [f"{key}: {dict(hashes)[name]}" for name, key in HASHES.items() if name in dict(hashes)]
    for kind, key in SEVERAL.items():
        if pairs := [f"{name.removeprefix(kind)}: {value}" for name, value in hashes if name.startswith(kind)]:
            entries.append(f"{key}: {quote(', '.join(pairs))}")
    return entries


ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def _sampler(said: dict[str, str]) -> dict[str, str | None]:
    """ "DPM++ 2M Karras", or "DPM++ 2M" beside "Schedule type: Karras" -> our two names. A stranger's name stays."""
    name, schedule = said.pop("Sampler", None), said.pop("Schedule type", "Automatic")
    spacing: str | None = {label: ours for ours, label in SPACING_LABELS.items()}.get(schedule)
    if spacing is None and re.fullmatch(r"[a-z]\w*", schedule):  # one of ours that A1111 has no label for
        spacing = schedule
    elif spacing is None and schedule != "Automatic":
        said["Schedule type"] = schedule
    for suffix in SUFFIXES:
        if name and name.endswith(" " + SPACING_LABELS[suffix]):
            name, spacing = name.removesuffix(" " + SPACING_LABELS[suffix]), suffix
    sampler = {label: ours for ours, label in SAMPLER_LABELS.items()}.get(name, name) if name else None
    return {"sampler": sampler, "spacing": spacing}


def _hires(said: dict[str, str]) -> None:
    """A1111's "Hires resize: 1024x1024", one side perhaps 0, as the times that the picture is enlarged."""
    try:
        ratios = {
            to / side for to, side in zip(read_size(said["Hires resize"]), read_size(said["Size"]), strict=True) if to
        }
    except (KeyError, ValueError, ZeroDivisionError):
        return
    if len(ratios) == 1:  # another shape stays among what has no meaning here
        said["Hires upscale"] = plain_number(ratios.pop())
        del said["Hires resize"]


def _hashes(said: dict[str, str]) -> tuple[tuple[str, str], ...]:
    found = [(name, said.pop(key)) for name, key in HASHES.items() if key in said]
    for kind, key in SEVERAL.items():
        pairs = [pair.rpartition(": ") for pair in said.pop(key, "").split(", ") if ": " in pair]
        found += [(kind + name, value) for name, _, value in pairs]
    return tuple(found)


def parse_settings(text: str) -> Settings:
    """A1111's text -> Settings; what has no meaning here is kept in `other`. UserError where this is no such text."""
    *lines, last = text.rstrip("\n").split("\n")
    said = {key: unquote(value.strip()) for key, value in ENTRY.findall(last)}
    if len(said) < 3:  # A1111's own rule: fewer, and the line belongs to the prompt
        raise UserError(f"no settings in the text {last[:60]!r}; its last line should read 'Steps: 20, Sampler: ...'")
    _hires(said)
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    found: dict[str, Any] = {
        "prompt": "\n".join(lines[:negative]),
        "negative": "\n".join(lines[negative:]).removeprefix("Negative prompt:").removeprefix(" "),
        **_sampler(said),
        "hashes": _hashes(said),
    }
    for key, name, read, _ in FIELDS:
        if key in said:
            try:
                found[name] = read(said.pop(key))
            except ValueError as error:
                raise UserError(f"settings text: {key!r} has a value that cannot be read ({error})") from None
    if found.get("guidance") == 0:  # off is written as 1 here, so this is A1111's 0
        found["like"] = "a1111"
    return replace(Settings(**found), other=tuple((k, v) for k, v in said.items() if k != "Version"))
