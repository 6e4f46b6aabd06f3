"""The picture and the random numbers of each position of a run: functions of seed and position.

So neither interruptions nor the number of processes change them.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch


def random(seed: int, purpose: int, position: int) -> torch.Generator:
    """A generator for each (seed, purpose, position), independent of the order of drawing."""
    mixed = (seed * 0x9E3779B97F4A7C15 + purpose * 0xBF58476D1CE4E5B9 + position * 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    mixed = mixed * 0xD6E8FEB86659FD93 % 2**64  # a 64-bit hash, so that neighbours have unrelated seeds
    return torch.Generator().manual_seed((mixed ^ mixed >> 32) & (2**63 - 1))


class Order:
    """All pictures once per epoch, shuffled anew each epoch. Position p counts pictures from the run's start."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=random(self.seed, 1, epoch))
        return int(self._permutation[place])


class Repeated:
    """An order in which some pictures are repeated within an epoch."""

    def __init__(self, repeats: Sequence[int], seed: int):
        self.table = [index for index, times in enumerate(repeats) for _ in range(times)]
        self.count = len(self.table)
        self._order = Order(self.count, seed)

    def __call__(self, position: int) -> int:
        return self.table[self._order(position)]


class Bucketed:
    """An order for buckets: each micro-batch has pictures of one shape.

    Every epoch, each shape's pictures are shuffled and split into micro-batches, the last of which is filled up with
    the first pictures again; then the micro-batches are shuffled. `surplus` is the number of such repetitions an epoch.
    """

    def __init__(self, shapes: Sequence[Hashable], repeats: Sequence[int], batch: int, seed: int):
        groups: dict[Hashable, list[int]] = {}
        for index, (shape, times) in enumerate(zip(shapes, repeats, strict=True)):
            groups.setdefault(shape, []).extend([index] * times)
        self.groups = [group for group in groups.values() if group]
        self.batch, self.seed = batch, seed
        self.count = sum(-(-len(group) // batch) * batch for group in self.groups)
        self.surplus = self.count - sum(repeats)
        self._epoch = -1
        self._table: list[int] = []

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._table = epoch, self._deal(random(self.seed, 1, epoch))
        return self._table[place]

    def _deal(self, generator: torch.Generator) -> list[int]:
        batches = []
        for group in self.groups:
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            order = [order[i % len(order)] for i in range(-(-len(order) // self.batch) * self.batch)]
            batches += [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        return [index for i in torch.randperm(len(batches), generator=generator).tolist() for index in batches[i]]


class Pick(NamedTuple):
    """One picture of a batch, with its own random generator."""

    index: int  # type: ignore[assignment]  # of the picture in the data; hides the tuple's method
    position: int  # in the run: 0, 1, 2, ...
    generator: torch.Generator
