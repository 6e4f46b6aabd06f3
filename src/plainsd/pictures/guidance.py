"""From a model and its prompts to one `Denoise`: which rows go through the network, and how its outputs are combined.

All rows of a step go through the network as one batch: each picture cond and uncond (Ho and Salimans 2022,
arXiv:2207.12598), and, for perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377), cond with the middle
block's self-attention map an identity. Guidance 1 needs no uncond row, and makes none. A model that edits a picture
(Brooks et al. 2023, arXiv:2211.09800) also gets a row with neither prompt nor picture.

Shape letters: B pictures, R rows of the batch, C channels, H W latent height and width.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plainsd.diffusion.conventions import convention
from plainsd.diffusion.denoiser import (
    Denoise,
    Pair,
    denoiser,
    edited,
    guided,
    interval,
    perturbed,
    projected,
    rescaled,
    thresholded,
)
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.diffusion.solvers.cfg_pp import both
from plainsd.errors import UserError
from plainsd.models.unet import UNet
from plainsd.models.variants import edits
from plainsd.pictures.conditioning import Conditioning, stack
from plainsd.pictures.memory import on_stage, rows_at_once
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.plan import PromptPlan
from plainsd.pictures.settings import Resolved, Settings

COND, UNCOND, PERTURBED, BLANK = range(4)  # kinds of estimates and rows; BLANK: uncond and without the picture to edit
UNetCall = Callable[..., Tensor]  # the UNet's signature
Join = Callable[..., dict]  # (step, prompted, x, timestep, conditioning) -> extra arguments of the UNet
Estimate = Callable[..., list[Tensor]]  # (x, sigma, *kinds) -> an x0 for each kind, (B, C, H, W)


class BatchRow(NamedTuple):
    """One row of the network's batch."""

    kind: int
    picture: int  # index in the batch
    conditioning: Conditioning  # one row
    weight: float  # of this part of the prompt
    part: int = 0  # its index


# --- the network -----------------------------------------------------------------------------------------------------


