"""CLIPScores of many pictures: of a folder, or of pictures that are drawn from prompts."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.generate import final, text_to_image
from plainsd.pictures.clip_score import SCORE_PREFIX, Clip, clip_scores, plain_text
from plainsd.pictures.images import open_picture, read_settings, write_png
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import Settings
from plainsd.reports.embeddings import CLIP_BATCH
from plainsd.train.data.folders import found_in

SHOWN = 5  # of the lowest scores


class Captioned(NamedTuple):
    """A picture with its texts; the score is the mean over these."""

    name: str
    image: Callable[[], Image.Image]
    texts: tuple[str, ...]


class Scored(NamedTuple):
    name: str
    text: str  # the first
    score: float


def captioned_in(folder: Path, say: Callable[[str], None]) -> Iterator[Captioned]:
    """The pictures of a folder: with the captions beside them, as for training, or the prompt in their metadata. Those
    with neither are left out, and named."""
    without = []
    for found in found_in(folder, (), say):
        if found.fault:
            raise UserError(f"{found.path}: {found.fault}", field="pictures")
        texts = found.texts or prompt_in(found.path)
        if texts:
            inside = found.path.is_relative_to(folder)
            name = str(found.path.relative_to(folder) if inside else found.path)
            yield Captioned(name, partial(open_picture, found.path), texts)
        else:
            without.append(found.path.name)
    if without:
        more = f", and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        say(f"{len(without)} without caption or settings, not scored: {', '.join(without[:SHOWN])}{more}")


def prompt_in(path: Path) -> tuple[str, ...]:
    """The plain text of the prompt that a picture was made from; none, where it holds no settings."""
    open_picture(path)  # UserError for one that is broken
    try:
        settings = read_settings(path)
    except UserError:
        return ()
    text = plain_text(settings.prompt, settings.steps or 20)
    return (text,) if text else ()


def drawn(
    sd: StableDiffusion,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    out: Path | None,
    noted: Callable[[Settings], Settings],
    **options,
) -> Iterator[Captioned]:
    """One picture for each prompt; number k has seed + k. With `out`, they are written there with their settings, as
    `noted` gives them."""
    for start in range(0, len(prompts), batch):
        events = text_to_image(sd, prompts[start : start + batch], seed=seed + start, **options)
        for image, settings in zip(final(events), events.settings, strict=True):
            name = f"{settings.seed - seed:05d}.png"
            if out:
                out.mkdir(parents=True, exist_ok=True)
                write_png(image, out / name, noted(settings))
            text = plain_text(settings.prompt, settings.steps)
            yield Captioned(name, image.copy, (text,))


def read_back(path: Path) -> Captioned:
    """A picture that `write_png` wrote with its settings."""
    settings = read_settings(path)
    assert settings.steps is not None  # of a picture that was drawn
    text = plain_text(settings.prompt, settings.steps)
    return Captioned(path.name, partial(open_picture, path), (text,))


def score_all(
    clip: Clip,
    pictures: Iterable[Captioned],
    prefix: str = SCORE_PREFIX,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Scored]:
    """In the order of the pictures. `progress` is called with the number of pictures of each batch."""
    scored: list[Scored] = []
    following = iter(pictures)
    while some := list(islice(following, CLIP_BATCH)):
        pairs = [(image, text) for one in some for image in [one.image()] for text in one.texts]
        images, texts = [image for image, _ in pairs], [text for _, text in pairs]
        scores = iter(clip_scores(clip, images, texts, prefix))
        scored += [Scored(one.name, one.texts[0], statistics.fmean(next(scores) for _ in one.texts)) for one in some]
        progress(len(some))
    return scored


def score_summary(scored: Sequence[Scored], prefix: str) -> dict:
    scores = [one.score for one in scored]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return {
        "clip_score": statistics.fmean(scores),
        "standard_error": spread / math.sqrt(len(scores)),
        "standard_deviation": spread,
        "pictures": len(scores),
        "prefix": prefix,
        "scores": [one._asdict() for one in scored],
    }


def score_text(result: dict) -> str:
    """The mean with its standard error, and the pictures that fit their texts least."""
    mean, error, count = (result[name] for name in ("clip_score", "standard_error", "pictures"))
    lines = [f"CLIPScore {mean:.4f} +- {error:.4f} ({count} picture{'s' * (count > 1)})"]
    lowest = sorted(result["scores"], key=lambda one: one["score"])[:SHOWN]
    lines += [f"  {one['score']:.4f}  {one['name']}  {one['text'][:80]}" for one in lowest]
    return "\n".join(lines) + "\n"


def write_scores(result: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("scores.json", json.dumps(result, indent=2) + "\n"), ("scores.txt", score_text(result))):
        with written_whole(out / name) as draft:
            draft.write_text(text, encoding="utf-8")
