"""Whether a control fits the model, the task and its own numbers; checked before anything is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from plainsd.errors import UserError, unknown
from plainsd.models.control import ControlNet
from plainsd.models.t2i_adapter import T2IAdapter
from plainsd.models.unet import UNetConfig
from plainsd.models.variants import VARIANTS
from plainsd.pictures.control import STRONGEST, Control, with_module
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.preprocess import INPAINT
from plainsd.pictures.settings import CONTROL_MODES, PREPROCESSORS, ControlNote


def check_control(
    sd: StableDiffusion, controls: Sequence[Control], size: tuple[int, int], over: str | None = None
) -> tuple[ControlNote, ...]:
    """Notes for the pictures' metadata. UserError for what does not fit; a map of another size gets a warning.

    `over`: what is drawn over, "picture", or "mask" for a picture with a mask; None: nothing."""
    controls = [with_module(control, over == "mask") for control in controls]
    for number, control in enumerate(controls, 1):
        which = f"control {number} ({control.name})" if len(controls) > 1 else f"control {control.name!r}"
        try:
            _check_numbers(control, which)
            _check_source(control, which, over)
            _check_maps(control, which)
            _check_family(control, which, sd)
        except UserError as error:
            error.entry = number - 1
            raise
        for image in control.images:
            if image.size != size:
                sizes = f"its map is {image.width}x{image.height} and the picture {size[0]}x{size[1]}"
                warnings.warn(f"{which}: {sizes}; it is scaled", stacklevel=3)
    return tuple(control.note for control in controls)


def _check_family(control: Control, which: str, sd: StableDiffusion) -> None:
    if reason := mismatch(control.net, sd):
        raise UserError(f"{which} does not fit the model: {reason}; choose a net of its family", field="control")


def _check_source(control: Control, which: str, over: str | None) -> None:
    """UserError where a map is to be made of a picture that is not there."""
    if control.image is None and control.module not in (*PREPROCESSORS, INPAINT):
        raise unknown("preprocessor", control.module, [*PREPROCESSORS, INPAINT], field="control")
    if control.image is None and over is None:
        raise UserError(f"{which} has no map and there is no picture to read; give its map", field="control")
    if control.module != INPAINT:
        return
    if control.image is not None:
        raise UserError(
            f"{which}: the inpainting map is made of the picture and its mask; give no map of its own", field="control"
        )
    if over != "mask":
        raise UserError(f"{which}: the inpainting map needs a picture and a mask; give both", field="control")
    if isinstance(control.net, T2IAdapter):
        raise UserError(f"{which}: inpainting maps are for ControlNets, and this is a T2I-Adapter; give it a map",
                        field="control")  # fmt: skip


def _check_numbers(control: Control, which: str) -> None:
    check_strength(control.strength, which, "control")
    check_range(control.start, control.end, which, "control")
    if control.mode not in CONTROL_MODES:
        raise unknown("control mode", control.mode, CONTROL_MODES, field="control")
    if control.guess and control.mode != "balanced":
        raise UserError(f"{which}: guess and mode {control.mode!r} do not go together; choose one", field="control")
    if control.guess and isinstance(control.net, T2IAdapter):
        raise UserError(
            f"{which}: guess mode is for ControlNets, and this is a T2I-Adapter; leave it out", field="control"
        )


def check_strength(strength: float, which: str, field: str) -> None:
    if not 0 <= strength <= STRONGEST:
        raise UserError(
            f"{which}: strength {strength} is out of range; choose 0 to {STRONGEST:g}", field=field, value=strength
        )


def check_range(start: float, end: float, which: str, field: str) -> None:
    if not 0 <= start < end <= 1:
        raise UserError(
            f"{which}: it is to act from {start} to {end} of the steps; give two fractions, the lower one first",
            field=field,
            value=(start, end),
        )


def _check_maps(control: Control, which: str) -> None:
    kinds, known = control.kinds, control.known_kinds
    maps = 1 if control.image is None else len(control.images)
    if not known and (kinds or maps != 1):
        what = f"kind {control.kind}" if kinds else f"{maps} maps"
        raise UserError(f"{which}: {what} is for union nets, and this net is for one; give one map", field="control")
    if known and (len(kinds) != maps or not maps or not all(0 <= kind < known for kind in kinds)):
        raise UserError(
            f"{which}: a union net wants the kind of each map, 0 to {known - 1}, and has {maps} maps and {list(kinds)}",
            field="control",
        )


def mismatch(net: ControlNet | T2IAdapter, sd: StableDiffusion) -> str | None:
    """Why the net cannot speak to this model's UNet; None: it can."""
    channels = (net.config if isinstance(net, T2IAdapter) else net.control).hint_channels
    if channels not in (1, 3):
        return f"it reads maps of {channels} channels, and pictures have 1 or 3"
    if isinstance(net, T2IAdapter):
        return adapter_mismatch(net, sd)
    own, its = sd.unet.config, net.config
    if (net.widths, its.in_channels) != (sd.unet.widths, sd.vae.config.latent_channels):
        return f"it is for {family(its)} and this is {family(own)}"
    attends = any(its.depth) or bool(its.mid_depth)
    if attends and its.context != own.context or its.vector != own.vector:
        return f"it is for {family(its)} and this is {family(own)}"
    if net.control.factor != sd.vae.config.factor:
        return (
            f"it reads maps {net.control.factor} times as large as latents, and this model's are {sd.vae.config.factor}"
        )
    return None


def adapter_mismatch(net: T2IAdapter, sd: StableDiffusion) -> str | None:
    """Likewise. Its features must have the widths of the UNet's levels, and their sizes."""
    own, its = sd.unet.config, net.config
    last = len(own.channels) - 1
    halved = [level + (not depth and level < last) for level, depth in enumerate(own.depth)]
    wanted = [
        (own.channels[level], sd.vae.config.factor * 2**times) for level, times in enumerate([*halved, last][:-1])
    ]
    wanted.append((own.channels[-1], sd.vae.config.factor * 2**last))
    sides = [its.factor * 2 ** sum(its.halved[: level + 1]) for level in range(len(its.channels))]
    if list(zip(its.channels, sides, strict=True)) in (wanted, wanted[:-1]):
        return None
    widths = "-".join(map(str, its.channels))
    return f"it gives features of widths {widths} from {its.factor} pixels on, and this is {family(own)}"


def family(unet: UNetConfig) -> str:
    """The name of the known model with this UNet shape, or else the shape."""
    for known in VARIANTS.values():
        other = known.unet
        if (other.channels, other.context, other.vector) == (unet.channels, unet.context, unet.vector):
            return known.name
    return f"a UNet of widths {'-'.join(map(str, unet.channels))} that reads texts of {unet.context} numbers"
