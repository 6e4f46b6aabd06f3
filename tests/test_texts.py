"""Texts of other programs, and of earlier versions of ours: what each of them means here. All texts are made up."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_linear import grows_with_the_length, reading

from plainsd.errors import UserError
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.pictures.texts.entries import LONGEST_TEXT, entries, quote
from plainsd.pictures.texts.labels import both_named, sampler_named, spacing_named

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sampler", "spacing"),
    [
        ("DPM++ 2M SDE SGMUniform", "dpmpp_2m_sde", "sgm_uniform"),
        ("DPM++ 2M SDE SGM Uniform", "dpmpp_2m_sde", "sgm_uniform"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde", "karras"),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 3M SDE Exponential", "dpmpp_3m_sde", "exponential"),
        ("DPM++ 2M SDE Heun Exponential", "dpmpp_2m_sde_heun", "exponential"),
        ("dpm++ 2s A KARRAS", "dpmpp_2s_a", "karras"),
        ("euler A", "euler_a", None),
        ("k_euler_ancestral", "euler_a", None),
        ("k_dpmpp_2m_ka", "dpmpp_2m", "karras"),
        ("k_dpm_2_a_ka", "dpm2_a", "karras"),
        ("k_dpmpp_2m_sde_exp", "dpmpp_2m_sde", "exponential"),
        ("k_lms", "lms", None),
        ("k_dpm_ad", "dpm_adaptive", None),
        ("dpm++2m karras", "dpmpp_2m", "karras"),
        ("euler_a discrete", "euler_a", "uniform"),
        ("DDIM CFG++", "ddim_cfg_pp", None),
        ("Euler a CFG++", "euler_a_cfg_pp", None),
        ("Restart", "restart", None),
        ("Some Other SGM Uniform", "Some Other", "sgm_uniform"),
        ("Some Other", "Some Other", None),
    ],
)
def test_samplers_by_every_name_they_had(text, sampler, spacing):
    assert both_named(text) == (sampler, spacing)


def test_names_of_comfyui_and_k_diffusion():
    names = {
        "euler_ancestral": "euler_a", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a", "dpmpp_2s_ancestral": "dpmpp_2s_a",
        "dpmpp_sde_gpu": "dpmpp_sde", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
        "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2", "res_multistep_ancestral": "res_multistep_a",
        "heunpp2": "heunpp2",
    }  # fmt: skip
    assert {name: sampler_named(name) for name in names} == names
    schedules = {"normal": "uniform", "karras": "karras", "sgm_uniform": "sgm_uniform", "simple": "simple",
                 "ddim_uniform": "ddim_uniform", "exponential": "exponential", "x": None}  # fmt: skip
    assert {name: spacing_named(name) for name in schedules} == schedules


@pytest.mark.parametrize(
    ("label", "spacing"),
    [
        ("Uniform", "uniform"), ("Karras", "karras"), ("Exponential", "exponential"),
        ("Polyexponential", "polyexponential"), ("SGM Uniform", "sgm_uniform"), ("KL Optimal", "kl_optimal_a1111"),
        ("Align Your Steps", "align_your_steps"), ("Simple", "simple"), ("Normal", "uniform"), ("DDIM", "ddim_uniform"),
        ("Beta", "beta_a1111"), ("karras", "karras"), ("polyexponential", "polyexponential"), ("Automatic", None),
    ],
)  # fmt: skip
def test_every_schedule_of_a1111(label, spacing):
    read = parse_settings(f"x\nSteps: 3, Sampler: Euler, Schedule type: {label}, Seed: 1, Version: v1.10.1")
    assert (read.sampler, read.spacing, read.like, read.other) == ("euler", spacing, "a1111", ())


def test_before_schedule_types_all_but_a_few_samplers_were_drawn_uniformly():
    def spacing(sampler, version):
        return parse_settings(f"x\nSteps: 3, Sampler: {sampler}, Seed: 1, Version: {version}").spacing

    assert spacing("DPM++ 2M", "v1.6.0") == "uniform" and spacing("DPM++ 2M Karras", "v1.6.0") == "karras"
    assert spacing("DDIM", "v1.6.0") is None and spacing("DPM++ 2M", "v1.9.0") is None
    assert spacing("DPM++ 2M", "f2.0.1v1.10.1-previous") is None


# --- our own, of this version and before -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "sampler", "spacing"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "dpmpp_2m", "linspace"),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "trailing"),
        ("Sampler: DDIM, Schedule type: DDIM", "ddim", "leading"),
        ("Sampler: LCM, Schedule type: Distilled", "lcm", "distilled"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
    ],
)
def test_our_first_version_called_its_spacings_by_a1111s_names(said, sampler, spacing):
    old = parse_settings(f"x\nSteps: 3, {said}, CFG scale: 7, Seed: 1, Version: plainsd 0.1.0")
    assert (old.sampler, old.spacing, old.like, old.other) == (sampler, spacing, None, ())
    assert parse_settings(format_settings(old)) == replace(old, noise="cpu")


def test_in_our_first_version_guidance_0_was_a1111s():
    text = "x\nSteps: 3, CFG scale: 0, Seed: 1, Version: plainsd 0.1.0"
    assert parse_settings(text).like == "a1111"
    assert parse_settings(text.replace("Seed: 1", "Seed: 1, RNG: CPU")).like is None


def test_a_spacing_of_our_own_stands_beside_a1111s_nearest():
    text = format_settings(Settings("x", steps=3, sampler="euler", spacing="trailing"))
    assert "Schedule type: Simple, Spacing: trailing, " in text
    assert "RNG: CPU" in text  # without it, A1111 takes the noise for a GPU's


@pytest.mark.parametrize(("sampler", "key"), [("ddim", "Eta DDIM"), ("ddim_cfg_pp", "Eta DDIM"), ("euler_a", "Eta")])
def test_eta_is_called_as_a1111_calls_it(sampler, key):
    text = format_settings(Settings("x", steps=3, sampler=sampler, eta=0.5))
    assert f", {key}: 0.5, " in text and parse_settings(text).eta == 0.5
    assert parse_settings(text.replace(key, "Eta")).eta == 0.5  # A1111 before 1.6


def test_hires_names_its_upscaler():
    assert "Hires upscaler: Latent, " in format_settings(Settings("x", steps=3, hires=2.0))
    assert "upscaler" not in format_settings(Settings("x", steps=3))


def test_names_of_loras_have_none_of_the_signs_that_part_them():
    text = format_settings(Settings("x", steps=3, hashes=(("lora:a, b: c", "0123456789ab"),)))
    assert 'Lora hashes: "a b c: 0123456789ab"' in text


def test_what_has_no_meaning_here_is_written_again():
    text = 'x\nSteps: 3, Sampler: Euler, Seed: 1, Face restoration: CodeFormer, Styles: "a, b", Version: v1.10.1'
    read = parse_settings(text)
    assert read.other == (("Face restoration", "CodeFormer"), ("Styles", "a, b"))
    assert 'Face restoration: CodeFormer, Styles: "a, b", Version: plainsd' in format_settings(read)
    assert parse_settings(format_settings(read)).other == read.other


# --- A1111 and its kin -----------------------------------------------------------------------------------------------


def test_lines_may_end_as_on_windows():
    unix = "two\nlines\nNegative prompt: no\nbirds\nSteps: 3, Sampler: Euler, Seed: 1"
    assert parse_settings(unix.replace("\n", "\r\n") + "\r\n") == parse_settings(unix)


def test_a_mask_shows_by_its_blur():
    assert parse_settings("x\nSteps: 3, Seed: 1, Denoising strength: 0.5, Mask blur: 4").masked


@pytest.mark.parametrize(
    ("size", "first", "hires"), [("1024x1024", "512x512", 2.0), ("1024x1024", "0x0", 2.0), ("768x768", "512x512", 1.5)]
)
def test_the_first_pass_of_2022(size, first, hires):
    read = parse_settings(f"x\nSteps: 3, Seed: 1, Size: {size}, Denoising strength: 0.7, First pass size: {first}")
    assert (read.size, read.hires, read.other) == ((512, 512), hires, ())


def test_stable_diffusion_cpp():
    """A default picture of it: all numbers are there, some of them as 'the program's own'."""
    read = parse_settings(
        "a boat\nNegative prompt: rain\nSteps: 20, CFG scale: 7.000000, Guidance: 3.500000, Eta: inf, Seed: 42, "
        "Size: 512x768, Model: boats.safetensors, RNG: cuda, Sampler RNG: cuda, Sampler: euler_a discrete, "
        'Clip skip: 0, Version: stable-diffusion.cpp, SDCPP: {"prompt": "a: b, c: d", "steps": [1, 2], "x": {"y": 3}}'
    )
    assert (read.prompt, read.negative, read.steps, read.guidance) == ("a boat", "rain", 20, 7.0)
    assert (read.sampler, read.spacing, read.eta, read.clip_skip) == ("euler_a", "uniform", None, 1)
    assert (read.size, read.model, read.seed, read.like) == ((512, 768), "boats", 42, "a1111")
    assert dict(read.other)["Guidance"] == "3.500000" and "SDCPP" not in dict(read.other)


