"""Noise that is the same on any machine: NVIDIA's random numbers, slerp of two noises, a Brownian path over all levels.

A stream is a seeded generator: each call returns the next unit noise of the given shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
Stream = Callable[[Shape], Tensor]  # shape -> the next float32 unit noise, on the CPU
Path = Callable[[float, float], Tensor]  # (sigma, sigma_next) -> the unit noise of the step between them

# --- streams ---------------------------------------------------------------------------------------------------------


def stream(kind: str, seed: int) -> Stream:
    """PyTorch's CPU generator ("cpu"), or NVIDIA's ("nv"). Seeds are taken modulo 2**64."""
    if kind == "nv":
        return Philox(seed % 2**64)
    generator = torch.Generator().manual_seed(seed % 2**64)
    return lambda shape: torch.randn(shape, generator=generator)


LOW = np.uint64(2**32 - 1)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # the key grows by these from round to round
UNIT = 2.0**-32
TURN = UNIT * float(np.float32(2 * math.pi))  # cuRAND keeps 2 pi in float32


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int], rounds: int = 10) -> tuple[np.ndarray, ...]:
    """Philox 4x32: four words of 32 random bits for each counter of four words (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3", section 3.3). Words are kept in uint64, where no product of two overflows."""
    c0, c1, c2, c3 = counter
    for i in range(rounds):
        k0, k1 = (np.uint64((word + i * step) % 2**32) for word, step in zip(key, WEYL, strict=True))
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & LOW, first >> 32 ^ c3 ^ k1, first & LOW
    return c0, c1, c2, c3


class Philox:
    """The stream of `torch.randn(..., device="cuda")`, on any machine.

    On a GPU each number has its own thread: the key is the seed, word 0 of the counter the call, word 2 the thread, and
    two of the four words make a pair of normal numbers (Box and Muller 1958), of which the sine one is kept. This holds
    as long as a GPU has that many threads; for larger tensors GPUs differ from each other.
    """

    def __init__(self, seed: int):
        self.key, self.calls = (seed & 0xFFFFFFFF, seed >> 32), 0

    def __call__(self, shape: Shape) -> Tensor:
        elements: np.ndarray = np.arange(math.prod(shape), dtype=np.uint64)
        zeros = np.zeros_like(elements)
        x, y, _, _ = philox((zeros + np.uint64(self.calls), zeros, elements, zeros), self.key)
        self.calls += 1
        radius = np.sqrt(-2 * np.log(x * UNIT + UNIT / 2))
        return torch.from_numpy((radius * np.sin(y * TURN + TURN / 2)).astype(np.float32)).reshape(shape)


# --- interpolated noise ----------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation from a to b, which keeps the norm (Shoemake 1985)."""
    cosine = torch.dot(a.flatten() / a.norm(), b.flatten() / b.norm()).clamp(-1, 1)
    angle = torch.acos(cosine)
    if angle < 1e-4:
        return a + share * (b - a)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def slerp_columns(a: Tensor, b: Tensor, share: float) -> Tensor:
    """`slerp` of each column of each channel, (L, h, w), as A1111 mixes a variation. Where the two are nearly parallel,
    a linear mix, whose ends A1111 has swapped."""
    cosine = (a / a.norm(dim=1, keepdim=True) * (b / b.norm(dim=1, keepdim=True))).sum(1, keepdim=True)
    if cosine.mean() > 0.9995:
        return share * a + (1 - share) * b
    angle = torch.acos(cosine.clamp(2**-23 - 1, 1 - 2**-23))  # columns of a single row are all parallel
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


# --- one path over all levels ----------------------------------------------------------------------------------------

DIGITS = 6  # decimals of a level


class BrownianTree:
    """A Brownian motion W over noise levels, independent of the order of queries.

    The midpoint of an interval is drawn from its ends with its own seed, recursively down to the queried level (Li et
    al. 2020, arXiv:2001.01328, section 4), with the seeds of torchsde 0.2.6, which k-diffusion uses. Levels that differ
    only in the seventh decimal are the same; a difference in the sixth changes W by 0.001.
    """

    def __init__(self, low: float, high: float, seed: int, draw: Callable[[int], Tensor]):
        """`draw` returns the unit noise of a 32-bit seed."""
        self.low, self.high, self.seed = round(low, DIGITS), round(high, DIGITS), seed
        self.draw = lru_cache(64)(draw)  # neighbours share most of the way down
        self.whole = draw(self._seed_of()) * math.sqrt(high - low)

    def increment(self, a: float, b: float) -> Tensor:
        """W(b) - W(a), for low <= a < b <= high."""
        a, b = max(round(a, DIGITS), self.low), min(round(b, DIGITS), self.high)
        total, *parts = self._parts(a, b, self.low, self.high, self.whole, 0, 0)
        for part in parts:
            total = total + part
        return total

    def _parts(
        self, a: float, b: float, start: float, end: float, w: Tensor, branch: int, depth: int
    ) -> Iterator[Tensor]:
        """Increments of W over the part of [a, b] in [start, end], an interval over which W grows by w."""
        if (a, b) == (start, end):
            yield w
            return
        middle = round((start + end) / 2, DIGITS)
        before, after, length = middle - start, end - middle, 1 / (end - start)
        noise = self.draw(self._seed_of(branch, depth))
        left = before * w * length + math.sqrt(before * after * length) * noise
        if a < middle:
            yield from self._parts(a, min(b, middle), start, middle, left, 2 * branch, depth + 1)
        if b > middle:
            yield from self._parts(max(a, middle), b, middle, end, w - left, 2 * branch + 1, depth + 1)

    def _seed_of(self, *node: int) -> int:
        return int(np.random.SeedSequence(self.seed, spawn_key=node, pool_size=24).generate_state(1)[0])

    def step(self, sigma: float, sigma_next: float) -> Tensor:
        """The unit noise of the step from one level down to another, with levels rounded to float32."""
        high, low = np.float32(sigma), np.float32(sigma_next)
        return -self.increment(float(low), float(high)) / float(np.sqrt(high - low))
