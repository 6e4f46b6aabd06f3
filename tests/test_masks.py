"""How a mask is used: soft edges, wider masks, the masked part alone, what lies under it, and grey levels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_picture, tiny_sd
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw, ImageFilter

import plainsd
from plainsd.diffusion.denoiser import differential
from plainsd.diffusion.samplers import SAMPLERS, sampler_levels
from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.errors import UserError
from plainsd.pictures import drawing, sampling
from plainsd.pictures.images import read_settings
from plainsd.pictures.masks import MaskOptions, blurred_hole, canvas_of, grown, latent_mask
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings

PHOTO = noise_picture(64, 64)


def mask_of(box=(16, 16, 47, 47), size=(64, 64), level=255):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=level)
    return mask


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.array(before) != np.array(after)).any(axis=2)


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


def painted(sd, mask=None, **choices) -> Image.Image:
    (image,) = plainsd.final(plainsd.inpaint(sd, "a", PHOTO, mask or mask_of(), **{"steps": 2, **choices}))
    return image


def test_plain_masks_change_nothing_outside(sd):
    where = changed(PHOTO, painted(sd))
    assert where[16:48, 16:48].mean() > 0.9
    where[16:48, 16:48] = False
    assert not where.any()


@pytest.mark.parametrize(("grow", "box"), [(5, (11, 53)), (-4, (20, 44))])
def test_a_mask_grows_by_pixels(sd, grow, box):
    where, (low, high) = changed(PHOTO, painted(sd, mask_grow=grow)), box
    assert where[low, low:high].mean() > 0.8 and where[low:high, high - 1].mean() > 0.8
    where[low:high, low:high] = False
    assert not where.any()


@pytest.mark.parametrize("pixels", [0, 1, 2, 3, 5, 20, -1, -4, -13])
def test_growing_is_pillows_filter(pixels):
    """Which compares every pixel of the square, and takes seconds where a mask grows by 32 pixels."""
    for size in ((37, 21), (8, 50), (5, 5)):
        levels = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
        kind = ImageFilter.MaxFilter if pixels > 0 else ImageFilter.MinFilter
        assert np.array_equal(grown(levels, pixels), levels.filter(kind(2 * abs(pixels) + 1)))


def test_a_blurred_mask_fades_into_the_picture(sd):
    """Each pixel of the result lies between the old one and that of a mask that covers all."""
    canvas = canvas_of(PHOTO, mask_of(), (64, 64), MaskOptions(blur=4))
    opacity = np.array(canvas.alpha) / 255
    assert 0.4 < opacity[16, 32] < 0.65 and opacity[32, 32] > 0.97 and opacity[2, 2] == 0
    assert ((np.array(canvas.hole) == 255) == (opacity > 0)).all()
    white = Image.new("RGB", (64, 64), "white")
    mixed = np.array(canvas.finished(white), dtype=float)
    expected = np.array(PHOTO) * (1 - opacity[..., None]) + 255 * opacity[..., None]
    assert np.abs(mixed - expected).max() <= 1
    where = changed(PHOTO, painted(sd, mask_blur=4))
    assert where[14, 32] and not where[:2].any()


def test_the_masked_part_alone_is_drawn_at_the_whole_size(sd):
    mask = mask_of((20, 24, 27, 31))
    canvas = canvas_of(PHOTO, mask, (64, 64), MaskOptions(padding=4))
    assert canvas.box == (16, 20, 32, 36) and canvas.image.size == (64, 64)
    part = PHOTO.crop(canvas.box).resize((64, 64), Image.Resampling.LANCZOS)
    assert canvas.image.tobytes() == part.tobytes()
    events = plainsd.inpaint(sd, "a", PHOTO, mask, steps=2, masked_padding=4, size=(96, 64))
    (image,) = plainsd.final(events)
    assert events.settings[0].size == (96, 64) and image.size == PHOTO.size
    where = changed(PHOTO, image)
    assert where[24:32, 20:28].mean() > 0.8
    where[24:32, 20:28] = False
    assert not where.any()


@pytest.mark.parametrize("like", [None, "a1111"])
@pytest.mark.parametrize(("size", "box"), [((64, 128), (0, 4, 64, 124)), ((200, 64), (4, 0, 196, 64))])
def test_a_part_of_another_shape_is_padded_and_not_stretched(like, size, box):
    """The picture has no room for a square part around the mask. As A1111's `images.resize_image(2, ...)` has it, and
    mode 1 on the way back."""
    picture = noise_picture(*size)
    mask = mask_of((box[0], box[1], box[2] - 1, box[3] - 1), size)
    canvas = canvas_of(picture, mask, (64, 64), MaskOptions(padding=0, like=like))
    assert canvas.box == box and canvas.image.size == canvas.hole.size == (64, 64)
    scale = 64 / max(box[2] - box[0], box[3] - box[1])
    width, height = round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale)
    left, top = (64 - width) // 2, (64 - height) // 2
    part = picture.crop(box).resize((width, height), Image.Resampling.LANCZOS)
    inner = (left, top, left + width, top + height)
    assert canvas.image.crop(inner).tobytes() == part.tobytes()
    edges = np.array(canvas.image)
    assert (edges[:top] == edges[top]).all() and (edges[:, :left] == edges[:, left, None]).all() and left + top > 10
    finished = canvas.finished(canvas.image)
    assert finished.crop(box).tobytes() == part.resize((box[2] - box[0], box[3] - box[1]), 1).tobytes()
    beside = canvas.part_of(picture)
    assert np.abs(np.array(beside, int) - np.array(canvas.image, int)).mean() < 8  # a map of the same picture


def test_a_part_of_about_the_same_shape_fills_all():
    canvas = canvas_of(noise_picture(101, 67), mask_of((0, 0, 100, 66), (101, 67)), (96, 64), MaskOptions(padding=0))
    assert canvas.image.tobytes() == noise_picture(101, 67).resize((96, 64), Image.Resampling.LANCZOS).tobytes()


def test_what_lies_under_the_mask_counts_below_full_strength(sd, monkeypatch):
    seen, known = [], drawing.Known
    monkeypatch.setattr(drawing, "Known", lambda *args: seen.append(args) or known(*args))
    each = {
        content: painted(sd, strength=0.5, steps=4, masked_content=content).tobytes()
        for content in ("original", "fill", "noise", "nothing")
    }
    assert len(set(each.values())) == 4
    *_, noise, nothing = (latents[mask.expand_as(latents) > 0] for latents, mask in seen)
    assert 0.7 < noise.std() < 1.3 and not nothing.any()
    filled = canvas_of(PHOTO, mask_of(), (64, 64), MaskOptions(fill="fill")).image
    assert plainsd.final(plainsd.inpaint(sd, "a", filled, mask_of(), 0.5, steps=4))[0].tobytes() == each["fill"]


def test_at_full_strength_it_has_no_effect_and_that_is_said(sd, generate, tmp_path, recwarn):
    """In diffusers the run starts from pure noise; in A1111 and ComfyUI, and with soft masks, it does not."""
    for options in ({"strength": 0.9}, {"soft_mask": True}, {"like": "a1111"}, {"like": "comfyui"}):
        plainsd.inpaint(sd, "a", PHOTO, mask_of(), steps=4, masked_content="noise", **options)
    plainsd.inpaint(sd, "a", PHOTO, mask_of(), steps=4)
    assert not recwarn
    PHOTO.save(tmp_path / "photo.png")
    mask_of().save(tmp_path / "mask.png")
    given = ("--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--count", 2, "--batch", 1)
    code, _, err = generate("a", "--steps", 2, *given, "--masked-content", "noise")
    assert code == 0 and err.count("masked content noise has no effect at strength 1") == 1


def test_grey_levels_are_hard_unless_soft_is_asked_for(sd, monkeypatch):
    grey = mask_of(level=100)
    with pytest.raises(UserError, match="dark everywhere"):
        painted(sd, grey)
    assert changed(PHOTO, painted(sd, grey, soft_mask=True)).any()
    seen, rising = [], Image.linear_gradient("L").resize((64, 64))
    monkeypatch.setattr(sampling, "differential", lambda *args: seen.append(args[2]) or differential(*args))
    assert painted(sd, rising, soft_mask=True, strength=0.9, steps=4).size == (64, 64)
    levels = torch.from_numpy(np.array(rising))[None, None] / 255
    torch.testing.assert_close(seen, [F.avg_pool2d(levels, sd.vae.config.factor)])


def latents_of_a1111(hole: Image.Image, side: int) -> np.ndarray:
    """Img2Img.init of the web UI 1.10.1."""
    small = hole.convert("RGB").resize((side, side))
    return np.around(np.array(small, dtype=np.float32)[..., 0] / 255)


@pytest.mark.parametrize(("like", "count"), [("a1111", 1024), (None, 1292)])
def test_a_blurred_edge_is_redrawn_where_the_program_does(like, count):
    canvas = canvas_of(noise_picture(512, 512), mask_of((128, 128, 383, 383), (512, 512)), (512, 512),
                       MaskOptions(blur=4, like=like))  # fmt: skip
    levels = torch.from_numpy(np.array(canvas.hole))[None, None] / 255
    redrawn = latent_mask(levels, 8, rounded=like == "a1111")
    assert redrawn.sum() == count and {*redrawn.unique().tolist()} == {0, 1}
    if like:
        assert np.array_equal(redrawn[0, 0], latents_of_a1111(canvas.hole, 64))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("mask", [mask_of(), Image.linear_gradient("L").resize((64, 64))], ids=["square", "grey"])
def test_a1111_keeps_the_latents_where_its_mask_rounds_to_black(channels, mask):
    sd = tiny_sd(in_channels=channels)
    how = {"mask_blur": 4, "steps": 2, "like": "a1111", "sampler": "euler"}
    two = [[*plainsd.inpaint(sd, prompt, PHOTO, mask, 0.9, **how)][-1].latents for prompt in ("a", "b")]
    redrawn = (two[0] != two[1]).any(dim=1)[0].numpy()
    hole = canvas_of(PHOTO, mask, (64, 64), MaskOptions(blur=4, like="a1111")).hole
    assert np.array_equal(redrawn, latents_of_a1111(hole, len(redrawn)) == 1)


def test_a1111_fills_what_is_not_original_and_pastes_with_twice_the_mask():
    grey = mask_of(level=100)
    canvas = canvas_of(PHOTO, grey, (64, 64), MaskOptions(like="a1111"))
    assert np.array_equal(np.array(canvas.alpha), np.array(grey) * 2) and np.array_equal(canvas.hole, grey)
    assert np.array(canvas_of(PHOTO, mask_of(), (64, 64), MaskOptions(like="a1111")).alpha).max() == 255
    each = [canvas_of(PHOTO, mask_of(), (64, 64), MaskOptions(fill=fill, like="a1111")).image
            for fill in ("original", "fill", "noise", "nothing")]  # fmt: skip
    assert each[0] == PHOTO and each[1] == each[2] == each[3] == blurred_hole(PHOTO, mask_of())


def test_a1111s_filling_is_the_colours_around():
    image = Image.new("RGB", (64, 64), (200, 40, 90))
    image.paste("white", (16, 16, 48, 48))
    filled = np.array(blurred_hole(image, mask_of()), dtype=int)
    assert np.abs(filled - (200, 40, 90)).max() <= 8
    assert not changed(PHOTO, blurred_hole(PHOTO, mask_of()))[:16].any()


def test_differential_diffusion_by_its_algorithm():
    """Algorithm 1 of the paper beside diffusers' DDIM: before each step what has not begun is the known latents with
    their noise."""
    steps, generator = 7, torch.Generator().manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    known, noise = (torch.randn(1, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    change = torch.rand(1, 1, 6, 6, generator=generator, dtype=torch.float64)
    change[..., 0, :3], change[..., 5, 3:] = 0, 1
    shift = torch.randn(1, 4, 6, 6, generator=generator, dtype=torch.float64)

    def eps(x, t):
        return 0.4 * x + torch.tanh(shift) + t / 2000

    x = scheduler.add_noise(known, noise, scheduler.timesteps[:1])
    for i, t in enumerate(scheduler.timesteps):
        waits = (1 - change) > i / steps
        x = torch.where(waits, scheduler.add_noise(known, noise, t[None]), x)
        x = scheduler.step(eps(x, t), t, x).prev_sample
    schedule = NoiseSchedule.scaled_linear()
    levels = sampler_levels(schedule, "ddim", steps)

    def denoise(y, sigma):
        shown = y / (1 + sigma**2) ** 0.5
        return y - sigma * eps(shown, levels.timesteps[levels.sigmas.index(sigma)])

    ours = differential(denoise, known, change, levels.sigmas)
    start = known + noise * levels.sigmas[0]
    *_, last = SAMPLERS["ddim"].run(ours, start, levels.sigmas, lambda: None, strides=levels.strides)
    done = last.x / (1 + last.sigma**2) ** 0.5
    begun = (change > 0).expand_as(x)
    assert (done - x)[begun].abs().max() < 1e-5  # diffusers' table is float32
    assert begun.sum() < begun.numel()


def test_settings_are_written_and_read():
    made = Settings(
        "x", steps=3, masked=True, mask_blur=4.0, mask_grow=-2, masked_padding=32, masked_content="noise",
        soft_mask=True, noise="cpu",
    )  # fmt: skip
    text = format_settings(made)
    for entry in (
        "Mask blur: 4",
        "Masked area padding: 32",
        "Inpaint area: Only masked",
        "Masked content: latent noise",
    ):
        assert entry in text
    assert parse_settings(text) == made
    theirs = parse_settings(
        "x\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.75, Mask blur: 4, "
        "Inpaint area: Only masked, Masked area padding: 32, Version: v1.10.1"
    )
    assert theirs.masked and theirs.mask_blur == 4 and theirs.masked_padding == 32 and not theirs.other


def test_the_command_line_gives_it_back(generate, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    mask_of().save(tmp_path / "mask.png")
    given = ("--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png")
    options = ("--mask-blur", 3, "--mask-grow", 2, "--masked-padding", 8, "--masked-content", "fill", "--strength", 0.6)
    assert generate("a", "--steps", 4, *given, *options)[0] == 0
    (made,) = (tmp_path / "out").glob("*.png")
    settings = read_settings(made)
    assert (settings.mask_blur, settings.mask_grow, settings.masked_padding) == (3.0, 2, 8)
    assert generate("--from", made, *given)[0] == 0
    (again,) = {*(tmp_path / "out").glob("*.png")} - {made}
    assert again.read_bytes() == made.read_bytes()
    code, _, err = generate("a", *given, "--masked-content", "latent")
    assert code == 2 and "unknown masked_content 'latent'" in err
    code, _, err = generate("a", *given, "--mask-blur", 100)
    assert code == 2 and "mask blur 100" in err


@pytest.mark.parametrize(
    "options",
    [{"mask_blur": 4.0}, {"mask_grow": -1}, {"masked_padding": 0}, {"masked_content": "fill"}, {"soft_mask": True}],
)
def test_options_without_a_mask_are_refused(sd, options):
    """They would be written into the picture, and have done nothing."""
    (name,) = options
    for task in (
        lambda: plainsd.text_to_image(sd, "a", steps=2, **options),
        lambda: plainsd.image_to_image(sd, "a", PHOTO, steps=2, **options),
    ):
        with pytest.raises(UserError, match="without a mask; give one, or leave it out") as caught:
            task()
        assert caught.value.field == name
    plainsd.outpaint(sd, "a", PHOTO, left=8, steps=2, **options)  # whose mask is what it adds


def test_networks_that_read_masks_take_no_soft_ones(sd):
    reading = tiny_sd(in_channels=9)
    assert painted(reading, mask_blur=2, mask_grow=1).size == (64, 64)
    with pytest.raises(UserError, match="leave soft_mask out") as caught:
        painted(reading, soft_mask=True)
    assert caught.value.field == "soft_mask"
