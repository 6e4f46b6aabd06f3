"""What A1111 and ComfyUI do otherwise, against their published formulas: levels, pictures drawn over, DDIM's walk."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TINY_REFINER, TINY_XL, difference, tiny_sd
from PIL import Image
from test_edm import TINY_PLAYGROUND

import plainsd
from plainsd.diffusion.conventions import (
    CONVENTIONS,
    automatic_spacing,
    convention,
    planned_levels,
    told_timestep,
    whole_row,
)
from plainsd.diffusion.denoiser import denoiser, inpainting_clean
from plainsd.diffusion.samplers import SAMPLERS, sampler_levels
from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule, karras
from plainsd.errors import UserError
from plainsd.generate import image_to_image, text_to_image
from plainsd.pictures import sampling
from plainsd.pictures.defaults import resolved
from plainsd.pictures.guidance import COND, UNCOND, Estimates
from plainsd.pictures.images import to_pil
from plainsd.pictures.plan import encode_prompt
from plainsd.pictures.sampling import handed_over
from plainsd.pictures.settings import LIKE, Settings

SD = NoiseSchedule.scaled_linear()
TABLE = SD.sigmas.tolist()


def levels(sampler, steps, spacing, like, strength=None, schedule=SD, **more):
    return planned_levels(schedule, sampler, steps, spacing, like, strength, **more)


@pytest.fixture(scope="module")
def sd():
    return plainsd.load(device="cpu", dtype="float32")


# --- levels ----------------------------------------------------------------------------------------------------------


def test_every_program_is_a_choice():
    assert tuple(CONVENTIONS) == LIKE and convention(None) is CONVENTIONS["diffusers"]
    with pytest.raises(UserError, match="unknown like 'comfy'; did you mean 'comfyui'"):
        convention("comfy")


@pytest.mark.parametrize("name", SAMPLERS)
def test_diffusers_is_what_it_was(name):
    own = SAMPLERS[name].spacing
    assert levels(name, 12, own, None) == levels(name, 12, own, "diffusers") == sampler_levels(SD, name, 12, own)
    assert levels(name, 12, own, None, 0.5) == sampler_levels(SD, name, 12, own).part(6)


def test_automatic():
    asked = {name: automatic_spacing("a1111", name, "trailing") for name in SAMPLERS}
    assert [name for name, spacing in asked.items() if spacing == "karras"] == [
        "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2s_a", "dpmpp_sde", "restart"]  # fmt: skip
    assert [name for name, spacing in asked.items() if spacing == "exponential"] == [
        "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2m_sde_heun"]  # fmt: skip
    assert asked["euler"] == asked["unipc"] == "uniform" and asked["ddim"] == asked["plms"] == "ddim_uniform"
    assert automatic_spacing("a1111", "dpm2", None, "simple") == "simple"
    assert automatic_spacing("a1111", "ddim", None, "karras") == "ddim_uniform"  # which A1111 does not ask
    assert automatic_spacing("comfyui", "dpmpp_2m", None) == "uniform"
    assert automatic_spacing(None, "dpmpp_2m", "trailing") == "trailing"
    assert automatic_spacing(None, "dpmpp_2m", None) == "linspace"


def test_timesteps_are_not_rounded_and_no_level_is_left_out():
    rounded = sampler_levels(SD, "dpmpp_2m", 10, "karras")
    for like in ("a1111", "comfyui"):
        found = levels("dpmpp_2m", 10, "karras", like)
        np.testing.assert_allclose(found.sigmas, [*karras(SD.sigma_min, SD.sigma_max, 10), 0], rtol=1e-12)
        assert found.timesteps == [SD.timestep(sigma) for sigma in found.sigmas[:-1]] != rounded.timesteps
    assert sum(timestep % 1 > 1e-6 for timestep in found.timesteps) == 8


@pytest.mark.parametrize("name, like", [("dpm2", "a1111"), ("dpm2_a", "a1111"), ("dpmpp_3m_sde", "a1111"),
                                        ("dpm2", "comfyui"), ("unipc", "comfyui"),
                                        ("unipc_bh2", "comfyui")])  # fmt: skip
def test_the_last_level_but_one_is_dropped(name, like):
    longer, end = karras(SD.sigma_min, SD.sigma_max, 11), 0.001 if name.startswith("unipc") else 0
    np.testing.assert_allclose(levels(name, 10, "karras", like).sigmas, [*longer[:-1], end], rtol=1e-12)
    assert levels("euler", 10, "karras", like).sigmas[-2] == pytest.approx(SD.sigma_min)


def test_comfyui_tells_the_network_whole_timesteps(sd):
    """The entry of the table whose log sigma is nearest; half-way between two, what float32 makes of it on this
    processor: of 999 its own code (0.8.0) takes the upper 334 times on an Intel Xeon, 327 times on Zen 5."""
    for timestep in (0, 3.2, 3.8, 500, 998.7, 999):
        assert SD.nearest(SD.sigma(timestep)) == round(timestep)
    table = SD.sigmas.log().float()
    for low in range(999):  # as k-diffusion's sigma_to_t does, over the whole table
        level = (0.5 * table[low] + 0.5 * table[low + 1]).exp().log()
        assert SD.nearest(SD.sigma(low + 0.5)) == (level - table).abs().argmin() in (low, low + 1)
    told = []
    sd.unet.register_forward_pre_hook(lambda network, given: told.append(float(torch.as_tensor(given[1]).max())))
    run = dict(steps=4, sampler="heun", spacing="karras", guidance=1)
    for like, whole in (("comfyui", True), ("a1111", False)):
        told.clear()
        plainsd.final(text_to_image(sd, "x", like=like, **run))
        assert all(timestep == int(timestep) for timestep in told) is whole
    sd.unet._forward_pre_hooks.clear()


def test_samplers_told_their_ends_run_over_the_whole_table():
    """A1111's DPM fast and adaptive: from the first latent of the schedule that was asked for, over all levels."""
    found = levels("dpm_fast", 10, "ddim_uniform", "a1111")
    assert found.sigmas[0] == pytest.approx(SD.sigma_max) and found.sigmas[-1] == pytest.approx(SD.sigma_min)
    assert len(levels("dpm_fast", 7, "ddim_uniform", "a1111").sigmas) == 8  # where the row itself has one more
    assert found.first_scale == levels("euler", 10, "ddim_uniform", "a1111").sigmas[0] < 10
    row, found = (levels(name, 10, "ddim_uniform", "comfyui").sigmas for name in ("euler", "dpm_fast"))
    assert found[0] == pytest.approx(row[0]) and found[-1] == pytest.approx(row[-2])  # there over the row's own


