"""One or two `Explanation`s as a page that stands alone: everything is inside it, and it asks nobody for anything.

Pictures and maps are thinned until the page is below 5 MB: fewer steps, smaller pictures, coarser maps (`DETAIL`). Maps
go in as bytes, each scaled to its own highest value, which is told beside it; explain_page.html draws them.

Shape letters: S steps shown, G groups of tokens (the words, start, end and padding), N positions of a map.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.errors import UserError
from plainsd.pictures.previews import preview
from plainsd.reports.explain import Explanation

LARGEST_PAGE = 5_000_000  # bytes
LOSSLESS = 64  # pixels: pictures up to here are stored without loss
BINS = torch.linspace(-4, 4, 41)  # of the histograms, in standard deviations of the noise
CURVE = 80  # points of the schedule that are drawn


class Detail(NamedTuple):
    """How much of it is shown, at most."""

    steps: int
    picture: int  # pixels, of the longer side
    cross: int  # positions, of either side of a map
    self: int


DETAIL = (Detail(30, 256, 32, 16), Detail(24, 192, 16, 12), Detail(16, 128, 16, 10), Detail(10, 96, 8, 8))


def page(explanations: Sequence[Explanation]) -> str:
    """The page of one drawing, or of several beside each other. UserError where it would be too large."""
    template = (files("plainsd") / "reports" / "explain_page.html").read_text("utf-8")
    for detail in DETAIL:
        text = json.dumps([page_data(one, detail) for one in explanations], ensure_ascii=False)
        whole = template.replace("__DATA__", text.replace("<", "\\u003c"))  # no prompt ends the script that holds it
        if len(whole.encode()) < LARGEST_PAGE:
            return whole
    raise UserError("the page would be larger than 5 MB; explain fewer drawings, or a shorter prompt")


def page_data(one: Explanation, detail: Detail) -> dict:
    """What the page is told of a drawing."""
    shown = spread_out(len(one.timesteps), detail.steps)
    settings = one.settings
    latents = {"noisy": on_unit_scale(one)[shown], "estimate": one.denoised[shown]}
    pictures = {name: [encoded(picture, detail.picture) for picture in preview(each, one.latent_rgb)]
                for name, each in latents.items()}  # fmt: skip
    pictures |= {name: [encoded(each[i], detail.picture) for i in shown] for name, each in one.decoded.items()}
    groups = groups_of(one)
    return {
        "prompt": settings.prompt,
        "negative": settings.negative,
        "settings": f"seed {settings.seed}, {settings.steps} steps of {settings.sampler} ({settings.spacing} spacing), "
        f"guidance {settings.guidance:g}, {settings.size[0]}x{settings.size[1]}",
        "groups": [
            {"text": text, "word": word, "ids": [list(one.tokens[at].ids) for at in positions],
             "weight": one.tokens[positions[0]].weight}
            for text, word, positions in groups
        ],
        "steps": shown,
        "sigmas": one.sigmas,
        "timesteps": one.timesteps,
        "schedule": one.schedule[spread_out(len(one.schedule), CURVE)].tolist(),
        "places": spread_out(len(one.schedule), CURVE),
        "picture": encoded(one.image, 2 * detail.picture),
        "pictures": pictures,
        "cross": [
            packed_maps(torch.stack([pooled_maps(maps[shown][:, at].sum(1), detail.cross) for _, _, at in groups], 1),
                   layers=one.layers[size], size=list(size))
            for size, maps in one.cross_attention.items()
        ],
        "self": [shrunk_self(one, shown, detail.self)] if one.self_attention else [],
        "difference": None if one.uncond is None else packed_maps(rms(one.cond - one.uncond, 1)[shown]),
        "histograms": {name: [histogram(each[i]) for i in range(len(shown))] for name, each in latents.items()},
        "bins": BINS.tolist(),
    }  # fmt: skip


def spread_out(count: int, most: int) -> list[int]:
    """At most so many of the indices, evenly, with the first and the last."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def groups_of(one: Explanation) -> list[tuple[str, bool, list[int]]]:
    """Text, whether it is a word of the prompt, and the positions: all of them, each once."""
    places: dict[int | None, list[int]] = {}
    for at, token in enumerate(one.tokens):
        places.setdefault(token.word, []).append(at)
    rest = places.pop(None)
    starts = [at for at in rest if one.tokens[at].ids == one.tokens[0].ids]
    ends = [at for at in rest if at not in starts]
    words = [(one.words[word], True, at) for word, at in places.items() if word is not None]
    return [("start", False, starts), *words, ("end and padding", False, ends)]


def on_unit_scale(one: Explanation) -> Tensor:
    """Latents at each level but the last as the network is shown them, x / sqrt(spread^2 + sigma^2): (S, L, h, w)."""
    scales = torch.tensor([math.sqrt(one.spread**2 + sigma**2) for sigma in one.sigmas[:-1]])
    return one.noisy[:-1] / scales.view(-1, 1, 1, 1)


def rms(x: Tensor, dim: int) -> Tensor:
    return x.square().mean(dim).sqrt()


def histogram(x: Tensor) -> list[float]:
    """Density over `BINS`; what lies outside counts as at the edge."""
    counts = torch.histogram(x.flatten().clamp(BINS[0].item(), BINS[-1].item()), BINS).hist
    return [round(value, 4) for value in (counts / counts.sum() / (BINS[1] - BINS[0])).tolist()]


def pooled_maps(maps: Tensor, most: int) -> Tensor:
    """(..., height, width), each side at most so long: means over areas."""
    return F.adaptive_avg_pool2d(maps, [min(side, most) for side in maps.shape[-2:]])


def shrunk_self(one: Explanation, shown: list[int], most: int) -> dict:
    """The finest self-attention that there is: (S, N, height, width), a row of N for each place that reads."""
    size = max(one.self_attention)
    maps = one.self_attention[size][shown].unflatten(2, size)  # (S, N, height, width)
    maps = pooled_maps(maps, most).movedim(1, -1).unflatten(-1, size)  # (S, height, width, ...): read, then readers
    maps = pooled_maps(maps.flatten(0, 2)[:, None], most)[:, 0].unflatten(0, (len(shown), -1))
    maps = maps.flatten(2)  # (S, read, N)
    height, width = (min(side, most) for side in size)
    maps *= math.prod(size) / (height * width)  # several places are read as one: it still adds up to 1
    return packed_maps(maps.transpose(1, 2).unflatten(2, (height, width)), size=list(size))


def packed_maps(maps: Tensor, **more) -> dict:
    """(..., height, width) as bytes, each map scaled to its highest value, which is given beside."""
    peak = maps.flatten(-2).amax(-1).clamp(min=1e-12)
    bytes_ = (maps / peak[..., None, None] * 255).round().to(torch.uint8)
    return {
        "shape": list(maps.shape),
        "data": b64encode(bytes_.numpy().tobytes()).decode(),
        "peak": b64encode(peak.numpy().astype(np.float32).tobytes()).decode(),
        **more,
    }


def encoded(picture: Image.Image, most: int) -> str:
    """A picture as a data URI, its longer side at most so long."""
    if max(picture.size) > most:
        picture = picture.copy()
        picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    file, lossless = BytesIO(), max(picture.size) <= LOSSLESS
    picture.save(file, "PNG" if lossless else "WEBP", **({"optimize": True} if lossless else {"quality": 82}))
    return f"data:image/{'png' if lossless else 'webp'};base64,{b64encode(file.getvalue()).decode()}"
