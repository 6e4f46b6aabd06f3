"""Samplers against diffusers' schedulers, against the published formulas, and against a Gaussian known exactly."""

import importlib
import math
import sys
import warnings
from functools import partial
from itertools import islice, pairwise
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from plainsd.diffusion.denoiser import denoiser
from plainsd.diffusion.samplers import (
    SAMPLERS,
    Step,
    ancestral,
    sampler_levels,
    shared_spacings,
    toward,
)
from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import PNDMScheduler  # the package first: below, modules that it lacks are replaced

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own, thousands of them
SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
SHAPE = (2, 4, 3, 3)
SD15 = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip

# sampler -> diffusers' module, class, and options that make the class this sampler
SCHEDULERS = {
    "ddpm": ("ddpm", "DDPMScheduler", {"clip_sample": False}),
    "ddim": ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "plms": ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}),
    "dpm2": ("k_dpm_2_discrete", "KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpmpp_sde": ("dpmsolver_sde", "DPMSolverSDEScheduler", {}),
    "dpmpp_2m_sde": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}),
    "lcm": ("lcm", "LCMScheduler", {}),
    "dpmpp_2m_sde_heun": (
        "dpmsolver_multistep", "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "tcd": ("tcd", "TCDScheduler", {}),
    "deis": ("deis_multistep", "DEISMultistepScheduler", {}),
    "sa_solver": ("sasolver", "SASolverScheduler", {}),
    "unipc_bh2": ("unipc_multistep", "UniPCMultistepScheduler", {"solver_order": 3}),
}  # fmt: skip
OF_ITS_OWN = ("dpm_fast", "dpm_adaptive")  # choose their levels, and take what they have at the last for clean
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
SPACINGS = (*TIMESTEP_SPACINGS, "karras", "exponential")  # diffusers'
CASES = [
    (name, spacing)
    for name in SCHEDULERS
    for spacing in {"ddpm": TIMESTEP_SPACINGS, "ddim": TIMESTEP_SPACINGS, "plms": TIMESTEP_SPACINGS,
                    "euler_a": TIMESTEP_SPACINGS, "lcm": (None,), "tcd": (None,)}.get(name, SPACINGS)
]  # fmt: skip


# The same network and the same noise for both sides.


def network(schedule: NoiseSchedule, prediction: str):
    """What a perfect network predicts where each value of x0 is 0.8 or -0.8, give or take 0.5: smooth, not linear."""
    centre, spread = 0.8, 0.5

    def predict(x: Tensor, timestep: float) -> Tensor:  # x has unit variance
        sigma = schedule.sigma(float(timestep))
        alpha, noise = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
        variance = spread**2 + sigma**2
        x0 = (x / alpha * spread**2 + centre * sigma**2 * torch.tanh(centre * x / alpha / variance)) / variance
        epsilon = (x - alpha * x0) / noise
        return epsilon if prediction == "epsilon" else alpha * epsilon - noise * x0

    return predict


def draws(count: int, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def run_ours(schedule, name, prediction, steps, spacing, noises, **options) -> Tensor:
    """noises[0] makes the first latent, the others are for the steps."""
    levels = sampler_levels(schedule, name, steps, spacing)
    denoise = denoiser(network(schedule, prediction), schedule, prediction)
    x, rest = noises[0] * levels.first_scale, iter(noises[1:])
    if name == "plms":  # as diffusers does it
        options["prediction"] = prediction
    if levels.strides:
        options["strides"] = levels.strides
    if name == "tcd":
        options["sigma_at"] = schedule.sigma
    *_, last = SAMPLERS[name].run(denoise, x, levels.sigmas, lambda: next(rest), **options)
    assert last.index == len(levels.sigmas) - 2 and last.sigma == (0.0 if name in OF_ITS_OWN else levels.sigmas[-1])
    return last.x


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# The reference. diffusers keeps its tables, and does some of its arithmetic, in float32. `in_double` runs its modules
# with float32 meaning float64, so that agreement shows to the last digits; `as_shipped` runs them untouched.


class Double:
    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


def quad(function, low, high, **_):
    """For scipy.integrate.quad, which need not be installed; exact for the polynomials that LMS integrates."""
    points, weights = np.polynomial.legendre.leggauss(3)
    half, middle = (float(high) - float(low)) / 2, (float(high) + float(low)) / 2
    return (half * sum(w * float(function(middle + half * p)) for p, w in zip(points, weights, strict=True)),)


@pytest.fixture
def as_shipped(monkeypatch):
    """diffusers' module of a scheduler, with stand-ins for the two packages that some of them import."""

    def load(name):
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "integrate", SimpleNamespace(quad=quad), raising=False)
        return module

    return load