def test_stable_diffusion_cpps_second_pass_and_parts():
    read = parse_settings(
        "x\nSteps: 20, CFG scale: 7.0, Eta: 0.500000, Seed: 1, Size: 512x512, Model: , RNG: cpu, "
        "Sampler: dpm++2m karras, Unet: a/unet.gguf, VAE: v.safetensors, Clip skip: 2, "
        "Hires upscale: Latent (bicubic), Hires scale: 1.500000, Hires resize: 0x0, Hires steps: 0, "
        "Denoising strength: 0.700000, Version: stable-diffusion.cpp"
    )
    assert (read.sampler, read.spacing, read.eta, read.clip_skip) == ("dpmpp_2m", "karras", 0.5, 2)
    assert (read.hires, read.upscaler, read.strength, read.hires_steps) == (1.5, "latent-bicubic", 0.7, None)
    assert (read.model, read.vae) == ("unet", "v")


def test_sd_next():
    read = parse_settings(
        "x\nNegative prompt: \nSteps: 20, Size: 512x512, Sampler: Euler a, Seed: 1, CFG scale: 6, App: SD.Next, "
        "Version: 0123abc, Operations: txt2img; hires, Hires upscaler: Latent, Hires scale: 2, Hires strength: 0.4, "
        "Hires steps: 10, Variation seed: 5, Variation strength: 0.3"
    )
    assert (read.hires, read.upscaler, read.strength, read.hires_steps) == (2, "latent", 0.4, 10)
    assert (read.variation_seed, read.variation_strength, read.like) == (5, 0.3, None)


