"""DeepCache: the UNet with its deep features cached between steps. Faster; the picture changes slightly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plainsd.models.unet import EachBeside, UNet, plus


class DeepCache:
    """A UNet whose deep layers run at every `every`-th timestep only; in between, their last output is reused.

    Ma et al. 2023, "DeepCache" (arXiv:2312.00858), section 3.2, with uniform strides: from one step to the next the
    deep features change slowly. `shallow` is the number of blocks at either end that always run. One object serves one
    picture or batch, from first step to last. Each row of a batch has its own cache, and runs through all layers where
    the last timestep had no such row. `rows` names them, so that a picture's are the same in any batch and in any order
    of calls; without it a row is its place in a batch of this size. Several calls at the same timestep are kept apart.
    """

    def __init__(self, unet: UNet, every: int, shallow: int = 1):
        self.unet, self.every, self.shallow = unet, every, min(shallow, len(unet.down))
        self.turn = -1
        self.timestep: float | None = None
        self.deep: dict[tuple[Hashable, int], Tensor] = {}  # by row and by how often it was at this timestep before
        self.seen: Counter[Hashable] = Counter()  # rows at this timestep

    def __call__(
        self,
        x: Tensor,
        timestep: float,
        context: Tensor,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
        features: Sequence[Tensor | None] | None = None,
        beside: Sequence[EachBeside | None] | None = None,
        rows: Sequence[Hashable] | None = None,
    ) -> Tensor:
        unet, split = self.unet, len(self.unet.up) - 1 - self.shallow
        keys = self.advance(timestep, [(len(x), place) for place in range(len(x))] if rows is None else rows)
        due = self.turn % self.every == 0
        fresh = due or not self.deep.keys() >= set(keys)
        emb = unet.embed(timestep, x, vector, guidance)
        added = iter(features or [None] * (len(unet.down) + 2))
        more = beside or [None] * (len(unet.down) + 1 + len(unet.up))
        skips = [x := plus(unet.conv_in(x), next(added))]
        for place, block in enumerate(unet.down if fresh else unet.down[: self.shallow]):
            skips.append(x := plus(block(x, emb, context, more[place]), next(added)))
        if fresh:
            x = plus(unet.mid(x, emb, context, more[len(unet.down)]), next(added))
            x = plus(x, residuals and residuals[-1])
        skips = [plus(*pair) for pair in zip(skips, residuals or [None] * len(skips), strict=False)]
        for place, block in enumerate(unet.up):
            if place == split:
                x = self.kept(x if fresh else None, keys, due)
            if fresh or place >= split:
                x = torch.cat([x, skips.pop()], dim=1)
                size = skips[-1].shape[-2:] if block.resample is not None else None
                x = block(x, emb, context, more[len(unet.down) + 1 + place], size)
        return unet.conv_out(F.silu(unet.norm_out(x)))

    def advance(self, timestep: float, rows: Sequence[Hashable]) -> list[tuple[Hashable, int]]:
        """The keys of these rows. At a new timestep, forgets those that the last one had not."""
        if timestep != self.timestep:
            self.timestep, self.turn = timestep, self.turn + 1
            self.deep = {key: x for key, x in self.deep.items() if key[1] < self.seen[key[0]]}
            self.seen.clear()
        keys = [(row, self.seen[row]) for row in rows]
        self.seen.update(rows)
        return keys

    def kept(self, x: Tensor | None, keys: Sequence[tuple[Hashable, int]], due: bool) -> Tensor:
        """The output of the deep layers: of each row from the cache, unless it is due or has none there."""
        if x is not None:
            self.deep |= {key: row for key, row in zip(keys, x.split(1), strict=True) if due or key not in self.deep}
        return torch.cat([self.deep[key] for key in keys])
