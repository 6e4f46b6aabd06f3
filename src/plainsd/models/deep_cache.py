"""DeepCache: the UNet with its deep features cached between steps. Faster; the picture changes slightly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plainsd.models.unet import EachBeside, UNet, plus


class DeepCache:
    """A UNet whose deep layers run at every `every`-th timestep only; in between, their last output is reused.

    Ma et al. 2023, "DeepCache" (arXiv:2312.00858), section 3.2, with uniform strides: from one step to the next the
    deep features change slowly. `shallow` is the number of blocks at either end that always run. One object serves one
    picture or batch, from first step to last. Each of several calls at the same timestep (cond and uncond, when they
    are not batched) has its own cache.
    """

    def __init__(self, unet: UNet, every: int, shallow: int = 1):
        self.unet, self.every, self.shallow = unet, every, min(shallow, len(unet.down))
        self.turn, self.place = -1, 0
        self.timestep: float | None = None
        self.deep: list[Tensor] = []  # one for each call of a step

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
    ) -> Tensor:
        unet, split = self.unet, len(self.unet.up) - 1 - self.shallow
        fresh = self.advance(timestep, len(x))
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
                x = self.kept(x, fresh)
            if fresh or place >= split:
                x = torch.cat([x, skips.pop()], dim=1)
                size = skips[-1].shape[-2:] if block.resample is not None else None
                x = block(x, emb, context, more[len(unet.down) + 1 + place], size)
        return unet.conv_out(F.silu(unet.norm_out(x)))

    def advance(self, timestep: float, rows: int) -> bool:
        """Whether this call runs all layers: it is due, or the cache has no entry of this batch size."""
        if timestep == self.timestep:
            self.place += 1
        else:
            self.timestep, self.place, self.turn = timestep, 0, self.turn + 1
        return self.turn % self.every == 0 or [len(x) for x in self.deep[self.place :][:1]] != [rows]

    def kept(self, x: Tensor, fresh: bool) -> Tensor:
        """The output of the deep layers: fresh, or from the cache."""
        if fresh:
            self.deep[self.place : self.place + 1] = [x]
        return self.deep[self.place]
