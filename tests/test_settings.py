"""A1111's text of settings: what it looks like, what comes back, what strangers' texts become."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plainsd import __version__
from plainsd.errors import UserError
from plainsd.pictures.settings import LIKE, RANDOM, SEEDS, UPSCALERS, Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.pictures.texts.labels import NEAREST_LABELS, SAMPLER_LABELS, SPACING_LABELS, nearest_label

TYPICAL = Settings("a red apple", "blurred", (512, 512), 20, 7.0, "dpmpp_2m", "karras", 1, model="emoji", noise="cpu")


def test_text_is_a1111s():
    assert format_settings(TYPICAL) == (
        "a red apple\nNegative prompt: blurred\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, "
        f"Size: 512x512, Model: emoji, RNG: CPU, Version: plainsd {__version__}"
    )


def test_values_with_commas_and_colons_are_quoted():
    text = format_settings(Settings("x", model='C:\\a, "b"', steps=1))
    assert 'Model: "C:\\\\a, \\"b\\""' in text
    assert parse_settings(text).model == 'C:\\a, "b"'


@pytest.mark.parametrize("name", ["a\nb", "a\n", "\n", 'a, "b": 1', '"', "a,b", "a: b", "Größe 猫"])
@pytest.mark.parametrize("field", ["model", "vae", "refiner", "embeddings"])
def test_names_of_any_signs_come_back(field, name):
    """A line break amid the last line of the text would end it there."""
    made = Settings("x", steps=1, noise="cpu", **{field: (name,) if field == "embeddings" else name})
    if field == "embeddings" and ", " in name:
        made = Settings("x", steps=1, noise="cpu", embeddings=tuple(name.split(", ")))
    assert format_settings(made).count("\n") == 1 and parse_settings(format_settings(made)) == made


@pytest.mark.parametrize("kind", ["lora:", "embed:"])
def test_names_with_line_breaks_have_their_hashes(kind):
    made = Settings(
        "x", steps=1, noise="cpu", model="m", hashes=(("model", "6ce0161689"), (f"{kind}a\nb", "0123456789ab"))
    )
    assert parse_settings(format_settings(made)) == made


@pytest.mark.parametrize(("name", "low", "high"), [
    ("steps", 1, 1000), ("guidance", 0, 100), ("seed", 0, 2**64 - 1), ("clip_skip", 1, 48), ("eta", 0, 1),
    ("strength", 0, 1), ("variation_seed", 0, 2**64 - 1), ("variation_strength", 0, 1), ("hires", 1, 8),
    ("handover", 0, 1), ("rescale", 0, 1), ("perturbed", 0, 100), ("threshold", 0, 1), ("cache", 1, 100),
    ("apg", 0, 10_000), ("apg_parallel", 0, 1), ("apg_momentum", -1, 1),
])  # fmt: skip
def test_numbers_have_their_ranges(name, low, high):
    for value in (low, high):
        Settings(**{name: value}).check()
    step = 1 if high > 100 or name in ("clip_skip", "cache") else 0.001
    below = low - 2 if name in SEEDS else low - step  # -1 asks for a seed at random
    for value in (below, high + step, float("nan")):
        with pytest.raises(
            UserError, match=f"{name.replace('_', ' ')} {value} is out of range; choose {low} to {high}"
        ):
            Settings(**{name: value}).check()


def test_sizes_and_intervals_have_their_ranges():
    for size in ((7, 64), (64, 4097), (0, 0)):
        with pytest.raises(UserError, match="size .* is out of range; choose 8 to 4096"):
            Settings(size=size).check()
    for interval, says in (((-1, 2), "interval -1 is out of range"), ((3, 2), "is empty; give its lower sigma first"),
                           ((2, 2), "is empty")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            Settings(interval=interval).check()
    Settings(size=(8, 4096), interval=(0, 1)).check()


def test_numbers_and_pairs_as_python_and_json_have_them():
    made = Settings(
        size=[64.0, 32], steps=4.0, seed=7.0, variation_seed=5.0, interval=[0, 1.5], outpaint=[8.0, 0, 0, 0]
    )
    assert (made.size, made.interval, made.outpaint) == ((64, 32), (0, 1.5), (8, 0, 0, 0))
    assert (made.steps, made.seed, made.variation_seed) == (4, 7, 5)
    assert all(type(number) is int for number in (*made.size, *made.outpaint, made.steps, made.seed))
    assert Settings(seed=None).seed == RANDOM and made.hires_steps is None
    made.check()
    for wrong in ({"steps": 4.5}, {"seed_resize": (64, 64.5)}):
        with pytest.raises(UserError, match=r"4\.5 is not a whole number; choose"):
            Settings(**wrong).check()


@pytest.mark.parametrize("sampler", SAMPLER_LABELS)
@pytest.mark.parametrize("spacing", [None, *SPACING_LABELS, *NEAREST_LABELS])
def test_every_sampler_and_spacing_comes_back(sampler, spacing):
    made = Settings("x", steps=5, noise="cpu", sampler=sampler, spacing=spacing)
    assert parse_settings(format_settings(made)) == made


def test_the_nearest_schedule_that_a1111_has():
    names = ("linspace", "trailing", "leading", "karras", "beta", "my_own")
    labels = ["Uniform", "Simple", "DDIM", "Karras", "Beta", "Automatic"]
    assert [nearest_label("euler", name) for name in names] == labels
    assert nearest_label("dpmpp_2m", "linspace") == "SGM Uniform"


prompts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "Negative prompt:" not in text)
values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def first(pair):
    return pair[0]


def lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


floats = st.floats(allow_nan=False, allow_infinity=False, min_value=0)


@given(
    st.builds(
        Settings,
        prompt=prompts,
        negative=prompts,
        size=st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
        steps=st.integers(1, 1000),
        guidance=floats,
        seed=st.integers(0, 2**64 - 1),
        strength=st.none() | floats,
        interval=st.none() | st.tuples(floats, floats),
        threshold=st.none() | floats,
        cache=st.none() | st.integers(1, 100),
        clip_skip=st.integers(1, 12),
        handover=st.none() | floats,
        vae=st.none() | st.sampled_from(["sharp", "xl, vae: 1.safetensors"]),
        masked=st.booleans(),
        outpaint=st.none() | st.tuples(*[st.integers(0, 4096)] * 4),
        refiner=st.none() | st.sampled_from(["refiner", "xl, refiner: 1.0"]),
        embeddings=st.lists(st.sampled_from(["kitty", "<cat>", 'a "b"', "Größe: 猫"])).map(tuple),
        model=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1),
        sampler=st.none() | st.sampled_from([*SAMPLER_LABELS, "my_own"]),
        spacing=st.none() | st.sampled_from([*SPACING_LABELS, *NEAREST_LABELS, "my_own"]),
        eta=st.none() | floats,
        hires=st.none() | floats,
        upscaler=st.sampled_from(UPSCALERS),
        hires_steps=st.none() | st.integers(1, 1000),
        hires_sampler=st.none() | st.sampled_from(list(SAMPLER_LABELS)),
        hires_spacing=st.none() | st.sampled_from([*SPACING_LABELS, *NEAREST_LABELS]),
        hires_prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        hires_negative=st.none() | st.sampled_from(["blurred", "a: b, c", " spaced ", "two\nlines"]),
        hires_guidance=st.none() | floats,
        like=st.none() | st.sampled_from(LIKE),
        noise=st.sampled_from(["cpu", "nv", "comfyui"]),
        ensd=st.none() | st.integers(0, 2**64 - 1),
        seed_resize=st.none() | st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
        batch_index=st.integers(0, 4095),
        batch_size=st.integers(1, 4096),
        tiling=st.booleans(),
        other=st.lists(
            st.tuples(st.sampled_from(["ENSD 2", "Face restoration", "Styles"]), values), unique_by=first
        ).map(tuple),
    )
)
@example(Settings(prompt="a\r", negative="\r", noise="cpu"))
def test_whatever_is_written_comes_back(made):
    """But for the kind of line breaks in the prompts, which is not written."""
    wanted = {name: lines(getattr(made, name)) for name in ("prompt", "negative")}
    assert parse_settings(format_settings(made)) == replace(made, **wanted)


@pytest.mark.parametrize("key", ["Tiling", "Hires steps", "Like", "Sampler", "Version"])
def test_what_has_no_effect_is_not_written_under_a_key_that_has(key):
    written = format_settings(Settings(other=((key, "x"), ("Styles", "y"))))
    assert parse_settings(written) == Settings(noise="cpu", other=(("Styles", "y"),)) and f"{key}: x" not in written


def test_a_text_by_a1111_itself():
    text = (
        "photo of (a cat:1.2),\non a mat\nNegative prompt: dog,\nbird\nSteps: 30, Sampler: DPM++ 2M SDE, "
        "Schedule type: Karras, CFG scale: 7.5, Seed: 12, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, "
        'Clip skip: 2, Lora hashes: "a: 1, b: 2", Version: v1.10.1'
    )
    read = parse_settings(text)
    assert read.prompt == "photo of (a cat:1.2),\non a mat"
    assert read.negative == "dog,\nbird"
    assert (read.sampler, read.spacing, read.steps, read.guidance) == ("dpmpp_2m_sde", "karras", 30, 7.5)
    assert (read.seed, read.size, read.model, read.clip_skip) == (12, (512, 768), "v1-5", 2)
    assert read.hashes == (("model", "6ce0161689"), ("lora:a", "1"), ("lora:b", "2")) and read.other == ()


def test_a_schedule_of_a1111_that_we_lack_is_kept_apart():
    read = parse_settings("x\nSteps: 30, Sampler: Euler, Schedule type: Turbo, Seed: 1")
    assert (read.sampler, read.spacing, read.other) == ("euler", None, (("Schedule type", "Turbo"),))


@pytest.mark.parametrize(
    ("resize", "size", "hires"),
    [("1024x1536", "512x768", 2.0), ("768x0", "512x768", 1.5), ("0x0", "512x768", None), ("1024x1024", "512x768", None),
     ("big", "512x768", None), ("1024x1024", "0x0", None)],
)  # fmt: skip
def test_a1111s_size_of_the_second_pass(resize, size, hires):
    read = parse_settings(f"x\nSteps: 30, Sampler: Euler, Size: {size}, Hires resize: {resize}, Seed: 1")
    assert read.hires == hires and read.other == (() if hires else (("Hires resize", resize),))


@pytest.mark.parametrize("text", ["", "a red apple", "two\nlines: of, text", "\n\n"])
def test_a_text_without_settings_is_refused(text):
    with pytest.raises(UserError, match="no settings"):
        parse_settings(text)


def test_a_broken_number_is_named():
    with pytest.raises(UserError, match="'Steps'.*'many'"):
        parse_settings("x\nSteps: many, Seed: 1, Size: 8x8")