@pytest.fixture
def in_double(monkeypatch, as_shipped):
    def load(name):
        module = as_shipped(name)
        monkeypatch.setattr(module, "torch", Double(torch))
        monkeypatch.setattr(module, "np", Double(np))
        return module

    torch.set_default_dtype(torch.float64)
    yield load
    torch.set_default_dtype(torch.float32)


def build(module, name: str, schedule: NoiseSchedule, prediction: str, spacing: str | None, **more):
    """diffusers' scheduler for one of our samplers, over the table of `schedule`."""
    _, class_name, options = SCHEDULERS[name]
    alphas = schedule.alphas_cumprod
    options = {**options, "trained_betas": (1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).tolist(), **more}
    scheduler_class = getattr(module, class_name)
    with quick(scheduler_class):
        return scheduler_class(steps_offset=1, prediction_type=prediction, **options, **spaced_as(spacing))


def quick(scheduler_class):
    """Some constructors space out all 1000 timesteps first, which takes them seconds and is then forgotten."""
    return patch.object(scheduler_class, "set_timesteps", lambda self, *_: setattr(self, "sigmas", torch.zeros(1)))


def spaced_as(spacing: str | None) -> dict:
    if spacing in ("karras", "exponential"):
        return {f"use_{spacing}_sigmas": True}
    return {"timestep_spacing": spacing} if spacing else {}


def run_theirs(module, scheduler, schedule, name, prediction, steps, noises, **options) -> Tensor:
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # else it looks timesteps up, and fails where two are rounded to one
        scheduler.set_begin_index(0)
    rest = iter(noises[1:])
    if name == "dpmpp_sde":
        scheduler.noise_sampler = BrownianPath(rest)
    predict, x = network(schedule, prediction), noises[0] * scheduler.init_noise_sigma
    with patch.object(module, "randn_tensor", lambda *_, **__: next(rest), create=True):
        for timestep in scheduler.timesteps:
            output = predict(scheduler.scale_model_input(x, timestep), timestep)
            x = scheduler.step(output, timestep, x, **options).prev_sample
    return x if SAMPLERS[name].ends_at_zero else x / scheduler.alphas_cumprod[0].sqrt()


class BrownianPath:
    """Unit increments of one Brownian path over sigma: from a step's start to its middle, then to its end."""

    def __init__(self, noises):
        self.noises, self.first = noises, None

    def __call__(self, sigma, sigma_to):
        if self.first is None:
            self.first, self.middle = next(self.noises), sigma_to
            return self.first
        share = (sigma - self.middle) / (sigma - sigma_to)
        whole, self.first = share**0.5 * self.first + (1 - share) ** 0.5 * next(self.noises), None
        return whole


# Parity.

TOLERANCE = {"ddpm": 1e-9, "lcm": 1e-5}  # DDPM ends with noise of 1e-10 there; LCM keeps 7e-6 of x: see its docstring


@pytest.mark.parametrize(("name", "spacing"), CASES)
def test_whole_trajectory_equals_diffusers(in_double, monkeypatch, name, spacing):
    module = in_double(SCHEDULERS[name][0])
    monkeypatch.setattr(module, "randn_tensor", None, raising=False)
    for schedule in (SD, ZERO_SNR):
        for prediction in ("epsilon", "v_prediction"):
            scheduler = build(module, name, schedule, prediction, spacing)
            for steps in (7, 20, 50):
                noises = draws(2 * steps + 1)
                expected = run_theirs(module, scheduler, schedule, name, prediction, steps, noises)
                found = run_ours(schedule, name, prediction, steps, spacing, noises)
                case = f"{'zero SNR ' if schedule is ZERO_SNR else ''}{prediction}, {steps} steps"
                assert relative(found, expected) < TOLERANCE.get(name, 1e-10), case


# Where a zero-SNR table begins, at sigma 4096, these let diffusers' own float32 rounding grow to 1e-4 .. 4e-3 in few
# steps, because they mix values of that level into later ones. In float64, above, they agree as all others do.
ROUGH = {("plms", "epsilon"), ("deis", "epsilon")} | {
    (name, p) for name in ("heun", "dpm2", "dpm2_a") for p in ("epsilon", "v_prediction")
}


