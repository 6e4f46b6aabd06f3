"""Jobs: their settings, their state and progress, and a notifier of changes.

A job is a list of pictures. The unit of work is one picture.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from plainsd.pictures.settings import Resolved
from plainsd.text.prompts import LoraTag

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
ACTIVE = (QUEUED, RUNNING)


@dataclass(frozen=True)
class ControlInput:
    """A map that a job follows: its file among the inputs, and how the net acts, see pictures/control.py."""

    net: str
    map: str | None  # None: the inpainting map, of the picture and its mask
    strength: float
    start: float
    end: float
    guess: bool
    mode: str
    kinds: tuple[int, ...]
    preprocess: str  # what has made it, for the text ...
    thresholds: tuple[float, float] | None = None  # ... and how
    resolution: int | None = None
    resize: str = "stretch"  # how the map has got the picture's shape


@dataclass(frozen=True)
class ImagePromptInput:
    """An image prompt of a job, with the names of its files among the inputs; see pictures/image_prompt.py."""

    adapter: str
    images: tuple[str, ...]
    masks: tuple[str, ...]
    strength: float
    start: float
    end: float
    encoder: str | None  # None: the first that fits


@dataclass(frozen=True)
class Source:
    """What a job draws on, as names of files in the inputs' folder."""

    image: str | None = None  # what the model starts from
    hole: str | None = None  # of the same size, white where it is drawn anew
    base: str | None = None  # what the result is pasted into ...
    alpha: str | None = None  # ... with this opacity, of the same size as `base` ...
    box: tuple[int, int, int, int] | None = None  # ... scaled to this place: left, top, right, bottom
    controls: tuple[ControlInput, ...] = ()
    image_prompts: tuple[ImagePromptInput, ...] = ()

    def files(self) -> set[str]:
        more = [one.map for one in self.controls]
        more += [name for one in self.image_prompts for name in (*one.images, *one.masks)]
        return {name for name in (self.image, self.hole, self.base, self.alpha, *more) if name}


FOLLOWING: dict[str, Any] = {"spacing": "", "eta": None, "hires_spacing": None, "hires_guidance": None}
"""settings that follow from others where nothing is said, and what says nothing"""
GRID_SIDES = ("Grid across", "Grid down")  # in a sheet's text


@dataclass(frozen=True)
class Sheet:
    """The labels of an X/Y grid: the job's pictures on one sheet, as its last picture."""

    across: list[str]
    down: list[str]
    axes: list[tuple[str, list[str]]] = field(default_factory=list)  # settings and their values, across and down

    def shared_settings(self, cells: Sequence[Resolved]) -> Resolved:
        """The settings recorded for the sheet: those of its first picture, with the axes of the grid. Of what follows
        from another setting, such as a sampler's spacing, only what is the same in all cells."""
        first, named = cells[0], {name.strip().replace(" ", "_") for name, _ in self.axes}
        differing = [name for name in FOLLOWING if name not in named and len({getattr(c, name) for c in cells}) > 1]
        first = replace(first, **{name: FOLLOWING[name] for name in differing})
        sides = zip(GRID_SIDES, self.axes, strict=False)
        axes = [(side, f"{name}: {', '.join(values)}") for side, (name, values) in sides]
        return replace(first, other=(*first.other, *axes))


class Notifier:
    """Wakes waiting coroutines, from any thread."""

    def __init__(self):
        self.count, self.lock, self.waiting = 0, threading.Lock(), []

    def notify(self) -> None:
        with self.lock:
            self.count += 1
            waiting, self.waiting = self.waiting, []
        for loop, event in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    async def wait(self, seen: int, seconds: float) -> int:
        """Waits until `count` differs from `seen`, at most so many seconds. Returns the count."""
        event = asyncio.Event()
        with self.lock:
            if self.count == seen:
                self.waiting.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            with self.lock:
                self.waiting = [one for one in self.waiting if one[1] is not event]
        return self.count


@dataclass
class BatchProgress:
    """Steps of one batch."""

    step: int = 0  # done ...
    steps: int = 0  # ... of so many


