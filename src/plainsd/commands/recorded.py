"""What a picture's text holds on the way in and out: `--from`, and the names of what only flags can give.

A text names the model, the refiner, the VAE, learned words; where they lie is not in it. A picture that was made with
them is made again only where flags say so.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from plainsd.commands.adapters import LoraFiles, tags_of
from plainsd.commands.flags import GenerateFlags
from plainsd.errors import UserError
from plainsd.pictures.settings import DEFAULTS, Settings
from plainsd.text.prompts import lora_tags

if TYPE_CHECKING:
    from plainsd.pictures.model import StableDiffusion

ELSEWHERE = (
    "model",
    "refiner",
    "vae",
    "embeddings",
    "hashes",
    "control",
    "image_prompt",
)  # what a picture's text names, and flags give
NOISE = ("prediction", "zero_snr")  # how the model is to be read: a picture's text says it, and flags change it


def recorded(path: Path) -> dict:
    """What the picture's text says and the defaults do not."""
    from plainsd.pictures.images import read_settings

    said = {name: value for name, value in asdict(read_settings(path)).items() if value != DEFAULTS[name]}
    for name in said.keys() & {"hires_prompt", "hires_negative"}:
        said[name] = lora_tags(said[name])[0]  # in both passes the LoRAs are those of the prompt
    return said


def check_recorded(
    command: GenerateFlags, sd: StableDiffusion, prompts: list[str], words: Collection[str], choices: dict
) -> None:
    """What --from was made with, and its text only names, must be given. Takes the names out of the choices."""
    from plainsd.files.hashes import weights_hash
    from plainsd.pictures.defaults import model_name

    model, refiner, vae, learned, hashes = (choices.pop(name, None) for name in ELSEWHERE[:5])
    made = f"'{command.from_}' was made with the"
    if model not in (None, model_name(sd)) and command.model is None:
        raise UserError(f"{made} model {model!r}, and this is {model_name(sd)!r}; say where that is with --model")
    if refiner and command.refiner is None:
        raise UserError(f"{made} refiner {refiner!r}; say where that is with --refiner")
    if vae and command.vae is None:
        raise UserError(f"{made} VAE {vae!r}; say where that is with --vae")
    texts = " ".join([*prompts, choices.get("negative", "")])
    if missing := [word for word in learned or () if word in texts and word not in words]:
        raise UserError(f"{made} embedding {missing[0]!r}; give it with --embedding FILE:{missing[0]}")
    was = dict(hashes or ()).get("model")
    if was is not None and was != (now := weights_hash(sd.path, "unet")):
        print(
            f"note: {made} weights {was}, and these are {now} ({model_name(sd)}): the picture will differ",
            file=sys.stderr,
        )


def noise_flags(command: GenerateFlags, choices: dict) -> dict:
    """The arguments for `load` that say how the model is to be read. Takes them out of the choices."""
    from plainsd.files.predicted import check_prediction, on_or_off

    prediction, zero_snr = (choices.pop(name, None) for name in NOISE)
    prediction = command.prediction or prediction
    zero_snr = zero_snr if command.zero_snr is None else on_or_off(command.zero_snr)
    check_prediction(prediction)
    return {"prediction": prediction, "zero_snr": zero_snr}


def say_unused(keys: list[str]) -> None:
    """What a picture's text says that nothing here acts on, once all else is in order."""
    if keys:
        print(f"no effect here: {', '.join(keys)}", file=sys.stderr)


def with_notes(
    settings: Settings, sd: StableDiffusion, loras: LoraFiles, words: dict[str, Path], vae: Path | None, noise: dict
) -> Settings:
    """With what came by flags, and the hashes of all its files."""
    from plainsd.files.hashes import hashes

    used = {word: path for word, path in words.items() if word in settings.prompt or word in settings.negative}
    files = hashes(sd.path, vae, [(path.stem, path) for path, _ in loras], used.items())
    return replace(
        settings,
        prompt=settings.prompt + tags_of(loras),
        embeddings=tuple(used),
        vae=vae.resolve().name if vae else None,
        hashes=files,
        **noise,
    )