@pytest.mark.parametrize(("name", "spacing"), CASES)
def test_every_spacing_equals_diffusers_as_shipped(as_shipped, monkeypatch, name, spacing):
    module = as_shipped(SCHEDULERS[name][0])
    monkeypatch.setattr(module, "randn_tensor", None, raising=False)
    for schedule in (SD, ZERO_SNR):
        for prediction in ("epsilon", "v_prediction"):
            if schedule is ZERO_SNR and (name, prediction) in ROUGH:
                continue
            scheduler = build(module, name, schedule, prediction, spacing)
            for steps in (7, 20, 50):
                noises = draws(2 * steps + 1, torch.float32)
                expected = run_theirs(module, scheduler, schedule, name, prediction, steps, noises)
                found = run_ours(schedule, name, prediction, steps, spacing, noises)
                assert relative(found, expected) < 1e-4, (schedule is ZERO_SNR, prediction, steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_equal_diffusers_as_shipped(as_shipped, monkeypatch, name):
    """A user of Stable Diffusion 1.5 who swaps the scheduler with `from_config` gets what our default spacing gives."""
    module = as_shipped(SCHEDULERS[name][0])
    monkeypatch.setattr(module, "randn_tensor", None, raising=False)
    config = PNDMScheduler.from_config(SD15).config
    _, class_name, options = SCHEDULERS[name]
    scheduler_class = getattr(module, class_name)
    for prediction in ("epsilon", "v_prediction"):
        with quick(scheduler_class):
            scheduler = scheduler_class.from_config(config, prediction_type=prediction, **options)
        for steps in (7, 20, 50):
            noises = draws(2 * steps + 1, torch.float32)
            expected = run_theirs(module, scheduler, SD, name, prediction, steps, noises)
            assert relative(run_ours(SD, name, prediction, steps, None, noises), expected) < 2e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_ddim_eta_equals_diffusers(in_double, monkeypatch, spacing, eta):
    module = in_double("ddim")
    monkeypatch.setattr(module, "randn_tensor", None)
    for schedule in (SD, ZERO_SNR):
        for prediction in ("epsilon", "v_prediction"):
            scheduler = build(module, "ddim", schedule, prediction, spacing)
            for steps in (7, 20, 50):
                noises = draws(steps + 1)
                expected = run_theirs(module, scheduler, schedule, "ddim", prediction, steps, noises, eta=eta)
                found = run_ours(schedule, "ddim", prediction, steps, spacing, noises, eta=eta)
                assert relative(found, expected) < 1e-10, (schedule is ZERO_SNR, prediction, steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999])
def test_strides_of_leading_steps_end_where_the_next_begins(steps):
    levels = sampler_levels(SD, "plms", steps)
    assert len(levels.strides) == steps
    assert tuple(stride.below for stride in levels.strides) == levels.sigmas[1:]
    assert tuple(stride.above for stride in levels.strides[1:]) == levels.sigmas[:-2]
    assert not sampler_levels(SD, "ddpm", steps).strides and not sampler_levels(SD, "ddim", steps, "karras").strides


def test_a_part_of_the_levels_has_the_strides_of_its_steps():
    levels = sampler_levels(SD, "plms", 10)
    first, rest = levels.part(0, 4), levels.part(4)
    assert (
        first.sigmas == levels.sigmas[:5]
        and rest.sigmas == levels.sigmas[4:]
        and rest.first_scale == levels.first_scale
    )
    assert rest.strides == levels.strides[4:] and first.strides[:4] == levels.strides[:4]
    assert first.timesteps + rest.timesteps == levels.timesteps


def test_lcm_without_c_skip_equals_diffusers_to_the_last_digits(in_double, monkeypatch):
    module = in_double("lcm")
    monkeypatch.setattr(module, "randn_tensor", None)
    noises = draws(10)
    scheduler = build(module, "lcm", SD, "epsilon", None, timestep_scaling=1e9)
    expected = run_theirs(module, scheduler, SD, "lcm", "epsilon", 8, noises)
    assert relative(run_ours(SD, "lcm", "epsilon", 8, None, noises), expected) < 1e-12


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_single_step_of_plms_equals_diffusers(in_double, spacing, prediction):
    """It is one call, and no mean with the other end."""
    module = in_double("pndm")
    scheduler = build(module, "plms", SD, prediction, spacing)
    expected = run_theirs(module, scheduler, SD, "plms", prediction, 1, draws(1))
    assert relative(run_ours(SD, "plms", prediction, 1, spacing, draws(1)), expected) < 1e-10


