"""Upscalers from the server's folder, by name: for hires passes, and on their own."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from plainsd.errors import UserError, unknown
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import UPSCALERS
from plainsd.pictures.upscaling import Upscaler, load_upscaler, spandrel_classes
from plainsd.server.folders import changed_at, readable_files

NETWORK_SUFFIXES = (".pth", ".safetensors")
MAX_LOADED_UPSCALERS = 2  # networks in memory


class Upscalers:
    """The upscalers of a folder, scanned at each access."""

    def __init__(self, folder: Path | None, device: torch.device):
        self.folder, self.device = folder, device
        self.unusable: dict[str, str] = {}
        self.lock = threading.Lock()  # used by the worker and by requests
        self.loaded: dict[tuple[Path, int], Upscaler] = {}
        """by file and the time of its last change, the one used last at the end"""
        if folder is not None:
            spandrel_classes()  # fails early if it is not installed

    def known(self) -> dict[str, tuple[Path, int]]:
        """Files by name, and their scale factors."""
        unusable: dict[str, str] = {}
        found = readable_files(scale_of, self.folder, unusable, NETWORK_SUFFIXES)
        self.unusable = unusable
        return found

    def found(self, wanted: str) -> tuple[str, Path, int]:
        """By name, case-insensitively, as settings texts may write it. UserError if unknown."""
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
        key = (path, changed_at(path))
        with self.lock:
            network = self.loaded.pop(key, None) or replace(load_upscaler(path, self.device), name=name)
            self.loaded[key] = network
            for old in list(self.loaded)[:-MAX_LOADED_UPSCALERS]:
                del self.loaded[old]
        return network


def scale_of(path: Path) -> int:
    """The scale factor of an upscaler file; UserError if it is not one."""
    return load_upscaler(path).scale
