"""IP-Adapters by name out of the server's folder, their image encoders, and the image prompts of a request.

An adapter takes the image encoder that the request names; else the first that fits of these: the folder `image_encoder`
beside the adapter, and the image encoders in the server's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from plainsd.checkpoint import load_image_prompt
from plainsd.errors import UserError
from plainsd.files.image_prompt import open_image_adapter, open_tower, tower_beside
from plainsd.files.stored import empty
from plainsd.models.image_prompt import ImageAdapter
from plainsd.models.vision import VisionTower
from plainsd.pictures.control import control_name
from plainsd.pictures.image_prompt import ImagePrompt, ImageReader, encoder_of, tower_fits
from plainsd.pictures.model import StableDiffusion
from plainsd.server.canvas import InitImages
from plainsd.server.controls import IMAGE_ADAPTER, TOWER, found_by_name, input_name, of_kind, of_unit
from plainsd.server.folders import changed_below
from plainsd.server.jobs.job import ImagePromptInput
from plainsd.server.limits import Limits
from plainsd.server.schema import ImagePromptRequest
from plainsd.server.uploads import picture, png

KEPT = 2  # adapters in memory


class ImageAdapters:
    """Those in a folder, looked for anew each time. The worker's thread alone loads them."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.unusable: dict[str, str] = {}
        self.loaded: dict[tuple[Path, Path, int, int], ImageReader] = {}
        """by their files and the times of their last changes, the one used last at the end"""

    def known(self) -> dict[str, Path]:
        found, self.unusable = of_kind(IMAGE_ADAPTER, self.folder)
        return found

    def towers(self) -> dict[str, Path]:
        found, self.unusable = of_kind(TOWER, self.folder)
        return found

    def path(self, name: str) -> Path:
        return found_by_name(name, IMAGE_ADAPTER, self.known(), self.unusable, self.folder)

    def tower(self, path: Path, encoder: str | None) -> Path:
        """Of the adapter in this file."""
        towers = self.towers()
        if encoder is not None:
            return found_by_name(encoder, TOWER, towers, self.unusable, self.folder)
        config, beside = open_image_adapter(path).config, tower_beside(path)
        candidates = [place for place in (beside, *towers.values()) if place]
        for candidate in candidates:
            if tower_fits(open_tower(candidate).config, config):
                return candidate
        raise UserError(
            f"the IP-Adapter {path.stem!r} needs its image encoder, {encoder_of(config)}, and the server has none that "
            "fits; put it into the folder of --controls"
        )

    def bare(self, name: str, encoder: str | None) -> ImageReader:
        """Without weights: enough to check a request. UserError where the encoder does not fit."""
        path = self.path(name)
        adapter = empty(ImageAdapter, open_image_adapter(path).config)
        tower = empty(VisionTower, open_tower(self.tower(path, encoder)).config)
        assert isinstance(adapter, ImageAdapter) and isinstance(tower, VisionTower)
        return ImageReader(adapter, tower)

    def reader(self, name: str, encoder: str | None, sd: StableDiffusion) -> ImageReader:
        path = self.path(name)
        tower = self.tower(path, encoder)
        key = (path, tower, changed_below(path), changed_below(tower))
        reader = self.loaded.pop(key, None) or load_image_prompt(path, tower, device=sd.device, dtype=sd.dtype)
        self.loaded[key] = reader
        for old in list(self.loaded)[:-KEPT]:
            del self.loaded[old]
        return reader


# --- of a request ----------------------------------------------------------------------------------------------------


def image_prompts_of(
    units: list[ImagePromptRequest], adapters: ImageAdapters, limits: Limits, base: InitImages | None = None
) -> tuple[list[ImagePrompt], list[ImagePromptInput], dict[str, bytes]]:
    """What the tasks check, what the job keeps, and its files by their names among the inputs."""
    prompts, stored, files = [], [], {}
    for number, unit in enumerate(units):
        with of_unit("image_prompts", units, number):
            images = [picture(image, "images", limits) for image in unit.images]
            masks = [picture(mask, "masks", limits, "black") for mask in unit.masks]
            if base is not None:
                masks = [base.part_of(mask) for mask in masks]
            names: list[str] = []
            for image in (*images, *masks):
                content = png(image)
                names.append(input_name(content))
                files[names[-1]] = content
            kept = ImagePromptInput(unit.name, tuple(names[: len(images)]), tuple(names[len(images) :]),
                                     unit.strength, unit.start, unit.end, unit.encoder)  # fmt: skip
            prompts.append(as_image_prompt(kept, adapters.bare(unit.name, unit.encoder), images, masks, adapters))
            stored.append(kept)
    return prompts, stored, files


def as_image_prompt(
    kept: ImagePromptInput,
    reader: ImageReader,
    images: list[Image.Image],
    masks: list[Image.Image],
    adapters: ImageAdapters,
) -> ImagePrompt:
    name = control_name(adapters.path(kept.adapter))
    return ImagePrompt(reader, images, kept.strength, masks or None, kept.start, kept.end, name)


def image_prompt_at(
    kept: ImagePromptInput, sd: StableDiffusion, read: Callable[[str], Image.Image], adapters: ImageAdapters
) -> ImagePrompt:
    """For the drawing: the adapter with its weights, and its pictures. `read`: a picture among the inputs."""
    images, masks = ([read(name) for name in names] for names in (kept.images, kept.masks))
    with torch.inference_mode():
        reader = adapters.reader(kept.adapter, kept.encoder, sd)
    return as_image_prompt(kept, reader, images, masks, adapters)
