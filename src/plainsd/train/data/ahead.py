"""Pictures of the batches to come, drawn by other processes while this one trains.

The picture at each position of a run is known before, see plainsd.train.order, so that what is wanted next can be drawn
ahead: the batches that follow at the distance of the last two. Guesses that were wrong cost time, and change nothing.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from plainsd.emoji.workers import SceneSource, Wanted, drawn_by_worker, start_worker
from plainsd.train.data.crops import Framing
from plainsd.train.data.pictures import PictureSet
from plainsd.train.data.scenes import SceneEntry
from plainsd.train.order import Pick

CHUNK = 16  # pictures that one process draws at once
DEPTH = 3  # batches ahead

PixelsOf = Callable[[Sequence[Pick]], Tensor]  # the picks' pictures, (B, 3, H, W) in [-1, 1]


@contextmanager
def pictures_ahead(pictures: PictureSet, order: Callable[[int], int], workers: int) -> Iterator[PixelsOf]:
    """What gives the pixels of picks. Scenes are drawn by `workers` processes; other pictures, and all with 0 of them,
    are read when they are wanted."""
    scenes = all(isinstance(item, SceneEntry) for item in pictures.items)
    if not workers or not scenes or pictures.framing != Framing():
        yield lambda picks: pictures.pixels([pick.index for pick in picks])
        return
    with Ahead(pictures, order, workers) as ahead:
        yield ahead


class Ahead:
    """Processes that draw scenes. Called with picks at successive positions. Where one has ended, by a signal or for
    lack of memory, this process draws the batch, and others the next ones."""

    def __init__(self, pictures: PictureSet, order: Callable[[int], int], workers: int):
        self.pictures, self.workers = pictures, workers
        self.items: Sequence[SceneEntry] = pictures.items  # type: ignore[assignment]  # see pictures_ahead
        self.order = order
        sources: dict[int, SceneSource] = {id(item.source): item.source for item in self.items}
        self.numbers = {key: number for number, key in enumerate(sources)}
        self.sources = list(sources.values())
        self.pool = self._started()
        self.coming: dict[tuple[int, int], list[Future[np.ndarray]]] = {}  # by first position and count
        self.last = -1

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, picks: Sequence[Pick]) -> Tensor:
        try:
            pixels = self._drawn(picks)
        except BrokenProcessPool:
            warnings.warn(
                "a process that draws pictures has ended, perhaps for lack of memory; others take its "
                "place; where that happens again, give fewer --workers, or 0",
                stacklevel=2,
            )
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool, self.coming = self._started(), {}
            return self.pictures.pixels([pick.index for pick in picks])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.workers, get_context("spawn"), start_worker, (self.sources, self.pictures.size))

    def _drawn(self, picks: Sequence[Pick]) -> np.ndarray:
        first, count = picks[0].position, len(picks)
        wanted = self.coming.pop((first, count), None) or self._submit([pick.index for pick in picks])
        stride = first - self.last if 0 <= self.last < first else count
        self.last = first
        self.coming = {key: drawn for key, drawn in self.coming.items() if key[0] > first}
        for start in range(first + stride, first + stride * DEPTH + 1, stride):
            if (start, count) not in self.coming:
                indices = [self.order(position) for position in range(start, start + count)]
                self.coming[start, count] = self._submit(indices)
        return np.concatenate([drawn.result() for drawn in wanted])

    def _submit(self, indices: Sequence[int]) -> list[Future[np.ndarray]]:
        entries = [self.items[index] for index in indices]
        wanted = [Wanted(self.numbers[id(entry.source)], entry.index) for entry in entries]
        chunks = [wanted[i : i + CHUNK] for i in range(0, len(wanted), CHUNK)]
        return [self.pool.submit(drawn_by_worker, chunk) for chunk in chunks]
