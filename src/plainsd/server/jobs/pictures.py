"""Pictures of the history, their ids, and the names of their files."""

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plainsd.pictures.settings import Resolved
from plainsd.text.prompts import LoraTag

SAFE_INTEGER = 2**53 - 1  # JavaScript's


@dataclass(frozen=True)
class Picture:
    """One row of the history."""

    number: int  # increasing; the newest has the highest
    id: str
    job: str
    index: int  # in its job
    file: str  # below the data folder
    width: int
    height: int
    settings: Resolved
    loras: list[LoraTag]
    created: float
    favourite: bool = False
    problem: str | None = None  # why its row cannot be read


def with_lora_tags(settings: Resolved, loras: Sequence[LoraTag]) -> Resolved:
    """As written into a picture: LoRAs as tags in the prompt, where other programs expect them."""
    return replace(settings, prompt=" ".join(filter(None, [settings.prompt, *map(str, loras)])))


def new_id() -> str:
    return secrets.token_hex(8)


def new_path_prefix(prompt: str, id: str, created: float) -> str:
    """`2026-05-14/153012-a-red-apple-1f0c...`: only letters and digits of the prompt are used."""
    when = time.localtime(created)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower().encode("ascii", "ignore").decode())[:40].strip("-")
    return "-".join(part for part in (time.strftime("%Y-%m-%d/%H%M%S", when), slug, id) if part)


def json_seed(seed: int) -> int | str:
    """A seed beyond JavaScript's safe integers is sent as a string."""
    return seed if seed <= SAFE_INTEGER else str(seed)
