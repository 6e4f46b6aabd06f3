"""Every sampler by name, with the levels it visits: the ways from pure noise to a clean latent.

A sampler gets the model as a `Denoise`, (x, sigma) -> estimate of the clean latent, and falling noise levels.
`step.py` has what all share, `solvers/` the samplers, one file per kind. The table here gives the levels each one
visits, so that pictures equal those of diffusers' scheduler of the same name.

Orders of accuracy are those of the noise-free path, measured in tests/test_samplers.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

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

__all__ = [  # the last line re-exports what a sampler of your own needs
    "SAMPLERS", "Levels", "Sampler", "check_names", "sampler_levels", "shared_spacings",
    "Noise", "Sigmas", "Step", "Stride", "Strides", "ancestral", "toward",
]  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """A sampler and the levels it visits: those of diffusers' scheduler of the same name, rounded as there.

    The defaults are those of k-diffusion's samplers.
    """

    run: Callable[..., Iterator[Step]]  # (denoise, x, sigmas, noise)
    spacing: str = "linspace"  # the default, as diffusers has it for Stable Diffusion 1.5
    ends_at_zero: bool = True  # else at the table's lowest level, as the original DDIM and PLMS do
    same_stride: bool = False  # every step is 1000 // steps timesteps long: see `renamed`
    unit_first: bool = False  # initial noise is scaled by sqrt(1 + sigma^2), not sigma
    rounding: Mapping[str, Callable[[float], float]] = field(default_factory=dict)  # spacing -> rounding of timesteps
    spare: Mapping[str, int] = field(default_factory=dict)  # spacing -> points dropped at the clean end
    takes: tuple[str, ...] = ()  # from eta, strides, prediction, sigma_data, sigma_at, pair, path, around
    batched: bool = True  # a picture in a batch is the same as alone
    guidance_unit: float = 1.0  # factor on the guidance scale


def whole_part(timestep: float) -> float:
    """Floor, tolerant of rounding errors just below an integer."""
    return math.floor(timestep + 1e-9)


ROUNDING = {"linspace": round}
TO_FIRST: dict[str, Any] = {
    "ends_at_zero": False,
    "same_stride": True,
    "unit_first": True,
    "rounding": ROUNDING,
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
    "ddpm": Sampler(partial(ddim, eta=1.0), "leading", unit_first=True, rounding=ROUNDING, takes=("eta",)),
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
    "unipc": Sampler(unipc, **SOLVER, takes=("around",)),
    "lcm": Sampler(lcm, "distilled", unit_first=True),
    "dpmpp_2m_sde_heun": Sampler(partial(dpmpp_2m, eta=1.0, heun=True), **SOLVER, takes=("eta", "path")),
    "restart": Sampler(restart),
    "dpm_fast": Sampler(partial(dpm_fast, eta=1.0), ends_at_zero=False, takes=("eta", "around")),  # eta 1 is A1111's
    "dpm_adaptive": Sampler(partial(dpm_adaptive, eta=1.0), ends_at_zero=False, takes=("eta", "around"), batched=False),
    "ddim_cfg_pp": Sampler(  # A1111's unit: the scale that others take means about the same here
        euler_cfg_pp, "leading", **TO_FIRST, takes=("eta", "strides", "pair"), guidance_unit=1 / 12.5
    ),
    "euler_cfg_pp": Sampler(euler_cfg_pp, takes=("pair",)),
    "euler_a_cfg_pp": Sampler(partial(euler_cfg_pp, eta=1.0), takes=("eta", "pair")),
    "dpmpp_2m_cfg_pp": Sampler(dpmpp_2m_cfg_pp, takes=("pair",)),
    "tcd": Sampler(tcd, "distilled", ends_at_zero=False, unit_first=True, takes=("eta", "sigma_at", "around")),
    "res_multistep": Sampler(partial(dpmpp_2m, heun=True)),
    "res_multistep_a": Sampler(partial(dpmpp_2m, eta=1.0, heun=True, split=ancestral), takes=("eta",)),
    "gradient_estimation": Sampler(gradient_estimation),
    "deis": Sampler(deis, **SOLVER_TO_FIRST, takes=("around",)),
    "ipndm": Sampler(ipndm),
    "er_sde": Sampler(er_sde),
    "sa_solver": Sampler(sa_solver, **SOLVER_TO_FIRST, takes=("eta", "around")),
    "heunpp2": Sampler(heunpp2),
    "unipc_bh2": Sampler(partial(unipc, order=3), **SOLVER, takes=("around",)),  # ComfyUI's name
}


@dataclass(frozen=True)
class Levels:
    """The noise levels of one run, and how latents are scaled at both ends."""

    sigmas: tuple[Level, ...]  # steps + 1, falling
    strides: Strides  # for samplers that take them; empty if each step ends where the next begins
    first_scale: float  # initial latent = unit noise times this
    added: float | None = None  # level of the noise added to a picture; None: the first level
    picture_scale: float = 1.0  # initial latent = the noised picture times this
    last_scale: float | None = None  # clean latent = the last x times this; None: 1 / sqrt(1 + sigma^2)
    around: tuple[int, int] = (0, 0)  # steps of the whole row before these, and after them

    def from_noise(self, noise: Tensor) -> Tensor:
        """The initial latent of text to image, from unit noise."""
        return noise * self.first_scale

    def from_picture(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The initial latent of image to image, from clean latents."""
        return (latents + noise * (self.sigmas[0] if self.added is None else self.added)) * self.picture_scale

    def clean(self, x: Tensor, sigma: float) -> Tensor:
        """The latent to decode; a little noise that some samplers leave stays in it."""
        return x / math.sqrt(1 + sigma**2) if self.last_scale is None else x * self.last_scale

    @property
    def timesteps(self) -> list[float]:
        """The network's timestep at the start of each step."""
        return [sigma.timestep for sigma in self.sigmas[:-1]]

    def part(self, start: int, stop: int | None = None) -> "Levels":
        """The steps from `start` up to `stop` only."""
        steps, (before, after) = len(self.sigmas) - 1, self.around
        stop = steps if stop is None else stop
        around, own = (before + start, after + steps - stop), slice(start, stop + 1)
        return replace(self, sigmas=self.sigmas[own], strides=self.strides[own], around=around)


