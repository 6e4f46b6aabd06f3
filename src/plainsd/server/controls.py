"""Control nets by name out of the server's folder, and the maps of a request."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from plainsd.checkpoint import load_control
from plainsd.errors import UserError, unknown
from plainsd.files.control import is_control, open_control
from plainsd.files.stored import empty
from plainsd.files.t2i_adapter import is_t2i_adapter, open_t2i_adapter
from plainsd.listing import hidden
from plainsd.models.control import ControlNet
from plainsd.models.t2i_adapter import T2IAdapter
from plainsd.pictures.control import Control, control_name
from plainsd.pictures.control_checks import mismatch
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.preprocess import preprocessed
from plainsd.server.errors import APIError
from plainsd.server.folders import changed_at, named_files, printable_name, read_cached, readable_files
from plainsd.server.jobs.job import ControlInput
from plainsd.server.limits import Limits
from plainsd.server.schema import ControlRequest
from plainsd.server.uploads import picture, png

KEPT = 2  # nets in memory


class ControlNets:
    """Those in a folder, looked for anew each time: files, and folders in diffusers' layout. The worker's thread alone
    loads them."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.unusable: dict[str, str] = {}
        self.loaded: dict[
            tuple[str, str], ControlNet | T2IAdapter
        ] = {}  # by name and model, the one used last at the end

    def known(self) -> dict[str, Path]:
        found = {name: path for name, (path, _) in readable_files(control_in, self.folder, self.unusable).items()}
        for name, path in named_files(self.folder).items():
            if path.parent != self.folder and (path.parent / "config.json").is_file():  # it goes by its folder's name
                found.pop(name, None)
                self.unusable.pop(printable_name(name), None)
        below = sorted(self.folder.iterdir()) if self.folder else []
        for path in below:
            if (config := path / "config.json").is_file() and not hidden(path.name):
                content, why = read_cached(control_in_folder, path, changed_at(config))
                if content:
                    found[path.name] = path
                elif why:
                    self.unusable[printable_name(path.name)] = why.replace(str(path), path.name)
        return found

    def path(self, name: str) -> Path:
        """By name, with or without the digits behind it that A1111's clients send."""
        known = self.known()
        bare = name.rpartition(" [")[0] if name.endswith("]") else name
        for wanted in (name, bare):
            if wanted in known:
                return known[wanted]
        if name in self.unusable:
            raise UserError(f"controls: {name!r} cannot be used: {self.unusable[name]}", field="controls")
        if self.folder is None:
            raise UserError(
                f"controls: there is none called {name!r}; start the server with --controls FOLDER", field="controls"
            )
        raise UserError(f"controls: {unknown('control net', name, known)}", field="controls")

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
        """Loaded beside the model, for files that are changes to one."""
        key = (name, model)
        net = self.loaded.pop(key, None) or load_control(self.path(name), sd)
        self.loaded[key] = net
        for old in list(self.loaded)[:-KEPT]:
            del self.loaded[old]
        return net


def control_in(path: Path) -> bool:
    """Whether a file holds one; UserError where it does not. Of the file nothing is kept."""
    return is_t2i_adapter(path) or bool(open_control(path).file.tensors)


def control_in_folder(path: Path) -> bool:
    """Likewise of a folder in diffusers' layout; False where it is for something else."""
    return (is_control(path) or is_t2i_adapter(path)) and bare_at(path) is not None


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


def controls_of(
    units: list[ControlRequest], nets: ControlNets, limits: Limits
) -> tuple[list[Control], list[ControlInput], dict[str, bytes]]:
    """What the tasks check, what the job keeps, and its files by their names among the inputs."""
    controls, control_inputs, files = [], [], {}
    for unit in units:
        try:
            map = map_in(unit, limits)
            content = png(map)
            file = f"{hashlib.sha256(content).hexdigest()[:32]}.png"
            entry = ControlInput(
                unit.name,
                file,
                unit.strength,
                unit.start,
                unit.end,
                unit.guess,
                unit.mode,
                tuple(unit.kind),
                unit.preprocess,
            )
            controls.append(as_control(entry, nets.bare(unit.name), map, nets))
        except (UserError, APIError) as error:
            error.entry = len(controls)
            raise
        control_inputs.append(entry)
        files[file] = content
    return controls, control_inputs, files


def map_in(unit: ControlRequest, limits: Limits) -> Image.Image:
    given = picture(unit.image, "controls", limits, "black")
    try:
        return preprocessed(given, unit.preprocess, (unit.low, unit.high), unit.resolution)
    except UserError as error:
        raise APIError(422, f"controls: {error}", "controls", unit.preprocess) from None


def as_control(entry: ControlInput, net: ControlNet | T2IAdapter, map: Image.Image, nets: ControlNets) -> Control:
    name = control_name(nets.path(entry.net))
    return Control(net, map, entry.strength, entry.start, entry.end, entry.guess, entry.mode, entry.kinds or None, name,
                   entry.preprocess)  # fmt: skip


def control_at(entry: ControlInput, model: str, sd: StableDiffusion, map: Image.Image, nets: ControlNets) -> Control:
    """For the drawing: the net with its weights."""
    with torch.inference_mode():
        return as_control(entry, nets.net(entry.net, model, sd), map, nets)
