"""The noise table and the spacings, against diffusers' tables and timesteps."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plainsd.diffusion.conventions import planned_levels, schedule_like, told_timestep, whole_row
from plainsd.diffusion.samplers import SAMPLERS, sampler_levels, shared_spacings
from plainsd.diffusion.schedule import (
    TERMINAL_ALPHA_BAR,
    EDMSchedule,
    Level,
    NoiseSchedule,
    distilled,
    karras,
    leading,
    linspace,
    trailing,
)
from plainsd.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, about diffusers
SD = NoiseSchedule.scaled_linear()
SOLVERS = [("dpmpp_2m", "DPMSolverMultistep"), ("unipc", "UniPCMultistep")]
OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NoiseSchedule.scaled_linear(), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        (NoiseSchedule.linear(), {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (NoiseSchedule.scaled_linear(0.001, 0.01, 200),
         {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear", "num_train_timesteps": 200}),
    ],
)  # fmt: skip
def test_tables_equal_diffusers(ours, theirs):
    expected = diffusers.DDPMScheduler(**theirs).alphas_cumprod.double()  # a float32 table
    assert ours.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours.alphas_cumprod, expected, rtol=2e-5, atol=1e-9)


def test_first_and_last_level_of_stable_diffusion():
    assert SD.sigma_min == pytest.approx(0.029167158, rel=1e-7)
    assert SD.sigma_max == pytest.approx(14.614641, rel=1e-7)
    assert (SD.sigmas[0].item(), SD.sigmas[-1].item()) == (SD.sigma_min, SD.sigma_max)
    assert (SD.sigmas.diff() > 0).all()


def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    bent = SD.zero_terminal_snr()
    torch.testing.assert_close(bent.alphas_cumprod[:-1], expected[:-1], rtol=1e-10, atol=0)
    assert expected[-1] < 1e-30 and bent.alphas_cumprod[-1] == TERMINAL_ALPHA_BAR == 2.0**-24
    assert bent.alphas_cumprod[0].item() == pytest.approx(SD.alphas_cumprod[0].item(), rel=1e-15)
    assert bent.sigma_max == pytest.approx(4096, rel=1e-6)
    assert SD.sigma_max < 15, "the table that was bent has changed"


@pytest.mark.parametrize("schedule", [SD, SD.zero_terminal_snr(), NoiseSchedule.cosine()])
def test_timestep_and_sigma_are_inverse(schedule):
    for timestep in (0.0, 0.5, 1.0, 17.25, 500.0, 998.5, 999.0):
        assert schedule.timestep(schedule.sigma(timestep)) == pytest.approx(timestep, abs=1e-9)
    for timestep in (0, 1, 500, 999):
        assert schedule.sigma(timestep) == pytest.approx(schedule.sigmas[timestep].item(), rel=1e-14)
    middle = (schedule.sigmas[700] * schedule.sigmas[701]).sqrt().item()
    assert schedule.timestep(middle) == pytest.approx(700.5, abs=1e-9)
    assert type(schedule.sigma(3)) is float and type(schedule.timestep(1.0)) is float


def test_levels_outside_the_table_have_its_end_timesteps():
    assert SD.timestep(1e-4) == 0.0 and SD.timestep(1e4) == 999.0


def test_spacings_by_hand():
    assert leading(1000, 50)[:2] + leading(1000, 50)[-2:] == [981, 961, 21, 1]
    assert leading(1000, 7) == [853, 711, 569, 427, 285, 143, 1]
    assert leading(1000, 1000) == list(range(999, -1, -1))  # no room for the offset
    assert trailing(1000, 4) == [999, 749, 499, 249]
    assert trailing(1000, 1) == linspace(1000, 1) == [999]
    assert linspace(1000, 5) == [999, 749.25, 499.5, 249.75, 0]
    assert distilled(1000, 4) == [999, 759, 499, 259]
    assert karras(0.1, 10.0, 3)[1] == pytest.approx(((0.1 ** (1 / 7) + 10 ** (1 / 7)) / 2) ** 7)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "scheduler"), [("ddim", "DDIM"), ("euler", "EulerDiscrete"), *SOLVERS])
def test_timestep_spacings_equal_diffusers_for_every_number_of_steps(name, scheduler, spacing):
    theirs = getattr(diffusers, f"{scheduler}Scheduler")(**OPTIONS, timestep_spacing=spacing)
    for steps in range(2, 121):  # for 1 step diffusers' linspace begins at the clean end
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy()[:steps]  # trailing gives one too many, -1, for 61 and 103
        found = sampler_levels(SD, name, steps, spacing).timesteps
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
        if name != "ddim":
            found = sampler_levels(SD, name, steps, spacing).sigmas[:-1]
            np.testing.assert_allclose(found, theirs.sigmas[:steps], rtol=2e-5)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(("name", "scheduler"), [("euler", "EulerDiscrete"), *SOLVERS])
def test_level_spacings_equal_diffusers_for_every_number_of_steps(name, scheduler, spacing):
    theirs = getattr(diffusers, f"{scheduler}Scheduler")(**OPTIONS, **{f"use_{spacing}_sigmas": True})
    for steps in range(2, 121):
        theirs.set_timesteps(steps)
        np.testing.assert_allclose(sampler_levels(SD, name, steps, spacing).sigmas, theirs.sigmas, rtol=2e-5)
        found = np.array(sampler_levels(SD, name, steps, spacing).timesteps)
        off = np.abs(found - theirs.timesteps.numpy())
        if name == "euler":
            assert off.max() < 2e-3  # their table is float32
        else:  # where that tips the rounding, to the next whole or from it, timesteps may be one off
            exact = np.array([SD.timestep(sigma) for sigma in sampler_levels(SD, name, steps, spacing).sigmas[:-1]])
            tipping = np.abs((exact + (0.5 if spacing == "karras" else 0) + 0.5) % 1 - 0.5) < 2e-3
            assert off.max() <= 1 and (off[~tipping] == 0).all()
        assert found[[0, -1]] == pytest.approx([999, 0], abs=0 if name != "euler" else 1e-9)


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_levels_that_end_at_the_first_of_the_table_count_it_among_them(name):
    """diffusers' DDIM and PLMS choose no levels. Ours are those of the formula with the end as its last point: no step
    goes nowhere."""
    low, high = SD.sigma_min, SD.sigma_max
    for steps in (1, 2, 10, 50):
        found = sampler_levels(SD, name, steps, "exponential").sigmas
        np.testing.assert_allclose(found, np.exp(np.linspace(np.log(high), np.log(low), steps + 1)), rtol=1e-12)
        found = sampler_levels(SD, name, steps, "karras").sigmas
        np.testing.assert_allclose(found, np.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1) ** 7, rtol=1e-12)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.sampled_from(list(SAMPLERS)), st.sampled_from(shared_spacings()), st.integers(1, 998))
def test_every_row_of_levels_falls_inside_the_table(name, spacing, steps):
    for schedule in (SD, SD.zero_terminal_snr()):
        sigmas = sampler_levels(schedule, name, steps, spacing).sigmas
        aligned = spacing.startswith("align")  # its levels are published with three digits
        assert schedule.sigma_min * (0.99 if aligned else 0.999999) <= sigmas[-2] <= sigmas[0]
        assert sigmas[0] <= schedule.sigma_max * (1.01 if aligned else 1.000001)
        assert all(a > b for a, b in zip(sigmas[:-2], sigmas[1:-1], strict=True)) and sigmas[-2] >= sigmas[-1]
        timesteps = sampler_levels(schedule, name, steps, spacing).timesteps
        assert len(timesteps) == len(sigmas) - 1 and all(0 <= t <= 999 for t in timesteps)
        if spacing not in ("ddim_uniform", "beta"):  # the first may have more, the second fewer
            assert len(timesteps) == steps


def test_too_many_steps_are_refused_with_the_limit():
    with pytest.raises(UserError, match="steps 51 is more than the 50"):
        distilled(1000, 51)
    with pytest.raises(UserError, match="steps 201 is out of range; choose 1 to 200"):
        sampler_levels(NoiseSchedule.scaled_linear(count=200), "ddpm", 201)


@pytest.mark.parametrize(
    ("like", "last"),
    [
        (None, 2.0**-24),
        ("diffusers", 2.0**-24),
        ("a1111", 4.8973451890853435e-08),
        ("comfyui", 4.8973451890853435e-08),
    ],
)
def test_each_program_ends_a_zero_snr_table_in_its_own_way(like, last):
    """ComfyUI's rescale_zero_terminal_snr_sigmas and A1111's rescale_zero_terminal_snr_abar set this last alpha_bar."""
    bent, highest = SD.zero_terminal_snr(), ((1 - last) / last) ** 0.5
    assert highest == pytest.approx(4096 if last == 2.0**-24 else 4518.76, rel=2e-6)
    found = planned_levels(bent, "euler", 20, "karras", like)
    np.testing.assert_allclose(found.sigmas[:-1], karras(bent.sigma_min, highest, 20), rtol=1e-12)
    assert found.timesteps[0] == 999
    assert whole_row(bent, "euler", 20, "karras", like, 0.5)[0] == pytest.approx(highest, rel=1e-12)
    between = (bent.sigmas[998].item() * highest) ** 0.5
    told = told_timestep(bent, "dpm2", like)
    if last == 2.0**-24:
        assert told is None and bent.timestep(between) == pytest.approx(998.5)
    elif like == "a1111":
        assert told(between) == pytest.approx(998.5) and told(Level(between, 7.0)) == 7.0
        assert told_timestep(SD, "dpm2", like) is None
    else:
        assert (told(between * 0.99), told(between * 1.01)) == (998, 999)
    assert bent.sigma_max == pytest.approx(4096, rel=1e-6), "the model's own table has changed"
    for other in (SD, NoiseSchedule.cosine(), EDMSchedule()):
        assert schedule_like(other, like) is other
