"""The LoRAs of the server's folder, by their names in a `<lora:name:1>` tag: those of the files, or of the folders that
diffusers and PEFT save, or the trainers'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from plainsd.adapters.embeddings import bundled
from plainsd.adapters.lora import check_strengths
from plainsd.adapters.reading import LORA_FILES, open_lora, tensors_by_module
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
        return {name: path for name, (path, _) in self.scanned().items()}

    def aliases(self) -> dict[str, str]:
        """What A1111 calls them by default: by their trainers' names, where these tell one from all others."""
        found = self.scanned()
        count = Counter(alias for _, alias in found.values())
        clear = {alias for alias in count if count[alias] == 1 and alias not in found and can_be_written(alias)}
        return {name: alias if alias in clear and alias != path.stem else name for name, (path, alias) in found.items()}

    def scanned(self) -> dict[str, tuple[Path, str]]:
        """The files by name, with their trainers' names for them."""
        unusable: dict[str, str] = {}
        files = readable_files(alias_of_adapter, self.folder, unusable, saved_as=LORA_FILES)
        unwritten = [name for name in files if not can_be_written(name)]
        unusable |= dict.fromkeys(unwritten, "its name cannot be written in a prompt; rename it")
        self.unusable = unusable
        return {name: found for name, found in files.items() if name not in unwritten}

    def path(self, name: str) -> Path:
        found = self.scanned()
        if name in found:
            return found[name][0]
        if name in self.unusable:
            raise UserError(f"loras: {name!r} cannot be used: {self.unusable[name]}", field="loras")
        called = {own: path for own, (path, alias) in found.items() if alias == name}
        if len(called) == 1:
            return next(iter(called.values()))
        if called:
            what = f"loras: {len(called)} LoRAs are called {name!r}"
            raise UserError(f"{what}; name one by its file: {', '.join(called)}", field="loras", most=WITH_CHOICES)
        if self.folder is None:
            raise UserError(f"loras: there is no LoRA {name!r}; start the server with --loras FOLDER", field="loras")
        if not found:
            raise UserError(
                f"loras: there is no LoRA {name!r}; put .safetensors files into the folder of --loras",
                field="loras",
            )
        raise UserError(f"loras: {unknown('LoRA', name, found)}", field="loras", most=WITH_CHOICES)

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


def can_be_written(name: str) -> bool:
    """Whether a tag of this name is read as one."""
    try:
        return tagged_loras(f"<lora:{name}:1>") == ("", [LoraTag(name)])
    except UserError:  # a colon parts it
        return False


def alias_of_adapter(path: Path) -> str:
    """The name that the trainer of a LoRA gave it, or else that of the file; UserError if it is none. The file is not
    kept open."""
    return open_lora(path).metadata.get("ss_output_name") or path.stem
