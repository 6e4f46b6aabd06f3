"""Adapters on the command line: `--lora FILE:0.8`, A1111's `<lora:name:0.8>` in a prompt, `--embedding FILE:word`.

LoRAs are recorded in a picture's settings as `<lora:...>` tags, however they were given, so that --from finds them
again. So are the embeddings that its prompts use, so that --from can ask for them.
"""

from collections.abc import Sequence
from pathlib import Path

from plainsd.errors import UserError
from plainsd.pictures.settings import plain_number
from plainsd.text.prompts import lora_tags

FLAG_FIELDS = {"lora": "loras", "control": "control", "image-prompt": "image_prompt"}  # flag: field of the settings
LoraFiles = list[tuple[Path, float]]  # files and strengths


def prompts_and_loras(prompts: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """The prompts without LoRA tags, and the LoRAs they name, with strengths. UserError if prompts differ in them."""
    texts, tags = zip(*map(lora_tags, prompts), strict=True)
    if any(one != tags[0] for one in tags):
        raise UserError(
            "the prompts name different LoRAs, and all prompts of a run share one set; run them separately",
            field="prompt",
        )
    return [text.rstrip() for text in texts], dict(tags[0])


def tags_of(loras: LoraFiles) -> str:
    return "".join(f" <lora:{path.stem}:{plain_number(strength)}>" for path, strength in loras)


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


def chosen_loras(flags: Sequence[str], tags: dict[str, float], folder: Path | None) -> LoraFiles:
    """The LoRAs of --lora, then those that only tags name, found in `folder`. A flag's strength overrides a tag's."""
    from plainsd.adapters.lora import find_lora

    given = [from_flag(text) for text in flags]
    loras = [(path, tags.get(path.stem, 1.0) if strength is None else strength) for path, strength in given]
    for name, strength in tags.items():
        if not any(path.stem == Path(name).name for path, _ in loras):
            if folder is None:
                raise UserError(
                    f"the prompt names the LoRA {name!r}; give it with --lora FILE or --lora-folder FOLDER",
                    field="loras",
                    value=name,
                )
            loras.append((find_lora(folder, name), strength))
    return loras
