"""From prompts to pictures: equal to diffusers' pipelines, repeatable in any batch, each option does what it says."""

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, difference, pipeline, seeded, smooth_picture, tiny_sd
from PIL import Image

import plainsd
from plainsd.diffusion.noise import slerp
from plainsd.diffusion.samplers import SAMPLERS, Step
from plainsd.errors import UserError
from plainsd.generate import final, image_to_image, inpaint, outpaint, text_to_image
from plainsd.models.control import ControlConfig, control_of, hint_widths
from plainsd.pictures import guidance
from plainsd.pictures.control import Control
from plainsd.pictures.images import to_mask, to_tensor
from plainsd.pictures.model import StableDiffusion

LONG = "a red apple on a table, " * 5  # 120 byte tokens: two chunks


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return tiny_sd()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return smooth_picture(64)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    light = Image.new("L", (64, 64))
    light.paste(255, (16, 8, 48, 40))
    return light


def x_of(events) -> list[torch.Tensor]:
    return [event.x for event in events if isinstance(event, Step)]


# --- equal to diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sd):
    """The tiny models as diffusers folders: the ordinary one, and one of nine channels for inpainting."""
    place = tmp_path_factory.mktemp("models")
    plainsd.save(sd, place / "tiny")
    plainsd.save(tiny_sd(in_channels=9), place / "nine")
    plainsd.save(tiny_sd(TINY_XL), place / "xl")
    plainsd.save(tiny_sd(TINY_REFINER), place / "refiner")
    return place


def test_the_original_default_is_diffusers_picture(sd, folders):
    """50 steps of PLMS at guidance 7.5, two prompts, each with its own seed."""
    pipe = pipeline("StableDiffusionPipeline", folders / "tiny", "PNDMScheduler", skip_prk_steps=True)
    prompts = ["a red apple", "a green pear on a table"]
    theirs = pipe(prompts, negative_prompt=["blurred"] * 2, num_inference_steps=50, guidance_scale=7.5, height=64,
                  width=72, generator=[seeded(3), seeded(4)]).images  # fmt: skip
    ours = final(text_to_image(sd, prompts, "blurred", sampler="plms", steps=50, guidance=7.5, size=(72, 64), seed=3))
    assert all(difference(a, b) <= 1 for a, b in zip(ours, theirs, strict=True))
    assert difference(ours[0], ours[1]) > 50 and np.asarray(ours[0]).std() > 20


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("seed", [3, 2**40 + 3])
def test_guidance_0_and_long_seeds_are_as_in_diffusers(sd, folders, scale, seed):
    """Both follow the prompt plainly, without the negative one; both read the low 32 bits of a seed."""
    pipe = pipeline("StableDiffusionPipeline", folders / "tiny", "DDIMScheduler")
    theirs = pipe("a red apple", negative_prompt="blurred", num_inference_steps=3, guidance_scale=scale, height=64,
                  width=64, generator=seeded(seed)).images[0]  # fmt: skip
    choices = {"sampler": "ddim", "spacing": "leading", "steps": 3, "size": 64}
    events = text_to_image(sd, "a red apple", "blurred", guidance=scale, seed=seed, **choices)
    ours = final(events)[0]
    assert events.settings[0].guidance == 1 and difference(ours, theirs) <= 1
    assert difference(ours, final(text_to_image(sd, "a red apple", guidance=1, seed=3, **choices))[0]) == 0
    other = final(
        text_to_image(sd, "a red apple", "blurred", guidance=0, like="a1111", noise="cpu", seed=seed, **choices)
    )[0]
    assert difference(other, final(text_to_image(sd, "blurred", guidance=1, seed=3, **choices))[0]) <= 1


def test_seeds_from_python(sd):
    (one,), (other,) = (text_to_image(sd, "x", seed=-1).settings for _ in range(2))
    assert one.seed != other.seed and 0 <= min(one.seed, other.seed) and max(one.seed, other.seed) < 2**32
    (drawn,) = text_to_image(sd, "x", seed=None).settings
    (whole,) = text_to_image(sd, "x", seed=7.0, steps=2.0, size=[64.0, 64], interval=[0.0, 9.0]).settings
    assert drawn.seed >= 0 and (whole.seed, whole.steps, whole.size) == (7, 2, (64, 64))
    for seed, says in ((1.5, "not a whole number; choose 1"), (-2, "out of range"), (2**64, "out of range")):
        with pytest.raises(UserError, match=says):
            text_to_image(sd, "x", seed=seed)


