"""Settings as AUTOMATIC1111's web UI writes them, and most tools read them: what stands in a PNG under `parameters`.

    a red apple
    Negative prompt: blurred
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: emoji, Version: plainsd 0.1.0

Where A1111 has no word for a choice of ours, a key of our own stands beside its nearest one, and is the one we read.
Forge, SD.Next and stable-diffusion.cpp write the same form with words of their own: dialects.py.
"""

import re
from typing import Any

from plainsd import __version__
from plainsd.errors import UserError
from plainsd.pictures.settings import AUTOMATIC, DEFAULTS, Settings, noise_of
from plainsd.pictures.texts.controls import controls_read, controls_written
from plainsd.pictures.texts.dialects import as_a1111, written_by
from plainsd.pictures.texts.entries import check_length, entries, quote
from plainsd.pictures.texts.fields import FIELDS
from plainsd.pictures.texts.labels import (
    BEFORE_0_2,
    SPACING_LABELS,
    SUFFIXES,
    both_named,
    nearest_label,
    sampler_label,
    spacing_label,
    spacing_named,
)
from plainsd.text.prompts import LORA_TAG

HASH_KEYS = {"model": "Model hash", "vae": "VAE hash"}  # A1111's keys for one ...
SEVERAL = {"lora:": "Lora hashes", "embed:": "TI hashes"}  # ... and for "name: hash, name: hash"
OURS = {"Sampler", "Spacing", "Version", *(key for key, *_ in FIELDS)}  # read as fields, never as something other
ALWAYS = ("seed", "noise")  # written even where they have their default value: for A1111, no RNG is the GPU's
SECOND = "hires "  # what begins the keys of the second pass
NEGATIVE = "Negative prompt:"
ETA_DDIM = ("ddim", "ddim_cfg_pp")  # samplers whose eta A1111 keeps apart, under this key
PART = ("Inpaint area", "Only masked")  # said beside the padding
SECOND_LORAS = "Hires LoRAs"  # our key, in `other`: the tags of a hires prompt that names other LoRAs than the prompt
WITHOUT_SCHEDULE_TYPE = ("ddim", "plms", "unipc")  # had none when the others were drawn uniformly


# --- writing ---------------------------------------------------------------------------------------------------------


def format_settings(settings: Settings) -> str:
    """Settings -> A1111's text, three parts: the prompt, the negative prompt, one line of `key: value`."""
    pairs = []
    for key, name, _, write in FIELDS:
        value: Any = noise_of(settings) if name == "noise" else getattr(settings, name)
        if value != DEFAULTS[name] or name in ALWAYS or (name == "upscaler" and settings.hires):
            pairs.append((f"{key} DDIM" if name == "eta" and settings.sampler in ETA_DDIM else key, write(value)))
    pairs[1:1] = _names_written(settings.sampler, settings.spacing)
    pairs += _names_written(settings.hires_sampler, settings.hires_spacing, SECOND)
    pairs += controls_written(settings.control, settings.image_prompt)
    pairs += _hashes_written(settings.hashes)
    if settings.masked_padding is not None:
        pairs.append(PART)
    known = OURS | {key for key, _ in pairs}
    pairs += [pair for pair in settings.other if pair[0] not in known]
    pairs.append(("Version", f"plainsd {__version__}"))
    parts = [_with_newlines(settings.prompt)] if settings.prompt else []
    parts += [f"{NEGATIVE} {_with_newlines(settings.negative)}"] if settings.negative else []
    return "\n".join([*parts, ", ".join(f"{key}: {quote(value)}" for key, value in pairs)])


