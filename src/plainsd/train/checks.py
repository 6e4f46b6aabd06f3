"""What can be said of a run's options by themselves: numbers out of range."""

from collections.abc import Callable
from dataclasses import fields
from math import inf
from typing import NamedTuple

from plainsd.errors import UserError


class Range(NamedTuple):
    fits: Callable[[float], bool]  # of NaN nothing is true
    words: str


ONE_OR_MORE = Range(lambda value: value >= 1, "1 or more")
NO_LESS_THAN_0 = Range(lambda value: 0 <= value < inf, "0 or more")
SHARE = Range(lambda value: 0 <= value <= 1, "0 to 1")
DECAY = Range(lambda value: 0 <= value < 1, "0 or more, and below 1")
OPTION_RANGES = {
    "hold_out": DECAY,
    "size": ONE_OR_MORE,
    "places": ONE_OR_MORE,
    "shuffle_tags": NO_LESS_THAN_0,
    "chunks": ONE_OR_MORE,
    "limit": ONE_OR_MORE,
    "bad_share": SHARE,
    "workers": NO_LESS_THAN_0,
    "steps": ONE_OR_MORE,
    "epochs": ONE_OR_MORE,
    "batch": ONE_OR_MORE,
    "accumulate": ONE_OR_MORE,
    "warmup": NO_LESS_THAN_0,
    "weight_decay": NO_LESS_THAN_0,
    "beta2": DECAY,
    "clip": Range(lambda value: value > 0, "a number above 0; with inf nothing is clipped"),
    "ema": DECAY,
    "save_every": ONE_OR_MORE,
    "keep": ONE_OR_MORE,
    "save_results_every": ONE_OR_MORE,
    "save_epochs": ONE_OR_MORE,
    "log_every": ONE_OR_MORE,
    "validate_every": ONE_OR_MORE,
    "sample_every": ONE_OR_MORE,
    "dropout": SHARE,
    "timestep_power": Range(lambda value: 0 < value < inf, "a number above 0"),
    "prior_weight": NO_LESS_THAN_0,
    "prior_count": ONE_OR_MORE,
    "rank": ONE_OR_MORE,
    "vectors": ONE_OR_MORE,
    "kl_weight": NO_LESS_THAN_0,
    "edge_weight": NO_LESS_THAN_0,
    "patch_weight": NO_LESS_THAN_0,
    "patch_after": NO_LESS_THAN_0,
    "latent_noise": NO_LESS_THAN_0,
}


def as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_ranges(*groups: object) -> None:
    """A UserError for the first number out of range in groups of options."""
    for group in groups:
        for name in (entry.name for entry in fields(group) if entry.name in OPTION_RANGES):  # type: ignore[arg-type]
            value, wanted = getattr(group, name), OPTION_RANGES[name]
            if value is not None and not wanted.fits(value):
                raise UserError(
                    f"{as_flag(name)} {value:g} is out of range; give {wanted.words}", field=name, value=value
                )
