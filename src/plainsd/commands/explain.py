"""`plainsd explain`: an HTML page that shows how a picture was generated."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from plainsd.arguments import Switch
from plainsd.commands.flags import flag
from plainsd.commands.output import check_writable
from plainsd.errors import UserError, unknown
from plainsd.pictures.settings import RANDOM, drawn_seed, read_seed

BESIDE_FIELDS = {"negative": str, "steps": int, "guidance": float, "sampler": str, "spacing": str, "seed": int}
PAIR = re.compile(r"\s*(\w+)=([^,]*)")


@dataclass
class Explain:
    """Generates a picture and writes an HTML page about it: where each word acts, the steps, guidance, the schedule."""

    prompt: Annotated[Positional[str], flag("PROMPT")]
    """what the picture should show"""
    out: Annotated[Path, flag("FILE")] = Path("explain.html")
    """the page, one self-contained HTML file; overwritten if it exists"""
    beside: Annotated[str | None, flag("TEXT")] = None
    """a second picture for comparison: another prompt, or other settings, such as "guidance=1, steps=10" """
    model: Annotated[str | None, flag("MODEL")] = None
    """folder, single file or Hub id of a model; the embedded model if not given"""
    negative: Annotated[str, flag("TEXT")] = ""
    """negative prompt"""
    size: Annotated[tuple[int, int] | None, flag("W H")] = None
    """in pixels, multiples of 8 (16 for the embedded model)"""
    steps: Annotated[int | None, flag("N")] = None
    """sampling steps"""
    guidance: Annotated[float | None, flag("SCALE")] = None
    """guidance scale (CFG)"""
    sampler: Annotated[str | None, flag("NAME")] = None
    """a sampler of plainsd generate"""
    spacing: Annotated[str | None, flag("NAME")] = None
    """spacing of the noise levels"""
    seed: Annotated[str, flag("N")] = "0"
    """random or -1 picks one"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    plain: Switch = False
    """do not pack the weights for the processor, as `plainsd generate --plain`"""

    def run(self) -> None:
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise UserError(
                f"--out '{self.out}': the page is an HTML file; name it {self.out.stem or 'x'}.html", field="out"
            )
        if self.out.is_dir():
            raise UserError(f"--out '{self.out}' is a folder; give a file", field="out")
        check_writable(self.out.parent)
        names = ("negative", "size", "steps", "guidance", "sampler", "spacing")
        seed = read_seed(self.seed)
        first = {"prompt": self.prompt, **{name: getattr(self, name) for name in names}}
        first["seed"] = drawn_seed() if seed == RANDOM else seed
        drawings = [first, *([] if self.beside is None else [first | read_beside(self.beside)])]

        from tqdm import tqdm

        from plainsd.checkpoint import load
        from plainsd.disk import written_whole
        from plainsd.reports.explain import explain
        from plainsd.reports.explain_page import page
        from plainsd.speed.model import faster

        sd, seen = load(self.model, device=self.device, dtype=self.dtype), []
        if not self.plain:
            faster(sd, tell=partial(print, file=sys.stderr))
        with tqdm(unit="step", disable=None, dynamic_ncols=True) as bar:
            for choices in drawings:
                seen.append(explain(sd, **choices, show=lambda step: bar.update()))
        text = page(seen)
        with written_whole(self.out) as draft:
            draft.write_text(text, encoding="utf-8")
        print(self.out)


def read_beside(text: str) -> dict[str, Any]:
    """What --beside changes: settings if the text is NAME=VALUE, ...; else the prompt. Commas in a value of `negative`
    are part of it."""
    pairs: list[tuple[str, str]] = []
    for part in text.split(","):
        if pair := PAIR.fullmatch(part):
            pairs.append((pair[1], pair[2]))
        elif pairs and pairs[-1][0] == "negative":
            pairs[-1] = "negative", f"{pairs[-1][1]},{part}"
        elif pairs and pairs[0][0] in BESIDE_FIELDS:
            raise UserError(f"--beside: {part.strip()!r} is not NAME=VALUE, as what precedes it is; write it so",
                            field="beside")  # fmt: skip
        else:
            return {"prompt": text}
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in BESIDE_FIELDS:
            raise unknown("setting", name, BESIDE_FIELDS, field="beside")
        try:
            found[name] = BESIDE_FIELDS[name](value.strip())
        except ValueError:
            kind = "whole number" if BESIDE_FIELDS[name] is int else "number"
            raise UserError(f"--beside: {name} {value.strip()!r} is not a {kind}; give one", field="beside") from None
    return found
