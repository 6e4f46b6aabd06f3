"""What a run is trained on, in `RUN/data.json`: a digest of each picture with its captions, repeats, mask and map.

A run that goes on with other pictures is allowed, as data sets grow; but it is no longer the run that was begun, bit
for bit, so it says what has changed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from plainsd.disk import read_cache, read_json, written_whole
from plainsd.errors import UserError
from plainsd.train.data.heldout import digests
from plainsd.train.data.pictures import Entry

RECORD = "data.json"


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


def changes(now: Sequence[str], run: Path) -> str | None:
    """What is other than at the run's last start, in words; None if nothing is, or if the run is older than this
    record."""
    if not (run / RECORD).is_file():
        return None
    remedy = f"remove it, and {run} goes on without knowing whether its pictures have changed"
    before = read_json(run / RECORD, remedy).get("pictures")
    if not isinstance(before, list) or not all(isinstance(one, str) for one in before):
        raise UserError(f"{run / RECORD} is damaged: it lists no pictures; {remedy}")
    came, went = Counter(now) - Counter(before), Counter(before) - Counter(now)
    if came or went:
        return f"{came.total()} new or with another caption or mask, {went.total()} gone or changed"
    return None if list(now) == before else "they come in another order"


def record(now: Sequence[str], run: Path) -> None:
    with written_whole(run / RECORD) as unfinished:
        unfinished.write_text(json.dumps({"pictures": list(now)}), encoding="utf-8")
