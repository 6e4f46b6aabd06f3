"""The task of `plainsd generate`: text-to-image, image-to-image (of a file or a folder), inpainting or outpainting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from plainsd.commands.flags import GenerateFlags
from plainsd.commands.grid import axis_names
from plainsd.errors import UserError
from plainsd.listing import hidden, suffix_of

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def drop_idle_strength(command: GenerateFlags, choices: dict) -> None:
    """Removes the strength 0 of a text by A1111's API before 1.6, which wrote its default where there is no picture."""
    if not command.image and command.strength is None and choices.get("strength") == 0:
        del choices["strength"]


def tasks_of(command: GenerateFlags, choices: dict) -> list[Callable]:
    """Functions (sd, prompts, **choices) -> events, one for each picture if --image is a folder. Removes what they bind
    from `choices`."""
    if command.mask and command.outpaint:
        raise UserError("--mask and --outpaint do not go together; choose one of them", field="outpaint")
    sides = choices.pop("outpaint", None)  # also from --from
    if (command.mask or sides) and not command.image:
        raise UserError(
            f"{'--mask' if command.mask else 'outpainting'} needs a picture; give it with --image", field="image"
        )
    axes = axis_names(command.grid)
    drop_idle_strength(command, choices)
    if not (command.image or choices.get("hires") or "hires" in axes):
        if choices.get("strength") is not None or "strength" in axes:
            raise UserError(
                "strength needs a picture; give it with --image, or --hires for a second pass", field="strength"
            )

    from plainsd.generate import image_to_image, inpaint, outpaint, text_to_image
    from plainsd.pictures.images import open_picture

    if not command.image:
        return [text_to_image]
    task: Callable = image_to_image
    if command.mask:
        task = partial(inpaint, mask=open_picture(command.mask, background="black"))
    elif sides:
        task = partial(outpaint, **dict(zip(("left", "top", "right", "bottom"), sides, strict=True)))
    return [partial(task, image=open_picture(path)) for path in pictures_of(command.image)]


def pictures_of(path: Path) -> list[Path]:
    """The file, or all pictures of the folder, by name."""
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.iterdir() if suffix_of(one) in PICTURE_SUFFIXES and not hidden(one.name))
    if not found:
        raise UserError(
            f"--image '{path}' is a folder without pictures; give one with {' '.join(PICTURE_SUFFIXES)}", field="image"
        )
    return found
