"""`--grid guidance=3,5,7`: one labelled sheet over several values of one or two settings.

Three axes are not settings: `prompt=apple,pear` replaces the first text in the prompt by each of them (A1111's "Prompt
S/R"), `lora:style=0,0.5,1` gives strengths of a LoRA on the model, `model=a,b` gives models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from plainsd.errors import UserError, unknown
from plainsd.pictures.settings import RANDOM, SEEDS, drawn_seed, read_seed
from plainsd.pictures.texts.fields import FIELDS, read_switch

if TYPE_CHECKING:
    from PIL import Image

    from plainsd.pictures.drawing import Pictures
    from plainsd.pictures.model import StableDiffusion

NOT_GRIDDABLE = (  # they change the sheet's cell size, or come from other flags
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
SWITCHES = ("soft_mask", "tiling")
PROMPT_AXIS, MODEL, LORA_AXIS = "prompt", "model", "lora:"


@dataclass(frozen=True)
class GridAxis:
    name: str
    values: list


def axis(text: str) -> GridAxis:
    """`guidance=3,5,7` -> the setting and its values."""
    readers = {name: read for _, name, read, _ in FIELDS if name not in NOT_GRIDDABLE}
    readers |= dict.fromkeys(("sampler", "spacing", PROMPT_AXIS, MODEL), str) | dict.fromkeys(SEEDS, settled_seed)
    readers |= dict.fromkeys(SWITCHES, read_switch)
    key, equals, values = text.partition("=")
    name = key.strip() if key.strip().startswith(LORA_AXIS) else key.strip().replace("-", "_")
    readers |= {name: float} if name.startswith(LORA_AXIS) else {}
    if name not in readers:
        raise unknown("grid setting", key, [*readers, f"{LORA_AXIS}NAME"], field="grid")
    try:
        parsed = [readers[name](value.strip()) for value in values.split(",")]
    except ValueError:
        raise UserError(
            f"grid {text!r} has a value that cannot be read; write it as guidance=3,5,7", field="grid", value=text
        ) from None
    if not equals or not values:
        raise UserError(f"grid {text!r} has no values; write it as guidance=3,5,7", field="grid", value=text)
    return GridAxis(name, parsed)


def settled_seed(text: str) -> int:
    """A number in place of a random one, so that the sheet's labels say it."""
    seed = read_seed(text)
    return drawn_seed() if seed == RANDOM else seed


def axis_names(texts: Sequence[str]) -> set[str]:
    """What the axes of --grid are of."""
    return {text.partition("=")[0].strip().replace("-", "_") for text in texts}


def grid_cells(prompt: str, choices: dict, axes: list[GridAxis]) -> Iterator[tuple[list[str], dict]]:
    """The prompt and the settings of each cell, row by row: the first axis gives the columns, the second the rows."""
    for values in product(*(one.values for one in reversed(axes))):
        chosen = [*zip(axes, reversed(values), strict=True)]
        drawn = prompt
        for one, value in chosen:
            if one.name == PROMPT_AXIS:
                drawn = replaced(drawn, one.values[0], value)
        yield [drawn], choices | {one.name: value for one, value in chosen if one.name != PROMPT_AXIS}


def replaced(prompt: str, first: str, value: str) -> str:
    """The prompt with a prompt axis's first value replaced by `value`."""
    if first not in prompt:
        raise UserError(
            f"grid prompt={first},...: {first!r} is not in the prompt; begin with words that are", field="grid"
        )
    return prompt.replace(first, value)


def check_axes(names: Sequence[str]) -> None:
    """UserError for two axes of one setting. Two of the prompt replace different words."""
    for name in names:
        if name != PROMPT_AXIS and names.count(name) > 1:
            raise UserError(
                f"both axes of the grid are {name}; give one with all its values, or another setting", field="grid"
            )


Setup = tuple[str | None, tuple[tuple[str, float], ...]]  # a model, and names and strengths of LoRAs


def by_setup(cells: list[tuple[list[str], dict]]) -> dict[Setup, list[int]]:
    """Cell indices by model and LoRA strengths, so that each model is loaded once. Removes both from the cells."""
    found: dict[Setup, list[int]] = {}
    for index, (_, choices) in enumerate(cells):
        names = [name for name in choices if name.startswith(LORA_AXIS)]
        strengths = tuple((name.removeprefix(LORA_AXIS), choices.pop(name)) for name in names)
        found.setdefault((choices.pop(MODEL, None), strengths), []).append(index)
    return dict(sorted(found.items(), key=lambda entry: str(entry[0][0] or "")))


