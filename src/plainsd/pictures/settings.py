"""Every choice that makes a picture, and its text form: what stands in a PNG under `parameters`.

The text is the one AUTOMATIC1111's web UI writes and most tools read:

    a red apple
    Negative prompt: blurred
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: emoji, Version: plainsd 0.1.0

This module needs no torch, so that the command line can read settings before it loads anything heavy.
"""

import json
import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from plainsd import __version__
from plainsd.errors import UserError, unknown


@dataclass(frozen=True)
class Settings:
    """One picture's settings. None takes the default of the model, the sampler or the task."""

    prompt: str = ""
    negative: str = ""
    size: tuple[int, int] | None = None  # width, height in pixels; with a picture given, the picture's own
    steps: int | None = None
    guidance: float | None = None  # 1: no second pass, and the negative prompt has no effect; 0 is the same, see `like`
    sampler: str | None = None
    spacing: str | None = None
    seed: int = 0  # RANDOM: one is drawn. Of it PyTorch's generator reads the low 32 bits
    image_guidance: float | None = None  # towards the picture, of models that edit one (arXiv:2211.09800)
    clip_skip: int = 1  # 1: the text encoder's last layer, 2: the last but one, ...
    eta: float | None = None  # share of fresh noise a step, for samplers that have the choice
    strength: float | None = None  # share of the steps that run on a given or upscaled picture
    variation_seed: int | None = None  # a second seed, towards which the first noise is turned ...
    variation_strength: float = 0.0  # ... by this share, 0 to 1
    hires: float | None = None  # second pass on the picture enlarged this many times
    upscaler: str = "latent"  # how it is enlarged: "latent" or "lanczos"
    handover: float | None = None  # share of the timesteps after which the refiner draws
    refiner: str | None = None  # its name, for the text, as for `model`
    vae: str | None = None  # likewise, where it is not the model's own
    masked: bool = False  # inpainting: a mask came with the picture, for the text
    outpaint: tuple[int, int, int, int] | None = None  # pixels added at left, top, right, bottom, for the text
    rescale: float = 0.0  # Lin et al. 2023 (arXiv:2305.08891), 0 to 1
    interval: tuple[float, float] | None = None  # sigmas between which guidance acts (arXiv:2404.07724)
    perturbed: float = 0.0  # scale of perturbed-attention guidance (arXiv:2403.17377)
    threshold: float | None = None  # percentile of dynamic thresholding, .995 (arXiv:2205.11487)
    cache: int | None = None  # deep layers run at every so many-th call only (arXiv:2312.00858)
    embeddings: tuple[str, ...] = ()  # learned words in the prompts, for the text
    prediction: str | None = None  # what the user said that the model's network predicts, for the text
    zero_snr: bool | None = None  # likewise, whether its noise ends at zero SNR
    like: str | None = None  # "a1111": guidance 0 is what its formula says, the estimate without the prompt
    model: str | None = None  # its name, for the text; which model draws is said elsewhere
    hashes: tuple[tuple[str, str], ...] = ()  # of the files of model, vae, lora:name, embed:word, for the text
    other: tuple[tuple[str, str], ...] = ()  # what a text said beside these; nothing here acts on it

    def __eq__(self, other: object) -> bool:
        """By what they say, resolved or not."""
        return isinstance(other, Settings) and vars(self) == vars(other)

    def check(self) -> None:
        """UserError for the first number that is out of its range. Samplers and spacings are registered where they are
        written, and checked there: `samplers.check_names`."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            for entry in value if isinstance(value, tuple) else (value,):
                if entry is not None and not low <= entry <= high and not (name in SEEDS and entry == RANDOM):
                    what = f"{name.replace('_', ' ')} {entry} is out of range"
                    more = f", or {RANDOM} for a random one" if name in SEEDS else ""
                    raise UserError(f"{what}; choose {low} to {high}{more}", field=name, value=entry)
        for name in WHOLE:
            if (value := getattr(self, name)) is not None and value != int(value):
                what = f"{name.replace('_', ' ')} {value} is no whole number"
                raise UserError(f"{what}; choose {int(value)}", field=name, value=value)
        if self.interval is not None and self.interval[0] >= self.interval[1]:
            raise UserError(
                f"interval {self.interval} is empty; give its lower sigma first", field="interval", value=self.interval
            )
        for name, choices in (("upscaler", UPSCALERS), ("like", (None, *LIKE))):
            if (value := getattr(self, name)) not in choices:
                raise unknown(name, value, filter(None, choices), field=name)

    @property
    def counted(self) -> str:
        """Which seed goes up from picture to picture: of a variation the first one stays."""
        return "variation_seed" if self.variation_strength and self.variation_seed is not None else "seed"

    def check_count(self, count: int) -> None:
        """UserError where the seed of the last of so many pictures would be too large."""
        first, (_, largest) = getattr(self, self.counted), RANGES[self.counted]
        if first + count - 1 > largest:
            raise UserError(
                f"{self.counted.replace('_', ' ')} {first} and the {count - 1} after it pass {largest}; choose a lower "
                "one, or fewer pictures",
                field=self.counted,
                value=first,
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Resolved(Settings):
    """Settings with nothing left open: see `defaults.resolved`."""

    size: tuple[int, int]
    steps: int
    guidance: float
    sampler: str
    spacing: str


UPSCALERS = ("latent", "lanczos")
LIKE = ("a1111",)
SIZES = (8, 4096)  # pixels, of either side
RANGES = {
    "size": SIZES, "steps": (1, 1000), "guidance": (0, 100), "seed": (0, 2**64 - 1), "clip_skip": (1, 48),
    "image_guidance": (0, 100),
    "eta": (0, 1), "strength": (0, 1), "variation_seed": (0, 2**64 - 1), "variation_strength": (0, 1), "hires": (1, 8),
    "handover": (0, 1),
    "rescale": (0, 1), "interval": (0, 1e9), "perturbed": (0, 100), "threshold": (0, 1),
    "cache": (1, 100),
}  # fmt: skip
WHOLE = ("steps", "seed", "clip_skip", "variation_seed", "cache")
SEEDS = ("seed", "variation_seed")
RANDOM = -1  # as a seed


# --- seeds, and what is to be said of them ---------------------------------------------------------------------------


def drawn_seed() -> int:
    """A random one, of all that differ."""
    return int.from_bytes(os.urandom(4), "big")


def read_seed(text: str, name: str = "seed") -> int:
    """A seed as it is typed: a whole number, or `random`."""
    if text.strip().lower() == "random":
        return RANDOM
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name} {text!r} is no whole number; give one from 0 to {RANGES['seed'][1]}, or random"
        ) from None


def notes(settings: Settings) -> list[str]:
    """What a user should know of a choice that does something else than it seems to."""
    found = [
        f"{name.replace('_', ' ')} {value} draws the same as {value % 2**32}: PyTorch's generator reads only the low "
        "32 bits of a seed, here as in every program that draws its noise on the CPU"
        for name in SEEDS
        if (value := getattr(settings, name)) is not None and value >= 2**32
    ]
    if settings.guidance == 0 and settings.like is None:
        found.append(
            "guidance 0 is off, as 1 is: the prompt is followed plainly, and the negative prompt has no effect"
        )
    return found


# How A1111 writes our names, which is also what drop-downs show. A name that is not here is written as it is.
SAMPLER_LABELS = {
    "ddpm": "DDPM", "ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm2": "DPM2", "dpm2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_a": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE", "lms": "LMS", "unipc": "UniPC", "lcm": "LCM",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "restart": "Restart", "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive", "ddim_cfg_pp": "DDIM CFG++", "tcd": "TCD", "deis": "DEIS", "ipndm": "IPNDM",
}  # fmt: skip
SPACING_LABELS = {  # only what A1111 means by them, level for level
    "karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "uniform": "Uniform",
    "sgm_uniform": "SGM Uniform", "simple": "Simple", "ddim_uniform": "DDIM", "beta_a1111": "Beta",
    "kl_optimal_a1111": "KL Optimal",
    "align_your_steps": "Align Your Steps",        # of an SDXL model align_your_steps_xl: `defaults.resolved`
}  # fmt: skip
NEAREST_LABELS = {  # A1111's nearest, of those that it has not
    "linspace": "Uniform", "trailing": "Simple", "leading": "DDIM", "beta": "Beta", "kl_optimal": "KL Optimal",
    "align_your_steps_xl": "Align Your Steps", "distilled": "Automatic",
}  # fmt: skip
SPARED = (
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "unipc",
)  # their linspace leaves out the last, as SGM Uniform does
SUFFIXES = ("karras", "exponential")  # written behind the sampler's name; the others as "Schedule type"


def plain_number(value: float) -> str:
    """7.0 -> "7", 0.1 -> "0.1": no digit is lost."""
    return repr(value).removesuffix(".0")


def _interval(text: str) -> tuple[float, float]:
    low, high = text.split(" to ")
    return float(low), float(high)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _sides(text: str) -> tuple[int, ...]:
    left, top, right, bottom = text.split()
    return int(left), int(top), int(right), int(bottom)


# A1111's key, our field, text -> value, value -> text; in the order in which they are written
FIELDS = (
    ("Steps", "steps", int, str),
    ("CFG scale", "guidance", float, plain_number),
    ("Image CFG scale", "image_guidance", float, plain_number),
    ("Seed", "seed", int, str),
    ("Size", "size", _size, lambda size: f"{size[0]}x{size[1]}"),
    ("Model", "model", str, str),
    ("VAE", "vae", str, str),
    ("Prediction", "prediction", str, str),
    ("Noise Schedule", "zero_snr", lambda text: text == ZERO_SNR, lambda on: ZERO_SNR if on else "Default"),
    ("Denoising strength", "strength", float, plain_number),
    ("Mask", "masked", lambda text: text == "given", lambda masked: "given"),
    ("Outpaint", "outpaint", _sides, lambda sides: " ".join(map(str, sides))),
    ("Clip skip", "clip_skip", int, str),
    ("Eta", "eta", float, plain_number),
    ("Variation seed", "variation_seed", int, str),
    ("Variation seed strength", "variation_strength", float, plain_number),
    ("Hires upscale", "hires", float, plain_number),
    ("Hires upscaler", "upscaler", str.lower, str.capitalize),
    ("Refiner", "refiner", str, str),
    ("Refiner switch at", "handover", float, plain_number),
    ("CFG rescale", "rescale", float, plain_number),
    ("CFG interval", "interval", _interval, lambda pair: f"{plain_number(pair[0])} to {plain_number(pair[1])}"),
    ("PAG scale", "perturbed", float, plain_number),
    ("Threshold percentile", "threshold", float, plain_number),
    ("Deep cache", "cache", int, str),
    ("Embeddings", "embeddings", _words, ", ".join),
)
ZERO_SNR = "Zero Terminal SNR"  # A1111's word for it
HASHES = {"model": "Model hash", "vae": "VAE hash"}  # A1111's keys for one ...
SEVERAL = {"lora:": "Lora hashes", "embed:": "TI hashes"}  # ... and for "name: hash, name: hash"
DEFAULTS = {field.name: field.default for field in fields(Settings)}
ALWAYS = ("seed",)  # written even where they have their default value


def quote(text: str) -> str:
    """A value with a comma, a colon, a quote or a line break is written as a JSON string; others bare."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def unquote(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:  # another program's bare value that starts with a quote
        return text