def test_a1111s_lcm_knows_fifty_entries_of_the_table(sd):
    """Whatever schedule is asked for chooses among timesteps 19, 39 ... 999, and the network is told one of them."""
    found = levels("lcm", 4, automatic_spacing("a1111", "lcm", None), "a1111")
    np.testing.assert_allclose(found.timesteps, [999, 999 - 980 / 3, 19 + 980 / 3, 19], atol=0.2)
    assert found.sigmas[0] == pytest.approx(SD.sigma_max) and found.sigmas[-1] == 0
    few = levels("lcm", 4, "karras", "a1111").sigmas
    np.testing.assert_allclose(few, [*karras(TABLE[19], SD.sigma_max, 4), 0], rtol=1e-6)
    names = []
    sd.unet.register_forward_pre_hook(lambda network, given: names.append(float(torch.as_tensor(given[1]).max())))
    plainsd.final(text_to_image(sd, "x", like="a1111", sampler="lcm", steps=4, guidance=1))
    assert names == [999, 679, 339, 19]
    told = told_timestep(SD, "lcm", "a1111")
    halves = [told(level) for level in levels("lcm", 7, "uniform", "a1111").sigmas[:-1]]
    half = halves.pop(3)  # 509 lies half-way: float32's logarithm decides, on each processor anew
    assert half in (499, 519) and halves == [999, 839, 679, 339, 179, 19]
    assert automatic_spacing("comfyui", "lcm", None) == "distilled"


