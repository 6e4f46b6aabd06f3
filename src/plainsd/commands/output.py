"""Sampling with a progress bar, previews, and the files that pictures are written to."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plainsd.errors import UserError, unknown
from plainsd.pictures.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from plainsd.diffusion.samplers import Step
    from plainsd.pictures.drawing import Pictures
    from plainsd.pictures.model import StableDiffusion

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp")  # as in pictures/images.py, which imports torch
OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".avif")
PREVIEW_EVERY = 0.2  # seconds
PromptBatch = tuple[list[str], dict]  # prompts, and the choices that all of them share


class Preview:
    """Writes the current estimate to a PNG file a few times a second, decoded by TAESD or a linear projection."""

    def __init__(self, sd: StableDiffusion, path: Path, vae: Path | None = None):
        from plainsd.checkpoint import load_vae
        from plainsd.pictures.previews import previewer

        tiny = None if vae is None else load_vae(vae, device=sd.device, dtype=sd.dtype, like=sd.vae.config)
        self.path, self.factor, self.last = path, sd.vae.config.factor, 0.0
        self.previewer = previewer(sd, tiny)

    def __call__(self, step: Step) -> None:
        from plainsd.pictures.images import enlarged_to, grid, write_png

        now = time.perf_counter()
        if now - self.last >= PREVIEW_EVERY:
            size = tuple(side * self.factor for side in step.denoised.shape[:1:-1])
            images = [enlarged_to(image, size) for image in self.previewer(step.denoised)]
            write_png(grid(images, math.ceil(math.sqrt(len(images)))), self.path)
            self.last = now


class Target:
    """Where pictures are written: a file, or a folder in which they are numbered. Nothing is overwritten."""

    def __init__(self, out: Path, format: str | None = None):
        suffix = out.suffix.lower()
        if suffix in OTHER_FORMATS:
            names = f"{out.stem}.png, {out.stem}.jpg or {out.stem}.webp"
            raise UserError(f"--out '{out}': pictures are written as PNG, JPEG or WebP; name it {names}", field="out")
        if format is not None and f".{format}" not in PICTURE_FILES:
            raise unknown("format", format, [name[1:] for name in PICTURE_FILES], field="format")
        self.file = out if suffix in PICTURE_FILES and not out.is_dir() else None
        if self.file and format and {suffix, f".{format}"} not in ({suffix}, {".jpg", ".jpeg"}):
            raise UserError(f"--format {format} and --out '{out}' disagree; leave one of them out", field="format")
        self.suffix = f".{format or 'png'}"
        self.folder = out.parent if self.file else out
        self.number: int | None = None  # of the next file, if other processes write numbered files too
        self.listed: tuple[int, int] | None = None  # when the folder was last listed or written to; highest number
        check_writable(self.folder)

    def write(self, image: Image.Image, settings: Settings | None) -> Path:
        from plainsd.pictures.images import write_new_picture

        number = self.number if self.number is not None else 0 if self.file else self.next_number()
        self.number = None if self.number is None else number + 1
        path = self.file or self.path_of(number, settings.seed if settings else "grid")
        written = write_new_picture(image, path, settings)
        self.listed = self.changed(), number
        return written

    def path_of(self, number: int, what: int | str) -> Path:
        """Of a file in the folder."""
        return self.folder / f"{number:05d}-{what}{self.suffix}"

    def next_number(self) -> int:
        """One more than the highest in the folder. It is listed again only where somebody else has written into it
        since: else a run of many pictures would take time with their square."""
        changed = self.changed()
        if self.listed is None or self.listed[0] != changed:
            found = self.folder.glob("[0-9][0-9][0-9][0-9][0-9]-*")
            numbers = [int(path.name[:5]) for path in found if path.suffix in PICTURE_FILES]
            self.listed = changed, max(numbers, default=0)
        return self.listed[1] + 1

    def changed(self) -> int:
        """When the folder was written to last, in ns; -1 where there is none yet."""
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:
            return -1


def check_writable(folder: Path) -> None:
    """UserError if the folder, or its nearest existing parent, is not writable. Called before any work."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        kind = "is not writable" if nearest.is_dir() else "is not a folder"
        raise UserError(f"cannot write into '{folder}': '{nearest}' {kind}; choose another folder")


def draw(
    sd: StableDiffusion, task: Callable, batches: list[PromptBatch], show: Preview | None, *, hidden: bool = False
) -> Iterator[Pictures]:
    """Runs all batches under one progress bar, which may be hidden."""
    import torch
    from tqdm import tqdm

    from plainsd.diffusion.samplers import Step
    from plainsd.pictures.sampling import second_pass, steps_to_run

    runs = [task(sd, prompts, **choices) for prompts, choices in batches]  # wrong input raises here
    one = runs[0].settings[0]
    if one.strength is not None:
        first, last = (steps_to_run(sd, replace(one, hires=None)), second_pass(one)) if one.hires else (0, one)
        print(f"{runs[0].steps - first} of {last.steps} steps run at strength {one.strength}", file=sys.stderr)
    with tqdm(total=sum(run.steps for run in runs), unit="step", disable=hidden or None, dynamic_ncols=True) as bar:
        for run in runs:
            try:
                for event in run:
                    if not isinstance(event, Step):
                        yield event
                        continue
                    bar.update()
                    if show:
                        show(event)
            except torch.OutOfMemoryError:
                many = len(run.settings)
                raise UserError(
                    f"out of memory on a batch of {many} pictures; try a smaller --batch, or --low-memory"
                ) from None