@dataclass(eq=False)
class Job:
    """One request. The first half of the fields is stored in the database; the second exists in memory only."""

    id: str
    client: str
    api: str  # through which it came: "jobs", "openai" or "a1111"
    model: str
    settings: list[Resolved]
    path_prefix: str  # of its files, below pictures/
    created: float
    loras: list[LoraTag] = field(default_factory=list)
    source: Source | None = None
    inputs: dict[str, bytes] = field(default_factory=dict)  # its files, until they are written
    sheet: Sheet | None = None
    owner: str = ""  # the name of the token that it came with; empty: the admin's, or nobody's
    notes: list[str] = field(default_factory=list)  # settings with an unexpected effect, for the client
    number: int = 0
    state: str = QUEUED
    error: str | None = None
    attempts: int = 0  # server crashes while it was processed alone
    started: float | None = None
    finished: float | None = None
    done: set[int] = field(default_factory=set)  # pictures that are drawn ...
    deleted: set[int] = field(default_factory=set)  # ... of which these have been deleted, or are in the trash

    problem: str | None = None  # why its row cannot be read
    drawing: set[int] = field(default_factory=set)
    batches: dict[int, BatchProgress] = field(default_factory=dict)  # under way, by the first index of each
    previews: dict[int, bytes] = field(default_factory=dict)  # rough PNGs
    seconds: float = 0.0  # of drawing so far
    alone: bool = False  # not to be batched, after a failure in a batch
    losses: Counter[int] = field(default_factory=Counter)  # workers that ended while they loaded what a picture needs
    bad_request: bool = True  # whether a failure was caused by the request
    notifier: Notifier = field(default_factory=Notifier)

    @property
    def indices(self) -> set[int]:
        """The indices of its pictures; a sheet is the last."""
        return set(range(len(self.settings) + (self.sheet is not None)))

    @property
    def step(self) -> int:
        """Steps done, of all its batches under way."""
        return sum(batch.step for batch in self.batches.values())

    @property
    def steps(self) -> int:
        """Steps that these take together."""
        return sum(batch.steps for batch in self.batches.values())

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    def pending(self) -> list[int]:
        """Indices that can be processed now: a sheet only when its pictures are done."""
        if len(self.done) + len(self.drawing) == len(self.settings) + (self.sheet is not None):
            return []  # of many running jobs, nearly all
        left = sorted(self.indices - self.done - self.drawing)
        ready = not self.drawing and len(self.done) == len(self.settings)
        return [index for index in left if index < len(self.settings) or ready]

    def kept(self) -> list[int]:
        """Indices of its pictures in the history, in order."""
        return sorted(self.done - self.deleted)

    def settings_of(self, index: int) -> Resolved:
        if self.sheet is not None and index == len(self.settings):
            return self.sheet.shared_settings(self.settings)
        return self.settings[min(index, len(self.settings) - 1)]

    def picture_id(self, index: int) -> str:
        return f"{self.id}-{index}"

    def progress(self) -> float:
        """Fraction done, 0 to 1, counted in pictures and their steps."""
        begun = len(self.drawing) * self.step / self.steps if self.steps else 0
        return (len(self.done) + begun) / len(self.indices)

    def seconds_left(self) -> float | None:
        """Estimated from the time since it started; None while there is too little to go by."""
        share = self.progress()
        if self.state != RUNNING or self.started is None or share < 0.02:
            return None
        return (time.time() - self.started) * (1 - share) / share

    @cached_property
    def batch_keys(self) -> list[Resolved]:
        """For each picture the settings that must be equal within a batch: all but prompts, seeds and the guidance
        scale (but whether there is guidance)."""
        own: dict[str, Any] = {"prompt": "", "negative": "", "seed": 0, "variation_seed": None, "hashes": ()}
        own |= {"batch_index": 0, "batch_size": None}
        return [replace(one, **own, guidance=one.guidance if one.guidance in (0, 1) else -1) for one in self.settings]


class Unit(NamedTuple):
    """One picture of a job."""

    job: Job
    index: int  # type: ignore[assignment]  # tuple.index

    @property
    def settings(self) -> Resolved:
        return self.job.settings_of(self.index)

    @property
    def is_sheet(self) -> bool:
        return self.index == len(self.job.settings)

    def batch_key(self) -> tuple:
        """Pictures with equal keys may share a batch."""
        if self.is_sheet or self.job.alone:
            return (self.job.id, self.index)
        return (self.job.model, tuple(self.job.loras), self.job.source, self.job.batch_keys[self.index])
