"""Pictures of the history: their rows, their names, their settings in the forms that outlive a process."""

import re
import secrets
import time
from dataclasses import dataclass, replace

from plainsd.pictures.settings import Resolved, plain_number

SAFE_INTEGER = 2**53 - 1  # JavaScript's


@dataclass(frozen=True)
class Picture:
    """One row of the history."""

    number: int  # rises; the newest has the highest
    id: str
    job: str
    place: int  # in its job
    file: str  # below the data folder
    width: int
    height: int
    settings: Resolved
    loras: list[tuple[str, float]]
    created: float


def settings_from(data: dict) -> Resolved:
    """What `asdict` and JSON made of them, back."""
    tuples = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    pairs = {name: tuple(map(tuple, data.get(name, ()))) for name in ("hashes", "other")}
    return Resolved(**{**data, **tuples, **pairs})


def tagged(settings: Resolved, loras: list[tuple[str, float]]) -> Resolved:
    """As it is written into a picture: with its LoRAs in the prompt, where every program looks for them."""
    tags = [f"<lora:{name}:{plain_number(strength)}>" for name, strength in loras]
    return replace(settings, prompt=" ".join(filter(None, [settings.prompt, *tags])))


def new_id() -> str:
    return secrets.token_hex(8)


def new_place(prompt: str, id: str, created: float) -> str:
    """`2026-05-14/153012-a-red-apple-1f0c...`: nothing of a prompt reaches a file's name but letters and digits."""
    when = time.localtime(created)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower().encode("ascii", "ignore").decode())[:40].strip("-")
    return "-".join(part for part in (time.strftime("%Y-%m-%d/%H%M%S", when), slug, id) if part)


def json_seed(seed: int) -> int | str:
    """A seed that JavaScript could not hold goes as a string."""
    return seed if seed <= SAFE_INTEGER else str(seed)
