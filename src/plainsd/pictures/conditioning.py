"""From prompts to the UNet's conditioning: text encoder states, and SDXL's vector of pooled text and sizes.

A text encoder sees 77 positions: start, up to 75 tokens, end, padding. A longer prompt is cut into chunks that are
encoded one by one and concatenated, as in A1111. A token's weight multiplies its state; then the chunk is rescaled to
its original mean.

Shape letters: B prompts, K chunks, N positions of a chunk, M = K N, D width of the states (all encoders' together),
P width of the pooled state, V = P + 256 * (5 or 6) width of the vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plainsd.errors import UserError, shortened
from plainsd.models.clip import TextEncoder
from plainsd.models.layers import timestep_embedding
from plainsd.pictures.memory import on_stage
from plainsd.pictures.model import StableDiffusion
from plainsd.text.prompts import BREAK, Weighted, check_weight, parse
from plainsd.text.tokenizer import WORD_END, Tokenizer

BACKTRACK = 20  # tokens after a comma that move on with what follows when a chunk is full
SINUSOID = 256  # width of one number's embedding in SDXL's vector

Size = tuple[int, int]  # in pixels: width and height, or left and top
Chunk = list[tuple[int, float]]  # token ids and their weights, without start, end and padding
Weighing = Callable[[Tensor, Sequence[Sequence[float]], int], Tensor]  # states (B K, N, D), their weights, K


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a denoiser, one row per picture."""

    context: Tensor  # (B, M, D)
    vector: Tensor | None = None  # (B, V), SDXL
    concat: Tensor | None = None  # (B, 1 + L, h, w) of inpainting models, (B, L, h, w) of those that edit

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Applies `change` to every tensor that is not None."""
        parts = (self.context, self.vector, self.concat)
        return Conditioning(*(None if part is None else change(part) for part in parts))

    def row(self, index: int) -> Conditioning:
        return self.each(lambda part: part[index : index + 1])

    def repeat(self, count: int) -> Conditioning:
        """Each row `count` times."""
        return self.each(lambda part: part.repeat_interleave(count, dim=0))


def stack(conditionings: Sequence[Conditioning], empty: Conditioning | None = None) -> Conditioning:
    """All rows in one batch. Contexts of fewer chunks are padded with that of `empty`, an encoded empty prompt."""
    length = max(one.context.shape[1] for one in conditionings)
    contexts = []
    for one in conditionings:
        if missing := length - one.context.shape[1]:
            if empty is None:
                raise ValueError(f"contexts of {one.context.shape[1]} and {length} tokens need an `empty` to fill up")
            fill = empty.context.repeat(len(one.context), missing // empty.context.shape[1], 1)
            one = Conditioning(torch.cat([one.context, fill], dim=1), one.vector, one.concat)
        contexts.append(one)
    together = [
        [part for part in parts if part is not None]
        for parts in zip(*((one.context, one.vector, one.concat) for one in contexts), strict=True)
    ]
    return Conditioning(*(torch.cat(parts) if parts else None for parts in together))


# --- chunks ----------------------------------------------------------------------------------------------------------


def chunked(tokenizer: Tokenizer, pieces: Sequence[Weighted], room: int = 75, last: int | None = None) -> list[Chunk]:
    """A prompt's tokens in chunks of at most `room`, as A1111 cuts them.

    When a chunk is full, the tokens after its last comma move to the next chunk if they are at most 20; not from chunk
    `last`, where what moved would not be read. A BREAK ends a chunk. The vectors of a textual inversion stay together.
    """
    comma = tokenizer.vocabulary.get("," + WORD_END)
    done: list[Chunk] = []
    chunk: Chunk = []
    comma_at: int | None = None  # in the chunk that is being filled
    for piece in pieces:
        if piece is BREAK:
            done.append(chunk)
            chunk, comma_at = [], None
            continue
        for unit in tokenizer.units(piece.text):
            if len(unit) > room:
                raise UserError(
                    f"{tokenizer.pieces(unit[:1])[0]!r} has {len(unit)} vectors, and this model's text "
                    f"encoder sees {room} tokens at once; leave it out of the prompt",
                    field="prompt",
                )
            if unit == [comma]:
                comma_at = len(chunk)
            elif len(chunk) == room and comma_at is not None and room - comma_at <= BACKTRACK and len(done) + 1 != last:
                done.append(chunk[: comma_at + 1])
                chunk, comma_at = chunk[comma_at + 1 :], None
            if len(chunk) + len(unit) > room:
                done.append(chunk)
                chunk, comma_at = [], None
            chunk += [(key, piece.weight) for key in unit]
    return [*done, chunk] if chunk or not done else done


def framed(tokenizer: Tokenizer, chunk: Chunk, positions: int) -> Chunk:
    """With start, end and padding; these weigh 1."""
    padding = [(tokenizer.pad, 1.0)] * (positions - len(chunk) - 2)
    return [(tokenizer.start, 1.0), *chunk, (tokenizer.end, 1.0), *padding]


def as_weighted(prompt: str | Sequence[Weighted]) -> Sequence[Weighted]:
    """A prompt's weighted pieces. UserError for weights of 10,000 and more, infinity and NaN included."""
    pieces = parse(prompt) if isinstance(prompt, str) else prompt
    for piece in pieces:
        check_weight(piece.weight, piece.text)
    return pieces


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_prompts(
    sd: StableDiffusion,
    prompts: Sequence[str | Sequence[Weighted]],
    *,
    clip_skip: int = 1,
    size: Size | None = None,
    original: Size | None = None,
    crop: Size = (0, 0),
    score: float = 6.0,
) -> Conditioning:
    """Prompts, raw or parsed -> one row each. Text to take literally: `[Weighted(text)]`.

    `clip_skip` counts as in A1111: 1 is the last layer, 2 the one before; SDXL reads the one before in both cases.
    SDXL is conditioned on the sizes (width, height) of the picture and of the original, and on the crop (left, top),
    in pixels; its refiner on an aesthetic `score` (1 to 10) instead of the picture's size.
    """
    context, pooled = _encode(sd, [as_weighted(prompt) for prompt in prompts], clip_skip)
    return Conditioning(context, vector_of(sd, pooled, size, original, crop, score))


