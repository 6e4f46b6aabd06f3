"""Adapters on the command line: `--lora FILE:0.8`, A1111's `<lora:name:0.8>` in a prompt, also with a strength for the
text encoders and one for the UNet, `<lora:name:0.5:0.8>`; `--embedding FILE:word`.

LoRAs are recorded in a picture's settings as `<lora:...>` tags, however they were given, so that --from finds them
again. So are the embeddings that its prompts use, so that --from can ask for them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from plainsd.errors import UserError
from plainsd.text.prompts import LoraTag, tagged_loras

FLAG_FIELDS = {"lora": "loras", "control": "control", "image-prompt": "image_prompt"}  # flag: field of the settings


class LoraStrengths(NamedTuple):
    """Of one LoRA on a model, as `add_lora` takes them."""

    strength: float  # on the UNet
    text_strength: float  # on the text encoders


LoraFiles = list[tuple[Path, LoraStrengths]]


def prompts_and_loras(
    prompts: Sequence[str], each: Iterable[Mapping[str, str]] = ()
) -> tuple[list[str], list[LoraTag]]:
    """The prompts without LoRA tags, and the tags. UserError if prompts differ in them, or if the texts beside the
    prompts (`each`, by their fields) have any."""
    from plainsd.pictures.defaults import check_untagged

    texts, tags = zip(*map(tagged_loras, prompts), strict=True)
    if any(one != tags[0] for one in tags):
        raise UserError(
            "the prompts name different LoRAs, and all prompts of a run share one set; run them separately",
            field="prompt",
        )
    for field, text in dict.fromkeys(item for beside in each for item in beside.items()):
        check_untagged(field, text)
    return [text.rstrip() for text in texts], tags[0]


def tags_of(loras: LoraFiles) -> str:
    from plainsd.adapters.reading import lora_name

    return "".join(f" {LoraTag(lora_name(path), *strengths)}" for path, strengths in loras)


def from_flag(text: str, flag: str = "lora") -> tuple[Path, float | None]:
    """`style.safetensors:0.8` -> file and strength; None if no strength is given."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), None
    try:
        return Path(path), float(strength)
    except ValueError:
        what = f"--{flag} {text!r}: no such file, and {strength!r} is not a strength"
        raise UserError(f"{what}; write FILE or FILE:0.8", field=FLAG_FIELDS[flag], value=text) from None


def embedding_from_flag(text: str) -> tuple[Path, str]:
    """`cat.safetensors:<cat>` -> file and word; an empty word stands for the one that the file names."""
    path, colon, word = text.rpartition(":")
    file, word = (Path(text), "") if not colon or Path(text).exists() else (Path(path), word)
    if not file.exists():
        raise UserError(
            f"--embedding {text!r}: no such file {str(file)!r}; write FILE or FILE:word", field="embeddings", value=text
        )
    return file, word


def chosen_loras(flags: Sequence[str], tags: Iterable[LoraTag], folder: Path | None) -> LoraFiles:
    """The LoRAs of --lora, then those that only tags name, found in `folder`."""
    from plainsd.adapters.lora import find_lora
    from plainsd.adapters.reading import lora_name, lora_of_alias

    given = [from_flag(text) for text in flags]
    files = [path for path, _ in given]
    named: list[tuple[list[int], LoraTag]] = []
    others: LoraFiles = []
    for tag in tags:
        indices = [index for index, path in enumerate(files) if lora_name(path) == Path(tag.name).name]
        if not indices:
            found = lora_of_alias(files, tag.name) if folder is None else find_lora(folder, tag.name, files)
            if found is None:
                raise UserError(
                    f"the prompt names the LoRA {tag.name!r}; give it with --lora FILE or --lora-folder FOLDER",
                    field="loras",
                    value=tag.name,
                )
            indices = [index for index, path in enumerate(files) if path == found]
            others += [] if indices else [(found, LoraStrengths(tag.strength, tag.text_strength))]
        named += [(indices, tag)] if indices else []
    return [(files[index], one) for index, one in flag_strengths([number for _, number in given], named)] + others


def flag_strengths(
    numbers: Sequence[float | None], tags: Iterable[tuple[Sequence[int], LoraTag]]
) -> list[tuple[int, LoraStrengths]]:
    """The LoRAs of --lora by their indices, each as often as it acts, with strengths. `tags` come with the indices of
    the LoRAs that they may name: each of these takes one in turn, and the first of them all that are left. The number
    of a flag overrides its tags, on all networks."""
    own: list[list[LoraStrengths]] = [[] for _ in numbers]
    for indices, tag in tags:
        free = [index for index in indices if not own[index]]
        own[(free or indices)[0]].append(LoraStrengths(tag.strength, tag.text_strength))
    return [
        (index, one)
        for index, number in enumerate(numbers)
        for one in (own[index] or [LoraStrengths(1.0, 1.0)] if number is None else [LoraStrengths(number, number)])
    ]