@pytest.mark.parametrize(("steps", "start", "stop"), [(20, 10, 20), (14, 5, 14), (20, 0, 12), (12, 0, 7), (20, 12, 20)])
@pytest.mark.parametrize("name", ["dpmpp_2m", "deis", "sa_solver", "tcd", "unipc", "unipc_bh2"])
def test_a_part_of_the_row_equals_diffusers(in_double, monkeypatch, name, start, stop, steps):
    """On a picture the last steps run, and before a refiner the first; orders and noise are those of the whole row."""
    module = in_double(SCHEDULERS[name][0])
    monkeypatch.setattr(module, "randn_tensor", None, raising=False)
    spacing = None if name == "tcd" else "trailing"
    scheduler = build(module, name, SD, "epsilon", spacing)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start)
    noises, predict = draws(stop - start + 1), network(SD, "epsilon")
    x, rest = noises[0], iter(noises[1:])
    with monkeypatch.context() as patched:
        patched.setattr(module, "randn_tensor", lambda *_, **__: next(rest), raising=False)
        for timestep in scheduler.timesteps[start:stop]:
            x = scheduler.step(predict(x, timestep), timestep, x).prev_sample
    levels = sampler_levels(SD, name, steps, spacing)
    part, again = levels.part(start, stop), iter(noises[1:])
    assert part.around == (start, steps - stop) and levels.part(2).part(1, 4).around == (3, steps - 6)
    options = {"around": part.around} if "around" in SAMPLERS[name].takes else {}
    if name == "tcd":
        options["sigma_at"] = SD.sigma
    first = noises[0] * math.sqrt(1 + part.sigmas[0] ** 2)
    denoise = denoiser(predict, SD, "epsilon")
    *_, last = SAMPLERS[name].run(denoise, first, part.sigmas, lambda: next(again), **options)
    assert relative(last.x / math.sqrt(1 + last.sigma**2), x) < 1e-9


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_where_the_row_goes_on_x_is_at_its_level(name):
    """It is clean only at the end of the row."""
    part = sampler_levels(SD, name, 12, "karras").part(0, 6)
    run = partial(SAMPLERS[name].run, denoiser(network(SD, "epsilon"), SD, "epsilon"), draws(1)[0], part.sigmas)
    *_, last = run(lambda: torch.zeros(SHAPE), eta=0.0, around=part.around)
    assert last.sigma == pytest.approx(part.sigmas[-1]) and last.sigma > 0
    *_, alone = run(lambda: torch.zeros(SHAPE), eta=0.0)
    assert alone.sigma == 0 and torch.equal(alone.x, last.x)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_deis_of_third_order_equals_diffusers(in_double, spacing):
    module = in_double("deis_multistep")
    for steps in (7, 20, 50):
        scheduler = build(module, "deis", SD, "epsilon", spacing, solver_order=3)
        expected = run_theirs(module, scheduler, SD, "deis", "epsilon", steps, draws(1))
        assert relative(run_ours(SD, "deis", "epsilon", steps, spacing, draws(1), most=3), expected) < 1e-10


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_ipndm_equals_diffusers(in_double, steps):
    """Its scheduler has levels of its own, whose network predicts v; `levels` are put in their place."""
    levels = [SD.sigma(timestep) for timestep in np.linspace(999, 0, steps)] + [0.0]
    scheduler = in_double("ipndm").IPNDMScheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    scheduler.betas, scheduler.alphas = (torch.tensor([f(sigma) for sigma in levels]) for f in (
        lambda sigma: sigma / math.sqrt(1 + sigma**2), lambda sigma: 1 / math.sqrt(1 + sigma**2)))  # fmt: skip
    predict, x = network(SD, "v_prediction"), draws(1)[0]
    for sigma in levels[:-2]:
        x = scheduler.step(predict(x, SD.timestep(sigma)), None, x).prev_sample
    start = draws(1)[0] * math.sqrt(1 + levels[0] ** 2)
    *_, last = SAMPLERS["ipndm"].run(denoiser(predict, SD, "v_prediction"), start, levels[:-1], None)
    assert relative(last.x / math.sqrt(1 + levels[-2] ** 2), x) < 1e-11