@pytest.mark.parametrize("bh1", [False, True])
@pytest.mark.parametrize("steps", [4, 9])
def test_unipc_of_third_order_equals_diffusers(bh1, steps):
    """A1111 and ComfyUI run it, with B(h) = h."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample",
        solver_order=3, solver_type="bh1" if bh1 else "bh2", final_sigmas_type="sigma_min",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas, x = scheduler.sigmas.tolist(), torch.tensor([[3.0, -9.0, 0.5]], dtype=torch.float64)
    run = SAMPLERS["unipc"].run(lambda x, sigma: torch.sin(x) / (1 + sigma), x, sigmas, None, order=3, bh1=bh1)
    sample = x / math.sqrt(1 + sigmas[0] ** 2)
    *_, last = run
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        estimate = torch.sin(sample * math.sqrt(1 + sigma**2)) / (1 + sigma)
        sample = scheduler.step(estimate, timestep, sample).prev_sample
    torch.testing.assert_close(last.x, sample * math.sqrt(1 + sigmas[-1] ** 2), rtol=1e-6, atol=1e-6)


def test_the_first_latent():
    high = SD.sigma_max
    assert levels("euler", 10, "uniform", "a1111").first_scale == pytest.approx(high)
    assert levels("euler", 10, "uniform", "comfyui").first_scale == pytest.approx(math.sqrt(1 + high**2))
    low = levels("euler", 10, "ddim_uniform", "comfyui")  # begins below the top
    assert low.first_scale == low.sigmas[0] == pytest.approx(TABLE[901])
    edm = planned_levels(EDMSchedule(), "euler", 10, "karras", "comfyui")
    assert edm.first_scale == pytest.approx(math.sqrt(1 + 80**2))


@pytest.mark.parametrize("like", ["a1111", "comfyui"])
@pytest.mark.parametrize("schedule", [SD, EDMSchedule()], ids=["table", "edm"])
def test_a_picture_gets_the_noise_that_the_network_is_told(schedule, like):
    for strength in (0.2, 0.5):
        found = planned_levels(schedule, "dpmpp_2m", 25, "karras", like, strength)
        assert found.added == found.sigmas[0] < schedule.sigma_max


@pytest.mark.parametrize("steps, strength", [(20, 0.75), (20, 0.7), (20, 1.0), (30, 0.3), (10, 0.04), (7, 0.999)])
def test_a1111_counts_the_steps_on_a_picture(steps, strength):
    whole = levels("euler", steps, "karras", "a1111")
    running = int(min(strength, 0.999) * steps) + 1
    found = levels("euler", steps, "karras", "a1111", strength)
    assert found.sigmas == whole.sigmas[steps - running :] and found.added == found.sigmas[0]


def test_a1111s_second_pass_runs_all_steps_of_a_longer_row():
    found = levels("euler", 20, "karras", "a1111", 0.7, all_run=True)
    assert found.sigmas == levels("euler", 28, "karras", "a1111").sigmas[-21:]
    assert levels("ddim", 20, "ddim_uniform", "a1111", 0.7, all_run=True).timesteps[0] == 1 + 18 * (1000 // 28)


@pytest.mark.parametrize("strength, longer", [(0.5, 40), (0.75, 26), (0.3, 66), (0.99995, 20), (1.0, 20)])
def test_comfyui_runs_the_last_steps_of_a_longer_row(strength, longer):
    found = levels("dpmpp_2m", 20, "karras", "comfyui", strength)
    assert found.sigmas == levels("dpmpp_2m", longer, "karras", "comfyui").sigmas[-21:]
    assert found.added == (found.sigmas[0] if longer > 20 else pytest.approx(math.sqrt(1 + SD.sigma_max**2)))


@pytest.mark.parametrize("like", ["a1111", "comfyui"])
def test_no_strength_is_no_step(like):
    with pytest.raises(UserError, match="strength 0 of 20 steps leaves none to run"):
        levels("euler", 20, "karras", like, 0)
    if like == "a1111":
        with pytest.raises(UserError, match="20 steps leave ddim none to run on this picture"):
            levels("ddim", 20, "ddim_uniform", like, 0.05)


@pytest.mark.parametrize("steps, top, calls", [(20, 951, 19), (28, 981, 28), (50, 981, 49), (30, 991, 30)])
def test_a1111s_ddim_counts_timesteps_not_calls(steps, top, calls):
    for name in ("ddim", "plms", "ddim_cfg_pp"):
        found = levels(name, steps, "ddim_uniform", "a1111")
        assert found.timesteps[0] == top and len(found.timesteps) == calls
        assert found.sigmas[-1].timestep == 1 and found.sigmas[-1] == pytest.approx(TABLE[1])
    unipc = levels("unipc", steps, "uniform", "a1111")
    assert len(unipc.timesteps) == calls + 1 and unipc.timesteps[0] == 999 and unipc.sigmas[-1].timestep == 0


def test_dpm_fast_is_told_the_ends():
    whole, part = (levels("dpm_fast", 12, "uniform", "a1111", strength) for strength in (None, 0.5))
    assert len(whole.sigmas) == 13 and len(part.sigmas) == 8
    assert (whole.sigmas[0], whole.sigmas[-1]) == (pytest.approx(SD.sigma_max), pytest.approx(SD.sigma_min))
    row = levels("euler", 12, "uniform", "a1111", 0.5).sigmas
    assert (part.sigmas[0], part.sigmas[-1]) == (pytest.approx(row[0]), pytest.approx(row[-2]))


def perfect(x, timestep):
    """A network for a picture of normal distribution, mean 0.5 and spread 0.3: x has unit variance."""
    sigma = SD.sigma(float(timestep))
    x = x * math.sqrt(1 + sigma**2)
    x0 = (0.09 * x + sigma**2 * 0.5) / (0.09 + sigma**2)
    return (x - x0) / sigma


@pytest.mark.parametrize("steps", [20, 28])
@pytest.mark.parametrize("strength", [None, 0.75])
def test_a1111s_ddim_is_equation_12_on_its_timesteps(steps, strength):
    """Song et al. 2020 in the network's coordinates; a picture is noised one timestep above where the walk begins."""
    generator = torch.Generator().manual_seed(3)
    noise, picture = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    alphas = SD.alphas_cumprod
    walked = list(range(1, 1000, 1000 // steps))
    x = noise
    if strength:
        before = int(strength * steps)
        a = alphas[walked[before]]
        x, walked = a.sqrt() * picture + (1 - a).sqrt() * noise, walked[:before]
    for t, t_next in pairwise(reversed(walked)):
        a, a_next, eps = alphas[t], alphas[t_next], perfect(x, t)
        x = a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
    plan = levels("ddim", steps, "ddim_uniform", "a1111", strength)
    first = plan.from_picture(picture, noise) if strength else plan.from_noise(noise)
    *_, last = SAMPLERS["ddim"].run(denoiser(perfect, SD, "epsilon"), first, plan.sigmas, None)
    torch.testing.assert_close(plan.clean(last.x, last.sigma), x, rtol=1e-10, atol=1e-10)


def test_a_row_that_ends_above_zero_is_decoded_as_it_is():
    x = torch.ones(1)
    assert levels("euler", 5, "kl_optimal_a1111", "a1111").clean(x, 0.029) == 1
    assert levels("euler", 5, "kl_optimal_a1111", None).clean(x, 0.029) < 1


# --- whole pictures --------------------------------------------------------------------------------------------------


def test_what_is_left_open(sd):
    def chosen(**more):
        one = resolved(sd, Settings(**more))
        return one.spacing, one.like

    assert chosen(sampler="dpmpp_2m", like="a1111") == ("karras", "a1111")
    assert chosen(sampler="dpmpp_2m", like="comfyui") == ("uniform", "comfyui")
    assert chosen(sampler="euler", like="diffusers") == chosen(sampler="euler")
    assert resolved(sd, Settings(guidance=0, like="comfyui")).guidance == 0
    assert resolved(sd, Settings(guidance=0, like="diffusers")).guidance == 1


HIGHEST = 4518.7636987  # level of A1111 and ComfyUI for the embedded model, whose table ends at zero SNR


def euler(sd, x, sigmas, plan, guidance, steps=None):
    """k-diffusion's Euler, in double since it begins at sigma 4519; `steps` says which text each call reads."""
    x = x.double()
    estimates = Estimates(sd, [plan], None, sigmas, [guidance], sd.unet, calls=iter(steps) if steps else None)
    for sigma, sigma_next in pairwise(sigmas):
        cond, uncond = estimates(x.float(), sigma, COND, UNCOND)
        slope = (x - (uncond + guidance * (cond - uncond))) / sigma
        x = x + slope * (sigma_next - sigma)
    return x.float()


@torch.inference_mode()
@pytest.mark.parametrize("like", ["a1111", "comfyui"])
def test_text_to_image(sd, like):
    chosen = {"sampler": "euler", "steps": 4, "guidance": 3, "seed": 5, "noise": "cpu"}
    events = text_to_image(sd, "a red apple", "blurred", like=like, **chosen)
    *_, last = events
    row, high = levels("euler", 4, "uniform", like, schedule=sd.schedule), HIGHEST
    noise = torch.randn(last.latents.shape, generator=torch.Generator().manual_seed(5))
    scale = high if like == "a1111" else math.sqrt(1 + high**2)
    plan = encode_prompt(sd, "a red apple", "blurred", 4, like=like, size=(64, 64))
    expected = euler(sd, noise * scale, row.sigmas, plan, 3.0)
    torch.testing.assert_close(last.latents, expected, rtol=1e-4, atol=1e-5)
    assert last.settings[0].spacing == "uniform" and last.settings[0].like == like


@torch.inference_mode()
def test_edits_count_calls_and_the_first_one_as_none(sd):
    """A1111: of [a:b:2] three calls read a; all steps count on a picture, whether they run or not."""
    steps, chosen = 6, {"sampler": "euler", "steps": 6, "guidance": 3, "seed": 5}
    *_, last = text_to_image(sd, "[red:blue:2] apple", like="a1111", noise="cpu", **chosen)
    noise = torch.randn(last.latents.shape, generator=torch.Generator().manual_seed(5))
    plan = encode_prompt(sd, "[red:blue:2] apple", "", steps, like="a1111", size=(64, 64))
    assert [texts[1] for texts in plan.parts] == [("red apple",) * 3 + ("blue apple",) * 4]
    row = levels("euler", steps, "uniform", "a1111", schedule=sd.schedule)
    expected = euler(sd, noise * HIGHEST, row.sigmas, plan, 3.0, range(steps))
    torch.testing.assert_close(last.latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "like, sampler, spacing, runs", [("a1111", "euler", "karras", 5), ("comfyui", "euler", "karras", 8),
                                     ("a1111", "ddim", None, 3), ("a1111", "dpmpp_2m", "ddim_uniform", 6),
                                     (None, "euler", None, 4)]
)  # fmt: skip
def test_as_many_steps_are_told_as_come(sd, like, sampler, spacing, runs):
    image = to_pil(torch.zeros(1, 3, 64, 64))[0]
    events = image_to_image(
        sd, "a", image, strength=0.5, like=like, sampler=sampler, spacing=spacing, steps=8, guidance=1
    )
    assert events.steps == len(list(events)) - 1 == runs - (spacing == "ddim_uniform")
    hires = text_to_image(sd, "a", hires=1.5, like=like, sampler=sampler, spacing=spacing, steps=8, guidance=1)
    assert hires.steps == len(list(hires)) - 1


def test_a1111_hands_over_at_the_nearest_timestep():
    either = handed_over(lambda x, sigma: "model", lambda x, sigma: "refiner", SD, 0.8)
    middle = (TABLE[199] + TABLE[200]) / 2
    assert [either(None, sigma) for sigma in (14.0, TABLE[200], middle + 1e-6, middle - 1e-6, TABLE[199], 0.05)] == [
        "model", "model", "model", "refiner", "refiner", "refiner"]  # fmt: skip
    assert either(None, 14.0) == "refiner"  # also where a sampler goes back up, as restart does


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "ddim_uniform"])
def test_comfyui_hands_over_after_a_share_of_the_steps(spacing):
    """At the second node's `start_at_step`, whatever the timestep there."""
    sd, calls = tiny_sd(TINY_XL), []
    sd.refiner = tiny_sd(TINY_REFINER)
    for letter, unet in (("b", sd.unet), ("R", sd.refiner.unet)):
        unet.register_forward_pre_hook(lambda *_, letter=letter: calls.append(letter))
    options = {"steps": 10, "guidance": 1, "sampler": "euler", "spacing": spacing, "size": 32, "like": "comfyui"}
    plainsd.final(text_to_image(sd, "a", handover=0.7, **options))
    drawn, calls[:] = "".join(calls), []
    assert drawn.rstrip("R") == "b" * 7 and drawn[7:].strip("R") == ""
    photo = to_pil(torch.zeros(1, 3, 32, 32))[0]
    del options["size"]
    plainsd.final(image_to_image(sd, "a", photo, 0.5, handover=0.7, **options))
    assert "".join(calls)[:8] == "bbbbbbbR"


