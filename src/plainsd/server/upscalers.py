"""Networks that enlarge pictures, by name out of the server's folder: for second passes, and by themselves."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from plainsd.errors import UserError, unknown
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import UPSCALERS
from plainsd.pictures.upscaling import Upscaler, load_upscaler, spandrel_classes
from plainsd.server.folders import readable_files

NETWORK_SUFFIXES = (".pth", ".safetensors")
MAX_LOADED_UPSCALERS = 2  # networks in memory


class Upscalers:
    """Those in a folder, looked for anew each time."""

    def __init__(self, folder: Path | None, device: torch.device):
        self.folder, self.device = folder, device
        self.unusable: dict[str, str] = {}
        self.lock = threading.Lock()  # the worker draws with them, and others enlarge pictures
        self.loaded: dict[str, Upscaler] = {}  # the one used last at the end
        if folder is not None:
            spandrel_classes()  # says at once where it is not installed

    def known(self) -> dict[str, tuple[Path, int]]:
        """Files by name, and how often each enlarges."""
        return readable_files(scale_of, self.folder, self.unusable, NETWORK_SUFFIXES)

    def found(self, wanted: str) -> tuple[str, Path, int]:
        """By name, in any case, as a text may have it. UserError where there is none such."""
        known = self.known()
        names = [wanted] if wanted in known else [name for name in known if name.lower() == wanted.lower()]
        if names:
            return names[0], *known[names[0]]
        if wanted in self.unusable:
            raise UserError(f"upscaler {wanted!r} cannot be used: {self.unusable[wanted]}", field="upscaler")
        if self.folder is None:
            raise UserError(
                f"{unknown('upscaler', wanted, UPSCALERS)}, or start the server with --upscalers FOLDER",
                field="upscaler",
                value=wanted,
            )
        raise unknown("upscaler", wanted, [*UPSCALERS, *known], field="upscaler")

    def bare(self, bare: StableDiffusion, wanted: str | None) -> StableDiffusion:
        """A model without weights, with an upscaler without weights: enough to check a request."""
        if wanted is None or wanted in UPSCALERS:
            return bare
        name, _, scale = self.found(wanted)
        return replace(bare, upscaler=Upscaler(name, scale, None))

    def network(self, wanted: str) -> Upscaler:
        name, path, _ = self.found(wanted)
        with self.lock:
            network = self.loaded.pop(name, None) or replace(load_upscaler(path, self.device), name=name)
            self.loaded[name] = network
            for old in list(self.loaded)[:-MAX_LOADED_UPSCALERS]:
                del self.loaded[old]
        return network


def scale_of(path: Path) -> int:
    """How often a file's network enlarges; UserError where it holds none."""
    return load_upscaler(path).scale