def format_settings(settings: Settings) -> str:
    """Settings -> A1111's text, three parts: the prompt, the negative prompt, one line of `key: value`."""
    entries = []
    for key, name, _, write in FIELDS:
        value = getattr(settings, name)
        if value != DEFAULTS[name] or name in ALWAYS:
            entries.append(f"{key}: {quote(write(value))}")
    sampler = sampler_label(settings.sampler) if settings.sampler else None
    if settings.spacing in SUFFIXES:
        sampler = f"{sampler} {spacing_label(settings.spacing)}"
    elif settings.spacing:
        entries.insert(1, f"Schedule type: {spacing_label(settings.spacing)}")
    if sampler:
        entries.insert(1, f"Sampler: {sampler}")
    entries += _hash_entries(settings.hashes)
    entries.append(f"Version: plainsd {__version__}")
    parts = [settings.prompt] if settings.prompt else []
    parts += [f"Negative prompt: {settings.negative}"] if settings.negative else []
    return "\n".join([*parts, ", ".join(entries)])


def _hash_entries(hashes: tuple[tuple[str, str], ...]) -> list[str]:
    entries = [f"{key}: {dict(hashes)[name]}" for name, key in HASHES.items() if name in dict(hashes)]
    for kind, key in SEVERAL.items():
        if pairs := [f"{name.removeprefix(kind)}: {value}" for name, value in hashes if name.startswith(kind)]:
            entries.append(f"{key}: {quote(', '.join(pairs))}")
    return entries


ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def sampler_label(name: str) -> str:
    return SAMPLER_LABELS.get(name, name)


