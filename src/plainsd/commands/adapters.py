"""Adapters on the command line: `--lora FILE:0.8`, A1111's `<lora:name:0.8>` in a prompt, `--embedding FILE:word`.

The text that a picture carries always has the tags, whichever way the LoRAs came, so that --from finds them again; and
the learned words that its prompts use, so that --from can ask for them.
"""

from collections.abc import Sequence
from pathlib import Path

from plainsd.errors import UserError
from plainsd.pictures.settings import plain_number
from plainsd.text.prompts import lora_tags

LoraFiles = list[tuple[Path, float]]  # files and strengths


def prompts_and_loras(prompts: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """The prompts without their tags, and the LoRAs that they all name, with strengths."""
    texts, tags = zip(*map(lora_tags, prompts), strict=True)
    if any(one != tags[0] for one in tags):
        raise UserError("the prompts name different LoRAs, and one run has one set of them; run these prompts apart")
    return [text.rstrip() for text in texts], dict(tags[0])


def tags_of(loras: LoraFiles) -> str:
    return "".join(f" <lora:{path.stem}:{plain_number(strength)}>" for path, strength in loras)


def from_flag(text: str, flag: str = "lora") -> tuple[Path, float | None]:
    """`style.safetensors:0.8` -> file and strength; no strength is None."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), None
    try:
        return Path(path), float(strength)
    except ValueError:
        raise UserError(f"--{flag} {text!r} is no file, and {strength!r} is no strength; write FILE:0.8") from None


def learned(text: str) -> tuple[Path, str]:
    """`cat.safetensors:<cat>` -> file and word; without a word, the file's own is to be asked for: empty."""
    path, colon, word = text.rpartition(":")
    file, word = (Path(text), "") if not colon or Path(text).exists() else (Path(path), word)
    if not file.exists():
        raise UserError(f"--embedding {text!r}: there is no file {str(file)!r}; write FILE, or FILE:word")
    return file, word


def chosen_loras(flags: Sequence[str], tags: dict[str, float], folder: Path | None) -> LoraFiles:
    """The files of the flags, then those that only tags name, looked up in the folder. A flag's strength goes first."""
    from plainsd.adapters.lora import find_lora

    given = [from_flag(text) for text in flags]
    loras = [(path, tags.get(path.stem, 1.0) if strength is None else strength) for path, strength in given]
    for name, strength in tags.items():
        if not any(path.stem == Path(name).name for path, _ in loras):
            if folder is None:
                raise UserError(f"the prompt names the LoRA {name!r}; give it with --lora FILE or --lora-folder FOLDER")
            loras.append((find_lora(folder, name), strength))
    return loras
