"""DreamBooth's prior set (Ruiz et al. 2022, arXiv:2208.12242, section 3.2): pictures of a kind of thing in general,
made by the model itself before it learns one such thing, so that the kind does not come to look like the one."""

from collections.abc import Callable
from pathlib import Path

from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.generate import final, text_to_image
from plainsd.pictures.images import write_png
from plainsd.pictures.model import StableDiffusion
from plainsd.train.checkpoints import saving

AT_ONCE = 4


def make_prior(
    sd: StableDiffusion,
    folder: Path,
    prompt: str,
    count: int,
    size: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Fills a folder up to `count` pairs `00000.png` + `00000.txt`. Picture i has seed i, whenever it is made."""
    if count < 1:
        raise UserError(f"--prior-count {count} is out of range; give 1 or more")
    with saving("the prior set"):
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, count, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, count))
            if all((folder / f"{number:05d}.txt").is_file() for number in numbers):
                continue
            say(f"making pictures {first + 1} to {numbers[-1] + 1} of {count} of {prompt!r} in {folder}")
            images = final(text_to_image(sd, prompt, size=size, seed=first, count=len(numbers)))
            for number, image in zip(numbers, images, strict=True):
                write_png(image, folder / f"{number:05d}.png")
                with written_whole(folder / f"{number:05d}.txt") as draft:
                    draft.write_text(prompt, encoding="utf-8")