def spacing_label(name: str) -> str:
    return SPACING_LABELS.get(name, name)


def nearest_label(sampler: str | None, spacing: str) -> str:
    """A1111's "Schedule type" whose levels are, or are nearest to, those of a spacing with this sampler."""
    if spacing == "linspace" and sampler in SPARED:
        return SPACING_LABELS["sgm_uniform"]
    return (SPACING_LABELS | NEAREST_LABELS).get(spacing, "Automatic")


def _sampler(said: dict[str, str]) -> dict[str, str | None]:
    """ "DPM++ 2M Karras", or "DPM++ 2M" beside "Schedule type: Karras" -> our two names. A stranger's name stays."""
    name, schedule = said.pop("Sampler", None), said.pop("Schedule type", "Automatic")
    spacing: str | None = {label: ours for ours, label in SPACING_LABELS.items()}.get(schedule)
    if spacing is None and re.fullmatch(r"[a-z]\w*", schedule):  # one of ours that A1111 has no label for
        spacing = schedule
    elif spacing is None and schedule != "Automatic":
        said["Schedule type"] = schedule
    for suffix in SUFFIXES:
        if name and name.endswith(" " + SPACING_LABELS[suffix]):
            name, spacing = name.removesuffix(" " + SPACING_LABELS[suffix]), suffix
    sampler = {label: ours for ours, label in SAMPLER_LABELS.items()}.get(name, name) if name else None
    return {"sampler": sampler, "spacing": spacing}