def test_tcd_takes_every_share_of_noise_as_diffusers_does(in_double, monkeypatch):
    module = in_double("tcd")
    monkeypatch.setattr(module, "randn_tensor", None)
    for eta in (0.0, 0.7, 1.0):
        for steps in (1, 4, 50):
            scheduler = build(module, "tcd", SD, "epsilon", None)
            noises = draws(steps + 1)
            expected = run_theirs(module, scheduler, SD, "tcd", "epsilon", steps, noises, eta=eta)
            assert relative(run_ours(SD, "tcd", "epsilon", steps, None, noises, eta=eta), expected) < 1e-10


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_res_multistep_is_diffusers_second_order_with_the_line_integrated(in_double, steps):
    module = in_double("dpmsolver_multistep")
    for spacing in ("karras", "exponential"):
        scheduler = build(module, "dpmpp_2m", SD, "epsilon", spacing, solver_type="heun")
        expected = run_theirs(module, scheduler, SD, "dpmpp_2m", "epsilon", steps, draws(1))
        sigmas = sampler_levels(SD, "dpmpp_2m", steps, spacing).sigmas  # these are rounded
        start = draws(1)[0] * math.sqrt(1 + sigmas[0] ** 2)
        *_, last = SAMPLERS["res_multistep"].run(denoiser(network(SD, "epsilon"), SD, "epsilon"), start, sigmas, None)
        assert relative(last.x, expected) < 1e-10


@pytest.mark.parametrize("steps", [20, 50])
def test_dpmpp_3m_without_noise_equals_diffusers_third_order_solver(in_double, steps):
    """Only without noise: diffusers' stochastic third order has a wrong sign, its last term tends to -D2 for h = 0."""
    module = in_double("dpmsolver_multistep")
    scheduler = build(module, "dpmpp_2m", SD, "epsilon", "karras", solver_order=3, solver_type="heun")
    expected = run_theirs(module, scheduler, SD, "dpmpp_2m", "epsilon", steps, draws(1))
    assert relative(run_ours(SD, "dpmpp_3m_sde", "epsilon", steps, "karras", draws(1), eta=0.0), expected) < 1e-12


def test_dpmpp_2s_without_noise_equals_diffusers_singlestep_solver(in_double):
    """Where levels fall geometrically the middle of each of our steps is one of diffusers' levels."""
    module = in_double("dpmsolver_singlestep")
    alphas = SD.alphas_cumprod
    betas = (1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).tolist()
    scheduler = module.DPMSolverSinglestepScheduler(
        trained_betas=betas, use_exponential_sigmas=True, lower_order_final=True
    )
    scheduler.set_timesteps(20)
    x = draws(1)[0]
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(SD, "epsilon")(x, timestep), timestep, x).prev_sample

    def whole(x, timestep):  # this scheduler cuts fractions off
        return network(SD, "epsilon")(x, math.floor(timestep + 1e-6))

    denoise, sigmas = denoiser(whole, SD, "epsilon"), sampler_levels(SD, "dpmpp_2m", 20, "exponential").sigmas
    ours = draws(1)[0] * math.sqrt(1 + sigmas[0] ** 2)
    *_, last = SAMPLERS["dpmpp_2s_a"].run(denoise, ours, sigmas[:19:2], None, eta=0.0)
    *_, last = SAMPLERS["euler"].run(denoise, last.x, sigmas[18:], None)
    assert relative(last.x, x) < 1e-11


# Published formulas, in the letters of k-diffusion: t = -log sigma, h the step.


