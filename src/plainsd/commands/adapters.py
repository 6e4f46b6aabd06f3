"""Adapters on the command line: `--lora FILE:0.8`, A1111's `<lora:name:0.8>` in a prompt, also with a strength for the
text encoders and one for the UNet, `<lora:name:0.5:0.8>`; `--embedding FILE:word`.

LoRAs are recorded in a picture's settings as `<lora:...>` tags, however they were given, so that --from finds them
again. So are the embeddings that its prompts use, so that --from can ask for them.
"""

from collections.abc import Mapping, Sequence
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


def prompts_and_loras(prompts: Sequence[str]) -> tuple[list[str], dict[str, LoraStrengths]]:
    """The prompts without LoRA tags, and the LoRAs they name, with strengths. UserError if prompts differ in them."""
    texts, tags = zip(*map(tagged_loras, prompts), strict=True)
    if any(one != tags[0] for one in tags):
        raise UserError(
            "the prompts name different LoRAs, and all prompts of a run share one set; run them separately",
            field="prompt",
        )
    return [text.rstrip() for text in texts], {name: LoraStrengths(*strengths) for name, *strengths in tags[0]}


def tags_of(loras: LoraFiles) -> str:
    return "".join(f" {LoraTag(path.stem, *strengths)}" for path, strengths in loras)


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


def chosen_loras(flags: Sequence[str], tags: Mapping[str, LoraStrengths], folder: Path | None) -> LoraFiles:
    """The LoRAs of --lora, then those that only tags name, found in `folder`. A flag's strength overrides a tag's, on
    all networks."""
    from plainsd.adapters.lora import find_lora

    given = [from_flag(text) for text in flags]
    tagged = {Path(name).name: strengths for name, strengths in tags.items()}
    loras = [
        (path, tagged.get(path.stem, LoraStrengths(1.0, 1.0)) if number is None else LoraStrengths(number, number))
        for path, number in given
    ]
    for name, strengths in tags.items():
        if not any(path.stem == Path(name).name for path, _ in loras):
            if folder is None:
                raise UserError(
                    f"the prompt names the LoRA {name!r}; give it with --lora FILE or --lora-folder FOLDER",
                    field="loras",
                    value=name,
                )
            loras.append((find_lora(folder, name), strengths))
    return loras
