"""What networks predict, guidance, inpainting and training targets, against diffusers and against their definitions."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from plainsd.diffusion.denoiser import (
    PREDICTIONS,
    add_noise,
    denoiser,
    guided,
    inpainting,
    interval,
    min_snr_weight,
    network_input,
    output_from,
    perturbed,
    projected,
    rescaled,
    thresholded,
    train_target,
    x0_from,
)
from plainsd.diffusion.samplers import SAMPLERS, sampler_levels
from plainsd.diffusion.schedule import Level, NoiseSchedule
from plainsd.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
SHAPE = (2, 4, 6, 6)


def random(*seeds: int, dtype=torch.float64) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
            for seed in seeds]  # fmt: skip


# What networks predict.


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_a_perfect_network_gives_back_the_clean_latent(prediction, timestep):
    """The training target, seen through `denoiser` at the level it was made for, is x0 again."""
    for schedule in (SD, ZERO_SNR):
        x0, noise = random(1, 2)
        alpha_bar = schedule.alphas_cumprod[[timestep, timestep]]

        def predict(x, told):
            torch.testing.assert_close(x, network_input(x0, noise, alpha_bar), rtol=1e-12, atol=1e-12)  # noqa: B023
            assert told == pytest.approx(timestep, abs=1e-9)
            return train_target(prediction, x0, noise, alpha_bar)  # noqa: B023

        sigma = schedule.sigmas[timestep].item()
        found = denoiser(predict, schedule, prediction)(add_noise(x0, noise, sigma), sigma)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-15 * (1 + sigma) * 100)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_output_from_is_the_inverse(prediction):
    x, output = random(1, 2)
    for sigma in (0.03, 1.0, 14.6, 4096.0):
        back = output_from(prediction, x, x0_from(prediction, x, output, sigma), sigma)
        torch.testing.assert_close(back, output, rtol=1e-11, atol=1e-11)


def test_v_loses_no_digits_at_huge_levels():
    """In float32 at sigma 4096: through epsilon the estimate is off by 1e-4, through v by the last digit."""
    x0, noise, network_error = random(1, 2, 3)
    sigma = 4096.0
    x = add_noise(x0, noise, sigma)
    v = output_from("v_prediction", x, x0 + 0.1 * network_error, sigma)
    exact = x0_from("v_prediction", x, v, sigma)
    rough = x0_from("v_prediction", x.float(), v.float(), sigma)
    assert (rough - exact).abs().max() < 1e-6
    epsilon = output_from("epsilon", x, exact, sigma)
    assert (x0_from("epsilon", x.float(), epsilon.float(), sigma) - exact).abs().max() > 1e-5


def test_the_network_is_told_the_level_or_what_the_sampler_says():
    told = []
    denoise = denoiser(lambda x, t: told.append((x, t)) or x, SD, "epsilon")
    x = torch.ones(SHAPE)
    denoise(x, Level(2.0, 17.0))
    denoise(x, SD.sigma(321.5))
    assert told[0][1] == 17.0 and told[1][1] == pytest.approx(321.5)
    torch.testing.assert_close(told[0][0], x / math.sqrt(5))


def test_unknown_predictions_are_named():
    with pytest.raises(UserError, match="unknown prediction 'epsilom'; did you mean 'epsilon'"):
        denoiser(lambda x, t: x, SD, "epsilom")
    x, alpha_bar = torch.ones(SHAPE), torch.tensor([0.5, 0.5])
    for call in (
        lambda: x0_from("velocity", x, x, 1.0),
        lambda: output_from("velocity", x, x, 1.0),
        lambda: train_target("velocity", x, x, alpha_bar),
        lambda: min_snr_weight("velocity", alpha_bar),
    ):
        with pytest.raises(UserError, match="unknown prediction 'velocity'"):
            call()


# Guidance.

SIGMA = 2.5


def outputs_as_estimates(prediction: str, x: Tensor, *outputs: Tensor):
    return lambda x_, sigma: tuple(x0_from(prediction, x, output, SIGMA) for output in outputs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guidance_on_x0_is_guidance_on_the_prediction(prediction):
    x, prompted, plain = random(1, 2, 3)
    denoise = guided(outputs_as_estimates(prediction, x, prompted, plain), 7.5)
    expected = x0_from(prediction, x, plain + 7.5 * (prompted - plain), SIGMA)
    torch.testing.assert_close(denoise(x, SIGMA), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_equals_diffusers(prediction, phi):
    x, prompted, plain = random(1, 2, 3)
    mixed = plain + 7.5 * (prompted - plain)
    expected = x0_from(prediction, x, rescale_noise_cfg(mixed, prompted, guidance_rescale=phi), SIGMA)
    found = rescaled(outputs_as_estimates(prediction, x, prompted, plain), 7.5, phi, prediction)(x, SIGMA)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_thresholded_at_limit_one_equals_diffusers():
    prompted, plain = random(2, 3)
    prompted[1] *= 0.01  # a sample within the limit stays as it is
    plain[1] *= 0.01
    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    mixed = plain + 3.0 * (prompted - plain)
    found = thresholded(lambda x, sigma: (prompted, plain), 3.0, percentile=0.9, limit=1.0)(plain, SIGMA)
    torch.testing.assert_close(found, scheduler._threshold_sample(mixed))
    assert found[0].abs().max() == 1 and torch.equal(found[1], mixed[1])


def test_thresholded_keeps_the_reach_of_the_prompted_estimate():
    prompted, plain = random(2, 3)
    mixed = plain + 9.0 * (prompted - plain)
    found = thresholded(lambda x, sigma: (prompted, plain), 9.0, percentile=0.95)(plain, SIGMA)
    for sample in range(2):
        reach = prompted[sample].abs().flatten().quantile(0.95)
        assert mixed[sample].abs().max() > 5 * reach
        torch.testing.assert_close(found[sample].abs().max(), reach)
    assert (found * mixed >= 0).all()  # pushed inwards, never across
    halfway = thresholded(lambda x, sigma: (prompted, plain), 0.5, percentile=0.95)(plain, SIGMA)
    assert torch.equal(halfway, plain + 0.5 * (prompted - plain))  # within that reach: it stays as it is
    blank = torch.zeros(SHAPE)
    assert torch.equal(thresholded(lambda x, sigma: (blank, blank), 9.0)(blank, SIGMA), blank)


def test_interval_asks_only_one():
    asked = []
    denoise = interval(lambda x, s: asked.append(("inside", s)), lambda x, s: asked.append(("outside", s)), 1.0, 5.0)
    for sigma in (7.0, 5.0, 3.0, 1.0, 0.5):
        denoise(torch.ones(1), sigma)
    assert asked == [("outside", 7.0), ("inside", 5.0), ("inside", 3.0), ("outside", 1.0), ("outside", 0.5)]


def test_perturbed_is_the_formula_on_the_prediction():
    """Ahn et al. 2024, as diffusers' pipelines write it."""
    x, prompted, plain, blurred = random(1, 2, 3, 4)
    denoise = perturbed(outputs_as_estimates("epsilon", x, prompted, plain, blurred), 5.0, 3.0)
    expected = plain + 5.0 * (prompted - plain) + 3.0 * (prompted - blurred)
    torch.testing.assert_close(denoise(x, SIGMA), x0_from("epsilon", x, expected, SIGMA), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("limit", "parallel", "momentum"), [(15.0, 1.0, 0.0), (2.5, 0.0, -0.5), (4.0, 0.3, -0.75)])
