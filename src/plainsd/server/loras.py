"""The LoRAs of the server's folder, by their names in a `<lora:name:1>` tag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plainsd.adapters.embeddings import bundled
from plainsd.adapters.lora import check_strengths
from plainsd.adapters.reading import open_lora, tensors_by_module
from plainsd.errors import WITH_CHOICES, UserError, unknown
from plainsd.pictures.model import StableDiffusion
from plainsd.server.folders import readable_files
from plainsd.text.prompts import LoraTag, tagged_loras

NamedLoras = Sequence[LoraTag]


class Loras:
    """Scanned at each access."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.unusable: dict[str, str] = {}  # files that were skipped, and why, as of the last scan

    def known(self) -> dict[str, Path]:
        unusable: dict[str, str] = {}
        files = {name: path for name, (path, _) in readable_files(has_adapter, self.folder, unusable).items()}
        written = {name for name in files if tagged_loras(f"<lora:{name}:1>") == ("", [LoraTag(name)])}
        unusable |= dict.fromkeys(files.keys() - written, "its name cannot be written in a prompt; rename it")
        self.unusable = unusable
        return {name: path for name, path in files.items() if name in written}

    def path(self, name: str) -> Path:
        known = self.known()
        if name in known:
            return known[name]
        if name in self.unusable:
            raise UserError(f"loras: {name!r} cannot be used: {self.unusable[name]}", field="loras")
        if self.folder is None:
            raise UserError(f"loras: there is no LoRA {name!r}; start the server with --loras FOLDER", field="loras")
        if not known:
            raise UserError(
                f"loras: there is no LoRA {name!r}; put .safetensors files into the folder of --loras",
                field="loras",
            )
        raise UserError(f"loras: {unknown('LoRA', name, known)}", field="loras", most=WITH_CHOICES)

    def check(self, bare: StableDiffusion, wanted: NamedLoras) -> None:
        """UserError if one is missing or does not fit the model, which needs no weights."""
        for name, *strengths in wanted:
            try:
                check_strengths(*strengths)
            except UserError as error:
                raise UserError(f"loras: {error}", field="loras", most=WITH_CHOICES) from None
            path = self.path(name)
            try:
                file = open_lora(path)
                tensors_by_module(file, bare, partial=False)
                bundled(bare, file)
            except UserError as error:  # does not reveal the path
                raise UserError(f"loras: {str(error).replace(str(path), name)}", field="loras") from None


def has_adapter(path: Path) -> bool:
    """Whether a file holds a LoRA; UserError if not. The file is not kept open."""
    return bool(open_lora(path).tensors)