def k_diffusion_noise_scale(sigma, sigma_next):
    up = min(sigma_next, math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def published_2s_a(denoise, x, sigmas, noise):
    for sigma, sigma_next in pairwise(sigmas):
        d = denoise(x, sigma)
        if sigma_next == 0:
            return d
        down, up = k_diffusion_noise_scale(sigma, sigma_next)
        t, h = -math.log(sigma), math.log(sigma / down)
        s = t + h / 2
        x_2 = math.exp(-s) / math.exp(-t) * x - math.expm1(-h / 2) * d
        x = math.exp(-h) * x - math.expm1(-h) * denoise(x_2, math.exp(-s)) + noise() * up
    return x


def published_3m_sde(denoise, x, sigmas, noise):
    d1 = d2 = h1 = h2 = None
    for sigma, sigma_next in pairwise(sigmas):
        d = denoise(x, sigma)
        if sigma_next == 0:
            return d
        h = math.log(sigma / sigma_next)
        x = math.exp(-2 * h) * x - math.expm1(-2 * h) * d
        phi_2 = math.expm1(-2 * h) / (2 * h) + 1
        if h2 is not None:
            r0, r1 = h1 / h, h2 / h
            near, far = (d - d1) / r0, (d1 - d2) / r1
            slope, bend = near + (near - far) * r0 / (r0 + r1), (near - far) / (r0 + r1)
            x = x + phi_2 * slope - (phi_2 / (2 * h) - 0.5) * bend
        elif h1 is not None:
            x = x + phi_2 * (d - d1) / (h1 / h)
        x = x + noise() * sigma_next * math.sqrt(-math.expm1(-2 * h))
        d1, d2, h1, h2 = d, d1, h, h1
    return x


@pytest.mark.parametrize(("name", "published"), [("dpmpp_2s_a", published_2s_a), ("dpmpp_3m_sde", published_3m_sde)])
@pytest.mark.parametrize("spacing", shared_spacings())
def test_published_formula(name, published, spacing):
    for prediction in ("epsilon", "v_prediction"):
        for steps in (7, 20, 50):
            sigmas, noises = sampler_levels(SD, name, steps, spacing).sigmas, draws(steps + 1)
            denoise, ours, theirs = denoiser(network(SD, prediction), SD, prediction), iter(noises), iter(noises)
            x = next(ours) * sigmas[0]
            expected = published(denoise, next(theirs) * sigmas[0], sigmas, lambda i=theirs: next(i))
            *_, last = SAMPLERS[name].run(denoise, x, sigmas, lambda i=ours: next(i))
            assert relative(last.x, expected) < 1e-10


# A Gaussian: with x0 ~ N(MEAN, SPREAD^2) the perfect estimate, and where it leads, are known.

MEAN, SPREAD = 0.3, 0.7
HIGH, LOW = 8.0, 0.05


def gaussian(x: Tensor, sigma: float) -> Tensor:
    return MEAN + (x - MEAN) * SPREAD**2 / (SPREAD**2 + sigma**2)


def measured_order(run, sigmas_of, denoise=gaussian, counts=(64, 128, 256), exact=None) -> float:
    """log2 of what halving the steps costs, on the path without fresh noise."""
    start = torch.tensor([3.0, -9.0], dtype=torch.float64)
    if exact is None:
        exact = MEAN + (start - MEAN) * math.sqrt((SPREAD**2 + LOW**2) / (SPREAD**2 + HIGH**2))
    errors = []
    for count in counts:
        *_, last = run(denoise, start, sigmas_of(count), lambda: torch.zeros_like(start))
        errors.append((last.x - exact).abs().max().item())
    assert errors[-1] > 1e-13, "too exact to measure"
    return math.log2(errors[-2] / errors[-1])


def geometric(count: int) -> list[float]:
    return [HIGH * (LOW / HIGH) ** (index / count) for index in range(count + 1)]


def even(count: int) -> list[float]:
    return [HIGH + (LOW - HIGH) * index / count for index in range(count + 1)]


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1), ("ddim", {}, 1), ("heun", {}, 2), ("dpm2", {}, 2), ("dpmpp_2m", {}, 2), ("plms", {}, 2),
        ("dpm2_a", {"eta": 0.0}, 2), ("dpmpp_2s_a", {"eta": 0.0}, 2), ("dpmpp_sde", {"eta": 0.0}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2), ("dpmpp_3m_sde", {"eta": 0.0}, 2), ("unipc", {}, 3), ("unipc_bh2", {}, 2),
        ("plms", {"prediction": "v_prediction"}, 1), ("dpmpp_2m_sde_heun", {"eta": 0.0}, 2), ("res_multistep", {}, 2),
        ("res_multistep_a", {"eta": 0.0}, 2), ("gradient_estimation", {}, 1), ("deis", {}, 2),
        ("deis", {"most": 3}, 2), ("ipndm", {}, 2), ("sa_solver", {"eta": 0.0}, 2), ("heunpp2", {}, 1),
        ("euler_cfg_pp", {}, 1), ("ddim_cfg_pp", {}, 1), ("euler_a_cfg_pp", {"eta": 0.0}, 1),
        ("dpmpp_2m_cfg_pp", {}, 2), ("tcd", {"eta": 0.0}, 1),
    ],
)  # fmt: skip
def test_order_of_convergence(name, options, order):
    assert measured_order(partial(SAMPLERS[name].run, **options), geometric) == pytest.approx(order, abs=0.15)


def test_order_of_dpm_fast_is_that_of_its_steps():
    """With three calls a step; a last one of two, whose one error is of the same order."""
    run = partial(SAMPLERS["dpm_fast"].run, eta=0.0)
    assert measured_order(run, geometric, counts=(65, 131, 263)) == pytest.approx(3, abs=0.15)


def test_order_of_plms_is_higher_where_levels_are_even():
    assert measured_order(SAMPLERS["plms"].run, even, counts=(500, 1000, 2000)) > 2.8


