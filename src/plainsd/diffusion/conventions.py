"""diffusers, A1111 and ComfyUI draw the same prompt, sampler and seed differently. Here is what each does, as data.

diffusers' samplers round timesteps and drop levels, each in its own way: that is the table of samplers.py. A1111 and
ComfyUI run k-diffusion's samplers over unrounded levels, and differ in how these are chosen, how noise is added to a
picture, how many steps run on it, and how prompts are read (pictures/conditioning.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from plainsd.diffusion.samplers import SAMPLERS, Levels, check_names, sampler_levels
from plainsd.diffusion.schedule import (
    SPACINGS,
    TERMINAL_ALPHA_BAR,
    EDMSchedule,
    Level,
    NoiseSchedule,
    exponential,
    spaced,
)
from plainsd.diffusion.spacings import ddim_uniform
from plainsd.errors import UserError, unknown


@dataclass(frozen=True)
class Convention:
    """What one program does where programs differ. The defaults are those of diffusers."""

    plain_levels: bool = False  # no rounding of timesteps, no level dropped except by `drops`
    automatic: Mapping[str, str] = field(default_factory=dict)  # sampler -> its default spacing
    otherwise: str | None = None  # default spacing of the other samplers; None: the model's, or the sampler's own
    drops: tuple[str, ...] = ()  # samplers that compute one step more and drop the last level but one
    by_timesteps: Mapping[str, str] = field(default_factory=dict)  # sampler -> its spacing, whatever the user chose
    ends: Mapping[str, float] = field(default_factory=dict)  # sampler -> where it ends, if not as in diffusers
    taught: Mapping[str, int] = field(default_factory=dict)  # sampler -> the timesteps it knows, so many evenly spaced
    whole_timesteps: bool = False  # the network gets the nearest integer timestep, between levels too
    solvers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # sampler -> its options
    top_counts_latent: bool = False  # at sigma_max the initial noise is scaled by sqrt(1 + sigma^2), not sigma
    second_pass_whole: bool = False  # the hires pass runs all its steps, the last ones of a longer schedule
    image_keeps: bool = False  # even at strength 1 noise is added to the picture instead of replacing it
    guidance_zero: bool = False  # guidance 0 follows the formula: the uncond estimate
    refines_midway: bool = False  # the refiner takes over inside the sampler, which keeps its history
    refines_by_steps: bool = False  # it takes over after a share of the steps, not of the timesteps
    refines_second_pass: bool = False  # of two passes the refiner acts in the second alone
    keeps_own: bool = False  # outside a mask the network sees the sampler's latents (of `by_timesteps` the clean ones)
    prompts: str = "pieces"  # how prompts are read, a name in pictures/conditioning.py: pieces, batches or words
    second_order: tuple[str, ...] = ()  # samplers whose steps count twice for prompt editing
    second_size_floored: bool = False  # sides of the second pass are cut to whole latents, not rounded
    masks_rounded: bool = False  # masks keep their grey levels; a latent is redrawn where they round to white
    ends_only: tuple[str, ...] = ()  # samplers that get the first level and the last above 0, and choose the others
    terminal_alpha_bar: float = TERMINAL_ALPHA_BAR  # the last entry of zero-terminal-SNR tables, instead of 0


OTHER_TERMINAL_ALPHA_BAR = 4.8973451890853435e-08  # of A1111 and ComfyUI: sigma is 4518.76, not 4096
A1111_KARRAS = ("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a", "restart")
A1111_EXPONENTIAL = ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")

CONVENTIONS = {
    "diffusers": Convention(),
    "a1111": Convention(
        plain_levels=True,
        automatic=dict.fromkeys(A1111_KARRAS, "karras") | dict.fromkeys(A1111_EXPONENTIAL, "exponential"),
        otherwise="uniform",
        drops=("dpm2", "dpm2_a", "dpmpp_3m_sde"),
        by_timesteps=dict.fromkeys(("ddim", "ddim_cfg_pp", "plms"), "ddim_uniform") | {"unipc": "uniform"},
        ends_only=("dpm_fast", "dpm_adaptive"),
        solvers={"unipc": {"order": 3, "bh1": True}},
        second_pass_whole=True,
        second_size_floored=True,
        masks_rounded=True,
        image_keeps=True,
        guidance_zero=True,
        refines_midway=True,
        refines_second_pass=True,
        keeps_own=True,
        prompts="batches",
        taught={"lcm": 50},
        terminal_alpha_bar=OTHER_TERMINAL_ALPHA_BAR,
        second_order=("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "restart"),
    ),
    "comfyui": Convention(
        plain_levels=True,
        otherwise="uniform",
        drops=("dpm2", "dpm2_a", "unipc", "unipc_bh2"),
        ends={"ddim": 0.0, "unipc": 0.001, "unipc_bh2": 0.001},  # DDIM is Euler there; UniPC stops short of 0
        whole_timesteps=True,
        ends_only=("dpm_fast", "dpm_adaptive"),
        solvers={"unipc": {"order": 3, "bh1": True}, "dpm_fast": {"eta": 0.0}, "dpm_adaptive": {"eta": 0.0}},
        top_counts_latent=True,
        image_keeps=True,
        guidance_zero=True,
        refines_by_steps=True,
        prompts="words",
        terminal_alpha_bar=OTHER_TERMINAL_ALPHA_BAR,
    ),
}


def convention(like: str | None) -> Convention:
    """The convention of this name; None is diffusers. UserError for an unknown name."""
    if like not in (None, *CONVENTIONS):
        raise unknown("like", like, CONVENTIONS, field="like")
    return CONVENTIONS[like or "diffusers"]


def automatic_spacing(
    like: str | None, sampler: str, model: str | None, asked: str | None = None, *, timesteps: bool = True
) -> str:
    """The spacing of a sampler, where `asked` may be None; `model` is the model's own, if it has one. `timesteps`: EDM
    models have none."""
    rules, own = convention(like), SAMPLERS[sampler].spacing
    if sampler in rules.by_timesteps and timesteps:
        return rules.by_timesteps[sampler]
    if asked is not None:
        return asked
    if own == "distilled" and sampler not in rules.taught:
        return own
    return rules.automatic.get(sampler) or rules.otherwise or model or own


def schedule_like(schedule: NoiseSchedule | EDMSchedule, like: str | None) -> NoiseSchedule | EDMSchedule:
    """The schedule as that program has it: its zero-terminal-SNR tables may end elsewhere (`ModelSamplingDiscrete` of
    ComfyUI 0.8.0, `rescale_zero_terminal_snr_abar` of A1111 1.10.1)."""
    last = convention(like).terminal_alpha_bar
    if isinstance(schedule, EDMSchedule) or not schedule.zero_snr or last == TERMINAL_ALPHA_BAR:
        return schedule
    return schedule.ending_at(last)


def planned_levels(
    schedule: NoiseSchedule | EDMSchedule,
    sampler: str,
    steps: int,
    spacing: str,
    like: str | None = None,
    strength: float | None = None,
    *,
    all_run: bool = False,
) -> Levels:
    """The levels of a run: the whole schedule from pure noise, or with a strength the part that runs on a picture.

    With `all_run` the strength only sets where it begins: all `steps` run, the last ones of a longer schedule (always
    so in ComfyUI). UserError for a strength that leaves no step to run.
    """
    rules, schedule = convention(like), schedule_like(schedule, like)
    check_names(sampler, spacing)
    if not rules.plain_levels:
        running = None if strength is None else steps if all_run else steps_of_strength(steps, strength)
        levels = sampler_levels(schedule, sampler, row_length(schedule, steps, like, strength, all_run), spacing)
        last = len(levels.sigmas) - 1
        return levels if running is None else levels.part(last - min(running, last))
    if like == "comfyui":
        total = row_length(schedule, steps, like, strength, all_run)
        sigmas = _plain(rules, schedule, sampler, total, spacing)
        sigmas = sigmas if strength is None or strength > WHOLE else sigmas[-(steps + 1) :]
        return _between(rules, schedule, sampler, sigmas, (sigmas[-2], sigmas[0]), len(sigmas))
    total, before = row_length(schedule, steps, like, strength, all_run), None
    if strength is not None:
        before = steps - 1 if all_run else int(min(_above_zero(steps, strength), 0.999) * steps)
    if sampler in rules.by_timesteps and isinstance(schedule, NoiseSchedule):
        return _by_timesteps(schedule, sampler, total, before)
    if sampler in rules.taught and isinstance(schedule, NoiseSchedule):
        sigmas = _plain(rules, _every(schedule, rules.taught[sampler]), sampler, total, spacing)
        sigmas = [Level(sigma, schedule.timestep(sigma) if sigma else 0.0) for sigma in sigmas]
    else:
        sigmas = _plain(rules, schedule, sampler, total, spacing)
    if before is not None:
        sigmas = sigmas[total - before - 1 :]
        if len(sigmas) < 2:  # a spacing without repeated timesteps may have fewer levels
            raise _nothing_runs(steps, strength or 0.0, 1 / steps)
    ends = (schedule.sigma_min, schedule.sigma_max) if before is None else (sigmas[-2], sigmas[0])
    return _between(rules, schedule, sampler, sigmas, ends, steps + 1 if before is None else len(sigmas))


def whole_row(
    schedule: NoiseSchedule | EDMSchedule,
    sampler: str,
    steps: int,
    spacing: str,
    like: str | None = None,
    strength: float | None = None,
    *,
    all_run: bool = False,
) -> tuple[Level, ...]:
    """The full schedule, of which `planned_levels` gives the last part for a picture of this strength."""
    if like == "comfyui" and not all_run:
        strength = None
    total = row_length(schedule, steps, like, strength, all_run)
    return planned_levels(schedule, sampler, total, spacing, like).sigmas


WHOLE = 0.9999  # ComfyUI's strength from which on all steps of a row run


def row_length(
    schedule: NoiseSchedule | EDMSchedule, steps: int, like: str | None, strength: float | None, all_run: bool
) -> int:
    """The steps of the whole row, of which `steps` run at this strength, if all do. UserError for more than the table
    has."""
    if strength is None or not (all_run or like == "comfyui"):
        return steps
    share = _above_zero(steps, strength)
    if like == "a1111":
        share = min(share, 0.999)
    elif like == "comfyui" and share > WHOLE:
        return steps
    total = max(steps, int(steps / share))
    if total > len(schedule):
        raise UserError(
            f"{steps} steps at strength {strength} are the last ones of {total}, and the most are {len(schedule)}; "
            f"choose a strength of at least {math.ceil(1000 * steps / len(schedule)) / 1000:g}, or fewer steps",
            field="strength",
            value=strength,
        )
    return total


def told_timestep(
    schedule: NoiseSchedule | EDMSchedule, sampler: str, like: str | None
) -> Callable[[float], float] | None:
    """Level -> the timestep that the network gets, where it only gets some, or the table is another than the model's;
    None: the level's own."""
    rules, table = convention(like), schedule_like(schedule, like)
    if isinstance(table, EDMSchedule):
        return None
    if sampler in rules.taught:
        few = _every(table, rules.taught[sampler])
        stride = len(table) // len(few)
        return lambda sigma: few.nearest(sigma) * stride + stride - 1
    if rules.whole_timesteps:
        return table.nearest
    if table is schedule:
        return None
    return lambda sigma: sigma.timestep if isinstance(sigma, Level) else table.timestep(sigma)


