"""Every sampler: the ways to walk from pure noise to a clean latent.

A sampler sees the model as a `Denoise`, (x, sigma) -> estimate of the clean latent, and a falling row of noise levels.
In the coordinates x = x0 + sigma * noise the noise-free path from one level to the next is the straight line through
x and the estimate, and one function takes it: `toward`. Song et al. 2020 call that step DDIM, Karras et al. 2022 Euler,
Lu et al. 2022 first-order DPM-Solver++. All others are this step with a better estimate to aim at, or with a lower
level to aim at and the difference filled up with fresh noise (`ancestral`), or both.

A sampler is a generator: one `Step` after each step, the last one holds the result. Progress bars, previews and
cancelling live outside. Randomness comes in as `noise`, a function that returns unit noise shaped like x.

Orders of accuracy are those of the noise-free path, measured in tests/test_samplers.py. The table at the end says
for each name which levels it visits, so that pictures equal those of diffusers' scheduler of the same name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from plainsd.diffusion.denoiser import Denoise, output_from, x0_from
from plainsd.diffusion.schedule import SPACINGS, EDMSchedule, Level, NoiseSchedule, spaced
from plainsd.errors import unknown

Noise = Callable[[], Tensor]  # unit noise, shaped like x
Sigmas = Sequence[float]  # noise levels, falling


class Step(NamedTuple):
    """What a sampler yields after each step."""

    index: int  # type: ignore[assignment]  # 0 for the first step; hides the tuple's method, which nobody needs
    sigma: float  # noise level that x has now
    x: Tensor  # the latents, at that level; after the last step the result
    denoised: Tensor  # the model's estimate of the clean latent, made at the level before


class Stride(NamedTuple):
    """The levels that lie one stride of 1000 // steps timesteps above and below the one where a step begins: see
    `renamed`."""

    above: float
    below: float


Strides = Sequence[Stride]  # one a step, or none at all


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Move x along the line to `denoised`: scale its noise part from level sigma down to sigma_next."""
    return denoised + (x - denoised) * (sigma_next / sigma)


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step in two: aim below sigma_next, then add noise up to it. Returns (level to aim at, noise to add).

    With eta = 1 the two together draw from the DDPM posterior of x at sigma_next, given x at sigma and x0; with eta = 0
    nothing is added. This is sigma_t(eta) of DDIM's equation 16 in these coordinates.
    """
    ratio = sigma_next / sigma
    sigma_down = sigma_next * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)
    sigma_up = eta * sigma_next * math.sqrt(1 - ratio**2)
    return sigma_down, sigma_up


def renoised(x: Tensor, noise: Noise, sigma_up: float) -> Tensor:
    """Add fresh noise; draw none where none is to be added."""
    return x + sigma_up * noise() if sigma_up > 0 else x


def renamed(x: Tensor, sigma: float, other: float) -> Tensor:
    """x at one level, said to be at another: what the network is shown, x / sqrt(1 + sigma^2), stays as it is.

    Only DDIM and PLMS need it, to follow diffusers. There all their steps are 1000 // steps timesteps long. With
    leading spacing each ends where the next begins; with linspace, and with trailing where steps does not divide 1000,
    it ends a little above, and x is simply taken for one at the next level. `strides` says where such steps end.
    """
    return x * math.sqrt((1 + other**2) / (1 + sigma**2))


# One call of the model a step, no memory.


def euler(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """First order, noise-free (Karras et al. 2022, algorithm 1 without churn)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = toward(x, denoised, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def ddim(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0, strides: Strides = ()
) -> Iterator[Step]:
    """Song et al. 2020, "Denoising Diffusion Implicit Models", equation 12: from Euler (eta 0) to DDPM (eta 1)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        end = strides[index].below if strides else sigma_next
        sigma_down, sigma_up = ancestral(sigma, end, eta)
        x = renoised(toward(x, denoised, sigma, sigma_down), noise, sigma_up)
        x = renamed(x, end, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def lcm(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Jump to the estimate and add all the noise anew, for models taught to be right at once (Luo et al. 2023).

    Their c_skip, 7e-6 of x at the lowest timestep they know and less above, is left out.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = renoised(denoised, noise, sigma_next)
        yield Step(index, sigma_next, x, denoised)


# Two calls a step: the second one tells how the estimate changes along the way.


def heun(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Second order: the mean of the slopes at both ends of the step (Karras et al. 2022, algorithm 1).

    The slope at the end, met by a line from x, aims at denoised + (second - denoised) * sigma / sigma_next; so the
    mean of both slopes is one step toward the mean of both aims.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        if sigma_next > 0:
            second = denoise(toward(x, denoised, sigma, sigma_next), sigma_next)
            aim = denoised + (second - denoised) * (sigma / sigma_next / 2)
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def halfway(sigma: float, sigma_down: float) -> float:
    """The level in the middle, in log sigma. No `Level`: the network is told its exact timestep, also where it happens
    to be sigma_next (eta = 1), for which a rounded one may be kept."""
    return math.sqrt(sigma * sigma_down)


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """Second order: the slope in the middle of the step, in log sigma (DPM-Solver-2, Lu et al. 2022a)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = halfway(sigma, sigma_down)
            second = denoise(toward(x, denoised, sigma, middle), middle)
            aim = denoised + (second - denoised) * (sigma / middle)
        x = renoised(toward(x, aim, sigma, sigma_down), noise, sigma_up)
        yield Step(index, sigma_next, x, denoised)


def dpmpp_2s_a(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> Iterator[Step]:
    """Second order: the estimate in the middle of the step (DPM-Solver++(2S), Lu et al. 2022b, algorithm 1)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = halfway(sigma, sigma_down)
            aim = denoise(toward(x, denoised, sigma, middle), middle)
        x = renoised(toward(x, aim, sigma, sigma_down), noise, sigma_up)
        yield Step(index, sigma_next, x, denoised)


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> Iterator[Step]:
    """As `dpmpp_2s_a`, with noise on the way to the middle too: one Brownian path over sigma, seen twice.

    The noise of the whole step is that of its first part and that of the rest, by their shares of the step.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            share = (sigma - middle) / (sigma - sigma_next)
            first, rest = noise(), noise()
            sigma_down, sigma_up = ancestral(sigma, middle, eta)
            aim = denoise(toward(x, denoised, sigma, sigma_down) + sigma_up * first, middle)
            sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
            whole = math.sqrt(share) * first + math.sqrt(1 - share) * rest
            x = toward(x, aim, sigma, sigma_down) + sigma_up * whole
        else:
            x = denoised
        yield Step(index, sigma_next, x, denoised)


# One call a step, remembering the calls before: the change of the estimate comes free.


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """Second order: extrapolate the last two estimates to the middle of the step (DPM-Solver++(2M), Lu et al. 2022b).

    With eta = 1 its stochastic form, SDE-DPM-Solver++(2M). The first step and one to level 0 are of first order.
    """
    previous = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        if previous is not None and sigma_next > 0:
            stride, stride_before = math.log(sigma / sigma_next), math.log(sigmas[index - 1] / sigma)
            aim = denoised + (denoised - previous) * (stride / stride_before / 2)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        x = renoised(toward(x, aim, sigma, sigma_down), noise, sigma_up)
        previous = denoised
        yield Step(index, sigma_next, x, denoised)


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> Iterator[Step]:
    """A parabola through the last three estimates, integrated over the step (SDE-DPM-Solver++(3M) of k-diffusion).

    As published it counts the parabola's curvature by half, which makes its order 2 and not 3.
    """
    estimates: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        estimates = [denoised, *estimates[:2]]
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        if index > 0 and sigma_next > 0:
            slope, curve = _parabola(estimates, newest_first(sigmas, index, 3))
            stride, reach = math.log(sigma / sigma_next), math.log(sigma / sigma_down)
            phi_1 = -math.expm1(-reach)
            phi_2 = 1 - phi_1 / reach
            phi_3 = phi_2 / reach - 0.5
            aim = denoised + (phi_2 * stride * slope - phi_3 * stride**2 * curve) / phi_1
        x = renoised(toward(x, aim, sigma, sigma_down), noise, sigma_up)
        yield Step(index, sigma_next, x, denoised)


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    noise: Noise,
    *,
    prediction: str = "epsilon",
    sigma_data: float = 1.0,
    strides: Strides = (),
) -> Iterator[Step]:
    """Adams-Bashforth on the network's output, with the weights for even steps of sigma: fourth order there, second on
    a table's timesteps (PNDM, Liu et al. 2022, as Stable Diffusion's original uses it, without the Runge-Kutta start).

    The first step is taken twice: with the output at its start, then from there with the mean of both ends; the second
    time it is one stride that ends where the next step begins (see `renamed`).
    `prediction` says which output is extrapolated. The original always takes epsilon; diffusers takes v where the
    network predicts v, which is only of first order.
    """
    outputs: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        outputs = [output_from(prediction, x, denoised, sigma, sigma_data), *outputs[:3]]
        start, end = sigma, strides[index].below if strides else sigma_next
        if index == 0:
            trial = renamed(toward(x, denoised, start, end), end, sigma_next)
            at_end = output_from(prediction, trial, denoise(trial, sigma_next), sigma_next, sigma_data)
            mean = (outputs[0] + at_end) / 2
            start, end = strides[1].above if len(strides) > 1 else sigma, sigma_next
            x = renamed(x, sigma, start)
        else:
            mean = _weighted(outputs, ADAMS_BASHFORTH[len(outputs)])
        aim = x0_from(prediction, x, mean, start, sigma_data)
        x = renamed(toward(x, aim, start, end), end, sigma_next)
        yield Step(index, sigma_next, x, denoised)


ADAMS_BASHFORTH = {  # number of known outputs, newest first -> their weights
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lms(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Adams-Bashforth on the slope dx / dsigma, its weights integrated for the levels at hand: fourth order once four
    slopes are known (the linear multistep sampler of k-diffusion).

    The weights add to 1, so only differences of slopes enter the aim: where sigma is huge nothing cancels.
    """
    slopes: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        weights = _lagrange_means(newest_first(sigmas, index, 4), sigma, sigma_next)
        aim = denoised + _weighted([sigma * (slopes[0] - slope) for slope in slopes], weights)
        x = toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


def unipc(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Third order: `dpmpp_2m`, and each step is taken once more when the estimate at its end is known, at the cost of
    no call (UniPC-2 with B(h) = exp(h) - 1, Zhao et al. 2023). The last step, to level 0, is of first order."""
    start = x  # where the step before began
    estimates: list[Tensor] = []  # newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = aim = denoise(x, sigma)
        estimates = [denoised, *estimates[:2]]
        if index > 0:
            x = toward(start, _corrected(estimates, newest_first(sigmas, index, 3)), sigmas[index - 1], sigma)
            if sigma_next > 0:
                stride, stride_before = math.log(sigma / sigma_next), math.log(sigmas[index - 1] / sigma)
                aim = denoised + (denoised - estimates[1]) * (stride / stride_before / 2)
        start, x = x, toward(x, aim, sigma, sigma_next)
        yield Step(index, sigma_next, x, denoised)


# The weights which they use.


def newest_first(sigmas: Sigmas, index: int, most: int) -> Sigmas:
    """The levels of the current and the last steps, `most` of them where there are as many."""
    return sigmas[max(0, index + 1 - most) : index + 1][::-1]


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


def _lagrange_means(known: Sigmas, sigma: float, sigma_next: float) -> list[float]:
    """Weights that turn values at the known levels into the mean of their polynomial between sigma and sigma_next.

    Gauss's rule with two points is exact for the cubics that four values make.
    """
    centre, reach = (sigma + sigma_next) / 2, (sigma - sigma_next) / 2 / math.sqrt(3)
    points = (centre - reach, centre + reach)

    def basis(own: float, point: float) -> float:
        return math.prod((point - other) / (own - other) for other in known if other != own)

    return [sum(basis(own, point) for point in points) / 2 for own in known]


def _parabola(estimates: Sequence[Tensor], sigmas: Sigmas) -> tuple[Tensor, Tensor | float]:
    """Slope and curvature, over -log sigma at the newest, of the line or parabola through two or three estimates."""
    near = (estimates[0] - estimates[1]) / math.log(sigmas[1] / sigmas[0])
    if len(estimates) == 2:
        return near, 0.0
    far = (estimates[1] - estimates[2]) / math.log(sigmas[2] / sigmas[1])
    curve = (near - far) / math.log(sigmas[2] / sigmas[0])
    return near + curve * math.log(sigmas[1] / sigmas[0]), curve


def _corrected(estimates: Sequence[Tensor], sigmas: Sigmas) -> Tensor:
    """The aim of UniC for the step from sigmas[1] to sigmas[0], from the estimates at its end, its start and before."""
    end, start, *earlier = estimates
    if not earlier:
        return (start + end) / 2
    h = -math.log(sigmas[1] / sigmas[0])
    place = math.log(sigmas[2] / sigmas[1]) / h  # of the earlier estimate, where the step goes from 0 to 1
    b_1 = (math.expm1(h) / h - 1) / math.expm1(h)
    b_2 = ((math.expm1(h) / h - 1) / h - 0.5) * 2 / math.expm1(h)
    weight = (b_1 - b_2) / (1 - place)
    return start + (earlier[0] - start) * (weight / place) + (end - start) * (b_1 - weight)


# The table.


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
    takes: tuple[str, ...] = ()  # what `run` takes by name: of "eta", "strides", "prediction", "sigma_data"


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
    "dpmpp_sde": Sampler(dpmpp_sde, takes=("eta",)),
    "dpmpp_2m_sde": Sampler(partial(dpmpp_2m, eta=1.0), **SOLVER, takes=("eta",)),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, **SOLVER, takes=("eta",)),
    "lms": Sampler(lms),
    "unipc": Sampler(unipc, **SOLVER),
    "lcm": Sampler(lcm, "distilled", unit_first=True),
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
