"""All settings of a picture. texts/ writes them as text, and reads other programs' texts.

This module does not import torch, so that the command line can read settings before anything heavy is loaded.
"""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from plainsd.errors import UserError, unknown

INPAINT = "inpaint"  # the preprocessor that reads the picture that is drawn over, and its mask


class ControlNote(NamedTuple):
    """A control in a picture's metadata: see pictures/control.py."""

    module: str = "none"  # the preprocessor
    model: str = "None"
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    guess: bool = False
    kinds: tuple[int, ...] = ()  # types of the maps, for a union net
    thresholds: tuple[float, float] | None = None  # canny's; None: the usual ones
    resolution: int | None = None  # of the shorter side, to which the picture is scaled first; None: not at all
    resize: str = "stretch"  # how the map gets the picture's size, one of MAP_RESIZES


class ImagePromptNote(NamedTuple):
    """An image prompt in a picture's metadata: see pictures/image_prompt.py."""

    model: str = "None"
    weight: float = 1.0
    images: int = 1
    masks: int = 0
    start: float = 0.0
    end: float = 1.0


PREPROCESSORS = ("none", "canny")  # what makes control maps: see pictures/preprocess.py
THRESHOLDS = (100, 200)  # canny's
MAP_RESIZES = {"stretch": "Just Resize", "crop": "Crop and Resize", "fill": "Resize and Fill"}
CONTROL_MODES = {"balanced": "Balanced", "prompt": "My prompt is more important",
                 "control": "ControlNet is more important"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One picture's settings. None takes the default of the model, the sampler or the task."""

    prompt: str = ""
    negative: str = ""
    size: tuple[int, int] | None = None  # width, height in pixels; with a picture given, the picture's own
    steps: int | None = None
    guidance: float | None = None  # 0: off, see `like`; 1 likewise, without CFG++: the negative prompt has no effect
    sampler: str | None = None
    spacing: str | None = None
    seed: int = 0  # RANDOM or None: one is drawn. PyTorch's CPU generator uses its low 32 bits
    noise: str | None = None  # whose random numbers: "cpu", "nv" (a GPU's, on any device), "comfyui"; see `noise_of`
    ensd: int | None = None  # A1111's eta noise seed delta: added to the seed for ancestral noise
    seed_resize: tuple[int, int] | None = None  # the initial noise of this size, in the middle of the picture's
    batch_index: int = 0  # with noise "comfyui": index in its batch ...
    batch_size: int | None = None  # ... and the batch's size
    image_guidance: float | None = None  # towards the picture, of models that edit one (arXiv:2211.09800)
    clip_skip: int = 1  # 1: the text encoder's last layer, 2: the last but one, ...
    eta: float | None = None  # share of fresh noise per step, for samplers that take it
    strength: float | None = None  # share of the steps that run on a given or upscaled picture
    variation_seed: int | None = None  # a second seed, towards whose noise the initial one is interpolated ...
    variation_strength: float = 0.0  # ... by this share, 0 to 1
    hires: float | None = None  # second pass on the picture enlarged this many times
    upscaler: str = "latent"  # one of UPSCALERS, or a network by its file's name
    hires_steps: int | None = None  # of the hires pass, all of which run; None: the share `strength` of `steps`
    hires_sampler: str | None = None  # of the hires pass, if different; likewise the following
    hires_spacing: str | None = None  # AUTOMATIC: that of the pass's sampler, whatever the first pass has
    hires_prompt: str | None = None
    hires_negative: str | None = None
    hires_guidance: float | None = None
    handover: float | None = None  # share of the timesteps after which the refiner takes over
    refiner: str | None = None  # its name, for the metadata, as for `model`
    vae: str | None = None  # likewise, if not the model's own
    masked: bool = False  # inpainting: a mask was given, for the metadata
    mask_blur: float = 0.0  # see `masks.MaskOptions`, likewise the following
    mask_grow: int = 0
    masked_padding: int | None = None
    masked_content: str = "original"
    soft_mask: bool = False
    outpaint: tuple[int, int, int, int] | None = None  # pixels added at left, top, right, bottom, for the metadata
    control: tuple[ControlNote, ...] = ()  # for the metadata
    image_prompt: tuple[ImagePromptNote, ...] = ()  # likewise
    rescale: float = 0.0  # Lin et al. 2023 (arXiv:2305.08891), 0 to 1
    interval: tuple[float, float] | None = None  # sigmas between which guidance acts (arXiv:2404.07724)
    perturbed: float = 0.0  # scale of perturbed-attention guidance (arXiv:2403.17377)
    threshold: float | None = None  # percentile of dynamic thresholding, .995 (arXiv:2205.11487)
    apg: float = 0.0  # adaptive projected guidance: norm limit of its update, 15 for SDXL (arXiv:2410.02416)
    apg_parallel: float = 0.0  # share of the component parallel to the cond estimate, the paper's eta
    apg_momentum: float = -0.5  # momentum over steps, the paper's beta
    tiling: bool = False  # the picture tiles seamlessly
    cache: int | None = None  # deep layers run only at every n-th call (DeepCache, arXiv:2312.00858)
    embeddings: tuple[str, ...] = ()  # textual inversions in the prompts, for the metadata
    prediction: str | None = None  # prediction type, if the user set it, for the metadata
    zero_snr: bool | None = None  # likewise, zero-terminal SNR
    like: str | None = None  # the program to reproduce, see diffusion/conventions.py; None is "diffusers"
    model: str | None = None  # its name, for the metadata only; it chooses no model
    hashes: tuple[tuple[str, str], ...] = ()  # of the files of model, vae, lora:name, embed:word, for the metadata
    other: tuple[tuple[str, str], ...] = ()  # other fields of a text that was read; without effect

    def __post_init__(self) -> None:
        """Takes numbers and pairs as Python and JSON have them: 4.0 is 4, [8, 64] is (8, 64), seed None is RANDOM."""
        for name, value in list(vars(self).items()):
            if isinstance(value, list):
                value = tuple(value)
            if name in WHOLE_NUMBERS:
                value = tuple(map(as_whole, value)) if isinstance(value, tuple) else as_whole(value)
            object.__setattr__(self, name, RANDOM if name == "seed" and value is None else value)

    def __eq__(self, other: object) -> bool:
        """Compares the fields, resolved or not."""
        return isinstance(other, Settings) and vars(self) == vars(other)

    def check(self) -> None:
        """UserError for the first number out of range. Samplers and spacings are checked by `samplers.check_names`."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            for entry in value if isinstance(value, tuple) else (value,):
                if entry is not None and not low <= entry <= high and not (name in SEEDS and entry == RANDOM):
                    what = f"{name.replace('_', ' ')} {entry} is out of range"
                    more = f", or {RANDOM} for a random one" if name in SEEDS else ""
                    raise UserError(f"{what}; choose {low} to {high}{more}", field=name, value=entry)
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            for entry in value if isinstance(value, tuple) else (value,):
                if entry is not None and entry != int(entry):
                    what = f"{name.replace('_', ' ')} {entry} is not a whole number"
                    raise UserError(f"{what}; choose {int(entry)}", field=name, value=entry)
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
        """The field that increases from picture to picture: the seed, for variations the variation seed, for ComfyUI's
        batches the index."""
        if noise_of(self) == "comfyui":
            return "batch_index"
        return "variation_seed" if self.variation_strength and self.variation_seed is not None else "seed"

    def check_count(self, count: int) -> None:
        """UserError if the seed, or the place in a batch, of the last of `count` pictures would be too large."""
        first, (_, largest) = getattr(self, self.counted), RANGES[self.counted]
        if self.counted == "batch_index" and self.batch_size is not None:
            largest = self.batch_size - 1
        if first + count - 1 > largest:
            raise UserError(
                f"{self.counted.replace('_', ' ')} {first} and the {count - 1} after it pass {largest}; choose a lower "
                "one, or fewer pictures",
                field=self.counted,
                value=first,
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Resolved(Settings):
    """Settings without None where a value is needed: see `defaults.resolved`."""

    size: tuple[int, int]
    steps: int
    guidance: float
    sampler: str
    spacing: str


LATENT_MODES = {  # upscalers in latent space, as A1111's of these names: mode, antialiased
    "latent": ("bilinear", False), "latent-antialiased": ("bilinear", True), "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True), "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}  # fmt: skip
UPSCALERS = (*LATENT_MODES, "lanczos")
MASK_OPTIONS = ("mask_blur", "mask_grow", "masked_padding", "masked_content", "soft_mask")
MASKED_CONTENTS = ("original", "fill", "noise", "nothing")  # what is under the mask at the start
LIKE = ("diffusers", "a1111", "comfyui")
NOISE_OF = {None: "cpu", "diffusers": "cpu", "a1111": "nv", "comfyui": "comfyui"}  # by `like`, if nothing is said
SIZES = (8, 4096)  # pixels per side
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
WHOLE_NUMBERS = (  # fields that must be whole numbers
    "steps", "hires_steps", "seed", "clip_skip", "variation_seed", "cache",
    "ensd", "batch_index", "batch_size", "mask_grow", "masked_padding", "size", "seed_resize", "outpaint",
)  # fmt: skip
SEEDS = ("seed", "variation_seed")
NEEDS = {  # settings without effect, unless another is there too
    **dict.fromkeys(("hires_steps", "hires_sampler", "hires_spacing", "hires_prompt", "hires_negative",
                     "hires_guidance", "upscaler"), "hires"),
    "variation_seed": "variation_strength", "apg_parallel": "apg", "apg_momentum": "apg",
}  # fmt: skip
RANDOM = -1  # as a seed
AUTOMATIC = "automatic"  # as hires_spacing


# --- seeds and notes -------------------------------------------------------------------------------------------------


def noise_of(settings: Settings) -> str:
    """The kind of random numbers: as set, or those of the program in `like` (A1111 draws on the GPU)."""
    return settings.noise or NOISE_OF[settings.like]


def check_needs(given: Collection[str], has: Collection[str]) -> None:
    """UserError for the first of the `given` settings whose need is not among those that a picture `has`."""
    for name, need in NEEDS.items():
        if name in given and need not in has:
            first, second = (one.replace("_", " ") for one in (name, need))
            raise UserError(f"{first} has no effect without {second}; give both, or leave it out", field=name)


def drawn_seed() -> int:
    """A random seed, from all that give different noise."""
    return int.from_bytes(os.urandom(4), "big")


def read_seed(text: str, name: str = "seed") -> int:
    """A seed as typed: an integer, or `random`."""
    if text.strip().lower() == "random":
        return RANDOM
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name} {text!r} is not a whole number; give one from 0 to {RANGES['seed'][1]}, or random"
        ) from None


def notes(settings: Settings) -> list[str]:
    """Notes for the user on settings that do something else than expected."""
    found = [
        f"{name.replace('_', ' ')} {value} draws the same as {value % 2**32}: PyTorch's generator reads only the low "
        "32 bits of a seed, here as in every program that draws its noise on the CPU"
        for name in SEEDS
        if (value := getattr(settings, name)) is not None and value >= 2**32 and noise_of(settings) != "nv"
    ]
    if settings.like in (None, "diffusers"):
        for name, sampler in (
            ("guidance", settings.sampler),
            ("hires_guidance", settings.hires_sampler or settings.sampler),
        ):
            if getattr(settings, name) == 0:
                same = "" if "cfg_pp" in str(sampler) else ", as 1 is"
                found.append(
                    f"{name.replace('_', ' ')} 0 is off{same}: the prompt is followed plainly, and the negative prompt "
                    "has no effect"
                )
    return found


def content_notes(settings: Settings) -> list[str]:
    """Likewise, where something is drawn under a mask."""
    name, soft = settings.masked_content, settings.soft_mask
    if name == DEFAULTS["masked_content"] or settings.strength != 1 or soft or settings.like not in (None, "diffusers"):
        return []
    return [f"masked content {name} has no effect at strength 1, from pure noise; choose a lower strength"]


def as_whole(value: Any) -> Any:
    """4.0 -> 4; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def ratio_to(wanted: tuple[int, int], size: tuple[int, int]) -> float | None:
    """How many times `size` is enlarged to the wanted one, a side of which may be 0: any. None where the shapes differ.
    A float may fall short of a wanted side in its last digit, and is then the next one."""
    pairs = [(large, small) for large, small in zip(wanted, size, strict=True) if large and small]
    ratios = {large / small for large, small in pairs}
    if len(ratios) != 1:
        return None
    times = ratios.pop()
    return times if all(int(small * times) == large for large, small in pairs) else math.nextafter(times, math.inf)


def plain_number(value: float) -> str:
    """7.0 -> "7", 0.1 -> "0.1": no digit is lost."""
    return repr(value).removesuffix(".0")


DEFAULTS = {field.name: field.default for field in fields(Settings)}