@pytest.mark.parametrize(
    "name",
    ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "euler_a", "dpmpp_2s_a", "dpm2_a", "dpmpp_2m_sde_heun",
     "res_multistep_a", "sa_solver", "euler_a_cfg_pp", "dpm_fast"],
)  # fmt: skip
def test_order_of_the_mean_path_of_stochastic_samplers(name):
    """Without its noise the reverse SDE is dx = 2 (x - x0) / sigma dsigma. A Gaussian's mean follows it exactly in one
    step, so the estimate here is a bent one; the reference is the same path in many small Heun steps."""

    def bent(x, sigma):
        return torch.sin(x) / (1 + sigma)

    x = torch.tensor([3.0, -9.0], dtype=torch.float64)
    for sigma, sigma_next in pairwise(geometric(8000)):
        slope = 2 * (x - bent(x, sigma)) / sigma
        trial = x + (sigma_next - sigma) * slope
        x = x + (sigma_next - sigma) * (slope + 2 * (trial - bent(trial, sigma_next)) / sigma_next) / 2
    order = measured_order(SAMPLERS[name].run, geometric, bent, exact=x)
    second = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2m_sde_heun", "res_multistep_a", "sa_solver")
    expected = 2 if name in second else 1
    assert order == pytest.approx(expected, abs=0.15)


def test_lms_is_exact_where_the_slope_is_a_cubic_of_sigma():
    def slope(sigma):
        return 1 - 2 * sigma + 0.3 * sigma**2 + 0.01 * sigma**3

    def integral(sigma):
        return sigma - sigma**2 + 0.1 * sigma**3 + 0.0025 * sigma**4

    x, sigmas = torch.zeros(1, dtype=torch.float64), [8.0, 6.5, 4.0, 3.5, 2.0, 0.7, 0.0]
    steps = list(SAMPLERS["lms"].run(lambda x, sigma: x - sigma * slope(sigma), x, sigmas, None))
    for before, after in pairwise(steps[2:]):  # from the fourth step on, four slopes are known
        assert (after.x - before.x).item() == pytest.approx(integral(after.sigma) - integral(before.sigma), rel=1e-12)


DRAWS = dict.fromkeys(  # of six steps
    ("ddpm", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm", "dpmpp_2m_sde_heun", "tcd",
     "euler_a_cfg_pp", "res_multistep_a", "er_sde"), 5,
) | {"dpmpp_sde": 10, "sa_solver": 6, "dpm_fast": 2}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "tcd")])  # made for other models
def test_samples_have_the_mean_and_spread_of_the_data(name):
    generator = torch.Generator().manual_seed(0)

    def unit():
        return torch.randn(10_000, generator=generator, dtype=torch.float64)

    sigmas = sampler_levels(SD, name, 300, "karras").sigmas
    *_, last = SAMPLERS[name].run(gaussian, MEAN + unit() * math.hypot(SPREAD, sigmas[0]), sigmas, unit)
    assert last.x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert last.x.std().item() == pytest.approx(math.hypot(SPREAD, sigmas[-1]), rel=0.03)


@pytest.mark.parametrize(("timestep", "earlier"), [(999, 979), (500, 499), (21, 1), (1, 0)])
def test_eta_one_is_the_ddpm_posterior(timestep, earlier):
    """Ho et al. 2020, equations 6 and 7, for a stride of any length: beta is 1 - alpha_bar_t / alpha_bar_earlier."""
    generator = torch.Generator().manual_seed(1)
    x_t, x0 = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    now, then = SD.alphas_cumprod[timestep].item(), SD.alphas_cumprod[earlier].item()
    beta = 1 - now / then
    mean = math.sqrt(then) * beta / (1 - now) * x0 + math.sqrt(now / then) * (1 - then) / (1 - now) * x_t
    variance = (1 - then) / (1 - now) * beta
    sigmas = [SD.sigma(timestep), SD.sigma(earlier)]
    for noise in (0.0, 1.0, -2.5):
        fresh = torch.full_like(x0, noise)
        run = SAMPLERS["ddpm"].run(lambda x, sigma: x0, x_t / math.sqrt(now), sigmas, lambda f=fresh: f)
        found = next(run).x * math.sqrt(then)
        torch.testing.assert_close(found, mean + noise * math.sqrt(variance), rtol=1e-12, atol=1e-13)


def test_ancestral_keeps_the_noise_level():
    for eta in (0.0, 0.4, 1.0):
        down, up = ancestral(4096.0, 3.0, eta)
        assert math.hypot(down, up) == pytest.approx(3.0, rel=1e-14)
    assert down == pytest.approx(9 / 4096, rel=1e-14)  # no digits lost where sigma_next is far below


