"""Encodes captions for training: plain text without prompt syntax, at a fixed length.

A fixed length makes a picture's loss independent of the rest of its batch. Frozen encoders encode each caption once,
alone and in float32, so that its states are identical in every run and after every resume.

Shape letters: B captions, M = positions * chunks (77 with CLIP), D width of the states, P of the pooled state, V of
SDXL's vector.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from plainsd.errors import UserError
from plainsd.pictures.conditioning import SINUSOID, chunked, cut, encode_chunks, encode_prompts, size_vector
from plainsd.pictures.model import StableDiffusion
from plainsd.speed.training import autocast
from plainsd.text.prompts import Weighted

SCORE = 6.0  # the aesthetic score that SDXL's refiner is conditioned on


@dataclass
class Reader:
    """Captions to text states, with an LRU cache of at most `room` bytes."""

    sd: StableDiffusion
    learns: bool = False  # the text encoders are trained: no cache, with gradients
    chunks: int = 1  # of 75 tokens each with CLIP; longer captions are truncated
    room: int = 2**30
    _known: OrderedDict[str, tuple[Tensor, Tensor | None]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def __post_init__(self):
        if self.chunks < 1:
            raise UserError(f"{self.chunks} chunks of caption; give at least 1")

    def __call__(self, captions: Sequence[str], sizes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Context (B, M, D) and SDXL's vector (B, V). `sizes` (B, 6) is SDXL's size conditioning."""
        if self.learns:
            context, pooled = self._encode(captions)
        else:
            states = [self._recall(caption) for caption in captions]
            context = torch.cat([one for one, _ in states]).to(self.sd.device)
            pooled = torch.cat([one for _, one in states]).to(self.sd.device) if states[0][1] is not None else None
        if pooled is None:
            return context, None
        return context, size_vector(pooled, self._numbers(sizes, pooled).to(pooled.device))

    def _recall(self, caption: str) -> tuple[Tensor, Tensor | None]:
        if caption in self._known:
            self._known.move_to_end(caption)
            return self._known[caption]
        with torch.no_grad(), autocast(self.sd.device.type, False):  # one form of attention, in steps and between them
            context, pooled = self._encode([caption])
            states = context.cpu(), None if pooled is None else pooled.cpu()
        self._known[caption] = states
        self._bytes += _size(states)
        while self._bytes > self.room and len(self._known) > 1:
            self._bytes -= _size(self._known.popitem(last=False)[1])
        return states

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(B, M, D), and where the UNet reads it the pooled state (B, P). An empty caption is all zeros to SDXL's base
        model unless the model says otherwise (`Variant.force_zeros`), as it is when pictures are made."""
        parts = cut(self.sd, [[Weighted(caption)] for caption in captions], partial(chunked, last=self.chunks))
        read = [[chunks[: self.chunks] for chunks in each] for each in parts]
        context, pooled = encode_chunks(self.sd, read, clip_skip=1)
        context = self._padded(context)
        if self.sd.unet.config.vector is None:
            return context, None
        width = pooled.shape[1]
        if self.sd.variant.force_zeros and (self.sd.unet.config.vector or 0) - width == 6 * SINUSOID:
            said = torch.tensor([bool(caption) for caption in captions], device=context.device)
            context, pooled = context * said[:, None, None], pooled * said[:, None]
        return context, pooled

    def _padded(self, context: Tensor) -> Tensor:
        """(B, M or less, D) -> (B, M, D), with an empty caption's states."""
        missing = self.chunks - context.shape[1] // self.sd.text_encoders[0].config.positions
        if missing:
            empty = encode_prompts(self.sd, [[Weighted("")]]).context
            context = torch.cat([context, empty.repeat(len(context), missing, 1)], dim=1)
        return context

    def _numbers(self, sizes: Tensor, pooled: Tensor) -> Tensor:
        """SDXL's base model is conditioned on six sizes, its refiner on four and a score."""
        if self.sd.unet.config.vector - pooled.shape[1] == 6 * SINUSOID:
            return sizes
        return torch.cat([sizes[:, :4], torch.full((len(sizes), 1), SCORE)], dim=1)


def _size(states: tuple[Tensor, Tensor | None]) -> int:
    return sum(part.nbytes for part in states if part is not None)


def cut_captions(sd: StableDiffusion, captions: Sequence[str], chunks: int) -> int:
    """How many captions are truncated."""
    encoders = [
        (tokenizer, encoder.config.positions - 2)
        for tokenizer, encoder in zip(sd.tokenizers, sd.text_encoders, strict=True)
    ]
    return sum(
        any(len(chunked(tokenizer, [Weighted(caption)], room, chunks)) > chunks for tokenizer, room in encoders)
        for caption in captions
    )