def _encode(sd: StableDiffusion, prompts: list[Sequence[Weighted]], clip_skip: int) -> tuple[Tensor, Tensor]:
    """(B, M, D) from all text encoders, and the last one's pooled state (B, P) of the first chunk."""
    return encode_chunks(sd, cut(sd, prompts), clip_skip)


def cut(
    sd: StableDiffusion, prompts: Sequence[Sequence[Weighted]], cutting=chunked, *, pad_is_word: bool = False
) -> list[list[list[Chunk]]]:
    """Chunks by text encoder and prompt. `pad_is_word`: see `Tokenizer.reading_pad_as_word`."""
    tokenizers = [one.reading_pad_as_word() for one in sd.tokenizers] if pad_is_word else sd.tokenizers
    prompts = [without_unknown(tokenizers, prompt) for prompt in prompts]
    parts = zip(tokenizers, sd.text_encoders, strict=True)
    return [
        [cutting(tokenizer, prompt, encoder.config.positions - 2) for prompt in prompts] for tokenizer, encoder in parts
    ]


def without_unknown(tokenizers: Sequence[Tokenizer], pieces: Sequence[Weighted]) -> list[Weighted]:
    """A prompt's pieces but for learned words that a model has not, which ComfyUI leaves out with a warning."""
    found = []
    for piece in pieces:
        if not piece.learned or all(tokenizer.has_learned(piece.text) for tokenizer in tokenizers):
            found.append(piece)
            continue
        word = shortened(piece.text, 60)
        warnings.warn(
            f"the model has no embedding {word!r}, and the prompt is read without it; add it with --embedding "
            f"FILE:{word}, or add_embedding",
            stacklevel=2,
        )
    return found


def encode_chunks(
    sd: StableDiffusion, cuts: list[list[list[Chunk]]], clip_skip: int, weighing: Weighing | None = None
) -> tuple[Tensor, Tensor]:
    """The chunks of `cut` -> (B, M, D) and (B, P). Prompts of fewer chunks are padded with empty ones."""
    weighing = weighing or (lambda states, weights, count: weigh(states, weights))
    count, size = max(len(chunks) for each in cuts for chunks in each), len(cuts[0])
    contexts = []
    for tokenizer, encoder, each in zip(sd.tokenizers, sd.text_encoders, cuts, strict=True):
        on_stage(sd, encoder)
        rows = [
            framed(tokenizer, chunk, encoder.config.positions)
            for chunks in each
            for chunk in [*chunks, *[[]] * (count - len(chunks))]
        ]
        device = encoder.token.weight.device
        states = encoder(torch.tensor([[key for key, _ in row] for row in rows], device=device))
        weights = [[weight for _, weight in row] for row in rows]
        hidden = weighing(_layer(sd, encoder, states, clip_skip), weights, count)
        contexts.append(hidden.unflatten(0, (size, count)).flatten(1, 2))  # (B, M, D)
        pooled = states.pooled.unflatten(0, (size, count))[:, 0]  # (B, P)
    return torch.cat(contexts, dim=-1), pooled


