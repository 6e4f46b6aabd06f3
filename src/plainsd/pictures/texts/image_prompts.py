"""Pictures that a picture took after, in words of our own, which A1111 passes over:

Image Prompt 0: "Model: ip-adapter_sd15 [289b45f1], Weight: 0.6, Images: 2, Masks: 0"
"""

import re

from plainsd.errors import UserError
from plainsd.pictures.settings import ImagePromptNote

IMAGE_PROMPT_KEY = re.compile(r"Image Prompt \d{1,3}")


def image_prompts_written(notes: tuple[ImagePromptNote, ...]) -> list[tuple[str, str]]:
    """Names have no commas and colons here, at which the text is parted."""
    return [
        (
            f"Image Prompt {number}",
            f"Model: {re.sub('[:,]', '', note.model)}, Weight: {note.weight}, Images: {note.images}, "
            f"Masks: {note.masks}",
        )
        for number, note in enumerate(notes)
    ]


def image_prompts_read(said: dict[str, str]) -> tuple[ImagePromptNote, ...]:
    """Takes them out of what a text says. UserError for one that cannot be read."""
    keys = sorted(filter(IMAGE_PROMPT_KEY.fullmatch, said), key=lambda key: int(key.split()[-1]))
    return tuple(read_image_prompt(key, said.pop(key)) for key in keys)


def read_image_prompt(key: str, text: str) -> ImagePromptNote:
    pairs = dict(entry.strip().partition(": ")[::2] for entry in text.split(","))
    try:
        return ImagePromptNote(
            pairs.get("Model", "None"),
            float(pairs.get("Weight", 1.0)),
            int(pairs.get("Images", 1)),
            int(pairs.get("Masks", 0)),
        )
    except ValueError as error:
        raise UserError(f"settings text: {key!r} has a value that cannot be read ({error})") from None
