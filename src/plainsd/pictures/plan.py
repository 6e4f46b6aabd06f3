"""The text of each step: prompts with editing, alternation and AND, encoded in one of three ways.

pieces   diffusers' convention: every text by itself, A1111's notation
batches  A1111's own: the variants of an edited prompt are encoded as one batch, with one mean restored for all, and
         padded to the longest; parts of an AND are padded to the longest by repeating the last state. Network calls are
         counted, not steps, and the first one does not count.
words    ComfyUI's: another notation, no editing and no AND; weights interpolate from the states of an empty text

All give each text as many chunks as it needs: a short negative prompt is not padded to a long prompt's length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from plainsd.diffusion.conventions import convention
from plainsd.pictures.conditioning import (
    Chunk,
    Conditioning,
    as_weighted,
    clip_skip_like,
    cut,
    encode_chunks,
    is_base,
    vector_of,
)
from plainsd.pictures.model import StableDiffusion
from plainsd.text.prompts import BREAK, alternates, compose, parse_words, schedule
from plainsd.text.tokenizer import Tokenizer

WHOLE_BELOW = 8  # tokens; ComfyUI does not split shorter segments between two chunks

Encoded = tuple[Tensor, Tensor]  # a text's context (1, M, D) and pooled state (1, P)


@dataclass(frozen=True)
class PromptPlan:
    """The texts of each step. Every text is encoded once; lengths M may differ between texts."""

    parts: tuple[tuple[float, tuple[str, ...]], ...]  # for each part of an AND: its weight, and its text at each step
    negatives: tuple[str, ...]  # the negative text at each step; the last one is repeated
    encoded: dict[str, Conditioning]
    encoded_negatives: dict[str, Conditioning]
    alike: bool = False  # the parts of a step are padded to the longest
    lengthened: dict[tuple[str, int], Conditioning] = field(default_factory=dict)  # a cache

    def positive(self, step: int) -> list[tuple[Conditioning, float]]:
        """The cond rows of a step (counted from 0), each with its weight."""
        texts = [(texts[min(step, len(texts) - 1)], weight) for weight, texts in self.parts]
        length = max(self.encoded[text].context.shape[1] for text, _ in texts) if self.alike else 0
        return [(self._at_least(text, length), weight) for text, weight in texts]

    def negative(self, step: int) -> Conditioning:
        return self.encoded_negatives[self.negatives[min(step, len(self.negatives) - 1)]]

    def _at_least(self, text: str, length: int) -> Conditioning:
        """A text's row, padded to this length by repeating its last state; the same tensor at each step."""
        one = self.encoded[text]
        missing = length - one.context.shape[1]
        if missing <= 0:
            return one
        if (text, length) not in self.lengthened:
            last = one.context[:, -1:].expand(-1, missing, -1)
            self.lengthened[text, length] = replace(one, context=torch.cat([one.context, last], dim=1))
        return self.lengthened[text, length]


@torch.no_grad()
def encode_prompt(
    sd: StableDiffusion,
    prompt: str,
    negative: str,
    steps: int,
    *,
    clip_skip: int = 1,
    first_pass: int | None = None,
    scores: tuple[float, float] = (6.0, 2.5),
    like: str | None = None,
    **sizes,
) -> PromptPlan:
    """A prompt with editing, alternation and AND, and a negative prompt without AND, encoded for `steps` steps.

    `sizes` are `size`, `original` and `crop` of `encode_prompts`; `scores` the refiner's for prompt and negative.
    For SDXL's base model an empty negative prompt is all zeros, as it was trained: in diffusers unless the model says
    otherwise (`Variant.force_zeros`), in A1111 always, in ComfyUI never.
    """
    how = convention(like).prompts
    composed = [(prompt, 1.0)] if how == "words" else compose(prompt)
    texts_of, rows_of = READERS[how]
    parts = tuple((weight, texts_of(text, steps, first_pass)) for text, weight in composed)
    rows = [rows_of(text, steps, first_pass) for text, _ in composed]
    clip_skip = clip_skip_like(sd, clip_skip, like)
    wanted, unwanted = ENCODERS[how](sd, rows, rows_of(negative, steps, first_pass), clip_skip)
    negatives = texts_of(negative, steps, first_pass)
    whole = how == "batches" and unwanted.keys() == {""}  # A1111 looks at all of its texts at once
    zeroed = whole or (how == "pieces" and sd.variant.force_zeros)
    if zeroed and sd.unet.config.vector is not None and "" in unwanted and is_base(sd, unwanted[""][1]):
        unwanted[""] = (torch.zeros_like(unwanted[""][0]), torch.zeros_like(unwanted[""][1]))

    def conditioned(encoded: dict[str, Encoded], score: float) -> dict[str, Conditioning]:
        pairs = encoded.items()
        return {text: Conditioning(one, vector_of(sd, pooled, **sizes, score=score)) for text, (one, pooled) in pairs}

    positive, negative_ones = conditioned(wanted, scores[0]), conditioned(unwanted, scores[1])
    return PromptPlan(parts, negatives, positive, negative_ones, alike=how == "batches")


def by_steps(prompt: str, steps: int, first_pass: int | None) -> tuple[str, ...]:
    """The text of each step."""
    texts: list[str] = []
    for last, text in schedule(prompt, steps, first_pass):
        texts += [text] * (last - len(texts))
    return tuple(texts)


def by_call(prompt: str, calls: int, first_pass: int | None) -> tuple[str, ...]:
    """The text of each network call in A1111, where a text for the first n calls is used n + 1 times."""
    texts = by_steps(prompt, calls, first_pass)
    return (texts[0], *texts)