def guidance_embedding(scale: float, dim: int, device: torch.device | None = None) -> Tensor:
    """The guidance scale's embedding, for distilled models (Meng et al. 2023, arXiv:2210.03142): (1, dim)."""
    frequencies = torch.exp(torch.arange(dim // 2, device=device) * -(math.log(10_000.0) / (dim // 2 - 1)))
    angle = 1000.0 * (scale - 1) * frequencies
    return torch.cat([angle.sin(), angle.cos()])[None]


@contextmanager
def blind_attention(unet: UNet, rows: int) -> Iterator[None]:
    """Makes the middle block's self-attention map an identity in the last `rows` rows: each position reads itself."""

    def replace(attention, args, output):
        blind = attention.out(attention.v(args[0][-rows:]))
        return torch.cat([output[:-rows], blind])

    assert unet.mid.attn is not None  # ensured by `check_guidance`
    handles = [block.self_attn.register_forward_hook(replace) for block in unet.mid.attn.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def predict(
    sd: StableDiffusion,
    network: UNetCall,
    rows: Sequence[BatchRow],
    conditioning: Conditioning,
    guidances: Sequence[float],
    joins: Sequence[Join],
    x: Tensor,
    timestep: float,
) -> Tensor:
    """One call of the UNet. Latents (R, C, H, W) are float32 outside, in the network's dtype inside."""
    on_stage(sd, sd.unet)
    x = x.to(sd.dtype)
    more: dict[str, Any] = {}
    for join in joins:
        more |= join([row.kind in (COND, PERTURBED) for row in rows], x, timestep, conditioning)
    if conditioning.concat is not None:
        x = torch.cat([x, conditioning.concat], dim=1)  # (R, 9, H, W)
    dim = sd.unet.config.guidance_dim
    if dim:
        scales = [guidance_embedding(guidances[row.picture], dim, x.device) for row in rows]
        more["guidance"] = torch.cat(scales).to(x)  # (R, dim)
    blind = sum(row.kind == PERTURBED for row in rows)
    with blind_attention(sd.unet, blind) if blind else nullcontext():
        return network(x, timestep, conditioning.context, conditioning.vector, **more).float()


class Estimates:
    """The network as a function of x, sigma and the requested kinds of estimates: an x0 for each kind.

    Rows with contexts of different lengths go in separate calls, so that a picture never depends on the prompts of its
    batch. The step, for prompt editing, is the one that begins at sigma or above; with `calls`, a counter of all calls
    of the run, it is the next call.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        plans: Sequence[PromptPlan],
        concat: Tensor | None,
        sigmas: Sequence[float],
        guidances: Sequence[float],
        network: UNetCall,
        joins: Sequence[Join] = (),
        calls: Iterator[int] | None = None,
        name_rows: bool = False,
    ):
        """A plan, a `concat` row and a guidance scale per picture; the levels of the whole run; the UNet or a
        replacement; sources of its extra arguments. `name_rows`: it takes the names of its rows, see `DeepCache`."""
        self.sd, self.plans, self.concat, self.guidances, self.network = sd, plans, concat, guidances, network
        self.joins, self.calls, self.name_rows = joins, calls, name_rows
        self.rising = [-sigma for sigma in sigmas]
        self.rows_at_once: dict[int, int] = {}  # by number of rows; the free memory is read only once
        self.batches: dict[tuple, Conditioning] = {}  # conditioning of the same rows, batched once for all steps

    def __call__(self, x: Tensor, sigma: float, *kinds: int) -> list[Tensor]:
        step = self.step(sigma)
        reading = step if self.calls is None else next(self.calls)
        calls: dict[int, list[BatchRow]] = defaultdict(list)
        for kind in kinds:
            for row in self.rows(kind, reading):
                calls[row.conditioning.context.shape[1]].append(row)
        found: dict[tuple[int, int], list[tuple[Tensor, float]]] = defaultdict(list)
        for rows in self.split(calls.values(), x):
            inputs = torch.cat([x[row.picture : row.picture + 1] for row in rows])  # (R, C, H, W)
            joins: list[Join] = [partial(join, step) for join in self.joins]
            if self.name_rows:
                names = [(row.kind, row.picture, row.part) for row in rows]
                joins.append(lambda *_, names=names: {"rows": names})
            call = partial(predict, self.sd, self.network, rows, self.batch(rows), self.guidances, joins)
            estimates = denoiser(call, self.sd.schedule, self.sd.prediction)(inputs, sigma)
            for row, x0 in zip(rows, estimates.split(1), strict=True):
                found[row.kind, row.picture].append((x0, row.weight))
        return [torch.cat([_composed(found, kind, i) for i in range(len(self.plans))]) for kind in kinds]

    def step(self, sigma: float) -> int:
        return min(max(bisect_right(self.rising, -sigma) - 1, 0), len(self.rising) - 2)

    def rows(self, kind: int, step: int) -> Iterator[BatchRow]:
        for picture, plan in enumerate(self.plans):
            for part, (conditioning, weight) in enumerate(self.parts(plan, kind, step)):
                if self.concat is not None:
                    beside = self.concat[picture : picture + 1] * (kind != BLANK)
                    conditioning = replace(conditioning, concat=beside)
                yield BatchRow(kind, picture, conditioning, weight, part)

    def parts(self, plan: PromptPlan, kind: int, step: int) -> Sequence[tuple[Conditioning, float]]:
        return [(plan.negative(step), 1.0)] if kind in (UNCOND, BLANK) else plan.positive(step)

    def split(self, calls: Iterable[list[BatchRow]], x: Tensor) -> Iterator[list[BatchRow]]:
        """Splits calls into as many rows as the free memory allows."""
        for rows in calls:
            if len(rows) not in self.rows_at_once:
                self.rows_at_once[len(rows)] = rows_at_once(self.sd, x.shape[-2] * x.shape[-1], len(rows))
            most = self.rows_at_once[len(rows)]
            yield from (rows[i : i + most] for i in range(0, len(rows), most))

    def batch(self, rows: list[BatchRow]) -> Conditioning:
        key = tuple((row.picture, row.kind == BLANK, id(row.conditioning.context)) for row in rows)
        if key not in self.batches:
            together = stack([row.conditioning for row in rows])
            self.batches[key] = together.each(lambda part: part.to(self.sd.device, self.sd.dtype))
        return self.batches[key]


def _composed(found: Mapping[tuple[int, int], list[tuple[Tensor, float]]], kind: int, picture: int) -> Tensor:
    """Prompts joined by AND: each pulls from the uncond estimate by its weight (Liu et al. 2022, arXiv:2206.01714)."""
    parts = found[kind, picture]
    if len(parts) == 1:
        return parts[0][0]
    uncond = found[UNCOND, picture][0][0]
    return uncond + sum(weight * (x0 - uncond) for x0, weight in parts)


# --- guidance --------------------------------------------------------------------------------------------------------


def check_guidance(sd: StableDiffusion, settings: Settings) -> None:
    chosen = [name for name in ("rescale", "perturbed", "threshold", "apg") if getattr(settings, name)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} do not go together; choose one of them", field=chosen[0])
    editing = edits(sd.unet.config, sd.vae.config)
    if settings.image_guidance is not None and not editing:
        raise UserError(
            f"image guidance {settings.image_guidance} is for models that edit pictures (InstructPix2Pix), and this is "
            "none; leave it out",
            field="image_guidance",
            value=settings.image_guidance,
        )
    if sd.refiner is not None and editing:
        raise UserError("a refiner does not go with a model that edits pictures; leave it out", field="refiner")
    if chosen and editing:
        raise UserError(f"{chosen[0]} does not go with a model that edits pictures; leave it out", field=chosen[0])
    lacking = [
        name for name, one in (("this model", sd), ("its refiner", sd.refiner)) if one and one.unet.mid.attn is None
    ]
    if settings.perturbed and lacking:
        raise UserError(
            f"perturbed guidance needs attention in the UNet's middle, which {lacking[0]} lacks; leave it out",
            field="perturbed",
            value=settings.perturbed,
        )


def guided_denoise(
    estimate: Estimate,
    each: Sequence[Resolved],
    prediction: str,
    sigma_data: float = 1.0,
    *,
    composed: bool,
    distilled: bool,
    device: torch.device,
) -> Denoise:
    """The network with the guidance that the settings ask for. Scales may differ per picture, but not whether one is 1.

    `composed`: the uncond estimate is always needed, as with prompts joined by AND. `distilled`: the network takes the
    scale as an input, and needs no uncond row.
    """
    settings, unit = each[0], SAMPLERS[each[0].sampler].guidance_unit
    scales = [1.0 if distilled else one.guidance * unit for one in each]
    unguided, scale = scales[0] == 1, scales[0]
    if len(set(scales)) > 1:
        scale = torch.tensor(scales, device=device).view(-1, 1, 1, 1)  # (B, 1, 1, 1)

    cond = prompted(estimate, composed)

    def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return tuple(estimate(x, sigma, COND, UNCOND))

    def triple(x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(estimate(x, sigma, COND, UNCOND, PERTURBED))

    if settings.perturbed and unguided and not composed:
        # away from the perturbed estimate alone: cond + s (cond - blurred)
        denoise = guided(lambda x, sigma: tuple(estimate(x, sigma, COND, PERTURBED)), 1 + settings.perturbed)
    elif settings.perturbed:
        denoise = perturbed(triple, scale, settings.perturbed)
    elif settings.image_guidance is not None and not (unguided and settings.image_guidance == 1):
        denoise = edited(
            lambda x, sigma: tuple(estimate(x, sigma, COND, UNCOND, BLANK)), scale, settings.image_guidance
        )
    elif unguided:
        denoise = cond
    elif settings.rescale:
        denoise = rescaled(pair, scale, settings.rescale, prediction, sigma_data)
    elif settings.threshold:
        denoise = thresholded(pair, scale, settings.threshold)
    elif settings.apg:
        denoise = projected(pair, scale, settings.apg, settings.apg_parallel, settings.apg_momentum)
    else:
        denoise = guided(pair, scale)
    return interval(denoise, cond, *settings.interval) if settings.interval else denoise


def guided_pair(
    estimate: Estimate, each: Sequence[Resolved], *args: Any, composed: bool, distilled: bool, **options: Any
) -> Pair:
    """`guided_denoise` and the uncond estimate of the same forward pass, for CFG++. Without guidance, at 0 and outside
    the interval, and of networks that take the scale as an input, both are the cond estimate: the ordinary step."""
    settings, unit = each[0], SAMPLERS[each[0].sampler].guidance_unit
    options["distilled"] = distilled
    if switched_off(settings) or distilled:
        plain = [replace(one, guidance=1 / unit) for one in each]
        return both(guided_denoise(estimate, plain, *args, composed=composed, **options))
    found: dict[int, Tensor] = {}  # of the last pass

    def keeping(x: Tensor, sigma: float, *kinds: int) -> list[Tensor]:
        estimates = estimate(x, sigma, *kinds)
        found.update(zip(kinds, estimates, strict=True))
        return estimates

    always = [replace(one, interval=None) for one in each]
    denoise = guided_denoise(keeping, always, *args, composed=True, **options)

    def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return denoise(x, sigma), found[UNCOND]

    return interval(pair, both(prompted(estimate, composed)), *settings.interval) if settings.interval else pair


def prompted(estimate: Estimate, composed: bool) -> Denoise:
    """The cond estimate alone."""

    def cond(x: Tensor, sigma: float) -> Tensor:
        return estimate(x, sigma, COND, UNCOND)[0] if composed else estimate(x, sigma, COND)[0]

    return cond


def switched_off(one: Resolved) -> bool:
    """Whether guidance is off at 0, and does not follow its formula to the uncond estimate as in A1111 and ComfyUI."""
    return one.guidance == 0 and not convention(one.like).guidance_zero