def set_strengths(sd: StableDiffusion, strengths: Iterable[tuple[str, float]]) -> None:
    """Sets the strengths of LoRAs on the model, by name. UserError for an unknown name, and one of several."""
    from plainsd.adapters.lora import Lora, attached

    on: dict[str, list[Lora]] = {}
    for lora in attached(sd):
        on.setdefault(lora.called, []).append(lora)
    for name, strength in strengths:
        if name not in on:
            raise unknown("LoRA", name, on or ["none: give one with --lora"], field="loras")
        if len(on[name]) > 1:
            what = f"grid {LORA_AXIS}{name}: {len(on[name])} LoRAs of this name are on the model"
            raise UserError(f"{what}; give one, or rename the others", field="grid")
        on[name][0].set_strength(strength)


def checked_sizes(
    cells: list[tuple[list[str], dict]],
    setups: dict[Setup, list[int]],
    sd: StableDiffusion,
    task: Callable,
    joins: dict[str, Sequence],
    vae: Path | None,
) -> list[tuple[int, int]]:
    """The sizes of the cells' pictures. UserError for a model that is not there, and for one that does not draw its
    cells. `sd` is the model of the first setup; no weights of the others are read."""
    models = {next(iter(setups))[0]: sd}
    sizes: dict[int, tuple[int, int]] = {}
    for (model, _), indices in setups.items():
        if model not in models:
            models[model] = bare_model(model, sd, joins, vae)
        for index in indices:
            prompts, choices = cells[index]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come again when it is drawn
                sizes[index] = task(models[model], prompts, **choices | joins).size
    return [sizes[index] for index in range(len(cells))]


def bare_model(
    model: str | None, beside: StableDiffusion, joins: dict[str, Sequence], vae: Path | None
) -> StableDiffusion:
    """A model without weights, with the refiner and upscaler of another. UserError where a control or an image prompt
    does not fit it."""
    from plainsd.files.convert import read
    from plainsd.files.hub import find
    from plainsd.files.stored import empties
    from plainsd.pictures.control_checks import mismatch
    from plainsd.pictures.image_prompt import image_mismatch
    from plainsd.pictures.model import assemble

    path = find(model)
    variant = read(path, vae=vae, ask=False).variant
    bare = assemble(variant, empties(variant), [], path)
    reasons = [(f"control {one.name!r}", mismatch(one.net, bare)) for one in joins.get("control", ())]
    reasons += [
        (f"image prompt {one.name!r}", image_mismatch(one.adapter.adapter, bare))
        for one in joins.get("image_prompt", ())
    ]
    for which, reason in reasons:
        if reason:
            raise UserError(
                f"grid model={model}: {which} does not fit it: {reason}; leave one of them out",
                field="grid",
                value=model,
            )
    bare.refiner, bare.upscaler = beside.refiner, beside.upscaler
    return bare


def check_sheet_side(sizes: list[tuple[int, int]], axes: list[GridAxis], suffix: str) -> None:
    """UserError where the sheet of pictures of these sizes is too long for its file's format."""
    from plainsd.pictures.images import check_side, sheet_layout

    labels = labels_of(axes)
    rows = len(labels[1]) if labels[1:] else 1
    check_side(sheet_layout(sizes, len(labels[0]), rows, *labels).size, suffix)


def cell_by_cell(
    cells: list[tuple[list[str], dict]],
    setups: dict[Setup, list[int]],
    sd: StableDiffusion,
    ready: Callable[[str | None], StableDiffusion],
    draw: Callable[..., Iterable[Pictures]],
    task: Callable,
    joins_of: Callable[[StableDiffusion], dict],
) -> list[Pictures]:
    """The cells' pictures, in the order of the cells. `sd` is the model of the first setup; `ready` loads another, and
    `joins_of` gives its ControlNets and image prompts."""
    found: dict[int, Pictures] = {}
    before = next(iter(setups))[0]
    for (model, strengths), indices in setups.items():
        if model != before:
            sd = ready(model)
            joins = joins_of(sd)
            for index in indices:
                cells[index][1].update(joins)
        before = model
        set_strengths(sd, strengths)
        found |= zip(indices, draw(sd, task, [cells[index] for index in indices]), strict=True)
    return [found[index] for index in range(len(cells))]


def labels_of(axes: list[GridAxis]) -> list[list[str]]:
    names = [one.name if one.name.startswith(LORA_AXIS) else one.name.replace("_", " ") for one in axes]
    return [[f"{name} {value}" for value in one.values] for name, one in zip(names, axes, strict=True)]


def sheet(images: list[Image.Image], axes: list[GridAxis]) -> Image.Image:
    from plainsd.pictures.images import grid

    labels = labels_of(axes)
    return grid(images, len(labels[0]), *labels)