SCHEDULERS = [
    ("ddim", "leading", "DDIMScheduler", {}),
    ("euler", "linspace", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("dpmpp_2m", "karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize("sampler, spacing, scheduler, options", SCHEDULERS)
def test_image_to_image_is_diffusers_picture(sd, folders, photo, sampler, spacing, scheduler, options):
    pipe = pipeline("StableDiffusionImg2ImgPipeline", folders / "tiny", scheduler, **options)
    theirs = pipe("a red apple", photo, strength=0.65, num_inference_steps=9, generator=seeded(3)).images[0]
    ours = final(image_to_image(sd, "a red apple", photo, 0.65, steps=9, sampler=sampler, spacing=spacing, seed=3))[0]
    assert difference(ours, theirs) <= 1
    assert difference(ours, photo) > 50


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("folder, channels", [("tiny", 4), ("nine", 9)])
def test_inpainting_is_diffusers_picture(folders, photo, mask, folder, channels, strength):
    pipe = pipeline("StableDiffusionInpaintPipeline", folders / folder, "DDIMScheduler")
    theirs = pipe("a red apple", photo, mask, strength=strength, num_inference_steps=8, height=64, width=64,
                  generator=seeded(3)).images[0]  # fmt: skip
    ours = final(inpaint(tiny_sd(in_channels=channels), "a red apple", photo, mask, strength, steps=8, sampler="ddim",
                         spacing="leading", seed=3))[0]  # fmt: skip
    hole = (16, 8, 48, 40)
    assert difference(ours.crop(hole), theirs.crop(hole)) <= 1
    assert difference(ours.crop(hole), photo.crop(hole)) > 50
    assert difference(Image.composite(photo, ours, mask), photo) == 0  # bit-exact outside


@pytest.mark.parametrize("negative", ["", "blurred"])
def test_sdxl_is_diffusers_picture(folders, negative):
    """Its sizes are told to the network; an empty negative prompt is all zeros."""
    pipe = pipeline("StableDiffusionXLPipeline", folders / "xl", "DDIMScheduler")
    theirs = pipe("a red apple", negative_prompt=negative or None, num_inference_steps=5, guidance_scale=5.0, height=64,
                  width=96, generator=seeded(3)).images[0]  # fmt: skip
    ours = final(text_to_image(tiny_sd(TINY_XL), "a red apple", negative, steps=5, guidance=5, size=(96, 64), seed=3,
                               sampler="ddim", spacing="leading"))[0]  # fmt: skip
    assert difference(ours, theirs) <= 1 and np.asarray(ours).std() > 20


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("sampler, scheduler, options", [
    ("ddim", "DDIMScheduler", {}), ("plms", "PNDMScheduler", {"skip_prk_steps": True}),
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
])  # fmt: skip
def test_latents_are_diffusers(tmp_path, prediction, rescale, sampler, scheduler, options):
    """To the fifth digit, where pictures have but two: those of DDIM and PLMS end with a little noise, at their scale.
    Rescaled guidance measures what the network predicts, which is not the noise everywhere."""
    sd = tiny_sd(replace(TINY, prediction=prediction))
    plainsd.save(sd, tmp_path / "m")
    pipe = pipeline("StableDiffusionPipeline", tmp_path / "m", scheduler, **options)
    theirs = pipe("a red apple", num_inference_steps=6, guidance_scale=7.5, guidance_rescale=rescale, height=64,
                  width=64, generator=seeded(3), output_type="latent").images  # fmt: skip
    *_, ours = text_to_image(sd, "a red apple", steps=6, guidance=7.5, rescale=rescale, sampler=sampler, seed=3,
                             spacing="leading")  # fmt: skip
    assert (ours.latents - theirs).abs().max() < 3e-5 * theirs.abs().max()


@pytest.mark.parametrize("handover, own", [(0.5, 5), (0.499, 5), (0.498, 4), (0.099, 1), (0.098, 0), (1.0, 10)])
def test_the_refiner_takes_over_below_the_timestep_of_its_share(handover, own):
    """Of the timesteps 901, 801, ..., 1 the base draws those of round(1000 - 1000 * handover) and above, that one
    included (diffusers' denoising_end)."""
    sd, calls = tiny_sd(TINY_XL), {"base": 0, "refiner": 0}
    sd.refiner = tiny_sd(TINY_REFINER)
    for name, unet in (("base", sd.unet), ("refiner", sd.refiner.unet)):
        unet.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    events = text_to_image(sd, "x", steps=10, guidance=1, sampler="ddim", spacing="leading", handover=handover)
    assert [event.index for event in events if isinstance(event, Step)] == list(range(10))
    assert calls == {"base": own, "refiner": 10 - own}


def test_the_refiner_is_diffusers_picture(folders, photo):
    pipe = pipeline("StableDiffusionXLImg2ImgPipeline", folders / "refiner", "DDIMScheduler")
    theirs = pipe("a red apple", image=photo, strength=0.6, num_inference_steps=5, guidance_scale=5.0,
                  generator=seeded(3)).images[0]  # fmt: skip
    ours = final(image_to_image(tiny_sd(TINY_REFINER), "a red apple", photo, 0.6, steps=5, guidance=5, seed=3,
                                sampler="ddim", spacing="leading"))[0]  # fmt: skip
    assert difference(ours, theirs) <= 1 and difference(ours, photo) > 50


def test_perturbed_guidance_needs_attention_in_the_refiner_too():
    sd = tiny_sd(TINY_XL)
    sd.refiner = tiny_sd(replace(TINY_REFINER, unet=replace(TINY_REFINER.unet, mid_depth=0)))
    with pytest.raises(UserError, match="in the UNet's middle, which its refiner lacks"):
        text_to_image(sd, "x", perturbed=3.0)


def test_a_task_gives_its_pictures_once(sd):
    events = text_to_image(sd, "x", steps=1, size=32)
    assert len(final(events)) == 1
    with pytest.raises(UserError, match="has ended before"):
        final(events)


def test_a_network_that_takes_the_scale_has_one_row_with_cfg_pp_too():
    sd, rows = tiny_sd(guidance_dim=12), []
    sd.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    drawn = [final(text_to_image(sd, "a cat", steps=2, size=32, sampler=name)) for name in ("euler", "euler_cfg_pp")]
    assert rows == [1, 1, 1, 1] and difference(*(pictures[0] for pictures in drawn)) == 0


# --- repeatable -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["plms", "euler_a", "dpmpp_sde", "lcm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_picture_of_a_batch_equals_the_picture_alone(sampler, dtype):
    sd = tiny_sd().to(dtype=dtype)
    prompts = ["a red apple", LONG, "a (green:1.3) [pear:plum:0.5]"]
    together = list(text_to_image(sd, prompts, ["", "bad", LONG], seed=5, sampler=sampler))
    for i, (prompt, negative) in enumerate(zip(prompts, ["", "bad", LONG], strict=True)):
        alone = list(text_to_image(sd, prompt, negative, seed=5 + i, sampler=sampler))
        if dtype == torch.float64:  # in float32 some processors round by the size of the batch
            assert torch.allclose(alone[0].x[0], together[0].x[i], atol=1e-4)
        assert difference(alone[-1].images[0], together[-1].images[i]) <= 1
        assert alone[-1].settings[0] == together[-1].settings[i]


def test_count_repeats_each_prompt_and_counts_seeds(sd):
    *_, (images, settings, latents) = text_to_image(sd, ["a", "b"], seed=5, count=2)
    assert [(one.prompt, one.seed) for one in settings] == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]
    assert len(images) == len(latents) == 4 and latents.shape == (4, 4, 8, 8)


def test_settings_make_the_picture_again(sd, photo):
    options = {"guidance": 3, "sampler": "dpmpp_2m_sde", "spacing": "karras", "eta": 0.5, "clip_skip": 2}
    options |= {"rescale": 0.3}
    *_, first = text_to_image(sd, "a [b|c]", "d", seed=5, steps=5, size=(72, 64), **options)
    again = {k: v for k, v in vars(first.settings[0]).items() if k not in ("model", "other")}
    assert difference(final(text_to_image(sd, **again))[0], first.images[0]) == 0


def test_the_first_latent_is_unit_noise_at_the_first_level(sd):
    """The estimate of a network that answers nothing is x itself: one Euler step from the first latent shows it."""
    silent = tiny_sd()
    torch.nn.init.zeros_(silent.unet.conv_out.weight)
    torch.nn.init.zeros_(silent.unet.conv_out.bias)
    first = next(text_to_image(silent, "x", seed=5, sampler="ddim", steps=10, guidance=1))
    sigma = silent.schedule.sigma(901)
    assert torch.allclose(first.x[0], torch.randn(4, 8, 8, generator=seeded(5)) * (1 + sigma**2) ** 0.5, rtol=1e-5)


# --- calls and precision ----------------------------------------------------------------------------------------------


@pytest.fixture
def batches(sd):
    """The batch sizes with which the UNet is called."""
    sizes = []
    handle = sd.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


def test_one_call_a_step_and_none_without_need(sd, batches):
    final(text_to_image(sd, "x", steps=3, count=2))
    final(text_to_image(sd, "x", steps=3, count=2, guidance=1))
    final(text_to_image(sd, "x", steps=1, guidance=1, perturbed=2.0))
    final(text_to_image(sd, "x", steps=1, perturbed=2.0))
    assert batches == [4] * 3 + [2] * 3 + [2] + [3]


def test_inference_mode_stays_inside(sd):
    events = text_to_image(sd, "x")
    assert next(events).x.is_inference() and not torch.is_inference_mode_enabled()
    events.close()
    with pytest.raises(StopIteration):
        next(events)
    assert not torch.is_inference_mode_enabled()


def test_steps_foretell_the_events(sd, photo):
    two_passes = text_to_image(sd, "x", steps=5, hires=1.5)
    over = image_to_image(sd, "x", photo, steps=5, sampler="heun")
    assert (two_passes.steps, over.steps) == (8, 3)
    assert len(x_of(two_passes)) == 8 and len(x_of(over)) == 3


def test_latents_stay_float32_around_a_bfloat16_network(sd):
    low = tiny_sd().to(dtype=torch.bfloat16)
    events = list(text_to_image(low, "x", steps=2, guidance=2))
    assert low.dtype == torch.bfloat16 and events[0].x.dtype == events[-1].latents.dtype == torch.float32
    exact = list(text_to_image(sd, "x", steps=2, guidance=2))
    assert 0 < (events[-1].latents - exact[-1].latents).abs().mean() < 0.2


def test_a_decode_that_overflows_is_done_again_and_said(sd):
    hot = tiny_sd()
    with torch.no_grad():
        hot.vae.decoder.conv_in.weight *= 3e4  # a GroupNorm follows: harmless in float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = final(text_to_image(hot, "x", steps=1))[0]
    hot.vae.to(torch.float16)
    with pytest.warns(UserWarning, match="overflowed in torch.float16; done again in float32"):
        again = final(text_to_image(hot, "x", steps=1))[0]
    assert difference(exact, again) <= 3


def test_latents_that_are_not_finite_are_an_error():
    broken = tiny_sd()
    torch.nn.init.constant_(broken.unet.conv_out.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        final(text_to_image(broken, "x", steps=1))


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_and_its_interval(sd):
    def x(**options):
        return x_of(text_to_image(sd, "a red apple", seed=1, **options))[-1]

    strong, plain = x(guidance=7.5), x(guidance=1)
    assert (strong - plain).abs().mean() > 0.1
    assert torch.allclose(x(guidance=7.5, interval=(0, 1000)), strong, atol=1e-4)
    assert torch.allclose(x(guidance=7.5, interval=(100, 1000)), plain, atol=1e-4)
    partly = x(guidance=7.5, interval=(0.1, 2))
    assert min((partly - strong).abs().mean(), (partly - plain).abs().mean()) > 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_perturbed_guidance_is_diffusers(tmp_path, prediction):
    """Its pipeline for perturbed-attention guidance, in the middle alone, with guidance and without."""
    sd = tiny_sd(replace(TINY, prediction=prediction))
    plainsd.save(sd, tmp_path / "m")
    pipe = pipeline("StableDiffusionPAGPipeline", tmp_path / "m", "DDIMScheduler")
    pipe.set_pag_applied_layers("mid")
    options = {"steps": 6, "sampler": "ddim", "spacing": "leading", "seed": 3}
    for scale in (7.5, 1.0):
        theirs = pipe("a red apple", num_inference_steps=6, guidance_scale=scale, pag_scale=3.0, height=64, width=64,
                      generator=seeded(3), output_type="latent").images  # fmt: skip
        *_, ours = text_to_image(sd, "a red apple", guidance=scale, perturbed=3.0, **options)
        *_, without = text_to_image(sd, "a red apple", guidance=scale, **options)
        assert (ours.latents - theirs).abs().max() < 3e-5 * theirs.abs().max()
        assert (without.latents - theirs).abs().max() > 3e-2 * theirs.abs().max()


def test_a_threshold_keeps_latents_from_growing_with_guidance(sd):
    def spread(**options):
        *_, drawn = text_to_image(sd, "a red apple", seed=1, **options)
        return drawn.latents.std().item()

    plain = spread(guidance=1)
    assert spread(guidance=30) > 2.5 * plain
    assert 0.3 * plain < spread(guidance=30, threshold=0.9) < spread(guidance=30, threshold=0.995) < plain


def test_projected_guidance_gets_its_numbers(sd, monkeypatch):
    seen, projected = [], guidance.projected
    monkeypatch.setattr(guidance, "projected", lambda pair, *args: seen.append(args) or projected(pair, *args))
    list(text_to_image(sd, "x", guidance=5, steps=1, apg=3, apg_parallel=0.2, apg_momentum=-0.7))
    assert seen == [(5, 3, 0.2, -0.7)]


def test_perturbed_guidance_without_guidance_is_the_limit_of_that_with_it(sd):
    alone = x_of(text_to_image(sd, "a", guidance=1, perturbed=3.0))[-1]
    nearly = x_of(text_to_image(sd, "a", guidance=1 + 1e-7, perturbed=3.0))[-1]
    assert torch.allclose(alone, nearly, atol=1e-3)


def test_blind_attention_sees_itself_only(sd):
    """With an identity for the softmax of q k^T, only in the rows that are meant, and only inside the `with`."""
    attention = sd.unet.mid.attn.blocks[0].self_attn
    x = torch.randn(3, 10, 64, generator=seeded(0))
    plain = attention(x)
    with guidance.blind_attention(sd.unet, 1):
        blind = attention(x)
    assert torch.equal(blind[:2], plain[:2]) and torch.equal(attention(x), plain)
    weight = torch.eye(10).expand(3, 4, 10, 10)
    values = attention.v(x).unflatten(-1, (4, -1)).transpose(1, 2)
    assert torch.allclose(blind[2], attention.out((weight @ values).transpose(1, 2).flatten(2))[2], atol=1e-6)
    assert (blind[2] - plain[2]).abs().max() > 0.01


def test_composition_by_and(sd):
    """A part of weight 0 pulls nowhere; two equal halves are the whole; two wholes pull twice as far."""
    one = x_of(text_to_image(sd, "a red apple", seed=1, guidance=2))[-1]
    for same in ("a red apple AND a pear:0", "a red apple:0.5 AND a red apple:0.5"):
        assert torch.allclose(x_of(text_to_image(sd, same, seed=1, guidance=2))[-1], one, atol=1e-3)
    twice = x_of(text_to_image(sd, "a red apple AND a red apple", seed=1, guidance=2))[-1]
    assert torch.allclose(twice, x_of(text_to_image(sd, "a red apple", seed=1, guidance=4))[-1], atol=1e-3)


def test_prompts_that_change_on_the_way(sd):
    steps = {
        p: x_of(text_to_image(sd, p, seed=1, steps=6, sampler="euler"))
        for p in ("[ab:xy:0.5]", "ab", "[ab|xy]", "[ab:xy:1]")
    }
    edited, plain, alternating, early = steps.values()  # up to 60; texts of other batches are rounded otherwise
    assert [torch.allclose(a, b, atol=2e-3) for a, b in zip(edited, plain, strict=True)] == [True] * 3 + [False] * 3
    assert torch.allclose(alternating[0], plain[0], atol=2e-3)
    assert torch.allclose(alternating[1], early[1], atol=2e-3)  # the second step reads the other text
    assert (alternating[1] - plain[1]).abs().max() > 1e-2


def test_distilled_models_are_told_the_scale_and_asked_once():
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    theirs = Pipeline.get_guidance_scale_embedding(None, torch.tensor([7.5 - 1]), embedding_dim=32)
    assert torch.allclose(guidance.guidance_embedding(7.5, 32), theirs, atol=1e-4)
    taught = tiny_sd(guidance_dim=32)
    sizes = []
    taught.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    low, high = (final(text_to_image(taught, "x", sampler="lcm", steps=2, guidance=g))[0] for g in (2, 9))
    assert sizes == [1] * 4 and difference(low, high) > 1


# --- variations, hires ------------------------------------------------------------------------------------------------


def test_variations_lead_from_one_seed_to_the_other(sd):
    def picture(**options):
        return final(text_to_image(sd, "x", **options))[0]

    start, end = picture(seed=1), picture(seed=2)
    assert difference(picture(seed=1, variation_seed=2), start) == 0
    assert difference(picture(seed=1, variation_seed=2, variation_strength=1), end) <= 1
    nearer = [np.abs(np.asarray(picture(seed=1, variation_seed=2, variation_strength=s)).astype(int) - start).mean()
              for s in (0.1, 0.3, 0.6)]  # fmt: skip
    assert 0 < nearer[0] < nearer[1] < nearer[2]


@pytest.mark.parametrize("more", [{"image": True}, {"hires": 1.5}, {"hires": 1.5, "upscaler": "lanczos"}], ids=str)
def test_variations_in_image_to_image_and_in_the_second_pass(sd, photo, more):
    """Strength 1 is the picture of the other seed, and the seed itself no variation."""
    draw = partial(image_to_image, image=photo) if "image" in more else partial(text_to_image, **more)

    def picture(**seeds):
        return final(draw(sd, "x", sampler="euler", **seeds))[0]

    start, end = picture(seed=1), picture(seed=2)
    assert difference(picture(seed=1, variation_seed=2, variation_strength=1), end) <= 1
    assert difference(picture(seed=1, variation_seed=1, variation_strength=0.5), start) <= 1
    assert difference(start, end) > 9


def test_slerp_keeps_the_length_of_noise():
    a, b = torch.randn(2, 4, 16, 16, generator=seeded(0))
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    assert slerp(a, b, 0.5).norm() == pytest.approx((a.norm() + b.norm()).item() / 2, rel=0.02)
    assert torch.allclose(slerp(a, a, 0.5), a)


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_hires_draws_over_the_enlarged_picture(sd, upscaler):
    plain = list(text_to_image(sd, "x", steps=5, seed=1))
    events = list(text_to_image(sd, "x", steps=5, seed=1, hires=1.4, upscaler=upscaler, strength=0.4))
    assert all(torch.equal(a.x, b.x) for a, b in zip(plain[:-1], events[:5], strict=True))
    assert len(events) == 5 + 2 + 1 and events[-1].images[0].size == (88, 88)
    if upscaler == "lanczos":
        return  # a random encoder does not undo its decoder; nothing of the picture is left
    small = events[-1].images[0].resize((64, 64), Image.Resampling.BOX)
    like, other = (np.corrcoef(np.asarray(small).ravel(), np.asarray(image).ravel())[0, 1]
                   for image in (plain[-1].images[0], final(text_to_image(sd, "x", steps=5, seed=2))[0]))  # fmt: skip
    assert like > other + 0.2


def test_the_second_pass_counts_its_steps_on_from_the_first(sd):
    """An edit at step 7, in passes of 5 and 5 steps: the second one reads the other text from its third step on."""

    def second(prompt):
        events = text_to_image(sd, prompt, steps=5, seed=1, hires=1.4, strength=1.0, sampler="euler")
        return x_of(events)[5:]

    edited, before = second("[ab:xy:7]"), second("ab")
    assert [torch.allclose(a, b, atol=2e-3) for a, b in zip(edited, before, strict=True)] == [True] * 2 + [False] * 3


@pytest.mark.parametrize("spacing", [None, "trailing"])
def test_lcm_has_the_levels_it_was_taught_whatever_the_models_spacing(spacing):
    sd = tiny_sd(replace(TINY, spacing=spacing))
    assert text_to_image(sd, "x", sampler="lcm").settings[0].spacing == "distilled"
    assert text_to_image(sd, "x", sampler="lcm", spacing="karras").settings[0].spacing == "karras"
    assert text_to_image(sd, "x", sampler="euler").settings[0].spacing == (spacing or "linspace")


# --- pictures of any size ---------------------------------------------------------------------------------------------


def test_the_size_of_the_pictures_is_told_before_they_are_drawn(sd, photo, mask):
    hires = text_to_image(sd, "a", steps=1, sampler="euler", size=(64, 56), hires=1.2, strength=1.0, like="a1111")
    part = inpaint(sd, "a", photo, mask, steps=1, masked_padding=2, size=(96, 64))
    for events in (hires, part, image_to_image(sd, "a", photo.resize((52, 41)), 1.0, steps=1)):
        assert events.size == final(events)[0].size


def test_pictures_of_any_size_keep_it(sd):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 51, 3), dtype=np.uint8))
    *steps, drawn = image_to_image(sd, "x", image)
    assert drawn.images[0].size == (51, 37) and {step.x.shape[2:] for step in steps} == {(5, 7)}  # of 40 by 56 pixels
    assert final(image_to_image(sd, "x", image, size=(70, 30)))[0].size == (70, 30)
    light = Image.new("L", image.size)
    light.paste(255, (50, 30, 51, 31))  # a single pixel in the padded corner block
    drawn = np.asarray(final(inpaint(sd, "x", image, light))[0])
    assert (drawn != np.asarray(image)).any(axis=-1).sum() <= 1
    wide = np.asarray(final(outpaint(sd, "x", image, left=5, bottom=9))[0])
    assert wide.shape == (46, 56, 3) and (wide[:37, 5:] == np.asarray(image)).all()


