"""Maps that a picture followed, as A1111's ControlNet extension writes them:

    ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 1.0, Resize Mode: Just Resize,
    Processor Res: -1, Threshold A: -1.0, Threshold B: -1.0, Guidance Start: 0.0, Guidance End: 1.0,
    Pixel Perfect: False, Control Mode: Balanced"

`Guess Mode` and `Union Kinds` are words of our own, written only where they are needed; the extension passes over them.
"""

import re

from plainsd.errors import UserError
from plainsd.pictures.settings import CONTROL_MODES, ControlNote

UNIT_KEY = re.compile(r"ControlNet \d{1,3}")
MODES = {label: name for name, label in CONTROL_MODES.items()}


def controls_written(notes: tuple[ControlNote, ...]) -> list[tuple[str, str]]:
    return [(f"ControlNet {number}", unit_text(note)) for number, note in enumerate(notes)]


def unit_text(note: ControlNote) -> str:
    """The extension parts a unit at commas and colons, so that names have none."""
    pairs: dict[str, object] = {
        "Module": note.module,
        "Model": note.model,
        "Weight": note.weight,
        "Resize Mode": "Just Resize",
        "Processor Res": -1,
        "Threshold A": -1.0,
        "Threshold B": -1.0,
        "Guidance Start": note.start,
        "Guidance End": note.end,
        "Pixel Perfect": False,
        "Control Mode": CONTROL_MODES[note.mode],
    }
    more: dict[str, object] = {"Guess Mode": True} if note.guess else {}
    more |= {"Union Kinds": " ".join(map(str, note.kinds))} if note.kinds else {}
    return ", ".join(f"{key}: {re.sub('[:,]', '', str(value))}" for key, value in (pairs | more).items())


def controls_read(said: dict[str, str]) -> tuple[ControlNote, ...]:
    """Takes the units out of what a text says. UserError for one that cannot be read."""
    return tuple(read_unit(key, said.pop(key)) for key in sorted(filter(UNIT_KEY.fullmatch, said), key=unit_number))


def unit_number(key: str) -> int:
    return int(key.split()[1])


def read_unit(key: str, text: str) -> ControlNote:
    pairs = dict(entry.strip().partition(": ")[::2] for entry in text.split(","))
    try:
        return ControlNote(
            module=pairs.get("Module", "none"),
            model=pairs.get("Model", "None"),
            weight=float(pairs.get("Weight", 1.0)),
            start=float(pairs.get("Guidance Start", 0.0)),
            end=float(pairs.get("Guidance End", 1.0)),
            mode=MODES[pairs.get("Control Mode", "Balanced")],
            guess=pairs.get("Guess Mode") == "True",
            kinds=tuple(map(int, pairs.get("Union Kinds", "").split())),
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"settings text: {key!r} has a value that cannot be read ({error})") from None