def test_projected_equals_diffusers(limit, parallel, momentum):
    """Over several calls, whose differences add up. The paper's formula is what diffusers calls the original one."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    told = iter([random(1, 2), random(3, 4), random(5, 6)])
    denoise = projected(lambda x, sigma: next(told), 7.5, limit, parallel, momentum)
    buffer = MomentumBuffer(momentum)
    for cond, uncond in (random(1, 2), random(3, 4), random(5, 6)):
        expected = normalized_guidance(cond, uncond, 6.5, buffer, parallel, limit, use_original_formulation=True)
        torch.testing.assert_close(denoise(cond, SIGMA), expected, rtol=1e-12, atol=1e-12)


def test_projected_is_plain_guidance_where_nothing_is_held_back():
    cond, uncond = random(1, 2)
    found = projected(lambda x, sigma: (cond, uncond), 5.0, 1e9, 1.0)(cond, SIGMA)
    torch.testing.assert_close(found, uncond + 5.0 * (cond - uncond), rtol=1e-12, atol=1e-12)
    blank = torch.zeros(SHAPE)
    assert torch.equal(projected(lambda x, sigma: (blank, blank), 5.0, 2.0)(blank, SIGMA), blank)


# Inpainting.


def bent(x: Tensor, timestep: float) -> Tensor:
    """A network whose answer depends on the neighbours too, so that the known part is felt in the unknown."""
    return 0.9 * x + 0.2 * torch.tanh(x.roll(1, -1) + float(timestep) / 500)


def diffusers_inpainting(scheduler, monkeypatch, steps, known, mask, noise, fresh):
    """The loop of StableDiffusionInpaintPipeline at strength 1; returns the end and all that the network was shown."""
    module = __import__(type(scheduler).__module__, fromlist=["_"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh), raising=False)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, shown = noise * scheduler.init_noise_sigma, []
    for index, timestep in enumerate(scheduler.timesteps):
        shown.append(scheduler.scale_model_input(x, timestep))
        x = scheduler.step(bent(shown[-1], timestep), timestep, x).prev_sample
        put_back = known
        if index < len(scheduler.timesteps) - 1:
            put_back = scheduler.add_noise(known, noise, scheduler.timesteps[index + 1 : index + 2])
        x = (1 - mask) * put_back + mask * x
    return x, shown


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("ddim", "DDIM", {"clip_sample": False, "set_alpha_to_one": False}),
        ("plms", "PNDM", {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("euler", "EulerDiscrete", {}),
        ("euler_a", "EulerAncestralDiscrete", {}),
        ("heun", "HeunDiscrete", {}),
        ("dpmpp_2m", "DPMSolverMultistep", {}),
        ("unipc", "UniPCMultistep", {}),
    ],
)
def test_inpainting_equals_diffusers(monkeypatch, name, scheduler, options):
    known, noise, *fresh = random(*range(1, 16), dtype=torch.float32)
    mask = (random(99)[0][:1, :1] > 0.3).float()  # (1, 1, H, W)
    reference = getattr(diffusers, f"{scheduler}Scheduler")(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **options
    )
    expected, expected_shown = diffusers_inpainting(reference, monkeypatch, 10, known, mask, noise, iter(fresh))

    shown, draws = [], iter(fresh)
    levels = sampler_levels(SD, name, 10)
    sigmas = levels.sigmas
    inner = denoiser(lambda x, t: shown.append(x) or bent(x, t), SD, "epsilon")
    denoise = inpainting(inner, known, mask, noise, start=sigmas[0])
    steps = list(SAMPLERS[name].run(denoise, noise * levels.first_scale, sigmas, lambda: next(draws)))

    assert len(shown) == len(expected_shown)
    for ours, theirs in zip(shown, expected_shown, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    end = steps[-1].x
    scale = math.sqrt(1 + sigmas[-1] ** 2)  # of DDIM and PLMS, whose scheduler works at unit variance
    painted = mask.bool().expand(SHAPE)
    torch.testing.assert_close(end[painted] / scale, expected[painted], rtol=0, atol=2e-5 * expected.abs().max())
    assert torch.equal(steps[-1].denoised[~painted], known[~painted])
    if sigmas[-1] == 0:
        assert torch.equal(end[~painted], known[~painted])


def test_inpainting_without_start_shows_the_known_part_at_every_level():
    known, noise, x = random(1, 2, 3)
    mask, shown = torch.zeros(1, 1, 6, 6, dtype=torch.float64), []
    mask[..., :3] = 1
    inpainting(lambda x, sigma: shown.append(x) or x, known, mask, noise)(x, 14.6)
    torch.testing.assert_close(shown[0][..., 3:], (known + 14.6 * noise)[..., 3:])
    assert torch.equal(shown[0][..., :3], x[..., :3])


# Training.


@pytest.mark.parametrize("zero_snr", [False, True])
def test_training_input_and_targets_equal_diffusers(zero_snr):
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    schedule = ZERO_SNR if zero_snr else SD
    x0, noise = random(1, 2, dtype=torch.float32)
    timesteps = torch.tensor([3, 999])  # each sample its own
    alpha_bar = schedule.alphas_cumprod[timesteps]
    close = {"rtol": 0, "atol": 1e-3 if zero_snr else 1e-5}  # diffusers trains at alpha_bar 0, not 2**-24
    torch.testing.assert_close(network_input(x0, noise, alpha_bar), scheduler.add_noise(x0, noise, timesteps), **close)
    velocity = train_target("v_prediction", x0, noise, alpha_bar)
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, noise, timesteps), **close)
    assert velocity.dtype == torch.float32
    assert torch.equal(train_target("epsilon", x0, noise, alpha_bar), noise)
    assert torch.equal(train_target("sample", x0, noise, alpha_bar), x0)
    if zero_snr:
        torch.testing.assert_close(velocity[1], -x0[1], rtol=0, atol=2e-3)  # pure noise in, the picture wanted


def test_min_snr_weights():
    """Hang et al. 2023: the same error of x0 weighs min(SNR, gamma), whichever form of it is predicted."""
    alpha_bar = SD.alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(min_snr_weight("sample", alpha_bar), snr.clamp(max=5))
    torch.testing.assert_close(min_snr_weight("epsilon", alpha_bar) * snr, snr.clamp(max=5))
    high = snr > 5  # below, v keeps weight 1 and does not follow SNR to 0
    torch.testing.assert_close((min_snr_weight("v_prediction", alpha_bar) * (snr + 1))[high], snr[high].clamp(max=5))
    assert (min_snr_weight("v_prediction", alpha_bar)[snr < 4] == 1).all()
    assert min_snr_weight("epsilon", alpha_bar, gamma=1.0).max() == 1 and high.any() and not high.all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_finite_at_the_ends(prediction):
    weights = min_snr_weight(prediction, torch.tensor([0.0, 2.0**-24, 1.0], dtype=torch.float64))
    assert weights.isfinite().all()
    if prediction != "sample":
        assert weights.tolist() == [1, 1, 0]