def test_a_vae_of_more_than_8_pixels_a_latent_sets_the_sizes(photo, mask):
    """Sizes of pictures from text are multiples of its 16 pixels; given pictures are padded to them."""
    sd = tiny_sd(replace(TINY, vae=replace(TINY.vae, channels=(8, 8, 16, 16, 16))))
    assert sd.vae.config.factor == 16
    *steps, drawn = text_to_image(sd, "x", size=(48, 80))
    assert drawn.images[0].size == (48, 80) and {step.x.shape[2:] for step in steps} == {(5, 3)}
    with pytest.raises(UserError, match="size 40x72: both sides must be multiples of 16 from 16 to 4096; try 32x64"):
        text_to_image(sd, "x", size=(40, 72))
    *steps, drawn = text_to_image(sd, "x", hires=1.4)
    assert drawn.images[0].size == (96, 96)  # 89.6
    image = photo.crop((0, 0, 40, 24))
    *steps, drawn = image_to_image(sd, "x", image)
    assert drawn.images[0].size == (40, 24) and {step.x.shape[2:] for step in steps} == {(2, 3)}
    repainted = np.asarray(final(inpaint(sd, "x", image, mask.crop((0, 0, 40, 24))))[0])
    outside = np.asarray(mask.crop((0, 0, 40, 24))) == 0
    assert (repainted[outside] == np.asarray(image)[outside]).all() and (repainted != np.asarray(image)).any()
    net = control_of(sd.unet, hint_widths(16)).eval()
    torch.nn.init.normal_(net.zero[0].weight)
    control = [Control(net, image)]
    assert np.asarray(final(image_to_image(sd, "x", image, control=control))[0]).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("factor", "widths"), [(4, (16, 32, 96)), (8, (16, 32, 96, 256)), (32, (16, 32, 96, *[256] * 3))]
)
def test_a_new_control_net_reads_maps_of_the_vaes_factor(factor, widths):
    assert hint_widths(factor) == widths and ControlConfig(hint=hint_widths(factor)).factor == factor


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler"])
def test_the_latents_around_the_hole_are_those_of_the_picture(sd, photo, mask, sampler):
    """DDIM and PLMS end with a little noise, but not there: pixels are pasted, latents go on to whoever takes them."""
    *_, drawn = inpaint(sd, "x", photo, mask, 0.8, steps=4, sampler=sampler, seed=3)
    gaussian = sd.vae.encode(to_tensor(photo))
    noise = torch.randn(gaussian.mean.shape[1:], generator=seeded(3))  # the first that seed 3 draws
    known = (gaussian.mean + torch.exp(0.5 * gaussian.logvar) * noise) * sd.vae.config.scaling_factor
    hole = torch.nn.functional.max_pool2d(to_mask(mask), 8).bool().expand_as(known)
    torch.testing.assert_close(drawn.latents[~hole], known[~hole], rtol=1e-5, atol=1e-6)
    assert (drawn.latents[hole] - known[hole]).abs().mean() > 0.1


