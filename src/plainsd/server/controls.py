"""ControlNets from the server's folder, by name, and the control maps of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from plainsd.checkpoint import load_control
from plainsd.errors import UserError, unknown
from plainsd.files.control import is_control, open_control
from plainsd.files.image_prompt import holds_image_adapter, is_tower, naming_of_tower, open_image_adapter, open_tower
from plainsd.files.stored import empty
from plainsd.files.t2i_adapter import is_t2i_adapter, open_t2i_adapter
from plainsd.files.tensorfile import open_tensors
from plainsd.listing import hidden
from plainsd.models.control import ControlNet
from plainsd.models.t2i_adapter import T2IAdapter
from plainsd.pictures.control import Control, control_name
from plainsd.pictures.control_checks import mismatch
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.preprocess import INPAINT, preprocessed
from plainsd.pictures.settings import PREPROCESSORS, THRESHOLDS
from plainsd.server.canvas import InitImages
from plainsd.server.errors import APIError
from plainsd.server.folders import changed_at, changed_below, named_files, printable_name, read_cached, readable_files
from plainsd.server.jobs.job import ControlInput
from plainsd.server.limits import Limits
from plainsd.server.schema import ControlRequest, ImagePromptRequest
from plainsd.server.uploads import check_pixels, picture, png

MAX_LOADED_CONTROLS = 2  # nets in memory
CONTROL, IMAGE_ADAPTER, TOWER = "ControlNet", "IP-Adapter", "image encoder"  # what a folder may hold


class ControlNets:
    """The ControlNets of a folder, scanned at each access: files, and folders in diffusers' layout. Only the worker
    thread loads them."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.unusable: dict[str, str] = {}
        self.loaded: dict[tuple[Path, int, str, int], ControlNet | T2IAdapter] = {}
        """by file, the time of its last change, model, and that of its own; most recently used last"""

    def known(self) -> dict[str, Path]:
        found, self.unusable = of_kind(CONTROL, self.folder)
        return found

    def path(self, name: str) -> Path:
        """By name, with or without the hash that A1111's clients append."""
        return found_by_name(name, CONTROL, self.known(), self.unusable, self.folder)

    def bare(self, name: str) -> ControlNet | T2IAdapter:
        """Without weights: enough to check a request."""
        return bare_at(self.path(name))

    def usable(self) -> dict[str, ControlNet | T2IAdapter]:
        """All of them, without weights."""
        nets = {}
        for name, path in sorted(self.known().items()):
            with suppress(UserError, OSError):  # it is gone since
                nets[name] = bare_at(path)
        return nets

    def described(self) -> dict[str, dict[str, Any]]:
        """Those that are known: how many kinds of maps a net tells apart (0: it is for one), and whether it is a
        T2I-Adapter."""
        return {name: {"kinds": 0 if isinstance(net, T2IAdapter) else net.control.kinds,
                       "adapter": isinstance(net, T2IAdapter)} for name, net in self.usable().items()}  # fmt: skip

    def fitting(self, sd: StableDiffusion) -> list[str]:
        """Those that can be used with this model."""
        return [name for name, net in self.usable().items() if mismatch(net, sd) is None]

    def net(self, name: str, model: str, sd: StableDiffusion) -> ControlNet | T2IAdapter:
        """Loads a net for a model, which files of differences need."""
        path = self.path(name)
        key = (path, changed_below(path), model, changed_below(sd.path) if sd.path else 0)
        net = self.loaded.pop(key, None) or load_control(path, sd)
        self.loaded[key] = net
        for old in list(self.loaded)[:-MAX_LOADED_CONTROLS]:
            del self.loaded[old]
        return net


# --- files -----------------------------------------------------------------------------------------------------------


