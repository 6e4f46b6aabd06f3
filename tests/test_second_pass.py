"""The second pass of hires: how latents are enlarged, and what it draws with where that differs from the first."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_sd

from plainsd.diffusion.samplers import Levels, Step, sampler_levels
from plainsd.errors import UserError
from plainsd.generate import text_to_image
from plainsd.pictures import sampling
from plainsd.pictures.defaults import enlarged_size
from plainsd.pictures.sampling import second_pass, steps_to_run
from plainsd.pictures.settings import LATENT_MODES, UPSCALERS, Settings, notes, ratio_to
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.pictures.texts.labels import UPSCALER_LABELS
from plainsd.pictures.upscaling import Upscaler


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


def drawn(sd, **options):
    """The latents at the end of each pass, and the levels of the second."""
    events = text_to_image(sd, "x", steps=3, seed=1, sampler="euler", hires=1.5, **options)
    steps = [event for event in events if isinstance(event, Step)]
    return steps[2].x, [step.x for step in steps[3:]], [step.sigma for step in steps[3:]]


@pytest.mark.parametrize("upscaler", LATENT_MODES)
def test_latents_are_enlarged_as_pytorch_does_it(sd, upscaler, monkeypatch):
    mode, antialias = LATENT_MODES[upscaler]
    seen = []
    monkeypatch.setattr(Levels, "from_picture", lambda self, x, noise: seen.append(x) or x + noise)
    first, _, _ = drawn(sd, upscaler=upscaler, strength=0.7)
    height, width = (side * 3 // 2 for side in first.shape[-2:])
    assert torch.allclose(seen[0], F.interpolate(first, (height, width), mode=mode, antialias=antialias), atol=1e-6)


def test_the_modes_are_pytorchs():
    assert LATENT_MODES == {
        "latent": ("bilinear", False),
        "latent-antialiased": ("bilinear", True),
        "latent-bicubic": ("bicubic", False),
        "latent-bicubic-antialiased": ("bicubic", True),
        "latent-nearest": ("nearest", False),
        "latent-nearest-exact": ("nearest-exact", False),
    }


def test_each_way_of_enlarging_gives_another_picture(sd):
    """Antialiasing may act only where a picture becomes smaller."""
    ends = {name: drawn(sd, upscaler=name, strength=0.7)[1][-1] for name in LATENT_MODES}
    pairs = [(a, b) for a in ends for b in ends if a < b and torch.equal(ends[a], ends[b])]
    assert set(pairs) <= {("latent", "latent-antialiased"), ("latent-bicubic", "latent-bicubic-antialiased")}


def test_the_names_are_a1111s():
    assert list(UPSCALERS) == [*LATENT_MODES, "lanczos"] == list(UPSCALER_LABELS)
    for name, label in UPSCALER_LABELS.items():
        for text in (label, label.upper(), name):
            assert parse_settings(f"x\nSteps: 3, Hires upscale: 2, Hires upscaler: {text}, Seed: 1").upscaler == name


@pytest.mark.parametrize(("typed", "name"), [("Lanczos", "lanczos"), ("Latent-Nearest", "latent-nearest"),
                                             ("2X_own", "2x_Own")])  # fmt: skip
def test_an_upscaler_is_found_in_any_capitals_and_recorded_by_its_own_name(typed, name, monkeypatch):
    sd = tiny_sd()
    sd.upscaler = Upscaler("2x_Own", 2, None)
    monkeypatch.setattr("plainsd.pictures.drawing.upscaled", lambda image, upscaler, size: image.resize(size))
    *_, pictures = text_to_image(sd, "x", steps=1, hires=1.5, strength=1.0, upscaler=typed)
    assert pictures.settings[0].upscaler == name and pictures.images[0].size == (96, 96)


@pytest.mark.parametrize(
    ("steps", "strength", "whole"), [(4, 0.5, 8), (3, 0.7, 4), (5, 1.0, 5), (2, 0.999, 2), (3, 0.3, 10), (1, 0.7, 1)]
)
def test_steps_of_its_own_all_run(sd, steps, strength, whole):
    """They are the last of a longer drawing, as long as the strength says."""
    _, ends, sigmas = drawn(sd, hires_steps=steps, strength=strength)
    assert sigmas == list(sampler_levels(sd.schedule, "euler", whole).sigmas[-steps:]) and len(ends) == steps


def test_another_sampler_has_its_own_spacing(sd):
    events = text_to_image(sd, "x", steps=3, sampler="euler", hires=1.5, hires_sampler="ddim", strength=1.0)
    one = events.settings[0]
    assert (one.sampler, one.spacing, one.hires_sampler, one.hires_spacing) == ("euler", "linspace", "ddim", "leading")
    assert second_pass(one).sampler == "ddim" and steps_to_run(sd, one) - one.steps == 3 and events.steps == 6
    sigmas = [event.sigma for event in events if isinstance(event, Step)]
    assert sigmas[3:] == list(sampler_levels(sd.schedule, "ddim", 3, "leading").sigmas[1:])
    same = text_to_image(sd, "x", steps=3, spacing="karras", hires=1.5, hires_sampler="ddim").settings[0]
    assert same.hires_spacing == "karras"


@pytest.mark.parametrize(
    ("again", "same"),
    [
        ({"hires_prompt": "xylophone"}, {"hires_prompt": "x"}),
        ({"hires_negative": "blurred"}, {"hires_negative": ""}),
        ({"hires_guidance": 3.0}, {"hires_guidance": 7.0}),
        ({"hires_spacing": "karras"}, {"hires_spacing": "linspace"}),
        ({"hires_sampler": "heun"}, {"hires_sampler": "euler"}),
    ],
)
def test_what_it_draws_with(sd, again, same):
    """It changes the second pass, and nothing of the first."""
    first, plain, _ = drawn(sd, strength=0.7, guidance=7.0)
    for changes, equal in ((again, False), (same, True)):
        other, changed, _ = drawn(sd, strength=0.7, guidance=7.0, **changes)
        assert torch.equal(first, other) and torch.equal(plain[-1], changed[-1]) == equal


def test_a_guidance_of_0_is_off_in_it_too(sd):
    off, one, formula = (
        text_to_image(sd, "x", "y", steps=4, hires=1.5, **choices)
        for choices in ({"hires_guidance": 0.0}, {"hires_guidance": 1.0}, {"hires_guidance": 0.0, "like": "a1111"})
    )
    assert off.settings[0].hires_guidance == second_pass(off.settings[0]).guidance == 1
    assert formula.settings[0].hires_guidance == 0
    (*_, a), (*_, b) = off, one
    assert torch.equal(a.latents, b.latents)
    assert notes(Settings(hires_guidance=0.0))[0].startswith("hires guidance 0 is off")


@pytest.mark.parametrize(("sampler", "hires_sampler", "steps", "before"),
                         [("euler_a", "dpmpp_sde", 6, 3), ("heun", "euler", 3, 6), ("heun", None, 6, 6)])  # fmt: skip
def test_a1111_counts_the_steps_of_each_pass_by_its_own_sampler(sd, monkeypatch, sampler, hires_sampler, steps, before):
    """`firstpass_steps` and `total_steps` of its `calculate_hr_conds`."""
    seen, real = [], sampling.encode_prompt
    monkeypatch.setattr(sampling, "encode_prompt", lambda *args, first_pass, **more: (
        seen.append((args[3], first_pass)) or real(*args, first_pass=first_pass, **more)))  # fmt: skip
    options = {"steps": 3, "hires": 1.5, "strength": 1.0, "like": "a1111", "hires_sampler": hires_sampler}
    *_, _ = text_to_image(sd, "a [b:1.5]", sampler=sampler, **options)
    assert seen == [(before, None), (steps, before)]


def test_what_needs_it_is_refused_without_it(sd):
    for choices, says in (
        ({"hires_steps": 3}, "hires steps has no effect without hires"),
        ({"hires_guidance": 2.0}, "hires guidance has no effect without hires"),
        ({"strength": 0.5}, "strength 0.5 needs a picture, or hires"),
    ):
        with pytest.raises(UserError, match=says):
            text_to_image(sd, "x", **choices)


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"hires_sampler": "eular"}, "unknown sampler 'eular'"),
        ({"hires_spacing": "x"}, "unknown spacing 'x'"),
        ({"hires_steps": 0}, "hires steps 0 is out of range"),
        ({"hires_steps": 500, "strength": 0.1}, "500 steps at strength 0.1 are the last ones of 5000"),
        ({"hires_guidance": 101.0}, "hires guidance 101.0 is out of range"),
        ({"hires_prompt": "a <lora:b:1>"}, "take the tag out"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_drawn(sd, choices, says):
    with pytest.raises(UserError, match=says):
        text_to_image(sd, "x", hires=1.5, **choices)


def test_a1111s_size_is_cut_to_whole_latents(sd):
    assert enlarged_size((360, 512), 1.4) == (504, 720)
    assert enlarged_size((360, 512), 1.4, like="a1111") == (496, 712)  # 360 * 1.4 is a little less than 504
    for like, side in (("a1111", 72), ("comfyui", 80), (None, 80)):
        *_, pictures = text_to_image(sd, "x", steps=2, hires=1.2, strength=1.0, sampler="euler", like=like)
        assert pictures.images[0].size == (side, side)


def test_a_size_that_a_float_falls_short_of_is_reached():
    for side in range(256, 1025, 8):
        for wanted in range(side, 2049, 8):
            assert enlarged_size((side, 8), ratio_to((wanted, 0), (side, 8)), like="a1111")[0] == wanted


def test_a1111s_words_for_it():
    read = parse_settings(
        "x\nNegative prompt: y\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1, "
        'Size: 64x64, Denoising strength: 0.5, Hires upscale: 2, Hires steps: 8, Hires sampler: "DPM++ 2M", '
        'Hires schedule type: Karras, Hires prompt: "a, b", Hires negative prompt: c, Hires CFG Scale: 5, '
        "Hires upscaler: Latent (nearest-exact), Version: v1.10.1"
    )
    assert (read.hires, read.upscaler, read.hires_steps) == (2, "latent-nearest-exact", 8)
    assert (read.hires_sampler, read.hires_spacing, read.hires_guidance) == ("dpmpp_2m", "karras", 5)
    assert (read.hires_prompt, read.hires_negative, read.other) == ("a, b", "c", ())
    same = parse_settings("x\nSteps: 20, Seed: 1, Hires upscale: 2, Hires steps: 0, Hires sampler: Use same sampler, "
                          "Hires schedule type: Use same scheduler, Hires prompt: , Hires CFG Scale: 0")  # fmt: skip
    assert (same.hires_steps, same.hires_sampler, same.hires_spacing, same.hires_prompt) == (None,) * 4
    assert same.hires_guidance is None and same.other == () and isinstance(same, Settings)
    own = parse_settings("x\nSteps: 20, Seed: 1, Hires upscale: 2, Hires schedule type: Automatic")
    assert own.hires_spacing == "automatic" and own.other == ()
    assert parse_settings(format_settings(own)).hires_spacing == "automatic"


@pytest.mark.parametrize(("asked", "drawn"), [("automatic", "uniform"), (None, None), ("simple", "simple")])
def test_an_automatic_schedule_is_that_of_the_second_sampler(sd, asked, drawn):
    made = text_to_image(
        sd, "x", steps=2, hires=1.5, sampler="euler", spacing="karras", hires_spacing=asked, like="a1111"
    )
    assert made.settings[0].hires_spacing == drawn
