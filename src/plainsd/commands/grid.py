"""`--grid guidance=3,5,7`: one labelled sheet over several values of one setting, or of two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from plainsd.errors import UserError, unknown
from plainsd.pictures.settings import SEEDS, read_seed
from plainsd.pictures.texts.fields import FIELDS

if TYPE_CHECKING:
    from PIL import Image

NOT_HERE = (
    "size",
    "outpaint",
    "interval",
    "model",
    "refiner",
    "vae",
    "masked",
    "embeddings",
    "prediction",
    "zero_snr",
    "seed_resize",
    "batch_index",
    "batch_size",
)
# pictures of one size; what flags alone say


@dataclass(frozen=True)
class GridAxis:
    name: str
    values: list


def axis(text: str) -> GridAxis:
    """`guidance=3,5,7` -> the setting and its values."""
    readers = {name: read for _, name, read, _ in FIELDS if name not in NOT_HERE}
    readers |= {"sampler": str, "spacing": str} | dict.fromkeys(SEEDS, read_seed)
    key, equals, values = text.partition("=")
    name = key.strip().replace("-", "_")
    if name not in readers:
        raise unknown("grid setting", key, readers)
    try:
        parsed = [readers[name](value.strip()) for value in values.split(",")]
    except ValueError:
        raise UserError(f"grid {text!r} has a value that cannot be read; write it as guidance=3,5,7") from None
    if not equals or not values:
        raise UserError(f"grid {text!r} has no values; write it as guidance=3,5,7")
    return GridAxis(name, parsed)


def grid_cells(prompt: str, choices: dict, axes: list[GridAxis]) -> Iterator[tuple[list[str], dict]]:
    """One picture a cell, row by row: the first axis runs across, the second down."""
    for values in product(*(one.values for one in reversed(axes))):
        yield [prompt], choices | dict(zip((one.name for one in reversed(axes)), values, strict=True))


def sheet(images: list[Image.Image], axes: list[GridAxis]) -> Image.Image:
    from plainsd.pictures.images import grid

    labels = [[f"{one.name.replace('_', ' ')} {value}" for value in one.values] for one in axes]
    return grid(images, len(labels[0]), *labels)
