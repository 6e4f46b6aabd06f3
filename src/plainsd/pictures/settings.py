"""Every choice that makes a picture. How it is written as text, and other programs' texts are read, is in texts/.

This module needs no torch, so that the command line can read settings before it loads anything heavy.
"""

import os
from dataclasses import dataclass, fields
from typing import NamedTuple

from plainsd.errors import UserError, unknown


class ControlNote(NamedTuple):
    """What a picture's text says of a map that it followed: see pictures/control.py."""

    module: str = "none"  # what made the map of a picture
    model: str = "None"
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    guess: bool = False
    kinds: tuple[int, ...] = ()  # of maps, where the net is for several


class ImagePromptNote(NamedTuple):
    """What a picture's text says of pictures that it took after: see pictures/image_prompt.py."""

    model: str = "None"
    weight: float = 1.0
    images: int = 1
    masks: int = 0


CONTROL_MODES = {"balanced": "Balanced", "prompt": "My prompt is more important",
                 "control": "ControlNet is more important"}  # fmt: skip


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
    noise: str | None = None  # whose random numbers: "cpu", "nv" (a GPU's, on any device), "comfyui"; see `noise_of`
    ensd: int | None = None  # A1111's eta noise seed delta: added to the seed for the noise on the way
    seed_resize: tuple[int, int] | None = None  # the first noise is that of this size, in the middle of the picture's
    batch_index: int = 0  # with noise "comfyui": which picture of the batch that was drawn at once ...
    batch_size: int | None = None  # ... and how many it had
    image_guidance: float | None = None  # towards the picture, of models that edit one (arXiv:2211.09800)
    clip_skip: int = 1  # 1: the text encoder's last layer, 2: the last but one, ...
    eta: float | None = None  # share of fresh noise a step, for samplers that have the choice
    strength: float | None = None  # share of the steps that run on a given or upscaled picture
    variation_seed: int | None = None  # a second seed, towards which the first noise is turned ...
    variation_strength: float = 0.0  # ... by this share, 0 to 1
    hires: float | None = None  # second pass on the picture enlarged this many times
    upscaler: str = "latent"  # how it is enlarged: one of UPSCALERS, or a network by its file's name
    hires_steps: int | None = None  # of the second pass, all of which run; None: the share `strength` of `steps`
    hires_sampler: str | None = None  # of the second pass, where it is another; likewise the following
    hires_spacing: str | None = None
    hires_prompt: str | None = None
    hires_negative: str | None = None
    hires_guidance: float | None = None
    handover: float | None = None  # share of the timesteps after which the refiner draws
    refiner: str | None = None  # its name, for the text, as for `model`
    vae: str | None = None  # likewise, where it is not the model's own
    masked: bool = False  # inpainting: a mask came with the picture, for the text
    mask_blur: float = 0.0  # see `masks.MaskOptions`, likewise the following
    mask_grow: int = 0
    masked_padding: int | None = None
    masked_content: str = "original"
    soft_mask: bool = False
    outpaint: tuple[int, int, int, int] | None = None  # pixels added at left, top, right, bottom, for the text
    control: tuple[ControlNote, ...] = ()  # maps that it followed, for the text
    image_prompt: tuple[ImagePromptNote, ...] = ()  # pictures that it took after, likewise
    rescale: float = 0.0  # Lin et al. 2023 (arXiv:2305.08891), 0 to 1
    interval: tuple[float, float] | None = None  # sigmas between which guidance acts (arXiv:2404.07724)
    perturbed: float = 0.0  # scale of perturbed-attention guidance (arXiv:2403.17377)
    threshold: float | None = None  # percentile of dynamic thresholding, .995 (arXiv:2205.11487)
    apg: float = 0.0  # adaptive projected guidance: the most length of its step, 15 for SDXL (arXiv:2410.02416)
    apg_parallel: float = 0.0  # share of that step's part along the prompted estimate, the paper's eta
    apg_momentum: float = -0.5  # what earlier steps count, the paper's beta
    tiling: bool = False  # the picture repeats without a seam
    cache: int | None = None  # deep layers run at every so many-th call only (arXiv:2312.00858)
    embeddings: tuple[str, ...] = ()  # learned words in the prompts, for the text
    prediction: str | None = None  # what the user said that the model's network predicts, for the text
    zero_snr: bool | None = None  # likewise, whether its noise ends at zero SNR
    like: str | None = None  # the program whose picture is wanted, see diffusion/conventions.py; None is "diffusers"
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
        for name, choices in (
            ("like", (None, *LIKE)),
            ("noise", (None, *NOISE_OF.values())),
            ("masked_content", MASKED_CONTENTS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise unknown(name, value, filter(None, choices), field=name)
        if self.batch_index >= (self.batch_size or RANGES["batch_size"][1]):
            what = f"batch index {self.batch_index} is not in a batch of {self.batch_size}"
            raise UserError(f"{what}; the first picture has index 0", field="batch_index", value=self.batch_index)

    @property
    def counted(self) -> str:
        """What goes up from picture to picture: the seed, of a variation the second one, of a batch of ComfyUI's the
        place in it."""
        if noise_of(self) == "comfyui":
            return "batch_index"
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


UPSCALERS = (
    "latent", "latent-antialiased", "latent-bicubic", "latent-bicubic-antialiased", "latent-nearest",
    "latent-nearest-exact", "lanczos",
)  # fmt: skip
MASKED_CONTENTS = ("original", "fill", "noise", "nothing")  # what lies under the mask at the start
LIKE = ("diffusers", "a1111", "comfyui")
NOISE_OF = {
    None: "cpu",
    "diffusers": "cpu",
    "a1111": "nv",
    "comfyui": "comfyui",
}  # by `like`, where nothing else is said
SIZES = (8, 4096)  # pixels, of either side
RANGES = {
    "size": SIZES, "steps": (1, 1000), "guidance": (0, 100), "seed": (0, 2**64 - 1), "clip_skip": (1, 48),
    "image_guidance": (0, 100),
    "eta": (0, 1), "strength": (0, 1), "variation_seed": (0, 2**64 - 1), "variation_strength": (0, 1), "hires": (1, 8),
    "hires_steps": (1, 1000), "hires_guidance": (0, 100),
    "mask_blur": (0, 64), "mask_grow": (-256, 256), "masked_padding": (0, 4096),
    "handover": (0, 1), "ensd": (0, 2**64 - 1), "seed_resize": SIZES, "batch_index": (0, 4095), "batch_size": (1, 4096),
    "rescale": (0, 1), "interval": (0, 1e9), "perturbed": (0, 100), "threshold": (0, 1),
    "apg": (0, 10_000), "apg_parallel": (0, 1), "apg_momentum": (-1, 1),
    "cache": (1, 100),
}  # fmt: skip
WHOLE = (
    *(
        "steps",
        "hires_steps",
        "seed",
        "clip_skip",
        "variation_seed",
        "cache",
        "ensd",
        "batch_index",
        "batch_size",
        "mask_grow",
        "masked_padding",
    ),
)
SEEDS = ("seed", "variation_seed")
RANDOM = -1  # as a seed


# --- seeds, and what is to be said of them ---------------------------------------------------------------------------


def noise_of(settings: Settings) -> str:
    """Whose random numbers: those asked for, or those of the program that is followed (A1111 draws on the GPU)."""
    return settings.noise or NOISE_OF[settings.like]


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
        if (value := getattr(settings, name)) is not None and value >= 2**32 and noise_of(settings) != "nv"
    ]
    if settings.guidance == 0 and settings.like in (None, "diffusers"):
        found.append(
            "guidance 0 is off, as 1 is: the prompt is followed plainly, and the negative prompt has no effect"
        )
    return found


def plain_number(value: float) -> str:
    """7.0 -> "7", 0.1 -> "0.1": no digit is lost."""
    return repr(value).removesuffix(".0")


DEFAULTS = {field.name: field.default for field in fields(Settings)}