def _every(schedule: NoiseSchedule, count: int) -> NoiseSchedule:
    """So many entries of the table, evenly spaced down from the last; in float32, whose rounding decides in A1111 which
    of two entries is nearest to a level half-way between them."""
    stride = len(schedule) // count
    return NoiseSchedule(schedule.alphas_cumprod[stride - 1 :: stride].float())


def steps_of_strength(steps: int, strength: float) -> int:
    """How many steps run at this strength, as diffusers counts them."""
    running = min(int(steps * strength), steps)
    if not running:
        raise _nothing_runs(steps, strength, 1 / steps)
    return running


def _above_zero(steps: int, strength: float) -> float:
    if strength <= 0:
        raise _nothing_runs(steps, strength, 0.01)
    return strength


def _nothing_runs(steps: int, strength: float, least: float) -> UserError:
    what = f"strength {strength} of {steps} steps leaves none to run; give at least {least:.2g}"
    return UserError(what, field="strength", value=strength)


def _plain(
    rules: Convention, schedule: NoiseSchedule | EDMSchedule, sampler: str, steps: int, spacing: str
) -> list[Level]:
    """The levels of k-diffusion's samplers, and where the last step ends."""
    rule = SPACINGS[spacing]
    to_zero = SAMPLERS[sampler].ends_at_zero or sampler in (*rules.ends, *rules.ends_only)
    dropped = sampler in rules.drops
    sigmas = spaced(schedule, spacing, steps + dropped, spare=int(rule.least and not to_zero))
    if not rule.closed:
        sigmas.append(Level(rules.ends.get(sampler, 0.0 if to_zero else schedule.sigma_min), 0.0))
    if dropped:
        del sigmas[-2]
    return sigmas


