"""What a UNet is asked and answers, and its attention maps, read by hooks beside it.

A hook computes softmax(q k^T / sqrt(d)) anew from the inputs of an attention layer, and the layer itself goes on as
ever: what is drawn is the same to the bit.

Shape letters: C L channels in and out, h w latent height and width, M tokens, N positions of a map, D T widths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from plainsd.models.layers import Attention
from plainsd.models.unet import Transformer, TransformerBlock, UNet
from plainsd.pictures.model import StableDiffusion

SELF_POSITIONS = 1024  # self-attention maps of more are not kept: they grow with the square

MapSize = tuple[int, int]  # height and width of a map


@dataclass
class Seen:
    """One evaluation of the network, at one latent and one level: rows of a batch that is one picture's."""

    x: Tensor  # (1, C, h, w), as the network is shown it
    timestep: float
    outputs: list[Tensor] = field(default_factory=list)  # (1, L, h, w) each: with the prompt, then without
    cross: dict[MapSize, Tensor] = field(default_factory=dict)  # (M, height, width), added up over layers
    self: dict[MapSize, Tensor] = field(default_factory=dict)  # (N, N), likewise: of each layer they would fill memory
    layers: Counter[tuple[str, MapSize]] = field(default_factory=Counter)  # how many layers, of "cross" and "self"

    def means(self, kind: str) -> dict[MapSize, Tensor]:
        """The maps' mean over layers."""
        return {size: total / self.layers[kind, size] for size, total in getattr(self, kind).items()}


class Watcher:
    """What the UNet is asked and answers, and the attention maps of the first row, which has the prompt.

    Only the first evaluation since `take` is kept: of samplers that ask twice a step the one where the step begins.
    """

    def __init__(self) -> None:
        self.first: Seen | None = None
        self.last: Seen | None = None  # what was taken
        self.now: Seen | None = None
        self.size: MapSize = (0, 0)  # of the map that is being computed

    def take(self) -> Seen:
        """What was seen since the last call, with its maps on the CPU; the same again for a step that asks nothing, as
        some of `dpm_adaptive`."""
        seen, self.first, self.now = self.first or self.last, None, None
        assert seen is not None  # the first step asks the network
        self.last = seen
        for maps in (seen.cross, seen.self):
            maps.update({size: total.cpu() for size, total in maps.items()})
        return seen

    def asked(self, unet: UNet, args: tuple) -> None:
        x, timestep = args[0][:1], float(args[1])
        if self.now is None or self.now.timestep != timestep or not torch.equal(self.now.x, x):
            self.now = Seen(x.clone(), timestep)
            self.first = self.first or self.now

    def answered(self, unet: UNet, args: tuple, output: Tensor) -> None:
        assert self.now is not None  # it was asked
        if self.now is self.first:
            self.now.outputs += output.float().split(1)

    def enters(self, transformer: Transformer, args: tuple) -> None:
        self.size = (args[0].shape[-2], args[0].shape[-1])

    def attends(self, kind: str, attention: Attention, args: tuple) -> None:
        assert self.now is not None
        if self.now is not self.first or self.now.outputs:
            return  # another evaluation, or the row without the prompt in a call of its own
        context = args[1] if kind == "cross" else args[0]
        if kind == "self" and context.shape[1] > SELF_POSITIONS:
            return
        maps = attention_map(attention, args[0][:1], context[:1])  # (N, M or N)
        maps = maps.T.unflatten(1, self.size) if kind == "cross" else maps
        sums = getattr(self.now, kind)
        sums[self.size] = sums[self.size] + maps if self.size in sums else maps
        self.now.layers[kind, self.size] += 1


def attention_map(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), mean over heads, in float32: (1, N, D), (1, M, T) -> (N, M)."""
    q, k = (
        projected.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()  # (1, heads, N or M, d)
        for projected in (attention.q(x), attention.k(context))
    )
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)[0]


@contextmanager
def watched(sd: StableDiffusion) -> Iterator[Watcher]:
    """Hooks on the UNet, gone afterwards."""
    watch, handles = Watcher(), []
    blocks = [block for block in sd.unet.modules() if isinstance(block, TransformerBlock)]
    try:
        handles.append(sd.unet.register_forward_pre_hook(watch.asked))
        handles.append(sd.unet.register_forward_hook(watch.answered))
        for module in sd.unet.modules():
            if isinstance(module, Transformer):
                handles.append(module.register_forward_pre_hook(watch.enters))
        for block in blocks:
            handles.append(block.self_attn.register_forward_pre_hook(partial(watch.attends, "self")))
            handles.append(block.cross_attn.register_forward_pre_hook(partial(watch.attends, "cross")))
        yield watch
    finally:
        for handle in handles:
            handle.remove()
