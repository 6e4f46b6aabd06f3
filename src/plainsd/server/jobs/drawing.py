"""The drawing of one batch as a stream of events, in this process or, with the same code, in another.

A worker thread hands `Work` to a `Drawer` and reads events: `Prepared`, `Begun`, `Advanced` for steps, and at the end
`DrawnBatch`. Work and events are plain data, so they can cross between machines.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from io import BytesIO
from typing import Any, NamedTuple, Protocol

from PIL import Image

from plainsd.allocator import release_freed_memory
from plainsd.files.hashes import Hashes
from plainsd.generate import batch
from plainsd.pictures.drawing import Pictures
from plainsd.pictures.images import PictureFile
from plainsd.pictures.settings import Resolved
from plainsd.server.controls import control_at
from plainsd.server.image_prompts import image_prompt_at
from plainsd.server.jobs.job import Source
from plainsd.server.jobs.pictures import with_lora_tags
from plainsd.server.jobs.queue import Place
from plainsd.server.loras import NamedLoras
from plainsd.server.pool import Models
from plainsd.server.uploads import png

PREVIEW_SECONDS = 0.25  # seconds


class Work(NamedTuple):
    """A batch: what its pictures share, and the settings of each."""

    model: str
    loras: NamedLoras
    settings: list[Resolved]
    source: Source
    inputs: Mapping[str, bytes]  # contents of the source's files, but of those that pictures are pasted into


class Prepared(NamedTuple):
    """The model is loaded, with its LoRAs."""

    resident: frozenset[str]  # the models that are loaded there now ...
    bytes: int = 0  # ... and their memory
    loads: int = 0  # models that were loaded for this batch


class Begun(NamedTuple):
    """Sampling begins."""

    steps: int  # of the whole batch


class Advanced(NamedTuple):
    """Steps were made."""

    seconds: list[float]  # of each step
    previews: list[bytes] = []  # a PNG for each picture; empty if none are due


class DrawnBatch(NamedTuple):
    """The pictures, and the hashes of the files that drew them."""

    images: Sequence[Image.Image | PictureFile]  # files: by another process, and of pictures that are whole
    hashes: Hashes


def as_files(drawn: DrawnBatch, work: Work, recorded: Mapping[str, Any]) -> DrawnBatch:
    """The pictures as the files that are written. Those that are yet to be pasted into others stay as they are."""
    if work.source.base:
        return drawn
    files = []
    for image, settings in zip(drawn.images, work.settings, strict=True):
        assert isinstance(image, Image.Image)
        settings = with_record(settings, drawn.hashes, recorded)
        files.append(PictureFile.of(image, ".png", with_lora_tags(settings, work.loras)))
    return drawn._replace(images=files)


def with_record(settings: Resolved, hashes: Hashes, recorded: Mapping[str, Any]) -> Resolved:
    """With what is known once a picture is drawn. `recorded`: that of `PoolOptions`."""
    return replace(settings, hashes=hashes, **recorded)


Event = Prepared | Begun | Advanced | DrawnBatch


def batch_events(models: Models, work: Work) -> Generator[Event]:
    """Draws a batch. Closing the generator ends it after the current step."""
    one, source, loads = work.settings[0], work.source, models.loads
    model, sd = models.prepare(work.model, work.loras, one)
    hashes = models.hashes(model, one)  # before the files may change
    yield Prepared(models.resident_names(), models.bytes(), models.loads - loads)

    def read(name: str) -> Image.Image:
        with Image.open(BytesIO(work.inputs[name])) as image:
            image.load()
            return image

    image = read(source.image) if source.image else None
    hole = read(source.hole) if source.hole else None
    control = [
        control_at(entry, work.model, sd, read(entry.map) if entry.map else None, models.controls)
        for entry in source.controls
    ]
    prompts = [image_prompt_at(entry, sd, read, models.image_adapters) for entry in source.image_prompts]
    here = source.base is None  # else `Worker.composited` pastes it
    events = batch(sd, work.settings, image, hole, control, prompts, composed=here)
    yield Begun(events.steps)
    last, last_preview = time.monotonic(), 0.0
    with closing(events):
        for event in events:
            if isinstance(event, Pictures):
                yield DrawnBatch(event.images, hashes)
                return
            now, previews = time.monotonic(), []
            if now - last_preview >= PREVIEW_SECONDS:
                assert model.preview is not None  # it is resident
                last_preview, previews = now, [png(rough) for rough in model.preview(event.denoised)]
            yield Advanced([now - last], previews)
            last = now


# --- who draws -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The server is stopping; the batch is abandoned and will run again."""


class RemoteError(Exception):
    """What another process raised, with the name of its class: `KeyError: ...`."""


class LostWhile(StrEnum):
    """What a worker did when its process ended."""

    WAITING = "it waited"
    LOADING = "it loaded what a batch needs"
    DRAWING = "it drew"


class WorkerLost(Exception):
    """The process that drew has ended, or no longer answers."""

    def __init__(self, why: str, stage: LostWhile):
        super().__init__(why)
        self.stage = stage


class Drawer(Protocol):
    """What a worker thread draws with."""

    place: Place
    remote: bool  # in a process of its own

    @property
    def ready(self) -> bool:
        """To take work."""

    def open(self) -> bool:
        """Makes it ready for work; False where the server stops before."""

    def draw(self, work: Work) -> Generator[Event]:
        """The events of a batch. WorkerLost where its process ends; RemoteError; Stopped."""

    def idle(self) -> None:
        """Called when nothing has come for a while."""

    def close(self) -> None:
        """Ends it."""


@dataclass
class LocalDrawer:
    """Draws in this process."""

    models: Models
    place: Place = field(default_factory=Place)
    remote: bool = False
    ready: bool = True

    def open(self) -> bool:
        return True

    def draw(self, work: Work) -> Generator[Event]:
        return batch_events(self.models, work)

    def idle(self) -> None:
        release_freed_memory()

    def close(self) -> None:
        pass