def _between(
    rules: Convention,
    schedule: NoiseSchedule | EDMSchedule,
    sampler: str,
    sigmas: list[Level],
    ends: tuple[float, float],
    count: int,
) -> Levels:
    """The same levels; for samplers of `ends_only`, so many evenly spaced between the two ends."""
    levels = _levels(rules, schedule, sigmas)
    if sampler not in rules.ends_only:
        return levels
    between = exponential(*ends, count)
    return replace(levels, sigmas=tuple(Level(sigma, schedule.timestep(sigma)) for sigma in between))


def _levels(rules: Convention, schedule: NoiseSchedule | EDMSchedule, sigmas: list[Level]) -> Levels:
    top, first = schedule.sigma_max, sigmas[0]
    at_top = first > top or math.isclose(first, top, rel_tol=1e-5)
    with_latent = at_top and (isinstance(schedule, EDMSchedule) or rules.top_counts_latent)
    scale = math.sqrt(1 + first**2) if with_latent else float(first)
    return Levels(tuple(sigmas), (), scale, added=scale, last_scale=1.0)


def _by_timesteps(schedule: NoiseSchedule, sampler: str, steps: int, before: int | None) -> Levels:
    """A1111's DDIM, PLMS and UniPC: every (1000 // steps)-th timestep from 1 up, the lowest of which DDIM and PLMS end
    at. On a picture the noise is that of the timestep above the first one visited: the network's input is unchanged,
    so x is relabelled to the level below."""
    known = ddim_uniform(len(schedule), steps)[::-1]
    some = known if before is None else known[:before]
    points = np.linspace(len(schedule) - 1 if before is None else some[-1], 0, len(some) + 1) if some else []
    points = list(points) if sampler == "unipc" else some[::-1]
    if len(points) < 2:
        raise UserError(
            f"{steps} steps leave {sampler} none to run on this picture; choose more, or another strength",
            field="steps",
            value=steps,
        )
    sigmas = tuple(Level(schedule.sigma(timestep), timestep) for timestep in points)
    scale = math.sqrt(1 + sigmas[0] ** 2)
    if before is None:
        return Levels(sigmas, (), scale)
    added = schedule.sigma(known[before])
    return Levels(sigmas, (), scale, added=added, picture_scale=math.sqrt((1 + sigmas[0] ** 2) / (1 + added**2)))