def of_kind(kind: str, folder: Path | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Files and folders of one kind by name; and those that are of none, with the reason."""
    unusable: dict[str, str] = {}
    if folder is None:
        return {}, unusable
    found = {name: path for name, (path, its) in readable_files(kind_of_file, folder, unusable).items() if its == kind}
    for name, path in named_files(folder).items():
        if path.parent != folder and (path.parent / "config.json").is_file():  # it goes by its folder's name
            found.pop(name, None)
            unusable.pop(printable_name(name), None)
    for path in sorted(folder.glob("*")):  # none if the folder is gone
        if (config := path / "config.json").is_file() and not hidden(path.name):
            its, why = read_cached(kind_of_folder, path, changed_at(config))
            if its == kind:
                found[path.name] = path
            elif why:
                unusable[printable_name(path.name)] = why.replace(str(path), path.name)
    return found, unusable


def kind_of_folder(path: Path) -> str:
    """What a folder with a config.json holds; "" for anything else. UserError where that cannot be read."""
    if is_control(path) or is_t2i_adapter(path):
        bare_at(path)
        return CONTROL
    if is_tower(path):
        open_tower(path)
        return TOWER
    return ""


def kind_of_file(path: Path) -> str:
    """What a file holds. UserError where it is none of these. Nothing of the file is kept."""
    names = open_tensors(path).tensors
    if holds_image_adapter(names):
        open_image_adapter(path)
        return IMAGE_ADAPTER
    if naming_of_tower(names):
        open_tower(path)
        return TOWER
    if not is_t2i_adapter(path):
        open_control(path)
    return CONTROL


def found_by_name(name: str, kind: str, known: Mapping[str, Path], unusable: Mapping[str, str], given: object) -> Path:
    """The file of this name, with or without the hash behind it that A1111's clients send. `given`: whether the server
    has a folder of them."""
    bare = name.rpartition(" [")[0] if name.endswith("]") else name
    for wanted in (name, bare):
        if wanted in known:
            return known[wanted]
    if why := unusable.get(name) or unusable.get(bare):
        raise UserError(f"{name!r} cannot be used: {why}", value=name)
    if not given:
        raise UserError(f"there is no {kind} {name!r}; start the server with --controls FOLDER", value=name)
    raise UserError(str(unknown(kind, name, known)), value=name)


def bare_at(path: Path) -> ControlNet | T2IAdapter:
    return net_without_weights(path, changed_at(path / "config.json" if path.is_dir() else path))


@lru_cache(256)
def net_without_weights(path: Path, _: int) -> ControlNet | T2IAdapter:
    """Made once for each time that the file was changed."""
    of_adapter = is_t2i_adapter(path)
    config = open_t2i_adapter(path).config if of_adapter else open_control(path).config
    net = empty(T2IAdapter if of_adapter else ControlNet, config)
    assert isinstance(net, ControlNet | T2IAdapter)
    return net


# --- of a request ----------------------------------------------------------------------------------------------------


@contextmanager
def of_unit(field: str, units: Sequence[ControlRequest | ImagePromptRequest], number: int) -> Iterator[None]:
    """Errors inside name the field, and the unit by its index where there are several."""
    where = units[number].label or (f"{field}[{number}]" if len(units) > 1 else field)
    try:
        yield
    except APIError as error:
        message = error.message if error.message.startswith(where) else f"{where}: {error.message}"
        raise APIError(error.status, message, field, error.value, entry=number) from None
    except UserError as error:
        raise APIError(422, f"{where}: {error}", field, error.value, entry=number) from None


def controls_of(
    units: list[ControlRequest],
    nets: ControlNets,
    limits: Limits,
    base: InitImages | None,
    size: tuple[int, int] | None = None,
) -> tuple[list[Control], list[ControlInput], dict[str, bytes]]:
    """Controls for checking, their records in the job, and the contents of their input files. `size` is the picture's,
    where it is not that of `base`."""
    controls, control_inputs, files = [], [], {}
    size = base.image.size if base is not None else size
    for number, unit in enumerate(units):
        with of_unit("controls", units, number):
            map, file = map_of_unit(unit, limits, base, size), None
            if map is not None and unit.image is not None and base is not None:
                map = base.part_of(map, unit.resize)
            if map is not None:
                content = png(map)
                file = input_name(content)
                files[file] = content
            made = unit.preprocess in PREPROCESSORS and unit.preprocess != "none"
            thresholds = (unit.low, unit.high) if made and (unit.low, unit.high) != THRESHOLDS else None
            entry = ControlInput(unit.name, file, unit.strength, unit.start, unit.end, unit.guess, unit.mode,
                                 tuple(unit.kind), unit.preprocess, thresholds,
                                 unit.resolution if made else None, unit.resize)  # fmt: skip
            controls.append(as_control(entry, nets.bare(unit.name), map, nets))
            control_inputs.append(entry)
    return controls, control_inputs, files


def input_name(content: bytes) -> str:
    """Of a picture among the inputs: by its content."""
    return f"{hashlib.sha256(content).hexdigest()[:32]}.png"


def map_of_unit(
    unit: ControlRequest, limits: Limits, base: InitImages | None, size: tuple[int, int] | None
) -> Image.Image | None:
    """The unit's map; None for the inpainting map, which is made of the picture that is drawn over and its mask. A
    pixel-perfect unit gets its resolution here."""
    if unit.image is not None:
        given = picture(unit.image, "image", limits, "black")
    elif base is None:
        raise APIError(422, "a control without an image reads the picture that is drawn over, and there is none; send "
                      "its map as image")  # fmt: skip
    elif unit.preprocess == INPAINT or (unit.preprocess == "none" and base.hole is not None):
        return None
    else:
        given = base.image
    if unit.pixel_perfect and size is not None:
        unit.resolution = filling_resolution(given.size, size)
    return map_within(limits, given, unit.preprocess, (unit.low, unit.high), unit.resolution)


def filling_resolution(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The shorter side of a picture of this size, scaled until it covers the target: what A1111's extension calls
    pixel perfect."""
    scale = max(there / here for here, there in zip(size, target, strict=True))
    return round(scale * min(size))


def map_within(
    limits: Limits, image: Image.Image, name: str, thresholds: tuple[float, float], resolution: int | None
) -> Image.Image:
    """A preprocessor's map. APIError where it would be larger than the pictures that this server draws: `resolution` is
    that of the shorter side."""
    if resolution:
        width, height = (max(8, round(side * resolution / min(image.size))) for side in image.size)
        check_pixels((width, height), limits, "resolution")
    return preprocessed(image, name, thresholds, resolution)


def as_control(
    entry: ControlInput, net: ControlNet | T2IAdapter, map: Image.Image | None, nets: ControlNets
) -> Control:
    name = control_name(nets.path(entry.net))
    return Control(net, map, entry.strength, entry.start, entry.end, entry.guess, entry.mode, entry.kinds or None, name,
                   entry.preprocess, entry.thresholds, entry.resolution, entry.resize)  # fmt: skip


def control_at(
    entry: ControlInput, model: str, sd: StableDiffusion, map: Image.Image | None, nets: ControlNets
) -> Control:
    """For sampling: the net with its weights."""
    with torch.inference_mode():
        return as_control(entry, nets.net(entry.net, model, sd), map, nets)