def _hires(said: dict[str, str]) -> None:
    """A1111's "Hires resize: 1024x1024", one side perhaps 0, as the times that the picture is enlarged."""
    try:
        ratios = {to / side for to, side in zip(_size(said["Hires resize"]), _size(said["Size"]), strict=True) if to}
    except (KeyError, ValueError, ZeroDivisionError):
        return
    if len(ratios) == 1:  # another shape stays among what has no meaning here
        said["Hires upscale"] = plain_number(ratios.pop())
        del said["Hires resize"]


def _hashes(said: dict[str, str]) -> tuple[tuple[str, str], ...]:
    found = [(name, said.pop(key)) for name, key in HASHES.items() if key in said]
    for kind, key in SEVERAL.items():
        pairs = [pair.rpartition(": ") for pair in said.pop(key, "").split(", ") if ": " in pair]
        found += [(kind + name, value) for name, _, value in pairs]
    return tuple(found)


def parse_settings(text: str) -> Settings:
    """A1111's text -> Settings; what has no meaning here is kept in `other`. UserError where this is no such text."""
    *lines, last = text.rstrip("\n").split("\n")
    said = {key: unquote(value.strip()) for key, value in ENTRY.findall(last)}
    if len(said) < 3:  # A1111's own rule: fewer, and the line belongs to the prompt
        raise UserError(f"no settings in the text {last[:60]!r}; its last line should read 'Steps: 20, Sampler: ...'")
    _hires(said)
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    found: dict[str, Any] = {
        "prompt": "\n".join(lines[:negative]),
        "negative": "\n".join(lines[negative:]).removeprefix("Negative prompt:").removeprefix(" "),
        **_sampler(said),
        "hashes": _hashes(said),
    }
    for key, name, read, _ in FIELDS:
        if key in said:
            try:
                found[name] = read(said.pop(key))
            except ValueError as error:
                raise UserError(f"settings text: {key!r} has a value that cannot be read ({error})") from None
    if found.get("guidance") == 0:  # off is written as 1 here, so this is A1111's 0
        found["like"] = "a1111"
    return replace(Settings(**found), other=tuple((k, v) for k, v in said.items() if k != "Version"))
