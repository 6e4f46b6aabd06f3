"""What can be said of a run's options by themselves: numbers out of range, options of other methods, and those that do
nothing beside the others."""

from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from math import inf
from typing import Any, NamedTuple

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

TUNING, TAUGHT = ("full", "lora", "inversion"), ("scratch", "full", "lora", "inversion", "controlnet")
METHODS_OF = {  # an option's methods, where not all have it
    **dict.fromkeys(("model",), ("vae", "scratch")),
    **dict.fromkeys(("tokenizer", "carry", "live_latents"), ("scratch",)),
    **dict.fromkeys(
        ("kl_weight", "edge_weight", "patch_weight", "patch_after", "latent_noise", "decoder_only"), ("vae",)
    ),
    **dict.fromkeys(("vae", "checkpointing", "prompts", "chunks", "shuffle_tags"), TAUGHT),
    **dict.fromkeys(("dropout", "timestep_power", "min_snr", "offset_noise", "perturbation", "huber"), TAUGHT),
    **dict.fromkeys(("prior", "prior_prompt", "prior_weight", "prior_count"), TUNING),
    **dict.fromkeys(("text_encoder", "distill_steps"), ("full", "lora")),
    **dict.fromkeys(("optimizer",), ("vae", "scratch", "full")),
    **dict.fromkeys(("kind", "rank", "alpha", "factor", "targets", "conv", "dora"), ("lora",)),
    **dict.fromkeys(("half_base",), ("lora", "inversion", "controlnet")),
    **dict.fromkeys(("token", "vectors", "initial"), ("inversion",)),
    **dict.fromkeys(("control",), ("controlnet",)),
    **dict.fromkeys(("save_dtype",), ("scratch", "full", "lora", "controlnet")),
}
DONE_ANYWAY = {"save_dtype": "float32"}  # what methods without the option do: they may be told it
ONLY_WITH = {  # an option's others, without all of which it does nothing
    "places": ("--crop random",),
    "prior_weight": ("--prior", "--prior-prompt"),
    "prior_count": ("--prior-prompt",),
    "distill_steps": ("--distill",),
    "patch_after": ("--patch-weight",),
}
OVERRULED = {"hold_out": "--heldout", "kl_weight": "--decoder-only"}  # an option's other, beside which it does nothing


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


def check_methods(options: Any) -> None:
    """A UserError for the first option that the run's method does not have. At their defaults all are let pass, as a
    file of options has them."""
    for entry, value in each_option(options):
        methods = METHODS_OF.get(entry.name)
        idle = value in (entry.default, DONE_ANYWAY.get(entry.name))
        if methods and options.method not in methods and not idle:
            *others, last = methods
            names = f"methods {', '.join(others)} and {last}" if others else f"method {last}"
            raise UserError(
                f"{as_flag(entry.name)} is for {names}, and method {options.method} does not use it; leave it out",
                field=entry.name,
            )


def check_together(options: Any) -> None:
    """A UserError for the first option that the others leave without effect. At their defaults all are let pass."""
    there = given_flags(options)
    for name, others in ONLY_WITH.items():
        if as_flag(name) in there and idle_beside(name, there):
            wanted = " or ".join(others)
            raise UserError(
                f"{as_flag(name)} has no effect without {wanted}; give that too, or leave it out", field=name
            )
    for name, other in OVERRULED.items():
        if as_flag(name) in there and idle_beside(name, there):
            raise UserError(f"{as_flag(name)} has no effect with {other}; leave one of them out", field=name)


def without_effect(options: Any) -> set[str]:
    """The options that change nothing about a run with these ones."""
    there = given_flags(options)
    idle = {name for name in (*ONLY_WITH, *OVERRULED) if idle_beside(name, there)}
    return idle | {name for name, methods in METHODS_OF.items() if options.method not in methods}


def given_flags(options: Any) -> set[str]:
    """The flags of the options that are not at their defaults."""
    return {as_flag(entry.name) for entry, value in each_option(options) if value != entry.default}


def idle_beside(name: str, there: set[str]) -> bool:
    """Whether an option does nothing where these flags are given."""
    needed = {flag.split()[0] for flag in ONLY_WITH.get(name, ())}
    return bool(needed and not needed & there) or OVERRULED.get(name) in there


def each_option(options: Any) -> Iterator[tuple[Field, Any]]:
    """Every option with its value, those of the groups too."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        if is_dataclass(value):
            yield from each_option(value)
        else:
            yield entry, value
