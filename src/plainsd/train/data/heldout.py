"""The train / validation split, which stays fixed during a run.

Pictures with the smallest digests of their stored bytes are held out. So adding or removing a picture hardly changes
the split, and copies of a picture are on the same side. A run records its held-out pictures at the start: pictures
added later are trained on, and one that is edited or renamed stays held out, since it is known by its bytes and by its
path.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from plainsd.disk import read_cache, read_json, written_whole
from plainsd.errors import UserError
from plainsd.train.order import random


class Kept(Protocol):
    """A picture, wherever it lies."""

    @property
    def place(self) -> str | None:
        """Its real path, where it has a file of its own."""

    def mark(self) -> str:
        """Changes when the picture does."""

    def content(self) -> bytes:
        """The picture as it is stored."""


def count_of(share: float, count: int) -> int:
    """The number of pictures in a share of `count`: at least one, and not all."""
    if not 0 < share < 1 or count < 2:
        raise UserError(f"cannot hold out a share of {share:g} of {count} pictures; give one between 0 and 1")
    return min(count - 1, max(1, round(share * count)))


def digests(items: Sequence[Kept], known: Path | None = None) -> list[str]:
    """The digest of each picture's stored bytes. `known`: a cache file."""
    told = {mark: digest for mark, digest in read_cache(known).items() if isinstance(digest, str)}
    before, found = len(told), []
    for item in items:
        mark = item.mark()
        if mark not in told:
            told[mark] = hashlib.sha256(item.content()).hexdigest()[:24]
        found.append(told[mark])
    if known and len(told) > before:
        with written_whole(known) as unfinished:
            unfinished.write_text(json.dumps(told), encoding="utf-8")
    return found


def chosen_pictures(marks: Sequence[str], share: float) -> set[int]:
    """The indices of the smallest digests. Copies of a picture go together, unless that leaves none to train on."""
    count = count_of(share, len(marks))
    last = sorted(marks)[count - 1]
    held = {i for i, mark in enumerate(marks) if mark <= last}
    return held if len(held) < len(marks) else set(sorted(range(len(marks)), key=lambda i: (marks[i], i))[:count])


def chosen_before(count: int, share: float) -> set[int]:
    """The split of old runs, which did not record it: by the number of pictures."""
    order = torch.randperm(count, generator=random(0, 4, count)).tolist()
    return set(order[: count_of(share, count)])


def of_run(
    items: Sequence[Kept], share: float, run: Path, *, begun: bool, writes: bool = True, say: Callable[[str], None]
) -> set[int]:
    """The indices of the pictures held out by the run in folder `run`. `begun`: it has a checkpoint to resume from."""
    record, marks = run / "heldout.json", digests(items, run / "cache" / "digests.json")
    if begun and record.is_file():
        held = kept(items, marks, record)
        if not 0 < len(held) < len(items):
            what = "all" if held else "none"
            raise UserError(
                f"{what} of the pictures are those that {run} holds out; put others there, or give another --out"
            )
        return held
    held = chosen_before(len(items), share) if begun else chosen_pictures(marks, share)
    if begun:
        say(f"{run} did not write down what it held out; taken is what it chose if no picture came or went since")
    if writes:
        keep(items, marks, held, record)
    return held


def kept(items: Sequence[Kept], marks: Sequence[str], record: Path) -> set[int]:
    """The indices of the pictures that a run recorded."""
    remedy = "put it back from a copy, or give another --out"
    try:
        written = read_json(record, remedy)["pictures"]
        contents, places = {str(mark) for mark, _ in written}, {str(place) for _, place in written if place}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{record} is damaged: it lists no pictures; {remedy}") from error
    return {i for i, item in enumerate(items) if marks[i] in contents or item.place in places}


def keep(items: Sequence[Kept], marks: Sequence[str], held: set[int], record: Path) -> None:
    """Records them: digest, and path if they are files."""
    pictures = [[marks[i], items[i].place] for i in sorted(held)]
    with written_whole(record) as unfinished:
        unfinished.write_text(json.dumps({"pictures": pictures}, indent=1), encoding="utf-8")
