"""The texts of a request that become prompts, of both passes: bounded and parsed before anything is queued."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from plainsd.diffusion.conventions import convention
from plainsd.errors import UserError
from plainsd.pictures.conditioning import as_weighted
from plainsd.pictures.sampling import second_pass
from plainsd.pictures.settings import Resolved, Settings
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.schema import JobRequest
from plainsd.text.prompts import Weighted, compose, parse_words, schedule, tagged_loras

PROMPTS = ("prompt", "negative", "hires_prompt", "hires_negative")


def prompts_in(asked: JobRequest | Settings) -> dict[str, str]:
    """Prompt and negative prompt, and those of the second pass if it has its own."""
    return {name: text for name in PROMPTS if (text := getattr(asked, name)) or name in ("prompt", "negative")}


def check_prompt_sizes(prompts: Mapping[str, str], limits: Limits) -> None:
    for name, text in prompts.items():
        if len(text) > limits.prompt:
            message = f"{name} has {len(text)} characters; at most {limits.prompt} are taken"
            raise APIError(422, message, name, len(text))
        if (depth := nesting(text)) > limits.nesting:
            message = f"{name} has {depth} brackets inside each other; at most {limits.nesting} are read"
            raise APIError(422, message, name, depth)


def nesting(prompt: str) -> int:
    """Maximum nesting depth of brackets."""
    deepest = depth = 0
    for character in re.findall(r"\\.|[()\[\]]", prompt):
        depth = depth + 1 if character in "([" else max(0, depth - 1) if character in ")]" else depth
        deepest = max(deepest, depth)
    return deepest


class PromptReading(NamedTuple):
    """A text as sampling will parse it."""

    field: str
    text: str
    steps: int
    calls: int  # of the network, a step
    first_pass: int | None  # steps of the pass before it
    notation: str  # a key of `plan.READERS`


def readings(one: Resolved) -> Iterator[PromptReading]:
    """Those of a picture's prompts, in each of its passes."""
    how = convention(one.like)
    passes: list[tuple[Resolved, int | None]] = [(one, None)]
    if one.hires:
        passes.append((second_pass(one), one.steps))
    for settings, first_pass in passes:
        calls = 2 if settings.sampler in how.second_order else 1
        for name in ("prompt", "negative"):
            own = first_pass is not None and getattr(one, f"hires_{name}") is not None
            field, text = f"hires_{name}" if own else name, getattr(settings, name)
            yield PromptReading(field, text, settings.steps, calls, first_pass, how.prompts)


def check_prompts(settings: list[Resolved], limits: Limits) -> None:
    """Parses every text that the prompts become during sampling. APIError for one that cannot be encoded."""
    distinct = dict.fromkeys(reading for one in settings for reading in readings(one))
    characters = sum(len(reading.text) * reading.steps for reading in distinct)
    if characters > limits.reading:
        what = f"prompts of {characters} characters, each counted once a step"
        remedy = f"at most {limits.reading} are read for one job: write shorter ones, or fewer cells of a grid"
        raise APIError(422, f"{what}; {remedy}", "prompt", characters)
    for reading in distinct:
        try:
            check_reading(reading)
        except UserError as error:
            raise APIError(422, f"{reading.field}: {error}", reading.field, reading.text) from None


def check_reading(reading: PromptReading) -> None:
    """UserError for a weight out of bounds, in the text of any step, and for a LoRA in a text that loads none."""
    if loras := tagged_loras(reading.text)[1]:
        raise UserError(f"<lora:{loras[0].name}> has no effect there; write it into the prompt, or list it in loras")
    if reading.notation == "words":
        as_weighted(parse_words(reading.text))
        return
    parts = compose(reading.text) if reading.field.endswith("prompt") else [(reading.text, 1.0)]
    for part, weight in parts:
        as_weighted([Weighted(part, weight)])  # of the whole part, beside others
    steps, before = reading.steps * reading.calls, reading.first_pass and reading.first_pass * reading.calls
    for text in {text for part, _ in parts for _, text in schedule(part, steps, before)}:
        as_weighted(text)
