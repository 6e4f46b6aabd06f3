"""What `plainsd generate` draws with: the model, and what flags add to it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plainsd.commands.adapters import LoraFiles
from plainsd.commands.control import chosen_controls
from plainsd.commands.flags import GenerateFlags
from plainsd.commands.image_prompt import chosen_image_prompts
from plainsd.commands.recorded import words_in
from plainsd.listing import suffix_of

if TYPE_CHECKING:
    import torch

    from plainsd.pictures.model import StableDiffusion


@dataclass
class DrawingSetup:
    """Loads models, with all that the flags add. Can be sent to another process: it holds names of files."""

    command: GenerateFlags
    device: str  # as --device names it
    loras: LoraFiles
    embeddings: list[tuple[Path, str]]  # files and their words
    noise: dict[str, Any]  # arguments for `load`: how to read the model
    controls: Any  # those that --from records ...
    image_prompts: Any  # ... and these

    def ready(self, model: str | None) -> tuple[StableDiffusion, dict[str, Path]]:
        """The model with its LoRAs, refiner and upscaler, and the words of the embeddings added to it."""
        from tqdm import tqdm

        from plainsd.adapters.embeddings import add_embedding
        from plainsd.device import choose_device
        from plainsd.pictures.memory import placed

        command, device = self.command, choose_device(self.device)
        sd = placed(partial(self.loaded, model, device), device, command.low_memory)
        words = {add_embedding(sd, file, word or None): file for file, word in self.embeddings}
        if command.int8:
            from plainsd.speed.int8 import int8

            int8(sd)
        if not command.plain:
            from plainsd.speed.model import faster

            faster(sd, compiled=command.compile, tell=partial(tqdm.write, file=sys.stderr))
        return sd, words

    def loaded(self, model: str | None, device: torch.device, place: torch.device) -> StableDiffusion:
        """The model with refiner and upscaler, loaded on `place`, in the precision for `device`, where it computes."""
        from plainsd.adapters.lora import add_lora
        from plainsd.checkpoint import load
        from plainsd.device import choose_dtype

        command = self.command
        where = {"device": place, "dtype": choose_dtype(command.dtype, device)}
        sd = load(model, vae=command.vae, **self.noise, **where)
        for file, strengths in self.loras:
            add_lora(sd, file, *strengths, partial=command.lora_partial)
        if command.refiner:
            sd.refiner = load(command.refiner, **where)
        if network := upscaler_file(command):
            from plainsd.pictures.upscaling import load_upscaler

            sd.upscaler = load_upscaler(network, place)
        return sd

    def joins(self, sd: StableDiffusion) -> dict[str, Any]:
        """The ControlNets and image prompts for a model."""
        return {
            "control": chosen_controls(self.command, sd, self.controls),
            "image_prompt": chosen_image_prompts(self.command, sd, self.image_prompts),
        }


def upscaler_file(command: GenerateFlags) -> Path | None:
    """The file in --upscaler; None if that is a built-in upscaler."""
    named = command.upscaler
    return Path(named) if named and suffix_of(Path(named)) in (".pth", ".safetensors") else None


def note_unused_embeddings(words: dict[str, Path], texts: Iterable[str | None]) -> None:
    used = words_in(texts, words)
    for word, file in words.items():
        if word not in used:
            print(f"note: the embedding {file} has no effect: no prompt has its word {word!r}", file=sys.stderr)
