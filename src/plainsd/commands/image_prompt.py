"""IP-Adapters on the command line: `--image-prompt FILE:STRENGTH --image-prompt-image FILE`, with masks and image
encoders.

A single adapter takes all the pictures that are given; several adapters take one each, in order. Masks are one for all,
or one for each picture; image encoders and ranges of steps one for all, or one for each adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plainsd.commands.adapters import from_flag
from plainsd.commands.control import nth
from plainsd.commands.flags import GenerateFlags
from plainsd.errors import UserError
from plainsd.pictures.settings import ImagePromptNote

if TYPE_CHECKING:
    from plainsd.pictures.image_prompt import ImagePrompt
    from plainsd.pictures.model import StableDiffusion


def check_image_prompt_flags(command: GenerateFlags, recorded: Sequence[ImagePromptNote]) -> None:
    """UserError for flags that do not go together. Called before anything is loaded."""
    adapters, images = len(command.image_prompt), len(command.image_prompt_image)
    masks, encoders = len(command.image_prompt_mask), len(command.image_encoder)
    if adapters != images and (adapters != 1 or not images):
        raise UserError(
            f"{adapters} --image-prompt and {images} --image-prompt-image; give as many of both, or one adapter and "
            "all its pictures",
            field="image_prompt",
        )
    if masks not in (0, 1, images) or (masks and not images):
        raise UserError(
            f"{masks} --image-prompt-mask and {images} --image-prompt-image; give one mask for each, or one for all",
            field="image_prompt",
        )
    ranges = len(command.image_prompt_range)
    if ranges not in (0, 1, adapters) or (ranges and not adapters):
        raise UserError(
            f"{ranges} --image-prompt-range and {adapters} --image-prompt; give one for each, or one for all",
            field="image_prompt",
        )
    if encoders not in (0, 1, adapters) or (encoders and not adapters):
        raise UserError(
            f"{encoders} --image-encoder and {adapters} --image-prompt; give one for each, or one for all",
            field="image_encoder",
        )
    if len(recorded) > adapters:
        raise UserError(
            f"'{command.from_}' was made with the image prompt {recorded[adapters].model!r}; give it with "
            "--image-prompt FILE, and its pictures with --image-prompt-image FILE",
            field="image_prompt",
        )
    for text in command.image_prompt:
        from_flag(text, "image-prompt")


def chosen_image_prompts(
    command: GenerateFlags, sd: StableDiffusion, recorded: Sequence[ImagePromptNote]
) -> list[ImagePrompt]:
    """The adapters with their image encoders, loaded on the model's device, and their pictures."""
    from plainsd.checkpoint import load_image_prompt, load_tower
    from plainsd.files.hub import find
    from plainsd.pictures.control import control_name
    from plainsd.pictures.image_prompt import ImagePrompt
    from plainsd.pictures.images import open_picture

    where = {"device": sd.device, "dtype": sd.dtype}
    towers = {path: load_tower(path, **where) for path in command.image_encoder}
    return [
        ImagePrompt(
            load_image_prompt(asked.path, towers[asked.encoder] if asked.encoder else None, **where),
            [open_picture(path) for path in asked.images],
            asked.note.weight,
            [open_picture(path, background="black") for path in asked.masks] or None,
            asked.note.start,
            asked.note.end,
            name=control_name(find(asked.path)),
        )
        for asked in asked_image_prompts(command, recorded)
    ]


class AskedImagePrompt(NamedTuple):
    """One --image-prompt: its files, and how it acts."""

    path: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    encoder: Path | None
    note: ImagePromptNote


def asked_image_prompts(command: GenerateFlags, recorded: Sequence[ImagePromptNote]) -> Iterator[AskedImagePrompt]:
    images, masks, alone = command.image_prompt_image, command.image_prompt_mask, len(command.image_prompt) == 1
    for number, text in enumerate(command.image_prompt):
        path, strength = from_flag(text, "image-prompt")
        before = recorded[number] if number < len(recorded) else ImagePromptNote()
        start, end = nth(command.image_prompt_range, number, (before.start, before.end))
        mask = nth(masks, number, None)
        yield AskedImagePrompt(
            path,
            images if alone else (images[number],),
            masks if alone else (mask,) if mask else (),
            nth(command.image_encoder, number, None),
            ImagePromptNote(weight=before.weight if strength is None else strength, start=start, end=end),
        )
