"""A picture's recorded settings: read for `--from`, and completed before a picture is written.

The settings name the model, the refiner, the VAE and embeddings, but not where these files are. To recreate a picture
that was made with them, flags must give the files.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from plainsd.commands.adapters import LoraFiles, tags_of
from plainsd.commands.flags import GenerateFlags
from plainsd.commands.texts import TEXTS_BESIDE
from plainsd.errors import UserError
from plainsd.pictures.settings import DEFAULTS, Settings
from plainsd.pictures.texts.a1111 import SECOND_LORAS
from plainsd.text.prompts import LORA_TAG, tagged_loras

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
)  # recorded by name; flags give the files
NOISE = ("prediction", "zero_snr")  # how to read the model: recorded, and overridden by flags


def recorded(path: Path) -> dict:
    """The recorded settings that differ from the defaults. LoRAs of a hires prompt are named, and left out; so are tags
    of the negative prompt, where A1111 loads no LoRAs (`parse_extra_network_prompts` of processing.py, 1.10.1)."""
    from plainsd.pictures.images import read_settings

    found = {name: value for name, value in asdict(read_settings(path)).items() if value != DEFAULTS[name]}
    for name in found.keys() & {"hires_prompt", "hires_negative"}:
        found[name] = tagged_loras(found[name])[0]  # the hires pass uses the LoRAs of the prompt
    if tag := LORA_TAG.search(found.get("negative", "")):
        found["negative"] = LORA_TAG.sub("", found["negative"])
        print(
            f"note: {tag[0]} in the negative prompt of '{path}' is left out: A1111 loads no LoRA there, and reads the "
            "tag as words; the picture will differ",
            file=sys.stderr,
        )
    other = found.pop("other", ())
    if own := dict(other).get(SECOND_LORAS):
        which = "without LoRAs" if own == "none" else f"with the LoRAs {own}"
        print(
            f"note: the hires pass of '{path}' was drawn {which}, and is drawn with those of the prompt here: the "
            "picture will differ",
            file=sys.stderr,
        )
    rest = tuple(pair for pair in other if pair[0] != SECOND_LORAS)
    return found | ({"other": rest} if rest else {})


def check_recorded(
    command: GenerateFlags,
    sd: StableDiffusion,
    prompts: list[str],
    loras: LoraFiles,
    words: Mapping[str, Path],
    choices: dict,
) -> None:
    """UserError if the picture of --from needs files that flags do not give. Removes their names from `choices`.
    `loras`, `words`: the LoRAs on the model, and the embeddings that flags give."""
    from plainsd.files.hashes import weights_hash
    from plainsd.pictures.defaults import model_name

    model, refiner, vae, embeddings, hashes = (choices.pop(name, None) for name in ELSEWHERE[:5])
    made = f"'{command.from_}' was made with the"
    if model not in (None, model_name(sd)) and command.model is None:
        raise UserError(f"{made} model {model!r}, not {model_name(sd)!r}; give it with --model", field="model")
    if refiner and command.refiner is None:
        raise UserError(f"{made} refiner {refiner!r}; give it with --refiner", field="refiner")
    if vae and command.vae is None:
        raise UserError(f"{made} VAE {vae!r}; give it with --vae", field="vae")
    used = words_in([*prompts, *(choices.get(name) for name in TEXTS_BESIDE)], embeddings or ())
    files = {word.lower(): file for word, file in words.items()}  # prompts and other programs differ in case
    if missing := [word for word in used if word.lower() not in files]:
        raise UserError(
            f"{made} embedding {missing[0]!r}; give it with --embedding FILE:{missing[0]}", field="embeddings"
        )
    was = dict(hashes or ()).get("model")
    if was is not None and was != (now := weights_hash(sd.path, "unet")):
        print(
            f"note: {made} weights {was}, and those of {model_name(sd)} are {now}: the picture will differ",
            file=sys.stderr,
        )
    note_other_embeddings(made, {word: files[word.lower()] for word in used}, dict(hashes or ()))
    note_other_loras(made, loras, hashes or ())


def note_other_embeddings(made: str, used: Mapping[str, Path], hashes: Mapping[str, str]) -> None:
    """Prints the words whose files are not those of the recorded hashes."""
    from plainsd.files.hashes import file_hash, weights_of

    for word, file in used.items():
        was = hashes.get(f"embed:{word}", "").lower()
        if not (now := file_hash(weights_of(file)[0])).startswith(was):
            print(
                f"note: {made} embedding {word!r} of the hash {was}, and that of {file} is {now[: len(was)]}: the "
                "picture will differ",
                file=sys.stderr,
            )


def note_other_loras(made: str, loras: LoraFiles, hashes: Iterable[tuple[str, str]]) -> None:
    """Prints the LoRAs whose files are not those of the recorded hashes, which are of the tensors, or, as some programs
    write them, of the whole file. Of several LoRAs of a name each has its own, in their order."""
    from plainsd.adapters.reading import lora_alias, lora_name
    from plainsd.files.hashes import file_hash, weights_of

    recorded: dict[str, list[str]] = defaultdict(list)
    for name, value in hashes:
        if name.startswith("lora:"):
            recorded[Path(name.removeprefix("lora:")).name].append(value.lower())
    for path, _ in loras:
        names = [re.sub("[:,]", "", called) for called in (lora_name(path), lora_alias(path)) if called]  # as there
        if not (known := [name for name in names if recorded[name]]):
            continue
        name, file = known[0], weights_of(path)[0]
        was = recorded[name].pop(0)
        now = file_hash(file, tensors_only=True)
        if not now.startswith(was) and not file_hash(file).startswith(was):
            print(
                f"note: {made} LoRA {name!r} of the hash {was}, and that of {path} is {now[: len(was)]}: the picture "
                "will differ",
                file=sys.stderr,
            )


def words_in(texts: Iterable[str | None], words: Iterable[str]) -> list[str]:
    """The learned words that occur in any of these texts."""
    from plainsd.adapters.embeddings import occurs_in

    given = [text for text in texts if text]
    return [word for word in words if any(occurs_in(word, text) for text in given)]


def noise_flags(command: GenerateFlags, choices: dict) -> dict:
    """The arguments of `load` that say how to read the model. Removes them from `choices`."""
    from plainsd.files.predicted import check_prediction, on_or_off

    prediction, zero_snr = (choices.pop(name, None) for name in NOISE)
    prediction = command.prediction or prediction
    zero_snr = zero_snr if command.zero_snr is None else on_or_off(command.zero_snr)
    check_prediction(prediction)
    return {"prediction": prediction, "zero_snr": zero_snr}


def say_unused(keys: list[str]) -> None:
    """Prints the recorded settings that have no effect here."""
    if keys:
        print(f"note: these settings have no effect here: {', '.join(keys)}", file=sys.stderr)


def with_notes(
    settings: Settings, sd: StableDiffusion, loras: LoraFiles, words: dict[str, Path], vae: Path | None, noise: dict
) -> Settings:
    """The settings to write: with LoRAs, embeddings and VAE from flags, and the hashes of all files."""
    from plainsd.adapters.reading import lora_name
    from plainsd.files.hashes import hashes

    used = words_in([settings.prompt, *(getattr(settings, name) for name in TEXTS_BESIDE)], words)
    files = hashes(sd.path, vae, [(lora_name(path), path) for path, _ in loras], [(word, words[word]) for word in used])
    return replace(
        settings,
        prompt=settings.prompt + tags_of(loras),
        embeddings=tuple(used),
        vae=vae.resolve().name if vae else None,
        hashes=files,
        **noise,
    )