def clip_skip_like(sd: StableDiffusion, clip_skip: int, like: str | None) -> int:
    """The clip skip, as counted here, that another program's means for this model.

    A1111 skips layers of OpenAI's encoder alone, and reads SD 2.x and SDXL at the layer that they were trained with
    (modules/sd_hijack_open_clip.py, sd_hijack_clip.py, 1.10.1). ComfyUI counts from the last layer of SD 2's encoder,
    which is not stored here (comfy/text_encoders/sd2_clip.py, 0.8).
    """
    if sd.text_encoders[-1].config.activation == "quick_gelu":  # OpenAI's
        return clip_skip
    if like == "a1111":
        return 1
    return max(clip_skip - 1, 1) if like == "comfyui" and sd.variant.context == "final" else clip_skip


def _layer(sd: StableDiffusion, encoder: TextEncoder, states, clip_skip: int) -> Tensor:
    """SD 1.x and 2.x apply the final norm to a layer (SD 2's encoder is stored one layer short), SDXL does not."""
    layers = encoder.config.layers
    if not 1 <= clip_skip <= layers:
        raise UserError(
            f"clip skip {clip_skip} is out of bounds; this model's layers are 1 (the last) to {layers}",
            field="clip_skip",
            value=clip_skip,
        )
    if sd.variant.context == "penultimate":
        return states.hidden[-max(clip_skip, 2)]
    return states.final if clip_skip == 1 else encoder.norm(states.hidden[-clip_skip])


def weigh(states: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Each token's state times its weight, then each row rescaled to its original mean. (R, N, D), R rows of N.

    This is A1111's original emphasis. The mean measures magnitude only if the tokens' means do not cancel, as in CLIP;
    a small encoder's may be nearly 0. So the scale of a row is bounded by its weights.
    """
    changed = [row for row, line in enumerate(weights) if any(weight != 1 for weight in line)]
    if not changed:
        return states
    lines = [weights[row] for row in changed]
    factors = torch.tensor(lines, device=states.device)[..., None]  # (rows changed, N, 1)
    most = torch.maximum(factors.amax(dim=1, keepdim=True), 1 / factors.amin(dim=1, keepdim=True).clamp(min=0.1))
    before = states[changed].float()
    after = before * factors
    ratio = before.mean(dim=(1, 2), keepdim=True) / after.mean(dim=(1, 2), keepdim=True)
    after = after * torch.where((ratio >= 1 / most) & (ratio <= most), ratio, 1.0)
    return states.index_put((torch.tensor(changed, device=states.device),), after.to(states.dtype))


def size_vector(pooled: Tensor, numbers: Tensor) -> Tensor:
    """SDXL's vector (Podell et al. 2023, arXiv:2307.01952, section 2.2): pooled (B, P), numbers (B, S) -> (B, V).

    The numbers are original height and width, crop top and left, target height and width; for the refiner an aesthetic
    score instead of the last two.
    """
    sinusoids = timestep_embedding(numbers.flatten(), SINUSOID).unflatten(0, numbers.shape).flatten(1)
    return torch.cat([pooled, sinusoids.to(pooled.dtype)], dim=1)


def vector_of(
    sd: StableDiffusion,
    pooled: Tensor,
    size: Size | None = None,
    original: Size | None = None,
    crop: Size = (0, 0),
    score: float = 6.0,
) -> Tensor | None:
    width = sd.unet.config.vector
    if width is None:
        return None
    size = size or (sd.variant.size, sd.variant.size)
    numbers: list[float] = [*reversed(original or size), *reversed(crop)]
    numbers += [*reversed(size)] if is_base(sd, pooled) else [score]
    return size_vector(pooled, torch.tensor([numbers] * len(pooled), dtype=torch.float32, device=pooled.device))


def is_base(sd: StableDiffusion, pooled: Tensor) -> bool:
    """SDXL's base model takes six numbers, its refiner five."""
    count, rest = divmod(sd.unet.config.vector - pooled.shape[1], SINUSOID)
    if rest or count not in (5, 6):
        raise UserError(
            f"the UNet expects a vector of {sd.unet.config.vector} numbers, and the pooled text has "
            f"{pooled.shape[1]}: the text encoders and the UNet belong to different models"
        )
    return count == 6
