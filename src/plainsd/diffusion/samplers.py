"""Every sampler by name, with the levels it visits: the ways to walk from pure noise to a clean latent.

A sampler sees the model as a `Denoise`, (x, sigma) -> estimate of the clean latent, and a falling row of noise levels.
`step.py` has what all share, `solvers/` has them, a file a kind. The table here says for each name which levels it
visits, so that pictures equal those of diffusers' scheduler of the same name.

Orders of accuracy are those of the noise-free path, measured in tests/test_samplers.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from plainsd.diffusion.schedule import SPACINGS, EDMSchedule, Level, NoiseSchedule, spaced
from plainsd.diffusion.solvers.adams import deis, gradient_estimation, ipndm, lms, plms
from plainsd.diffusion.solvers.cfg_pp import dpmpp_2m_cfg_pp, euler_cfg_pp
from plainsd.diffusion.solvers.dpm import dpm_adaptive, dpm_fast
from plainsd.diffusion.solvers.multistep import dpmpp_2m, dpmpp_3m_sde, unipc
from plainsd.diffusion.solvers.one_call import ddim, euler, lcm, tcd
from plainsd.diffusion.solvers.stochastic import er_sde, restart, sa_solver
from plainsd.diffusion.solvers.two_calls import dpm2, dpmpp_2s_a, dpmpp_sde, heun, heunpp2
from plainsd.diffusion.step import Noise, Sigmas, Step, Stride, Strides, ancestral, toward
from plainsd.errors import unknown

__all__ = [  # the last lines hand on what a sampler of one's own is made of
    "SAMPLERS", "Levels", "Sampler", "check_names", "sampler_levels", "shared_spacings",
    "Noise", "Sigmas", "Step", "Stride", "Strides", "ancestral", "toward",
]  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """A sampler and the levels it visits: those of diffusers' scheduler of the same name, with what that rounds.

    The defaults are those of the samplers that came with k-diffusion.
    """

    run: Callable[..., Iterator[Step]]  # (denoise, x, sigmas, noise)
    spacing: str = "linspace"  # used when none is asked for, as Stable Diffusion 1.5 gets it from diffusers
    ends_at_zero: bool = True  # else at the table's first level, as the original DDIM and PLMS
    same_stride: bool = False  # all its steps are 1000 // steps timesteps long: see `renamed`
    unit_first: bool = False  # the first latent counts a clean latent's own spread
    rounding: Mapping[str, Callable[[float], float]] = field(default_factory=dict)  # spacing -> for timesteps
    spare: Mapping[str, int] = field(default_factory=dict)  # spacing -> points left out at the clean end
    takes: tuple[str, ...] = ()  # by name: of "eta", "strides", "prediction", "sigma_data", "sigma_at", "pair", "path"
    batched: bool = True  # several pictures at once are what each is alone
    guidance_unit: float = 1.0  # what guidance is multiplied by


def whole_part(timestep: float) -> float:
    """Its whole part; the last digits of a whole number do not count against it."""
    return math.floor(timestep + 1e-9)


WHOLE = {"linspace": round}
TO_FIRST: dict[str, Any] = {
    "ends_at_zero": False,
    "same_stride": True,
    "unit_first": True,
    "rounding": WHOLE,
}
SOLVER: dict[str, Any] = {
    "unit_first": True,
    "rounding": {"linspace": round, "karras": round, "exponential": whole_part},
    "spare": {"linspace": 1, "leading": 1},
}
SOLVER_TO_FIRST = SOLVER | {
    "ends_at_zero": False,
    "spare": {"linspace": 1, "leading": 1, "karras": 0, "exponential": 0},
}

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(partial(ddim, eta=1.0), "leading", unit_first=True, rounding=WHOLE, takes=("eta",)),
    "ddim": Sampler(ddim, "leading", **TO_FIRST, takes=("eta", "strides")),
    "plms": Sampler(plms, "leading", **TO_FIRST, takes=("prediction", "sigma_data", "strides")),
    "euler": Sampler(euler),
    "euler_a": Sampler(partial(ddim, eta=1.0), takes=("eta",)),
    "heun": Sampler(heun),
    "dpm2": Sampler(dpm2, rounding={"karras": round}, takes=("eta",)),
    "dpm2_a": Sampler(partial(dpm2, eta=1.0), rounding={"karras": round}, takes=("eta",)),
    "dpmpp_2m": Sampler(dpmpp_2m, **SOLVER, takes=("eta",)),
    "dpmpp_2s_a": Sampler(dpmpp_2s_a, takes=("eta",)),
    "dpmpp_sde": Sampler(dpmpp_sde, takes=("eta", "path")),
    "dpmpp_2m_sde": Sampler(partial(dpmpp_2m, eta=1.0), **SOLVER, takes=("eta", "path")),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, **SOLVER, takes=("eta", "path")),
    "lms": Sampler(lms),
    "unipc": Sampler(unipc, **SOLVER),
    "lcm": Sampler(lcm, "distilled", unit_first=True),
    "dpmpp_2m_sde_heun": Sampler(partial(dpmpp_2m, eta=1.0, heun=True), **SOLVER, takes=("eta", "path")),
    "restart": Sampler(restart),
    "dpm_fast": Sampler(partial(dpm_fast, eta=1.0), ends_at_zero=False, takes=("eta",)),  # eta 1 is A1111's
    "dpm_adaptive": Sampler(partial(dpm_adaptive, eta=1.0), ends_at_zero=False, takes=("eta",), batched=False),
    "ddim_cfg_pp": Sampler(  # A1111's unit: the scale that others take means about the same here
        euler_cfg_pp, "leading", **TO_FIRST, takes=("eta", "strides", "pair"), guidance_unit=1 / 12.5
    ),
    "euler_cfg_pp": Sampler(euler_cfg_pp, takes=("pair",)),
    "euler_a_cfg_pp": Sampler(partial(euler_cfg_pp, eta=1.0), takes=("eta", "pair")),
    "dpmpp_2m_cfg_pp": Sampler(dpmpp_2m_cfg_pp, takes=("pair",)),
    "tcd": Sampler(tcd, "distilled", ends_at_zero=False, unit_first=True, takes=("eta", "sigma_at")),
    "res_multistep": Sampler(partial(dpmpp_2m, heun=True)),
    "res_multistep_a": Sampler(partial(dpmpp_2m, eta=1.0, heun=True, split=ancestral), takes=("eta",)),
    "gradient_estimation": Sampler(gradient_estimation),
    "deis": Sampler(deis, **SOLVER_TO_FIRST),
    "ipndm": Sampler(ipndm),
    "er_sde": Sampler(er_sde),
    "sa_solver": Sampler(sa_solver, **SOLVER_TO_FIRST, takes=("eta",)),
    "heunpp2": Sampler(heunpp2),
}


@dataclass(frozen=True)
class Levels:
    """All that the drawing of one picture visits, worked out once and handed on."""

    sigmas: tuple[Level, ...]  # steps + 1, falling
    strides: Strides  # for samplers that take them; empty where each step ends where the next one begins
    first_scale: float  # unit noise times this is the first latent

    @property
    def timesteps(self) -> list[float]:
        """What the network is told where each step begins."""
        return [sigma.timestep for sigma in self.sigmas[:-1]]

    def part(self, start: int, stop: int | None = None) -> "Levels":
        """Of the steps from `start` up to `stop` only."""
        stop = len(self.sigmas) - 1 if stop is None else stop
        return replace(self, sigmas=self.sigmas[start : stop + 1], strides=self.strides[start : stop + 1])


def sampler_levels(schedule: NoiseSchedule | EDMSchedule, name: str, steps: int, spacing: str | None = None) -> Levels:
    """What SAMPLERS[name] visits in so many steps; None takes its own spacing. UserError for unknown names."""
    check_names(name, spacing)
    sampler = SAMPLERS[name]
    spacing = spacing or sampler.spacing
    rule = SPACINGS[spacing]
    spare = sampler.spare.get(spacing, int(rule.least and not sampler.ends_at_zero))
    sigmas = spaced(schedule, spacing, steps, spare, sampler.rounding.get(spacing, float))
    strides: Strides = ()
    if sampler.same_stride and isinstance(schedule, NoiseSchedule) and not (rule.of_levels or rule.log):
        strides = _strides(schedule, sigmas)
    # A latent's own spread counts, sqrt(1 + sigma^2); the k-diffusion samplers leave out the 1 unless spacing is
    # leading or the model is EDM's, and so it is in diffusers.
    with_latent = sampler.unit_first or spacing == "leading" or isinstance(schedule, EDMSchedule)
    first_scale = math.sqrt(1 + sigmas[0] ** 2) if with_latent else float(sigmas[0])
    if not rule.closed:
        sigmas.append(Level(0.0 if sampler.ends_at_zero else schedule.sigma_min, 0.0))
    return Levels(tuple(sigmas), strides, first_scale)


def check_names(sampler: str | None, spacing: str | None) -> None:
    """UserError for a name that is in neither table; None is any."""
    if sampler not in (None, *SAMPLERS):
        raise unknown("sampler", sampler, SAMPLERS, field="sampler")
    own = SAMPLERS[sampler].spacing if sampler else None
    if spacing not in (None, own, *shared_spacings()):
        raise unknown("spacing", spacing, shared_spacings(), field="spacing")


def shared_spacings() -> list[str]:
    """Those that go with every sampler."""
    return [name for name, spacing in SPACINGS.items() if not spacing.own]


def _strides(schedule: NoiseSchedule, sigmas: Sequence[Level]) -> Strides:
    """The levels one stride above and below each of those, within the table."""
    stride, top, table = len(schedule) // len(sigmas), len(schedule) - 1, schedule.sigmas.tolist()
    at = [int(sigma.timestep) for sigma in sigmas]
    return tuple(Stride(table[min(t + stride, top)], table[max(t - stride, 0)]) for t in at)
