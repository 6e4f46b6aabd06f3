"""Few-step distillations that look like any other model: recognised by name, with the sampling settings they need.

Turbo: Sauer et al. 2023 (arXiv:2311.17042). Lightning: Lin et al. 2024 (arXiv:2402.13929). Hyper-SD: Ren et al. 2024
(arXiv:2404.13686). LCM: Luo et al. 2023 (arXiv:2310.04378). DMD2: Yin et al. 2024 (arXiv:2405.14867). The settings are
those of their model cards. A card's guidance of 0 is 1 here: no unconditional pass.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from plainsd.models.variants import LCM, TURBO, VARIANTS, Variant

DISTILLED_SETTINGS: dict[str, dict[str, Any]] = {
    "Turbo": {"guidance": 2.0, "sampler": "dpmpp_sde", "steps": 6, "spacing": "karras"},  # others' merges of it
    "Lightning": {"guidance": 1.0, "sampler": "euler", "steps": 4, "spacing": "trailing"},
    "Hyper": {"guidance": 1.0, "sampler": "ddim", "steps": 8, "spacing": "trailing"},
    "LCM": LCM | {"guidance": 1.5, "spacing": None},
    "DMD2": LCM | {"guidance": 1.0, "spacing": None},
}
OWN_TURBO = re.compile(
    r"^(sd|stable[-_ ]diffusion)[-_ ]?(xl)?([-_ ]?(1|2)\.\d)?[-_ ]turbo", re.IGNORECASE
)  # Stability's
NAME_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # camelCase, snake_case and numbers come apart
AFTER_HYPER = {"", "sd", "sdxl", "xl", "vae", "cfg", "unet", "step", "steps"}  # in names that begin with it
STYLE = ("real", "detail", "photo")  # hyperRealistic, hyper detailed
STEPS_IN_NAME = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?", re.IGNORECASE)
MOST_STEPS = 16
X0 = re.compile(r"lightning.*[-_ ]x0(?![a-z0-9])", re.IGNORECASE)  # sdxl_lightning_1step_x0


def distillation_named(text: str) -> str | None:
    """The distillation that a name refers to."""
    words = [word.lower() for word in NAME_WORD.findall(text)]
    for before, (word, following) in enumerate(pairwise([*words, ""])):
        if word in ("turbo", "lightning", "lcm"):
            return {"turbo": "Turbo", "lightning": "Lightning", "lcm": "LCM"}[word]
        known = following in AFTER_HYPER or following.isdigit() or before and not following.startswith(STYLE)
        if word == "hypersd" or word == "hyper" and known:
            return "Hyper"
        if word == "dmd":
            return "DMD2"
    return None


def with_distilled_settings(variant: Variant, names: Iterable[str]) -> tuple[Variant, str | None]:
    """The variant with the settings of the distillation that the first such name refers to, and a remark for the user.

    A model whose networks or scheduler already imply few steps keeps its settings.
    """
    if variant.sampler == "lcm" or variant.steps <= LCM["steps"]:
        return variant, None
    for name in names:
        if kind := distillation_named(name):
            settings = DISTILLED_SETTINGS[kind]
            own = next((v for v in VARIANTS.values() if v.name.endswith("-turbo") and v.unet == variant.unet), None)
            if kind == "Turbo" and own and OWN_TURBO.match(name):
                settings = TURBO | {"name": own.name}
            if told := [int(number) for number in STEPS_IN_NAME.findall(name) if 0 < int(number) <= MOST_STEPS]:
                settings = settings | {"steps": told[-1]}
            changed = replace(variant, **settings)
            spacing = f", spacing {changed.spacing}" if changed.spacing else ""
            return changed, (
                f"{name!r} says that the model is distilled ({kind}): drawn with {changed.sampler}, "
                f"{changed.steps} steps, guidance {changed.guidance:g}{spacing} where nothing else is asked for"
            )
    return variant, None