# What every sampler has to stand.


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, *shared_spacings()])
def test_zero_terminal_snr_loses_no_precision(name, spacing):
    """sigma begins at 4096. float32 latents end where float64 ones do.

    A1111's beta spreads levels over sigma itself, here almost all of them in the thousands, where differences of slopes
    keep fewer digits.
    """
    rough_there = spacing == "beta_a1111" and name in ("lms", "ipndm", "gradient_estimation")
    if name == "lcm" and spacing is None:
        assert sampler_levels(ZERO_SNR, name, 8).sigmas[0] == ZERO_SNR.sigma_max
    for steps in (1, 2, 13):
        most = 60 if name == "dpm_adaptive" else 2 * steps + 1
        fine, coarse = draws(most), draws(most, torch.float32)
        exact = run_ours(ZERO_SNR, name, "v_prediction", steps, spacing, fine)
        rough = run_ours(ZERO_SNR, name, "v_prediction", steps, spacing, coarse)
        assert rough.dtype == torch.float32
        assert relative(rough.double(), exact) < (2e-2 if rough_there else 2e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_come_one_by_one(name):
    """A step is computed when asked for, yields all it says, and noise is drawn only where it is used."""
    calls, drawn = [], []

    def denoise(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    def noise():
        drawn.append(len(calls))
        return torch.zeros(3)

    sigmas = sampler_levels(SD, name, 6).sigmas
    assert len(sigmas) == 7 and all(isinstance(sigma, float) for sigma in sigmas)
    assert list(sigmas) == sorted(sigmas)[::-1]
    run = SAMPLERS[name].run(denoise, torch.ones(3) * sigmas[0], sigmas, noise)
    assert calls == []
    first = next(run)
    assert isinstance(first, Step) and first.index == 0 and calls[0] == sigmas[0]
    if name != "dpm_adaptive":  # the levels and calls of which are its own
        assert first.sigma == sigmas[1] or name == "dpm_fast"
        assert 1 <= len(calls) <= (3 if name == "heunpp2" else 2)
        assert torch.equal(first.denoised, gaussian(torch.ones(3) * sigmas[0], sigmas[0]))
    last = list(islice(run, 10))[-1]
    assert last.index == 5
    assert len(drawn) == DRAWS.get(name, 0) or name == "dpm_adaptive"
    if SAMPLERS[name].ends_at_zero:
        assert torch.equal(last.x, last.denoised) or name == "lms"  # LMS mixes older slopes in to the end


def test_toward_is_exact_at_both_ends():
    x, denoised = torch.tensor([4096.0, -1.0]), torch.tensor([0.1, 0.2])
    assert torch.equal(toward(x, denoised, 5.0, 0.0), denoised)
    torch.testing.assert_close(toward(x, denoised, 5.0, 5.0), x)


def test_names_and_ends():
    assert (
        list(SAMPLERS)
        == (
            "ddpm ddim plms euler euler_a heun dpm2 dpm2_a dpmpp_2m dpmpp_2s_a dpmpp_sde dpmpp_2m_sde dpmpp_3m_sde lms "
            "unipc lcm dpmpp_2m_sde_heun restart dpm_fast dpm_adaptive ddim_cfg_pp euler_cfg_pp euler_a_cfg_pp "
            "dpmpp_2m_cfg_pp tcd res_multistep res_multistep_a gradient_estimation deis ipndm er_sde sa_solver heunpp2 "
            "unipc_bh2"
        ).split()
    )
    for name in SAMPLERS:
        low = name in ("ddim", "plms", "ddim_cfg_pp", "deis", "sa_solver", "tcd", *OF_ITS_OWN)
        assert sampler_levels(SD, name, 4).sigmas[-1] == (SD.sigma_min if low else 0.0)


def test_wrong_requests_are_named():
    with pytest.raises(UserError, match="unknown sampler 'eular'; did you mean 'euler'"):
        sampler_levels(SD, "eular", 20)
    with pytest.raises(UserError, match="unknown spacing 'karas'; did you mean 'karras'"):
        sampler_levels(SD, "euler", 20, "karas")
    with pytest.raises(UserError, match="unknown spacing 'distilled'"):
        sampler_levels(SD, "euler", 20, "distilled")
    with pytest.raises(UserError, match="steps 0 is out of range; choose 1 to 1000"):
        sampler_levels(SD, "ddpm", 0)
    with pytest.raises(UserError, match="steps 1000 is out of range; choose 1 to 999"):
        sampler_levels(SD, "unipc", 1000)
    with pytest.raises(UserError, match="choose 1 to 50"):
        sampler_levels(SD, "lcm", 51)