def test_of_two_passes_a1111_refines_the_second():
    """`hires_fix_refiner_pass` is "second pass" unless somebody chose another."""
    sd, calls = tiny_sd(TINY_XL), []
    sd.refiner = tiny_sd(TINY_REFINER)
    for letter, unet in (("b", sd.unet), ("R", sd.refiner.unet)):
        unet.register_forward_pre_hook(lambda *_, letter=letter: calls.append(letter))
    options = {"steps": 6, "guidance": 1, "sampler": "euler", "handover": 0.5, "size": 32, "like": "a1111"}
    plainsd.final(text_to_image(sd, "a", **options))
    one, calls[:] = "".join(calls), []
    plainsd.final(text_to_image(sd, "a", hires=2.0, **options))
    first, second = "".join(calls)[:6], "".join(calls)[6:]
    assert one == "bbbRRR" and first == "bbbbbb" and second.lstrip("b").strip("R") == "" and "R" in second


@pytest.mark.parametrize(
    ("like", "sampler", "shown"),
    [("a1111", "euler_a", 0.0), ("a1111", "ddim", "clean"), ("comfyui", "euler_a", math.inf), (None, "ddim", math.inf)],
)
def test_what_the_network_sees_outside_a_mask(monkeypatch, like, sampler, shown):
    """A1111 blends the known latents into the estimate alone, but into the input of samplers of timesteps."""
    seen, real = [], (sampling.inpainting, sampling.inpainting_clean)
    monkeypatch.setattr(sampling, "inpainting", lambda *args, start: seen.append(start) or real[0](*args, start=start))
    monkeypatch.setattr(sampling, "inpainting_clean", lambda *args: seen.append("clean") or real[1](*args))
    photo, mask = to_pil(torch.zeros(1, 3, 64, 64))[0], Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    options = {"steps": 4, "sampler": sampler, "like": like, "guidance": 1, "strength": 0.75}
    (drawn,) = plainsd.final(plainsd.inpaint(tiny_sd(), "a", photo, mask, **options))
    assert seen == [shown] and difference(Image.composite(photo, drawn, mask), photo) == 0