def variants(prompt: str, calls: int, first_pass: int | None) -> tuple[str, ...]:
    """The texts of an edited prompt that A1111 encodes together; with alternation, one for each call."""
    if alternates(prompt):
        return by_steps(prompt, calls, first_pass)
    return tuple(text for _, text in schedule(prompt, calls, first_pass))


def always(prompt: str, steps: int, first_pass: int | None) -> tuple[str, ...]:
    return (prompt,)


# --- encoding --------------------------------------------------------------------------------------------------------


Texts = Sequence[str]
Tables = tuple[dict[str, Encoded], dict[str, Encoded]]  # of the prompt's texts, and of the negative ones


def _encode_pieces(sd: StableDiffusion, parts: Sequence[Texts], negatives: Texts, clip_skip: int) -> Tables:
    """Each text by itself; texts with the same number of chunks are encoded as one batch."""
    wanted = list(dict.fromkeys(text for texts in parts for text in texts))
    unwanted = list(dict.fromkeys(negatives))
    cuts = cut(sd, [as_weighted(text) for text in [*wanted, *unwanted]])
    alike = defaultdict(list)
    for place in range(len(cuts[0])):
        alike[max(len(each[place]) for each in cuts)].append(place)
    found: dict[int, Encoded] = {}
    for places in alike.values():
        contexts, pooled = encode_chunks(sd, [[each[place] for place in places] for each in cuts], clip_skip)
        found |= {at: (contexts[i : i + 1], pooled[i : i + 1]) for i, at in enumerate(places)}
    first = {text: found[place] for place, text in enumerate(wanted)}
    return first, {text: found[place] for place, text in enumerate(unwanted, len(wanted))}


def _encode_batches(sd: StableDiffusion, parts: Sequence[Texts], negatives: Texts, clip_skip: int) -> Tables:
    """A batch for each part, and one for the negative prompt."""

    def together(texts: Texts) -> dict[str, Encoded]:
        cuts = cut(sd, [as_weighted(text) for text in texts], pad_is_word=True)
        contexts, pooled = encode_chunks(sd, cuts, clip_skip, weigh_together)
        return {text: (contexts[i : i + 1], pooled[i : i + 1]) for i, text in enumerate(texts)}

    first: dict[str, Encoded] = {}
    for texts in parts:
        first = together(texts) | first
    return first, together(negatives)


def weigh_together(states: Tensor, weights: Sequence[Sequence[float]], count: int) -> Tensor:
    """Each state times its weight; then the first chunks of the batch are rescaled together to their original mean, the
    second ones to theirs, and so on: A1111's "Original" emphasis. (B K, N, D), K = `count` chunks."""
    factors = torch.tensor(weights, device=states.device)[..., None]  # (B K, N, 1)
    if bool((factors == 1).all()):
        return states
    before = states.float().unflatten(0, (-1, count))  # (B, K, N, D)
    after = before * factors.unflatten(0, (-1, count))
    ratio = before.mean(dim=(0, 2, 3), keepdim=True) / after.mean(dim=(0, 2, 3), keepdim=True)
    changed = (factors != 1).unflatten(0, (-1, count)).any(dim=2, keepdim=True).any(dim=0, keepdim=True)
    return torch.where(changed, after * ratio, before).flatten(0, 1).to(states.dtype)


def _encode_words(sd: StableDiffusion, parts: Sequence[Texts], negatives: Texts, clip_skip: int) -> Tables:
    """Prompt and negative prompt, each in a batch with an empty text."""
    tables = []
    for text in (parts[0][0], negatives[0]):
        pieces = as_weighted(parse_words(text))
        cuts: list[list[list[Chunk]]] = [
            [chunks, [[]]] for (chunks,) in cut(sd, [pieces], chunked_by_stretch, pad_is_word=True)
        ]
        contexts, pooled = encode_chunks(sd, cuts, clip_skip, weigh_from_empty)
        tables.append({text: (contexts[:1], pooled[:1])})
    return tables[0], tables[1]


def weigh_from_empty(states: Tensor, weights: Sequence[Sequence[float]], count: int) -> Tensor:
    """ComfyUI's weights: z_empty + w (z - z_empty) at each position with w other than 1. The empty text is the last of
    the batch. (B K, N, D)"""
    factors = torch.tensor(weights, device=states.device)[..., None]  # (B K, N, 1)
    plain, empty = states.float(), states[-count].float()
    return torch.where(factors == 1, plain, empty + factors * (plain - empty)).to(states.dtype)


def chunked_by_stretch(tokenizer: Tokenizer, pieces: Sequence, room: int = 75) -> list[Chunk]:
    """A prompt's tokens in chunks of at most `room`, as ComfyUI cuts them: a segment of equal weight, or an embedding,
    of fewer than 8 tokens moves whole to the next chunk if it does not fit; longer ones are split at a chunk's end.
    A BREAK ends a chunk."""
    done: list[Chunk] = []
    chunk: Chunk = []
    for piece in pieces:
        if piece is BREAK:
            done.append(chunk)
            chunk = []
            continue
        stretch = [(key, piece.weight) for unit in tokenizer.units(piece.text) for key in unit]
        large = len(stretch) >= min(WHOLE_BELOW, room)
        at = 0
        while len(stretch) - at + len(chunk) > room:
            fits = room - len(chunk) if large else 0
            done.append(chunk + stretch[at : at + fits])
            chunk, at = [], at + fits
        chunk = chunk + stretch[at:]
    return [*done, chunk]


READERS = {"pieces": (by_steps, by_steps), "batches": (by_call, variants), "words": (always, always)}
ENCODERS = {"pieces": _encode_pieces, "batches": _encode_batches, "words": _encode_words}
