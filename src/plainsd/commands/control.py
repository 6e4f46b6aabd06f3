"""ControlNets and T2I-Adapters on the command line: `--control FILE:STRENGTH --control-image FILE`, and their options.

The first `--control-image` belongs to the first `--control`, and so on; so do `--control-range`, `--preprocess` and
`--control-kind`, which may also be given once for all. A net with `--preprocess inpaint` reads the picture that is
drawn over, and has no map among the others. What is not given is taken from the picture of `--from`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from plainsd.commands.adapters import from_flag
from plainsd.commands.flags import GenerateFlags
from plainsd.errors import UserError
from plainsd.pictures.settings import INPAINT, ControlNote

if TYPE_CHECKING:
    from PIL import Image

    from plainsd.pictures.control import Control
    from plainsd.pictures.model import StableDiffusion

Each = TypeVar("Each")


def check_control_flags(command: GenerateFlags, recorded: Sequence[ControlNote]) -> None:
    """UserError for flags that do not go together. Called before anything is loaded."""
    nets, maps = len(command.control), len(command.control_image)
    beside = ("control_range", "preprocess", "control_kind")
    for name in beside:
        given = len(getattr(command, name))
        if given not in (0, 1, nets) or (given and not nets):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{given} {flag} for {nets} --control; give one for each, or one for all", field="control")
    inpainting = sum(module == INPAINT for module in preprocessors_of(command, recorded))
    if maps != nets - inpainting and (maps or not command.image):
        but = f" without --preprocess {INPAINT}" if inpainting else ""
        raise UserError(
            f"{nets} --control and {maps} --control-image; give one image for each{but}, in the same order",
            field="control",
        )
    if inpainting and not command.image:
        raise UserError(
            f"--preprocess {INPAINT} reads a picture and its mask; give --image and --mask", field="control"
        )
    if not nets and (command.guess or command.control_mode):
        raise UserError("--guess and --control-mode need a ControlNet; give one with --control", field="control")
    if len(recorded) > nets:
        missing = recorded[nets].model
        raise UserError(
            f"'{command.from_}' was made with the ControlNet {missing!r}; give it with --control FILE, and its map "
            "with --control-image FILE",
            field="control",
        )
    for text in command.control:
        from_flag(text, "control")


def chosen_controls(command: GenerateFlags, sd: StableDiffusion, recorded: Sequence[ControlNote]) -> list[Control]:
    """The ControlNets and T2I-Adapters, loaded on the model's device, with their maps."""
    from plainsd.checkpoint import load_control
    from plainsd.files.hub import find
    from plainsd.pictures.control import Control, control_name

    return [
        Control(
            load_control(path, sd),
            None if map is None else map_of(map, note),
            note.weight,
            note.start,
            note.end,
            guess=note.guess,
            mode=note.mode,
            kind=note.kinds or None,
            name=control_name(find(path)),
            module=note.module,
            thresholds=note.thresholds,
            resolution=note.resolution,
            resize=note.resize,
        )
        for path, map, note in asked_controls(command, recorded)
    ]


def asked_controls(
    command: GenerateFlags, recorded: Sequence[ControlNote]
) -> Iterator[tuple[Path, Path | None, ControlNote]]:
    """For each --control: its file, the file of its map, if it has one, and how it acts."""
    maps = iter(command.control_image)
    for number, (text, module) in enumerate(zip(command.control, preprocessors_of(command, recorded), strict=True)):
        path, strength = from_flag(text, "control")
        before = recorded[number] if number < len(recorded) else ControlNote()
        start, end = nth(command.control_range, number, (before.start, before.end))
        kind = nth(command.control_kind, number, None)
        note = ControlNote(
            module,
            weight=before.weight if strength is None else strength,
            start=start,
            end=end,
            mode=command.control_mode or (before.mode if not command.guess else "balanced"),
            guess=command.guess or (before.guess and not command.control_mode),
            kinds=before.kinds if kind is None else (kind,),
            thresholds=before.thresholds if module == before.module else None,
            resolution=before.resolution if module == before.module else None,
            resize=before.resize,
        )
        yield path, None if module == INPAINT else next(maps, None), note


def preprocessors_of(command: GenerateFlags, recorded: Sequence[ControlNote]) -> list[str]:
    """The preprocessor of each --control."""
    before = [note.module for note in recorded]
    return [
        nth(command.preprocess, number, before[number] if number < len(before) else ControlNote().module)
        for number in range(len(command.control))
    ]


def nth(given: Sequence[Each], number: int, default: Each) -> Each:
    """Entry `number` of a flag that is given once for each, once for all (then the first), or not at all."""
    return given[number if len(given) > 1 else 0] if given else default


def map_of(path: Path, note: ControlNote) -> Image.Image:
    from plainsd.pictures.images import open_picture
    from plainsd.pictures.preprocess import preprocessed
    from plainsd.pictures.settings import THRESHOLDS

    picture = open_picture(path, background="black")
    return preprocessed(picture, note.module, note.thresholds or THRESHOLDS, note.resolution)