def test_one_light_pixel_frees_the_whole_latent_under_it(sd, photo):
    light, latents = Image.new("L", photo.size), {}
    for pixel in (None, (17, 42), (23, 47)):
        light.paste(255 if pixel is None else 0, (0, 0, 64, 64))
        if pixel:
            light.putpixel(pixel, 255)
        *_, drawn = inpaint(sd, "x", photo, light, 1.0, steps=4, sampler="euler", seed=3)
        latents[pixel] = drawn.latents
    for pixel in ((17, 42), (23, 47)):
        moved = (latents[pixel] - latents[None]).abs().mean(dim=1)[0]
        assert torch.equal(latents[17, 42], latents[23, 47]) and moved.flatten().argmin() == 5 * 8 + 2


def test_the_mask_lets_the_hole_change_and_nothing_else(sd, photo, mask):
    for sampler in SAMPLERS:
        drawn = final(inpaint(sd, "x", photo, mask, 0.8, steps=4, sampler=sampler))[0]
        assert difference(Image.composite(photo, drawn, mask), photo) == 0, sampler
        assert difference(drawn, photo) > 30, sampler


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_wrong_calls_fail_at_once(sd, photo, mask):
    nine = tiny_sd(in_channels=9)
    for call, message in [
        (lambda: text_to_image(sd, []), "0 prompts"),
        (lambda: text_to_image(sd, ["a", "b"], ["c"]), "2 prompts and 1 negative"),
        (lambda: text_to_image(sd, "a", count=0), "count 0"),
        (lambda: text_to_image(sd, "a", size=60), "size 60x60.*try 64x64"),
        (lambda: text_to_image(sd, "a <lora:style:0.8>"), "lora:style"),
        (lambda: text_to_image(nine, "a"), "inpainting model"),
        (lambda: image_to_image(nine, "a", photo), "inpainting model"),
        (lambda: image_to_image(sd, "a", photo, hires=2), "hires"),
        (lambda: text_to_image(sd, "a", variation_strength=0.5), "variation strength 0.5 without a variation seed"),
        (lambda: text_to_image(sd, "a", rescale=0.5, perturbed=1.0), "rescale and perturbed do not go together"),
        (lambda: text_to_image(sd, "a", perturbed=1.0, threshold=0.9), "perturbed and threshold do not go together"),
        (lambda: image_to_image(sd, "a", photo, 0.0), "leaves none"),
        (lambda: inpaint(sd, "a", photo, mask.resize((32, 32))), "the mask is 32x32"),
        (lambda: outpaint(sd, "a", photo), "at least one above 0"),
        (lambda: outpaint(sd, "a", photo, left=-8, right=9), "give pixels to add"),
        (lambda: outpaint(sd, "a", photo, left=4096), "size 4160x64"),
        (lambda: outpaint(sd, "a", photo, left=10**9), "give pixels to add"),
        (lambda: text_to_image(tiny_sd(mid_depth=0), "a", perturbed=1.0), "attention in the UNet.s middle"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(TypeError):
        text_to_image(sd, "a", speed=3)


@pytest.mark.parametrize("field, says", [
    ("prompt", "<lora:d> in the prompt: take"), ("negative", "<lora:d> in the negative prompt: take"),
    ("hires_prompt", "<lora:d> in the hires prompt: take"),
    ("hires_negative", "<lora:d> in the hires negative prompt: take"),
])  # fmt: skip
def test_a_tag_in_a_text_names_its_field(sd, field, says):
    for tag, message in (("<lora:d:0.5>", says), ("<hypernet:d:1>", "hypernetworks are not supported")):
        with pytest.raises(UserError, match=message) as caught:
            text_to_image(sd, **{"prompt": "a", "hires": 1.5, field: f"a {tag}"})
        assert caught.value.field == field


def test_the_public_face():
    assert sorted(plainsd.__all__) == [
        "Control", "ImagePrompt", "Pictures", "Settings", "StableDiffusion", "Step", "UserError", "add_embedding",
        "add_lora", "explain", "final", "image_to_image", "inpaint", "load", "load_control", "load_image_prompt",
        "outpaint", "save", "save_control", "save_embedding", "save_lora", "text_to_image",
    ]  # fmt: skip
    assert set(plainsd.__all__) <= set(dir(plainsd))
    assert [getattr(plainsd, name).__name__ for name in plainsd.__all__] == plainsd.__all__
    with pytest.raises(AttributeError, match="no attribute 'text2image'"):
        plainsd.text2image  # noqa: B018