def _with_newlines(text: str) -> str:
    """Its line breaks as newlines: a last carriage return would be one with the newline after it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _key_of(of: str, word: str) -> str:
    return (of + word).capitalize()


def _names_written(sampler: str | None, spacing: str | None, of: str = "") -> list[tuple[str, str]]:
    name = sampler_label(sampler) if sampler else ""
    if name and spacing in SUFFIXES:
        return [(_key_of(of, "sampler"), f"{name} {spacing_label(spacing)}")]
    pairs = [(_key_of(of, "sampler"), name)] if name else []
    if spacing:
        pairs.append((_key_of(of, "schedule type"), nearest_label(sampler, spacing)))
        pairs += [] if spacing in SPACING_LABELS else [(_key_of(of, "spacing"), spacing)]
    return pairs


def _hashes_written(hashes: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """A1111 parts "name: hash, name: hash" at commas and colons, so that names have none."""
    pairs = [(key, dict(hashes)[name]) for name, key in HASH_KEYS.items() if name in dict(hashes)]
    for kind, key in SEVERAL.items():
        named = [(name.removeprefix(kind), value) for name, value in hashes if name.startswith(kind)]
        if named:
            pairs.append((key, ", ".join(f"{re.sub('[:,]', '', name)}: {value}" for name, value in named)))
    return pairs


# --- reading ---------------------------------------------------------------------------------------------------------


def parse_settings(text: str) -> Settings:
    """A1111's text, or one of its dialects' -> Settings; what has no meaning here is kept in `other`. UserError where
    this is no such text."""
    check_length(text)
    *lines, last = _with_newlines(text).rstrip().split("\n")
    said = dict(entries(last))
    if len(said) < 3:  # A1111's own rule: fewer, and the line belongs to the prompt
        raise UserError(f"no settings in the text {last[:60]!r}; its last line should read 'Steps: 20, Sampler: ...'")
    said = as_a1111(said, last)
    old = written_by(said) == ("plainsd", (0, 1)) and "RNG" not in said
    negative = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    found: dict[str, Any] = {
        "prompt": "\n".join(lines[:negative]),
        "negative": "\n".join(lines[negative:]).removeprefix(NEGATIVE).removeprefix(" "),
    }
    named = "Schedule type" in said
    found["sampler"], found["spacing"] = _names_read(said, old=old)
    found["hires_sampler"], found["hires_spacing"] = _names_read(said, SECOND)
    found["hashes"] = _hashes_read(said)
    found["control"], found["image_prompt"] = controls_read(said)
    if found["sampler"] in ETA_DDIM and "Eta DDIM" in said:
        said["Eta"] = said.pop("Eta DDIM")
    for key, name, read, _ in FIELDS:
        if key in said:
            try:
                found[name] = read(said.pop(key))
            except ValueError as error:
                raise UserError(
                    f"settings text: {key!r} has a value that cannot be read ({str(error)[:120]})"
                ) from None
    if "masked_padding" in found and (PART[0], said.get(PART[0])) == PART:
        del said[PART[0]]
    found |= _implied(said, found, old, named)
    if written_by(said)[0] != "plainsd":
        said |= _loras_of_second_pass(found)
    return Settings(**found, other=tuple((k, v) for k, v in said.items() if k != "Version"))


def _names_read(said: dict[str, str], of: str = "", *, old: bool = False) -> tuple[str | None, str | None]:
    """ "DPM++ 2M Karras", or "DPM++ 2M" beside "Schedule type: Karras" -> our two names. A stranger's name stays."""
    sampler, spacing = both_named(said.pop(_key_of(of, "sampler"), ""))
    schedule = said.pop(_key_of(of, "schedule type"), "Use same scheduler" if of else "Automatic")
    own = said.pop(_key_of(of, "spacing"), None)
    if old and schedule in BEFORE_0_2:
        own = BEFORE_0_2[schedule]
    spacing = spacing or spacing_named(schedule)
    if of and own is None and spacing is None and schedule.lower() == AUTOMATIC:
        own = AUTOMATIC  # of the second pass, where nothing is that of the first
    elif own is None and spacing is None and re.fullmatch(r"[a-z]\w*", schedule):
        own = schedule  # one that is registered here, and that A1111 has no label for
    elif spacing is None and schedule.lower() not in ("automatic", "use same scheduler"):
        said[_key_of(of, "schedule type")] = schedule
    return sampler or None, own or spacing


def _hashes_read(said: dict[str, str]) -> tuple[tuple[str, str], ...]:
    found = [(name, said.pop(key)) for name, key in HASH_KEYS.items() if key in said]
    for kind, key in SEVERAL.items():
        pairs = [pair.rpartition(": ") for pair in said.pop(key, "").split(", ") if ": " in pair]
        found += [(kind + name, value) for name, _, value in pairs]
    return tuple(found)


def _loras_of_second_pass(found: dict[str, Any]) -> dict[str, str]:
    """In A1111 a hires prompt has LoRAs of its own, or none (processing.py, 1.10.1); here the second pass has those of
    the prompt."""
    if not (found.get("hires") and found.get("hires_prompt")):
        return {}
    first, second = ({tag[0]: None for tag in LORA_TAG.finditer(found[name])} for name in ("prompt", "hires_prompt"))
    if first.keys() == second.keys():
        return {}
    return {SECOND_LORAS: " ".join(" ".join(second).split()) or "none"}  # on one line


def _implied(said: dict[str, str], found: dict[str, Any], old: bool, named: bool) -> dict[str, Any]:
    """What a text means without saying it: by whose conventions the picture was drawn, and with which embeddings.
    `named`: whether it names the schedule, as A1111's do from 1.9 on."""
    program, version = written_by(said)
    if program == "plainsd":
        return {"like": "a1111"} if old and found.get("guidance") == 0 else {}  # off was written as 1
    implied: dict[str, Any] = {"like": "a1111"} if program != "SD.Next" else {}
    if "embeddings" not in found:  # A1111 has hashes for those that the prompts use
        names = [name for name, _ in found["hashes"]]
        implied["embeddings"] = tuple(name.removeprefix("embed:") for name in names if name.startswith("embed:"))
    if "noise" not in found:
        implied["noise"] = "nv"
    if "mask_blur" in found:
        implied["masked"] = True
    if program == "A1111" and version < (1, 6) and found.get("hires") and "[" in found["prompt"] + found["negative"]:
        said["Old prompt editing timelines"] = "True"  # the second pass began them anew
    before = program == "A1111" and version < (1, 9) or program == "unknown" and not named and "Version" not in said
    if before and not found["spacing"] and found["sampler"] not in (None, *WITHOUT_SCHEDULE_TYPE):
        implied["spacing"] = "uniform"
    return implied
