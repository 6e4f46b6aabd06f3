"""Models in the form of Karras et al. 2022 (EDM): Playground 2.5, CosXL. Beside diffusers' schedulers and pipelines."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_XL, pipeline, seeded, tiny_sd
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file

import plainsd
from plainsd.cli import main
from plainsd.diffusion.denoiser import denoiser, output_from, x0_from
from plainsd.diffusion.samplers import SAMPLERS, sampler_levels
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.files.config_noise import read_schedule
from plainsd.files.config_vae import read_vae
from plainsd.files.tensorfile import open_tensors
from plainsd.models.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore")
PLAYGROUND, COSXL = VARIANTS["playground-v2.5"], VARIANTS["cosxl"]
FIELDS = {
    "playground": {name: getattr(PLAYGROUND, name) for name in ("schedule", "prediction", "spacing")},
    "cosxl": {name: getattr(COSXL, name) for name in ("schedule", "prediction", "spacing")},
}
TINY_PLAYGROUND = replace(
    TINY_XL,
    vae=replace(
        TINY_XL.vae,
        scaling_factor=0.5,
        latents_mean=PLAYGROUND.vae.latents_mean,
        latents_std=PLAYGROUND.vae.latents_std,
    ),
    **FIELDS["playground"],
    sampler="dpmpp_2m",
)
TINY_COSXL = replace(TINY_XL, **FIELDS["cosxl"], sampler="euler")
CPU = {"device": "cpu", "dtype": "float32"}


def answer(x, timestep):
    """Stands for a network: it depends on both of its inputs."""
    return torch.tanh(1.3 * x) * (0.2 + timestep) + 0.1 * x.roll(1, -1)


def settings(sigma_schedule, prediction_type, schedule):
    names = ("sigma_min", "sigma_max", "sigma_data", "rho")
    own = {name: getattr(schedule, name) for name in names}
    return own | {"sigma_schedule": sigma_schedule, "prediction_type": prediction_type}


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("kind", "sampler"), [(EDMEulerScheduler, "euler"), (EDMDPMSolverMultistepScheduler, "dpmpp_2m")]
)
@pytest.mark.parametrize(
    ("theirs", "ours", "schedule"),
    [
        ("epsilon", "edm", PLAYGROUND.schedule),
        ("v_prediction", "v_prediction", COSXL.schedule),
        ("v_prediction", "v_prediction", EDMSchedule(0.01, 30.0, 0.7, 5.0)),
    ],
)
def test_trajectories_equal_diffusers(theirs, ours, schedule, kind, sampler, spacing, steps):
    """The levels, what the network is told of them, the first latent, and where it all ends, in float64."""
    if spacing == "exponential" and steps == 1:
        pytest.skip("a single exponential step begins at sigma_min in diffusers 0.42.1, on noise of sigma_max")
    scheduler = kind(**settings(spacing, theirs, schedule))
    scheduler.set_timesteps(steps)
    levels = sampler_levels(schedule, sampler, steps, spacing)
    sigmas = levels.sigmas
    torch.testing.assert_close(torch.tensor(list(map(float, sigmas))), scheduler.sigmas.float(), rtol=3e-6, atol=0)
    torch.testing.assert_close(torch.tensor(levels.timesteps), scheduler.timesteps.float(), rtol=0, atol=1e-6)

    noise = torch.randn(2, 4, 6, 6, generator=seeded(0), dtype=torch.float64)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = answer(scheduler.scale_model_input(x, timestep), timestep.double())
        x = scheduler.step(output, timestep, x).prev_sample
    denoise = denoiser(answer, schedule, ours)
    *_, last = SAMPLERS[sampler].run(denoise, noise * levels.first_scale, sigmas, None)
    torch.testing.assert_close(last.x, x, rtol=2e-4, atol=2e-5)  # their levels are float32


@pytest.mark.parametrize("prediction", ["edm", "v_prediction"])
def test_output_is_the_inverse_in_any_unit(prediction):
    x, output = torch.randn(2, 1, 4, 6, 6, generator=seeded(1), dtype=torch.float64)
    for sigma in (0.002, 0.7, 80.0):
        x0 = x0_from(prediction, x, output, sigma, 0.5)
        back = output_from(prediction, x, x0, sigma, 0.5)
        torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)


def test_what_the_network_is_told_goes_both_ways():
    schedule = EDMSchedule()
    assert schedule.timestep(schedule.sigma(0.37)) == pytest.approx(0.37)
    assert schedule.build() is schedule and len(schedule) == 1000


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(
    ("variant", "kind"), [(TINY_PLAYGROUND, "EDMDPMSolverMultistepScheduler"), (TINY_COSXL, "EDMEulerScheduler")]
)
def test_a_picture_equals_diffusers(tmp_path, variant, kind, rescale):
    """Text to image from a folder that we wrote and they read, and that they read as theirs."""
    sd = tiny_sd(variant)
    plainsd.save(sd, tmp_path / "m")
    config = json.loads((tmp_path / "m/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == kind
    pipe = pipeline("StableDiffusionXLPipeline", tmp_path / "m", kind)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "width": 64, "height": 64, "guidance_rescale": rescale}
    theirs = pipe("a cat", negative_prompt="a dog", generator=seeded(3), output_type="latent", **options).images
    again = plainsd.load(tmp_path / "m", **CPU)
    assert again.variant == replace(variant, name=again.variant.name)
    *_, ours = plainsd.text_to_image(again, "a cat", "a dog", seed=3, steps=6, guidance=3.0, rescale=rescale)
    scale = theirs.abs().max()
    assert (ours.latents - theirs).abs().max() / scale < 2e-4
    picture = pipe("a cat", negative_prompt="a dog", generator=seeded(3), **options).images[0]
    from conftest import difference

    assert difference(ours.images[0], picture) <= 1


def test_a_picture_drawn_over_equals_diffusers(tmp_path):
    """The normalisation of latents on the way in, and first levels in the middle of the row."""
    from conftest import smooth_picture

    plainsd.save(tiny_sd(TINY_PLAYGROUND), tmp_path / "m")
    sd, photo = plainsd.load(tmp_path / "m", **CPU), smooth_picture(64)
    pixels = plainsd.pictures.images.to_tensor(photo)
    latents = sd.vae.encode(pixels).mean
    std, mean = (torch.tensor(getattr(sd.vae.config, f"latents_{name}")).view(1, 4, 1, 1) for name in ("std", "mean"))
    expected = (latents - mean) * 0.5 / std  # StableDiffusionXLImg2ImgPipeline.prepare_latents
    torch.testing.assert_close(sd.vae.config.scaled(latents), expected)
    torch.testing.assert_close(sd.vae.config.unscaled(expected), latents)
    *_, done = plainsd.image_to_image(sd, "a cat", photo, 0.5, steps=6)
    assert done.latents.isfinite().all() and done.settings[0].spacing == "karras"


@pytest.mark.parametrize("name", ["playground-v2.5", "cosxl"])
def test_single_files_of_others(tmp_path, monkeypatch, name):
    """Read by the tensors that ComfyUI reads, and written with them."""
    from test_detect import header_of

    import plainsd.files.detect

    variant = VARIANTS[name]
    file = header_of(variant)
    plainsd.save(tiny_sd(TINY_PLAYGROUND if name != "cosxl" else TINY_COSXL), tmp_path / "m.safetensors")
    written = load_file(tmp_path / "m.safetensors")
    words = {key: value for key, value in written.items() if key.startswith("edm_")}
    if name == "cosxl":
        assert {key: value.item() for key, value in words.items()} == pytest.approx(
            {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}
        )
    else:
        assert words["edm_mean"].shape == words["edm_std"].shape == (1, 4, 1, 1)
        assert tuple(words["edm_std"].flatten().tolist()) == pytest.approx(variant.vae.latents_std)
    stored = {key: found for key, found in open_tensors(tmp_path / "m.safetensors").tensors.items() if key in words}
    found, certain = plainsd.files.detect.detect(replace(file, tensors=file.tensors | stored))
    assert certain and found.name == name
    assert (found.schedule.sigma_max, found.schedule.sigma_data) == (
        variant.schedule.sigma_max,
        variant.schedule.sigma_data,
    )
    assert (found.prediction, found.spacing) == (variant.prediction, variant.spacing)
    assert found.vae.latents_std == pytest.approx(variant.vae.latents_std)
    again = plainsd.load(tmp_path / "m.safetensors", **CPU)
    assert again.schedule == (TINY_PLAYGROUND if name != "cosxl" else TINY_COSXL).schedule


def test_spacings_and_samplers_that_need_a_table_are_refused(tmp_path):
    sd = tiny_sd(TINY_COSXL)
    with pytest.raises(UserError, match="spacing 'linspace' chooses among trained timesteps.*karras or exponential"):
        plainsd.text_to_image(sd, "a cat", spacing="linspace")
    with pytest.raises(UserError, match="spacing 'distilled'"):
        plainsd.text_to_image(sd, "a cat", sampler="lcm")
    for sampler in ("ddim", "plms", "unipc", "heun", "dpm2", "dpmpp_3m_sde", "dpmpp_sde"):
        *_, done = plainsd.text_to_image(sd, "a cat", sampler=sampler, steps=3)
        assert done.latents.isfinite().all()
    sd.refiner = tiny_sd(replace(TINY_XL, name="r"))
    with pytest.raises(UserError, match="cannot refine"):
        plainsd.text_to_image(sd, "a cat")


def test_training_and_prediction_flags_are_refused(tmp_path, capsys):
    from plainsd.train.methods.finetune import frozen

    with pytest.raises(UserError, match="trained at all noise levels .EDM."):
        frozen(tiny_sd(TINY_COSXL))
    plainsd.save(tiny_sd(TINY_COSXL), tmp_path / "m")
    assert main(["generate", "x", "--model", str(tmp_path / "m"), "--prediction", "epsilon"]) == 2
    said = capsys.readouterr().err
    assert "its own settings say what it predicts" in said and said.count("\n") == 1


def test_info_tells_it(tmp_path, capsys):
    plainsd.save(tiny_sd(TINY_PLAYGROUND), tmp_path / "m")
    assert main(["info", str(tmp_path / "m")]) == 0
    assert "all levels (EDM), sigma 0.002 to 80 around 0.5" in capsys.readouterr().out


# --- scheduler settings ----------------------------------------------------------------------------------------------

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    "kind",
    ["FlowMatchEulerDiscreteScheduler", "CosineDPMSolverMultistepScheduler", "CogVideoXDDIMScheduler", "SCMScheduler",
     "ScoreSdeVeScheduler", "IPNDMScheduler", "UnCLIPScheduler", "VQDiffusionScheduler", "NoSuchScheduler"],
)  # fmt: skip
def test_other_schedulers_are_refused_by_name(kind):
    with pytest.raises(UserError, match=f"x: the scheduler '{kind}' .*not supported; choose a model made with"):
        read_schedule(TABLE | {"_class_name": kind}, "x")
    with pytest.raises(UserError, match=kind):
        read_schedule(TABLE, "x", kind)


def test_schedulers_that_differ_by_the_sampler_alone_are_one():
    """Every scheduler of diffusers that any Stable Diffusion pipeline can take instead of another."""
    compatible = {kind.__name__ for kind in EulerDiscreteScheduler().compatibles} | {"DDIMScheduler", "LCMScheduler"}
    expected = read_schedule(TABLE, "x")
    assert len(compatible) > 10
    for kind in compatible - {"EDMEulerScheduler"}:
        assert read_schedule(TABLE | {"_class_name": kind}, "x") == expected, kind


@pytest.mark.parametrize(
    ("setting", "value"),
    [("prediction_type", "flow_prediction"), ("trained_betas", [0.1, 0.2]), ("thresholding", True),
     ("beta_schedule", "laplace"), ("beta_schedule", "exp"), ("use_flow_sigmas", True), ("snr_shift_scale", 3.0),
     ("timestep_spacing", "odd"), ("variance_type", "learned_range"), ("timestep_type", "continuous")],
)  # fmt: skip
def test_settings_that_would_change_the_noise_are_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        read_schedule(TABLE | {"_class_name": "DPMSolverMultistepScheduler", setting: value}, "x")


def test_settings_that_are_honoured():
    kind = {"_class_name": "EulerDiscreteScheduler"}
    assert read_schedule(TABLE | kind | {"use_karras_sigmas": True}, "x")["spacing"] == "karras"
    assert read_schedule(TABLE | kind | {"use_exponential_sigmas": True}, "x")["spacing"] == "exponential"
    assert read_schedule(TABLE | {"use_karras_sigmas": True}, "x")["spacing"] is None  # DDIM does not know it
    assert read_schedule(TABLE | {"prediction_type": "sample"}, "x")["prediction"] == "sample"
    zero = read_schedule(TABLE | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "x")
    assert zero["schedule"].zero_terminal_snr and zero["spacing"] == "trailing"
    with pytest.raises(UserError, match="sigma_max is 50"):
        read_schedule(TABLE | kind | {"use_karras_sigmas": True, "sigma_max": 50}, "x")


def test_continuous_euler_is_edm_in_other_words():
    """Euler's own scheduler, with continuous timesteps, v and karras levels: the same levels and timesteps."""
    config = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True,
              "sigma_min": 0.002, "sigma_max": 700.0}  # fmt: skip
    scheduler = EulerDiscreteScheduler(**TABLE, **config)
    scheduler.set_timesteps(9)
    found = read_schedule(TABLE | config | {"_class_name": "EulerDiscreteScheduler"}, "x")
    assert found["schedule"] == EDMSchedule(0.002, 700.0, 1.0) and found["sampler"] == "euler"
    levels = sampler_levels(found["schedule"], "euler", 9, found["spacing"])
    sigmas = levels.sigmas
    torch.testing.assert_close(torch.tensor(list(map(float, sigmas))), scheduler.sigmas.float(), rtol=3e-6, atol=0)
    torch.testing.assert_close(torch.tensor(levels.timesteps), scheduler.timesteps.float(), rtol=0, atol=1e-6)
    noise = torch.randn(1, 4, 6, 6, generator=seeded(0), dtype=torch.float64)
    output = torch.tanh(noise)
    scheduler.scale_model_input(noise * sigmas[0], scheduler.timesteps[0])
    theirs = scheduler.step(output, scheduler.timesteps[0], noise * sigmas[0]).pred_original_sample
    ours = x0_from(found["prediction"], noise * sigmas[0], output, sigmas[0], 1.0)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"latents_mean": [0.0] * 4}, {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
     {"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, {"latents_mean": "x", "latents_std": [1.0] * 4}],
)  # fmt: skip
def test_bad_moments_of_latents(settings):
    with pytest.raises(UserError, match="latents_"):
        read_vae({"block_out_channels": [32], "layers_per_block": 1} | settings, "x")


def test_training_on_normalised_latents_is_refused(tmp_path, capsys):
    """Whatever the schedule: the cache of latents knows one factor for all channels."""
    from test_finetune import write_pictures

    plainsd.save(tiny_sd(replace(TINY_PLAYGROUND, schedule=TINY_XL.schedule, prediction="epsilon")), tmp_path / "m")
    data = ["--data", str(write_pictures(tmp_path / "pictures", count=2)), "--out", str(tmp_path / "run")]
    assert main(["train", "--method", "lora", "--base", str(tmp_path / "m"), *data, "--device", "cpu"]) == 2
    assert "normalised channel by channel" in capsys.readouterr().err
