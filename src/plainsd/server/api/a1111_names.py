"""Translates A1111's names of samplers, schedulers, upscalers and models."""

from collections.abc import Collection
from typing import Any

from plainsd.diffusion.samplers import SAMPLERS, shared_spacings
from plainsd.errors import unknown
from plainsd.pictures.texts.labels import (
    UPSCALER_LABELS,
    both_named,
    sampler_label,
    spacing_label,
    spacing_named,
    upscaler_named,
)
from plainsd.server.errors import APIError
from plainsd.server.pool import Models

TITLE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")  # what a model's title may end with


def scheduler_names(spacing: str) -> tuple[str, str]:
    """Name and label here of one of our spacings: A1111's, but of ComfyUI's beta and kl_optimal, whose names mean
    others there, one of our own."""
    if spacing_named(spacing) in (spacing, None):
        return spacing, spacing_label(spacing)
    return f"ComfyUI {spacing}", f"ComfyUI {spacing}"


def known_schedulers() -> dict[str, str]:
    """Labels by name."""
    return dict(map(scheduler_names, shared_spacings()))


def sampler_of(name: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """A1111's two names, or its older one ("DPM++ 2M Karras"), or ours -> ours."""
    spacing = None
    if scheduler and scheduler.lower() != "automatic":
        ours = {word: one for one in shared_spacings() for word in scheduler_names(one)}
        spacing = spacing_named(scheduler) or ours.get(scheduler)
        if spacing not in shared_spacings():
            raise APIError(
                404, str(unknown("scheduler", scheduler, known_schedulers().values())), "scheduler", scheduler
            )
    if not name:
        return None, spacing
    sampler, own = both_named(name)
    if sampler not in SAMPLERS:
        raise APIError(404, str(unknown("sampler", name, map(sampler_label, SAMPLERS))), "sampler_name", name)
    return sampler, own or spacing


def upscaler_of(name: str | None, networks: Collection[str] = ()) -> str:
    """A1111's name, or ours, or that of a network in the server's folder -> ours."""
    if name and name in networks:
        return name
    known = upscaler_named(name or "latent")
    if known not in UPSCALER_LABELS:
        raise APIError(422, str(unknown("upscaler", name, (*UPSCALER_LABELS.values(), *networks))), "hr_upscaler", name)
    return known


def model_of(title: Any, models: Models) -> str | None:
    """A model by its name, as a file ("sd/dream.safetensors"), with its hash ("dream [0123abcd]"), or by its hash."""
    if title is None or title == "":
        return None
    if not isinstance(title, str):
        message = f"sd_model_checkpoint {title!r} is not a name; GET /sdapi/v1/sd-models lists them"
        raise APIError(422, message, "model", title)
    name = title.partition(" [")[0].strip()
    stem = name.replace("\\", "/").rpartition("/")[2]
    for suffix in TITLE_SUFFIXES:
        stem = stem.removesuffix(suffix)
    for one in (title, name, stem):
        if one in models.known:
            return one
    digest = title.partition("[")[2].partition("]")[0] or title
    hashed = [known.name for known in models.known.values() if known.hash and known.hash == digest]
    return hashed[0] if hashed else name  # an unknown name is refused where it is looked up
