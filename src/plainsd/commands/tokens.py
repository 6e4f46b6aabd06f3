"""`plainsd tokens`: how a prompt is tokenized, chunked and weighted."""

from __future__ import annotations

from plainsd.diffusion.conventions import convention
from plainsd.pictures.conditioning import as_weighted, chunked, cut
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.plan import READERS, chunked_by_stretch
from plainsd.text.prompts import LoraTag, compose, parse_words, tagged_loras


def describe(sd: StableDiffusion, prompt: str, steps: int = 20, like: str | None = None) -> str:
    """The text that `plainsd tokens` prints: LoRAs, AND parts, steps, chunks, weights and tokens.

    `like`: the program whose syntax to use, see diffusion/conventions.py. UserError for an unknown one.
    """
    how = convention(like).prompts
    prompt, loras = tagged_loras(prompt)
    lines = [f"LoRA {lora.name}, strength {_strengths(lora)}" for lora in loras]
    parts = [(prompt, 1.0)] if how == "words" else compose(prompt)
    for number, (part, weight) in enumerate(parts, 1):
        if len(parts) > 1:
            lines.append(f"part {number} of {len(parts)}, weight {weight:g}")
        by_step = READERS[how][0](part, steps, None)[:steps]
        for text in dict.fromkeys(by_step):
            if len(set(by_step)) > 1:
                lines.append(f"steps {_spans([step for step, at in enumerate(by_step, 1) if at == text])} of {steps}")
            lines += _chunk_lines(sd, text, how)
    return "\n".join(lines)


def _strengths(lora: LoraTag) -> str:
    own = "" if lora.text_strength == lora.strength else f", {lora.text_strength:g} on the text encoders"
    return f"{lora.strength:g}{own}"


def _spans(steps: list[int]) -> str:
    """[1, 2, 3, 5] -> '1-3, 5'"""
    starts = [step for step in steps if step - 1 not in steps]
    ends = [step for step in steps if step + 1 not in steps]
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def _chunk_lines(sd: StableDiffusion, text: str, how: str) -> list[str]:
    """A line per chunk, then a line per run of equal weight; for both of SDXL's tokenizers if they differ."""
    views = []
    pieces = as_weighted(parse_words(text) if how == "words" else text)
    cuts = cut(sd, [pieces], chunked_by_stretch if how == "words" else chunked, pad_is_word=how != "pieces")
    for tokenizer, encoder, (chunks,) in zip(sd.tokenizers, sd.text_encoders, cuts, strict=True):
        room = encoder.config.positions - 2
        lines = []
        for number, chunk in enumerate(chunks, 1):
            lines.append(f"chunk {number} of {len(chunks)}: {len(chunk)} of {room} tokens")
            stretches: list[tuple[float, list[int]]] = []
            for key, weight in chunk:
                if not stretches or stretches[-1][0] != weight:
                    stretches.append((weight, []))
                stretches[-1][1].append(key)
            lines += [f"  {weight:6.3f}  {' '.join(tokenizer.pieces(ids))}" for weight, ids in stretches]
        views.append(lines)
    if all(lines == views[0] for lines in views):
        return views[0]
    return [line for number, lines in enumerate(views, 1) for line in (f"text encoder {number}", *lines)]
