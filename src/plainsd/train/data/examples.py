"""Training batches: captioned latents with noise and timesteps, each drawn by its own generator; and deterministic ones
for validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from plainsd.train.data.latents import Latents
from plainsd.train.data.live import LiveLatents
from plainsd.train.data.pictures import PictureSet
from plainsd.train.objective import (
    PLAIN_OBJECTIVE,
    NoisyLatents,
    Objective,
    draw_noise,
    draw_timesteps,
    stratified_timesteps,
)
from plainsd.train.order import Pick, random


class ExampleBatch(NamedTuple):
    captions: list[str]  # empty where the caption was dropped
    timesteps: Tensor  # (B,)
    x0: Tensor  # (B, L, h, w), scaled latents
    noise: NoisyLatents
    mask: Tensor | None  # (B, 1, h, w)
    sizes: Tensor  # (B, 6): height and width of the original; top, left, height, width of the crop
    maps: Tensor | None = None  # (B, 3, H, W), 0 to 1, for a ControlNet


def draw_caption(pictures: PictureSet, pick: Pick, dropout: float) -> str:
    """A caption, or with probability `dropout` an empty one, for classifier-free guidance (Ho and Salimans 2022,
    arXiv:2207.12598)."""
    drop = float(torch.rand((), generator=pick.generator)) < dropout
    caption = pictures.caption(pick.index, pick.generator)
    return "" if drop else caption


@dataclass(frozen=True)
class Examples:
    """Captioned pictures as latents."""

    pictures: PictureSet
    latents: Latents | LiveLatents
    dropout: float = 0.1  # share of captions left empty
    timestep_power: float = 1.0  # timesteps are count * chance ** power: below 1, noisy ones come more often
    mapped: bool = False  # batches have the pictures' maps; every picture must have one

    def draw(self, picks: Sequence[Pick], steps: int, objective: Objective = PLAIN_OBJECTIVE) -> ExampleBatch:
        """The batch of these picks, each at one of `steps` timesteps."""
        captions = [draw_caption(self.pictures, p, self.dropout) for p in picks]
        timesteps = draw_timesteps(picks, steps, self.timestep_power)
        return self._batch(picks, captions, timesteps, self.latents.choose(picks), objective)

    def fixed(self, steps: int, batch: int) -> Iterator[ExampleBatch]:
        """Every picture once: its first caption and view, with fixed timestep and noise."""
        for picks, timesteps in fixed_picks(self.pictures, steps, batch, self.latents.shapes):
            captions = [self.pictures.items[p.index].texts[0] for p in picks]
            yield self._batch(picks, captions, timesteps, [0] * len(picks), PLAIN_OBJECTIVE)

    def _batch(
        self, picks: Sequence[Pick], captions: list[str], timesteps: Tensor, views: list[int], objective: Objective
    ) -> ExampleBatch:
        x0 = self.latents.draw(picks, views)
        noise = draw_noise(picks, x0.shape[1:], objective)
        maps = self.pictures.maps([p.index for p in picks], views) if self.mapped else None
        masks, sizes = self.latents.masks(picks, views), self._sizes(picks, views)
        return ExampleBatch(captions, timesteps, x0, noise, masks, sizes, maps)

    def _sizes(self, picks: Sequence[Pick], views: Sequence[int]) -> Tensor:
        rows = []
        for pick, number in zip(picks, views, strict=True):
            item, view = self.pictures.items[pick.index], self.pictures.views(pick.index)[number]
            width, height = item.size or item.open().size
            rows.append([height, width, view.top, view.left, *reversed(view.size)])
        return torch.tensor(rows, dtype=torch.float32)


def fixed_picks(
    pictures: PictureSet, steps: int, batch: int, shapes: Sequence | None = None
) -> Iterator[tuple[list[Pick], Tensor]]:
    """Picks of every picture with timesteps spread evenly over the table, in batches of one shape each."""
    count = len(pictures)
    order = sorted(range(count), key=lambda i: shapes[i]) if shapes else list(range(count))
    start = 0
    while start < count:
        numbers = order[start : start + batch]
        if shapes:
            numbers = [i for i in numbers if shapes[i] == shapes[numbers[0]]]
        picks = [Pick(i, i, random(0, 3, i)) for i in numbers]
        yield picks, stratified_timesteps(numbers, count, steps)
        start += len(numbers)