def sampler_levels(schedule: NoiseSchedule | EDMSchedule, name: str, steps: int, spacing: str | None = None) -> Levels:
    """The levels of SAMPLERS[name]; None takes its default spacing. UserError for unknown names."""
    check_names(name, spacing)
    sampler = SAMPLERS[name]
    spacing = spacing or sampler.spacing
    rule = SPACINGS[spacing]
    spare = sampler.spare.get(spacing, int(rule.least and not sampler.ends_at_zero))
    sigmas = spaced(schedule, spacing, steps, spare, sampler.rounding.get(spacing, float))
    strides: Strides = ()
    if sampler.same_stride and isinstance(schedule, NoiseSchedule) and not (rule.of_levels or rule.log):
        strides = _strides(schedule, sigmas)
    # The scale includes the latent's own variance, sqrt(1 + sigma^2); as in diffusers, k-diffusion samplers omit the 1
    # unless the spacing is leading or the model is EDM's.
    with_latent = sampler.unit_first or spacing == "leading" or isinstance(schedule, EDMSchedule)
    first_scale = math.sqrt(1 + sigmas[0] ** 2) if with_latent else float(sigmas[0])
    if not rule.closed:
        sigmas.append(Level(0.0 if sampler.ends_at_zero else schedule.sigma_min, 0.0))
    return Levels(tuple(sigmas), strides, first_scale)


def check_names(sampler: str | None, spacing: str | None) -> None:
    """UserError for an unknown name, or a spacing of another sampler; None passes."""
    if sampler not in (None, *SAMPLERS):
        raise unknown("sampler", sampler, SAMPLERS, field="sampler")
    own = SAMPLERS[sampler].spacing if sampler else None
    if spacing not in (None, own, *shared_spacings()):
        raise unknown("spacing", spacing, shared_spacings(), field="spacing")


def shared_spacings() -> list[str]:
    """Spacings that work with every sampler."""
    return [name for name, spacing in SPACINGS.items() if not spacing.own]


def _strides(schedule: NoiseSchedule, sigmas: Sequence[Level]) -> Strides:
    """The levels one stride above and below each of `sigmas`, within the table."""
    stride, top, table = len(schedule) // len(sigmas), len(schedule) - 1, schedule.sigmas.tolist()
    at = [int(sigma.timestep) for sigma in sigmas]
    return tuple(Stride(table[min(t + stride, top)], table[max(t - stride, 0)]) for t in at)
