"""From a model and its prompts to one `Denoise`: which rows the network is asked, and how its answers are mixed.

All that one step needs goes through the network as one batch: each picture with its prompt, without it (Ho and Salimans
2022, arXiv:2207.12598), and, for perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377), with its prompt
while the middle's self-attention looks at nothing but itself. Guidance 1 needs no second row and asks for none.

Shape letters: B pictures, R rows of the batch, C channels, H W latent height and width.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from plainsd.diffusion.denoiser import Denoise, denoiser, guided, interval, perturbed, rescaled, thresholded
from plainsd.errors import UserError
from plainsd.models.unet import UNet
from plainsd.pictures.conditioning import Conditioning, PromptPlan, stack
from plainsd.pictures.memory import on_stage, rows_at_once
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import Settings

PROMPTED, PLAIN, PERTURBED = range(3)  # kinds of rows
Network = Callable[..., Tensor]  # called as the UNet is
Ask = Callable[..., list[Tensor]]  # (x, sigma, *kinds) -> an x0 for each kind, (B, C, H, W)


class Row(NamedTuple):
    kind: int
    picture: int  # which of the batch
    told: Conditioning  # one row
    weight: float  # of this part of the prompt


# --- the network -----------------------------------------------------------------------------------------------------


def guidance_embedding(scale: float, dim: int, device: torch.device | None = None) -> Tensor:
    """The guidance scale as distilled models are told it (Meng et al. 2023, arXiv:2210.03142): (1, dim)."""
    frequencies = torch.exp(torch.arange(dim // 2, device=device) * -(math.log(10_000.0) / (dim // 2 - 1)))
    angle = 1000.0 * (scale - 1) * frequencies
    return torch.cat([angle.sin(), angle.cos()])[None]


@contextmanager
def blind_attention(unet: UNet, rows: int) -> Iterator[None]:
    """In the last rows, the middle's self-attention gives each position its own value: its map is an identity."""

    def replace(attention, args, output):
        blind = attention.out(attention.v(args[0][-rows:]))
        return torch.cat([output[:-rows], blind])

    handles = [block.self_attn.register_forward_hook(replace) for block in unet.mid.attn.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def predict(
    sd: StableDiffusion,
    network: Network,
    rows: Sequence[Row],
    told: Conditioning,
    guidances: Sequence[float],
    x: Tensor,
    timestep: float,
) -> Tensor:
    """One call of the UNet. Latents are float32 outside and of the network's precision inside: (R, C, H, W)."""
    on_stage(sd, sd.unet)
    x = x.to(sd.dtype)
    if told.concat is not None:
        x = torch.cat([x, told.concat], dim=1)  # (R, 9, H, W)
    dim = sd.unet.config.guidance_dim
    embedding = {}
    if dim:
        told_scales = [guidance_embedding(guidances[row.picture], dim, x.device) for row in rows]
        embedding = {"guidance": torch.cat(told_scales).to(x)}  # (R, dim)
    blind = sum(row.kind == PERTURBED for row in rows)
    with blind_attention(sd.unet, blind) if blind else nullcontext():
        return network(x, timestep, told.context, told.vector, **embedding).float()


def asker(
    sd: StableDiffusion,
    plans: Sequence[PromptPlan],
    concat: Tensor | None,
    sigmas: Sequence[float],
    timesteps: Mapping[float, float],
    guidances: Sequence[float],
    network: Network,
) -> Ask:
    """The network as a function of x, sigma and the kinds of estimates that are wanted. `network` is the UNet, or what
    stands in for it.

    Rows with contexts of different lengths go in separate calls, so that a picture never depends on its neighbours'
    prompts. The step, for prompts that change on the way, is the one that begins at sigma or above.
    """
    levels = [-sigma for sigma in sigmas]
    limits: dict[int, int] = {}  # rows asked for: rows at once; the free memory is read only once
    batches: dict[tuple, Conditioning] = {}  # what these rows are told, as one batch: the same tensors each step

    def told(rows: list[Row]) -> Conditioning:
        key = tuple((row.picture, id(row.told.context)) for row in rows)
        if key not in batches:
            batches[key] = stack([row.told for row in rows]).each(lambda part: part.to(sd.device, sd.dtype))
        return batches[key]

    def few(calls: Iterable[list[Row]], x: Tensor) -> Iterator[list[Row]]:
        for rows in calls:
            if len(rows) not in limits:
                limits[len(rows)] = rows_at_once(sd, x.shape[-2] * x.shape[-1], len(rows))
            yield from (rows[i : i + limits[len(rows)]] for i in range(0, len(rows), limits[len(rows)]))

    def ask(x: Tensor, sigma: float, *kinds: int) -> list[Tensor]:
        step = min(max(bisect_right(levels, -sigma) - 1, 0), len(sigmas) - 2)
        rows = [row for kind in kinds for i, plan in enumerate(plans) for row in _rows(plan, kind, i, step, concat)]
        calls = defaultdict(list)
        for row in rows:
            calls[row.told.context.shape[1]].append(row)
        estimates: dict[tuple[int, int], list[tuple[Tensor, float]]] = defaultdict(list)
        for together in few(calls.values(), x):
            inputs = torch.cat([x[row.picture : row.picture + 1] for row in together])  # (R, C, H, W)
            call = partial(predict, sd, network, together, told(together), guidances)
            denoise = denoiser(call, sd.schedule, sd.prediction, timesteps)
            for row, x0 in zip(together, denoise(inputs, sigma).split(1), strict=True):
                estimates[row.kind, row.picture].append((x0, row.weight))
        return [torch.cat([_composed(estimates, kind, i) for i in range(len(plans))]) for kind in kinds]

    return ask


def _rows(plan: PromptPlan, kind: int, picture: int, step: int, concat: Tensor | None) -> list[Row]:
    parts = [(plan.negative(step), 1.0)] if kind == PLAIN else plan.positive(step)
    if concat is not None:
        parts = [(Conditioning(told.context, told.vector, concat[picture : picture + 1]), w) for told, w in parts]
    return [Row(kind, picture, told, weight) for told, weight in parts]


def _composed(estimates: Mapping, kind: int, picture: int) -> Tensor:
    """Prompts joined by AND: each pulls from the plain estimate by its weight (Liu et al. 2022, arXiv:2206.01714)."""
    parts = estimates[kind, picture]
    if len(parts) == 1:
        return parts[0][0]
    plain = estimates[PLAIN, picture][0][0]
    return plain + sum(weight * (x0 - plain) for x0, weight in parts)


# --- guidance --------------------------------------------------------------------------------------------------------


def check_guidance(sd: StableDiffusion, settings: Settings) -> None:
    chosen = [name for name in ("rescale", "perturbed", "threshold") if getattr(settings, name)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} do not go together; choose one of them")
    if settings.perturbed and sd.unet.mid.attn is None:
        raise UserError("perturbed guidance needs attention in the UNet's middle, which this model lacks; leave it out")


def guided_denoise(
    ask: Ask, each: Sequence[Settings], prediction: str, *, composed: bool, distilled: bool, device: torch.device
) -> Denoise:
    """The wrappers that the settings ask for, around the network. They may differ in scale, but not in whether it is 1.

    `composed`: some prompt is joined by AND. `distilled`: the network is told the scale, and needs no second row.
    """
    settings, scales = each[0], [1.0 if distilled else one.guidance for one in each]
    unguided, scale = scales[0] == 1, scales[0]
    if len(set(scales)) > 1:
        scale = torch.tensor(scales, device=device).view(-1, 1, 1, 1)  # (B, 1, 1, 1)

    def prompted(x: Tensor, sigma: float) -> Tensor:
        return ask(x, sigma, PROMPTED, PLAIN)[0] if composed else ask(x, sigma, PROMPTED)[0]

    def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return tuple(ask(x, sigma, PROMPTED, PLAIN))

    def triple(x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(ask(x, sigma, PROMPTED, PLAIN, PERTURBED))

    if settings.perturbed and unguided and not composed:
        # away from the perturbed estimate alone: prompted + s (prompted - blurred)
        denoise = guided(lambda x, sigma: tuple(ask(x, sigma, PROMPTED, PERTURBED)), 1 + settings.perturbed)
    elif settings.perturbed:
        denoise = perturbed(triple, scale, settings.perturbed)
    elif unguided:
        denoise = prompted
    elif settings.rescale:
        denoise = rescaled(pair, scale, settings.rescale, prediction)
    elif settings.threshold:
        denoise = thresholded(pair, scale, settings.threshold)
    else:
        denoise = guided(pair, scale)
    return interval(denoise, prompted, *settings.interval) if settings.interval else denoise