# --- any text at all -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ]*[A-Za-z0-9]", fullmatch=True), st.text())))
def test_entries_come_back(pairs):
    pairs = [(key, value) for key, value in pairs if "\n" not in quote(value)]
    assert entries(", ".join(f"{key}: {quote(value)}" for key, value in pairs)) == pairs


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse_settings(text + "\nSteps: 3, Seed: 1, " + text)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


HARD = {
    "a long word": lambda n: "a" * n, "words": lambda n: "a " * n, "open quotes": lambda n: 'aa: "b, ' * n,
    "quotes": lambda n: 'aa:"' * n, "colons": lambda n: "a:" * n, "commas": lambda n: "," * n,
    "spaces": lambda n: " " * n,
    "backslashes": lambda n: 'aa: "' + "\\" * n, "keys": lambda n: "aa: b, " * n, "dashes": lambda n: "-" * n + ":",
    "lines": lambda n: "x\n" * n, "negatives": lambda n: "Negative prompt: \n" * n,
    "sizes": lambda n: "Size: " + "9" * n,
    "hashes": lambda n: 'Lora hashes: "' + "a: 1, " * n + '"', "a sampler": lambda n: "Sampler: " + "a " * n,
    "a returns": lambda n: "\r" * n, "a schedule": lambda n: "Schedule type: " + "a_" * n,
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_time_grows_with_the_length_and_no_more(name):
    """Twice the length takes twice the time; a square would take four times."""
    read = reading(parse_settings)
    assert grows_with_the_length(read, lambda n: f"x\nSteps: 3, Seed: 1, CFG scale: 7, {HARD[name](n)}", most=8000)


def test_longer_texts_than_any_program_writes_are_refused():
    with pytest.raises(UserError, match="too long"):
        parse_settings("x" * LONGEST_TEXT + "\nSteps: 3, Seed: 1, CFG scale: 7")


FIELD = {"Steps": "steps", "Seed": "seed", "Size": "size", "CFG scale": "guidance", "Hires upscale": "hires",
         "Outpaint": "outpaint", "CFG interval": "interval"}  # fmt: skip


@pytest.mark.parametrize("key", FIELD)
@pytest.mark.parametrize("value", ["many", "9" * 5000, "", "1 2", "0x", "nan x 3", "inf"])
def test_numbers_that_are_none_are_named(key, value):
    with pytest.raises(UserError) as caught:
        parse_settings(f"x\nAa: 1, Bb: 2, Cc: 3, {key}: {value}").check()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 300 and (repr(key) in said or said.startswith(FIELD[key])), said


THEIRS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Model: x, "
A1111S = "Version: v1.10.1"


def test_embeddings_are_those_that_a1111_has_hashes_of():
    text = "a cat\nNegative prompt: EasyNegative, <bad>\n" + THEIRS + 'TI hashes: "EasyNegative: c74b4e810b03", '
    read = parse_settings(text + A1111S)
    assert (read.embeddings, read.hashes) == (("EasyNegative",), (("embed:EasyNegative", "c74b4e810b03"),))
    assert parse_settings(format_settings(read)).embeddings == ("EasyNegative",)
    more = parse_settings(text.replace("b03", "b03, <bad>: 1a2b3c") + "Version: f2.0.1v1.10.1")
    assert more.embeddings == ("EasyNegative", "<bad>")
    assert parse_settings("x\n" + THEIRS + 'Lora hashes: "ink: 1a2b3c", ' + A1111S).embeddings == ()
    assert parse_settings(text + "Version: plainsd 0.2.0").embeddings == ()  # which names them itself


@pytest.mark.parametrize(
    ("prompt", "again", "said"),
    [
        ("a <lora:one:0.8>", "b <lora:two:0.5>", "<lora:two:0.5>"),
        ("a <lora:one:0.8>", "b <lora:one:0.5>", "<lora:one:0.5>"),
        ("a", "b <lora:two:0.5> <lora:three:1>", "<lora:two:0.5> <lora:three:1>"),
        ("a <lora:one:0.8>", "b", "none"),
        ("a <lora:one:0.8> <lora:two:1>", "<lora:two:1> b <lora:one:0.8>", None),
        ("a", "b", None),
    ],
)
def test_other_loras_of_a_hires_prompt(prompt, again, said):
    """A1111 draws the second pass with those of the hires prompt alone."""
    text = f'{prompt}\n{THEIRS}Denoising strength: 0.5, Hires prompt: "{again}", '
    read = parse_settings(f"{text}Hires upscale: 2, {A1111S}")
    assert read.hires_prompt == again and read.other == ((("Hires LoRAs", said),) if said else ())
    assert parse_settings(format_settings(read)).other == read.other
    assert parse_settings(text + A1111S).other == ()  # no second pass
    ours = parse_settings(f"{text}Hires upscale: 2, Version: plainsd 0.2.0")
    assert ours.other == ()  # whose hires prompts have none: the second pass has those of the prompt


# --- old texts -------------------------------------------------------------------------------------------------------


def test_a_text_without_version_or_schedule_is_of_before_schedule_types():
    """A1111 writes `Schedule type` since 1.9; before, Karras was a part of the sampler's name."""
    line = "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: 512x512"
    assert parse_settings(line).spacing == parse_settings(f"{line}, Version: v1.4.0").spacing == "uniform"
    assert parse_settings(line.replace("2M", "2M Karras")).spacing == "karras"
    assert parse_settings(f"{line}, Schedule type: Automatic").spacing is None
    assert parse_settings(f"{line} \n  ").size == (512, 512)  # blanks at the end


def test_what_a1111s_api_wrote_for_nothing_is_nothing(generate, tmp_path):
    text = "a\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64, Seed resize from: -1x-1"
    old = parse_settings(f"{text}, Denoising strength: 0, Version: v1.4.0")
    assert old.seed_resize is None and old.strength == 0
    assert parse_settings(text.replace("-1x-1", "32x48")).seed_resize == (32, 48)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{text}, Denoising strength: 0, Version: v1.4.0")
    Image.new("RGB", (64, 64)).save(tmp_path / "old.png", pnginfo=info)
    assert generate("--from", tmp_path / "old.png")[0] == 0


def test_units_of_the_middle_of_2023():
    unit = ("preprocessor: canny, model: control_v11p_sd15_canny [d14c016b], weight: 0.6, starting/ending: (0.1, 0.8), "
            "resize mode: Crop and Resize, pixel perfect: False, control mode: Balanced, "
            "preprocessor params: (512, 50, 150)")  # fmt: skip
    line = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512"
    (note,) = parse_settings(f'{line}, ControlNet 0: "{unit}"').control
    assert (note.module, note.model) == ("canny", "control_v11p_sd15_canny [d14c016b]")
    assert (note.weight, note.start, note.end) == (0.6, 0.1, 0.8)
    assert (note.thresholds, note.resolution, note.resize) == ((50, 150), 512, "crop")
    with pytest.raises(UserError, match="'ControlNet 0' has a value that cannot be read"):
        parse_settings(f'{line}, ControlNet 0: "weight: 0.6, strange: 1"')


def test_old_editing_in_two_passes_is_named():
    line = (
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Denoising strength: 0.5, Hires upscale: 2"
    )
    for version, prompt, told in (
        ("v1.5.2", "[a:b:0.5]", True),
        ("v1.6.0", "[a:b:0.5]", False),
        ("v1.5.2", "a", False),
    ):
        other = dict(parse_settings(f"{prompt}\n{line}, Version: {version}").other)
        assert ("Old prompt editing timelines" in other) == told
