"""Settings as fields of a request again: those of the history, and those read from a file."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plainsd.diffusion.samplers import SAMPLERS
from plainsd.errors import UserError
from plainsd.pictures.images import read_settings
from plainsd.pictures.settings import DEFAULTS, SEEDS, UPSCALERS, ControlNote, ImagePromptNote, Settings
from plainsd.pictures.texts.a1111 import format_settings
from plainsd.pictures.texts.fields import FIELDS
from plainsd.server.errors import APIError
from plainsd.server.jobs.job import GRID_SIDES
from plainsd.server.jobs.pictures import Picture, json_seed, with_lora_tags
from plainsd.server.limits import Limits
from plainsd.server.pool import Models
from plainsd.server.prompt_checks import prompts_in
from plainsd.server.schema import JobRequest
from plainsd.server.uploads import NamedBytes, opened, without_tags
from plainsd.text.prompts import LoraTag

REQUEST_FIELDS = JobRequest.model_fields.keys()  # other settings of a file are ignored

SECOND_PASS_PROMPTS = ("hires_prompt", "hires_negative")  # of the second pass; LoRAs are those of the prompt


def picture_as_json(row: Picture) -> dict[str, Any]:
    """A picture of the history as JSON, with the settings that reproduce it."""
    settings = row.settings
    fields = {name: value for name, value in vars(settings).items() if name in REQUEST_FIELDS}
    fields |= exact_seeds(settings) | {"spacing": settings.spacing or None, "settled": [*prompts_in(settings)]}
    if grid := grid_in(settings):
        fields = {name: value for name, value in fields.items() if name not in {one["name"] for one in grid}}
        fields["grid"] = grid
    return {
        "id": row.id, "number": row.number, "job": row.job, "url": f"/api/images/{row.id}.png",
        "thumbnail": f"/api/images/{row.id}/thumbnail", "width": row.width, "height": row.height,
        "created": row.created,
        "favourite": row.favourite,
        "settings": fields, "loras": loras_as_json(row.loras),
        "controls": controls_as_json(settings.control), "image_prompts": image_prompts_as_json(settings.image_prompt),
        "parameters": format_settings(with_lora_tags(settings, row.loras)), "problem": row.problem,
    }  # fmt: skip


def loras_as_json(loras: Sequence[LoraTag]) -> list[dict[str, Any]]:
    """In the form of a request."""
    return [
        {"name": one.name, "strength": one.strength}
        | ({"text_strength": one.text_strength} if one.text_strength != one.strength else {})
        for one in loras
    ]


def controls_as_json(notes: tuple[ControlNote, ...]) -> list[dict[str, Any]]:
    """In the form of a request, without their maps."""
    return [
        {"name": note.model.rpartition(" [")[0] or note.model, "strength": note.weight, "start": note.start,
         "end": note.end, "guess": note.guess, "mode": note.mode, "preprocess": note.module, "kind": list(note.kinds),
         **(dict(zip(("low", "high"), note.thresholds, strict=True)) if note.thresholds else {}),
         **({"resolution": note.resolution} if note.resolution else {}),
         **({"resize": note.resize} if note.resize != "stretch" else {})}
        for note in notes
    ]  # fmt: skip


def image_prompts_as_json(notes: tuple[ImagePromptNote, ...]) -> list[dict[str, Any]]:
    """Likewise, without their pictures and masks."""
    return [
        {"name": note.model.rpartition(" [")[0] or note.model, "strength": note.weight, "start": note.start,
         "end": note.end}
        for note in notes
    ]  # fmt: skip


def grid_in(settings: Settings) -> list[dict[str, Any]]:
    """The axes of a sheet, in the form of a request."""
    axes = [text.partition(": ") for side, text in settings.other if side in GRID_SIDES]
    return [{"name": name.replace(" ", "_"), "values": values.split(", ")} for name, _, values in axes]


def exact_seeds(settings: Settings) -> dict[str, Any]:
    return {name: json_seed(value) for name in SEEDS if (value := getattr(settings, name)) is not None}


def settings_in_file(content: bytes, limits: Limits, models: Models) -> dict:
    """The settings text of a PNG, as the fields of a request, but for the maps of its `controls` and the pictures of
    its `image_prompts`, which no file has. What has no meaning here stands under `unused`."""
    opened(content, "image", limits)
    try:
        settings = read_settings(NamedBytes(content, "image"))
    except UserError as error:
        raise APIError(422, str(error), "image") from None
    prompt, loras = without_tags(settings.prompt)
    again: dict[str, Any] = {
        name: without_tags(text)[0] for name in SECOND_PASS_PROMPTS if (text := getattr(settings, name))
    }
    settings = replace(settings, **exact_seeds(settings), **again)
    # a seed of 0 is said too: a request without any draws a random one
    kept = {name: value for name, value in vars(settings).items() if value != DEFAULTS[name] or name == "seed"}
    said = {name: value for name, value in kept.items() if name != "prompt"}
    taken = REQUEST_FIELDS - unavailable_fields(settings, models)
    unused = [(key, show(said[name])) for key, name, _, show in FIELDS if name in said and name not in taken]
    unused += [("Sampler", settings.sampler)] if settings.sampler and "sampler" not in taken else []
    fields = {name: value for name, value in said.items() if name in taken}
    if grid := grid_in(settings):
        fields["grid"] = grid
        settings = replace(settings, other=tuple(entry for entry in settings.other if entry[0] not in GRID_SIDES))
    return {
        "prompt": prompt,
        **fields,
        "settled": [*prompts_in(settings)],
        "loras": loras_as_json(loras),
        **({"controls": controls_as_json(settings.control)} if settings.control else {}),
        **({"image_prompts": image_prompts_as_json(settings.image_prompt)} if settings.image_prompt else {}),
        "unused": [f"{key}: {value}" for key, value in (*unused, *settings.other)],
    }


def unavailable_fields(settings: Settings, models: Models) -> set[str]:
    """Fields whose value is not available on this server."""
    embeddings = {embedding.text.lower() for embedding in models.embeddings.known()}
    available = {
        "model": settings.model in models.known, "sampler": settings.sampler in SAMPLERS,
        "hires_sampler": settings.hires_sampler in SAMPLERS,
        "upscaler": settings.upscaler in (*UPSCALERS, *models.upscalers.known()),
        "refiner": settings.refiner in models.known,
        "handover": settings.refiner in models.known,
        "embeddings": embeddings.issuperset(map(str.lower, settings.embeddings)),
    }  # fmt: skip
    return {name for name, is_available in available.items() if not is_available}
