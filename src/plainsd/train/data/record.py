"""What a run reads, in `RUN/data.json`: a digest of each picture with its captions, repeats, mask and map; of those it
is trained on, those held out, those of the prior set; and of each prompt of its sample grids.

A run that goes on with other pictures is allowed, as data sets grow; but it is no longer the run that was begun, bit
for bit, or its validation and its grids cannot be compared with those before. So it says what has changed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from plainsd.disk import read_cache, read_json, written_whole
from plainsd.errors import UserError
from plainsd.train.data.heldout import digests
from plainsd.train.data.pictures import Entry

RECORD = "data.json"
RECORDED = {  # of the record: what they are, and what a run does with them
    "pictures": ("pictures", "was trained on"),
    "heldout": ("held-out pictures", "was validated on"),
    "prior": ("prior pictures", "was trained on"),
    "prompts": ("prompts", "drew"),
}


def picture_digests(items: Sequence[Entry], cache: Path) -> list[str]:
    """Sixteen hexadecimal digits a picture, in the order of training. `cache`: a folder for what is known of files that
    have not changed."""
    if all(item.computed for item in items):  # mark says all of them, and there may be very many
        return [hashlib.sha256(f"{item.mark()} {item.repeats}".encode()).hexdigest()[:16] for item in items]
    contents, others = digests(items, cache / "digests.json"), mask_digests(items, cache / "masks.json")
    return [
        hashlib.sha256(json.dumps([content, other, item.texts, item.repeats]).encode()).hexdigest()[:16]
        for content, other, item in zip(contents, others, items, strict=True)
    ]


def mask_digests(items: Sequence[Entry], known: Path) -> list[str]:
    """Of each picture's mask and map; empty where it has neither."""
    if not any(item.masked or item.mapped for item in items):
        return [""] * len(items)
    made = read_cache(known)
    before = len(made)
    for item in items:
        if not isinstance(made.get(item.mark()), str):
            opened = [open() for has, open in ((item.masked, item.open_mask), (item.mapped, item.open_map)) if has]
            made[item.mark()] = hashlib.sha256(b"".join(one.tobytes() for one in opened)).hexdigest()[:16]
    if len(made) > before:
        with written_whole(known) as unfinished:
            unfinished.write_text(json.dumps(made), encoding="utf-8")
    return [made[item.mark()] for item in items]


def text_digests(texts: Iterable[str]) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


def changes(now: Sequence[str], run: Path, part: str) -> str | None:
    """A line that says what is other than at the run's last start; None if nothing is. `part`: a key of RECORDED."""
    what, how = RECORDED[part]
    remedy = f"remove it, and {run} goes on without knowing whether its pictures have changed"
    before = read_json(run / RECORD, remedy).get(part) if (run / RECORD).is_file() else None
    if before is None and not now:
        return None
    if before is None:
        return f"{run} did not write down its {what}, as of an older version: whether they have changed is not known"
    if not isinstance(before, list) or not all(isinstance(one, str) for one in before):
        raise UserError(f"{run / RECORD} is damaged: it lists no {what}; {remedy}")
    came, went = Counter(now) - Counter(before), Counter(before) - Counter(now)
    if list(now) == before:
        return None
    changed = f"{came.total()} new or with another caption or mask, {went.total()} gone or changed"
    if not came and not went:
        changed = "they come in another order"
    elif part == "prompts":
        changed = f"{came.total()} new, {went.total()} gone"
    return f"the {what} are not those that {run} {how} so far: {changed}; it goes on with these"


def record(now: Mapping[str, Sequence[str]], run: Path) -> None:
    with written_whole(run / RECORD) as unfinished:
        unfinished.write_text(json.dumps({part: list(digests) for part, digests in now.items()}), encoding="utf-8")