def test_clean_latents_are_shown_as_a1111_shows_them():
    """In its own coordinates, x scaled by sqrt(alpha_bar): the kept part of the network's input is the known latent,
    and the noise it finds there and x give the estimate."""
    generator, sigma = torch.Generator().manual_seed(0), 2.5
    x, known = (torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).double()
    alpha, noise = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)

    def network(scaled):
        return torch.tanh(1.7 * scaled) + 0.1 * scaled.roll(1, -1)

    shown = (x * alpha) * mask + known * (1 - mask)
    expected = (x * alpha - noise * network(shown)) / alpha
    found = inpainting_clean(lambda z, s: z - s * network(z * alpha), known, mask)(x, sigma)
    assert (found - expected).abs().max() < 1e-12


# --- rows that are too long, models without timesteps -----------------------------------------------------------------


def test_a_row_longer_than_the_table_is_said_by_its_strength():
    for like, more in (("comfyui", {}), ("a1111", {"all_run": True}), (None, {"all_run": True})):
        with pytest.raises(UserError, match="20 steps at strength 0.015 .* 1333, .* strength of at least 0.02"):
            levels("euler", 20, "karras", like, 0.015, **more)
        assert len(levels("euler", 20, "karras", like, 0.02, **more).sigmas) >= 21
    for like in (None, "comfyui", "a1111"):
        whole = whole_row(SD, "dpmpp_2m_sde", 20, "karras", like, 0.5, all_run=True)
        assert whole[0] == pytest.approx(max(levels("dpmpp_2m_sde", 40, "karras", like).sigmas))
    assert len(whole_row(SD, "dpmpp_2m_sde", 1000 - 1, "karras", None, 1.0, all_run=True)) == 1000
    with pytest.raises(UserError, match="leaves none to run"):
        levels("euler", 300, "beta", "a1111", 0.005)  # beta has no level twice


@pytest.mark.parametrize("sampler", ["ddim", "plms", "unipc", "ddim_cfg_pp"])
def test_edm_models_have_no_timesteps_to_choose_among(sampler):
    sd = tiny_sd(TINY_PLAYGROUND)
    assert resolved(sd, Settings(sampler=sampler, like="a1111")).spacing == "karras"
    assert resolved(sd, Settings(sampler=sampler, like="a1111", spacing="exponential")).spacing == "exponential"
    with pytest.raises(UserError, match="sa_solver adds noise between timesteps 200 and 800"):
        resolved(sd, Settings(sampler="sa_solver", eta=0.5))
    assert resolved(sd, Settings(sampler="sa_solver")).eta is None
