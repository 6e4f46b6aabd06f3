"""ControlNet in the sampling loop: which nets act at a step, on which rows, and what they add to the UNet.

The networks are in models/control.py. Residuals of several nets add up. Each is multiplied by the control's strength
and by a weight by its index k, from conv_in's output to the middle block's:

    balanced   1                      all rows         diffusers' own, and A1111's "Balanced"
    guess      0.1 to 1, logspace     prompted rows    Zhang et al. 2023, "guess mode", as diffusers has it
    prompt     0.825 ** (12 - k)      all rows         A1111's "My prompt is more important"
    control    0.825 ** (12 - k)      prompted rows    A1111's "ControlNet is more important"

T2I-Adapters' features add up likewise; "prompt" and "control" weigh them by 0.25, 0.62, 0.825 and 1, as A1111 does, and
guess mode is not for them.

"Prompted rows": the estimate without the prompt, from which guidance leads away, is made without the map, so that the
map's effect is multiplied by the guidance as the prompt's is. For SDXL's ten residuals A1111 counts from 12 as well.

Shape letters: R rows of the batch, C channels, H W height and width in pixels, h w those of the latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.errors import UserError, unknown
from plainsd.files.hashes import legacy_hash
from plainsd.models.control import ControlNet
from plainsd.models.t2i_adapter import T2IAdapter, as_features
from plainsd.models.unet import UNetConfig, plus
from plainsd.models.variants import VARIANTS
from plainsd.pictures.conditioning import Conditioning
from plainsd.pictures.images import to_rgb
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import CONTROL_MODES, ControlNote

PADDED_TO = 8  # maps are padded to multiples of this, as pictures are
SOFT = 0.825  # A1111's ratio from one residual to the next
SOFT_FEATURES = (0.25, 0.62, 0.825, 1.0)  # its weights of a T2I-Adapter's features
STRONGEST = 10.0


@dataclass(frozen=True, eq=False)
class Control:
    """A control map and the net that reads it. Pictures of any mode; they are scaled to the size of the result."""

    net: ControlNet | T2IAdapter
    image: Image.Image | Sequence[Image.Image]  # several for a union net only
    strength: float = 1.0
    start: float = 0.0  # from this fraction of the steps ...
    end: float = 1.0  # ... to this: only steps that lie entirely between the two, as in diffusers
    guess: bool = False
    mode: str = "balanced"  # or "prompt", "control"
    kind: int | Sequence[int] | None = None  # for a union net: the type of the map, or of each, from 0
    name: str = "control"  # of the net, for the metadata
    module: str = "none"  # the preprocessor, likewise

    @property
    def images(self) -> list[Image.Image]:
        return [self.image] if isinstance(self.image, Image.Image) else list(self.image)

    @property
    def kinds(self) -> tuple[int, ...]:
        return () if self.kind is None else (self.kind,) if isinstance(self.kind, int) else tuple(self.kind)

    @property
    def note(self) -> ControlNote:
        values = (self.module, self.name, float(self.strength), float(self.start), float(self.end), self.mode)
        return ControlNote(*values, self.guess, self.kinds)

    @property
    def prompted_only(self) -> bool:
        """Whether rows without the prompt are left as they are; so they are with nets whose residuals are means."""
        return self.guess or self.mode == "control" or self.pooled

    @property
    def pooled(self) -> bool:
        return isinstance(self.net, ControlNet) and self.net.control.pooled

    @property
    def known_kinds(self) -> int:
        """Of maps, for a union net; 0 for all others."""
        return self.net.control.kinds if isinstance(self.net, ControlNet) else 0

    def weights(self, count: int) -> list[float]:
        """The weights of `count` residuals. Several maps of a union net already got their strength in the net."""
        strength = 1.0 if len(self.images) > 1 else self.strength
        if isinstance(self.net, T2IAdapter):
            return [strength * share for share in ((1.0,) * count if self.mode == "balanced" else SOFT_FEATURES)][
                :count
            ]
        if self.guess and not self.pooled:
            return [strength * 10 ** (k / (count - 1) - 1) for k in range(count)]
        return [strength * (1.0 if self.mode == "balanced" else SOFT ** (12 - k)) for k in range(count)]

    def acts(self, step: int, steps: int) -> bool:
        return self.start <= step / steps and (step + 1) / steps <= self.end


class Fitted(NamedTuple):
    """A control with its maps as tensors for the net."""

    control: Control
    maps: list[Tensor]  # (1, 3, H, W), 0 to 1


def control_name(path: Path) -> str:
    """The name in a picture's metadata: the file's, with the hash by which A1111 tells files apart."""
    return f"{path.name if path.is_dir() else path.stem} [{legacy_hash(path)}]"


# --- at the door -----------------------------------------------------------------------------------------------------


def check_control(sd: StableDiffusion, controls: Sequence[Control], size: tuple[int, int]) -> tuple[ControlNote, ...]:
    """Notes for the pictures' metadata. UserError for what does not fit; a map of another size gets a warning."""
    for number, control in enumerate(controls, 1):
        which = f"control {number} ({control.name})" if len(controls) > 1 else f"control {control.name!r}"
        _check_numbers(control, which)
        _check_maps(control, which)
        if reason := mismatch(control.net, sd):
            raise UserError(f"{which} does not fit the model: {reason}; choose a net of its family", field="control")
        for image in control.images:
            if image.size != size:
                sizes = f"its map is {image.width}x{image.height} and the picture {size[0]}x{size[1]}"
                warnings.warn(f"{which}: {sizes}; it is scaled", stacklevel=3)
    return tuple(control.note for control in controls)


def _check_numbers(control: Control, which: str) -> None:
    if not 0 <= control.strength <= STRONGEST:
        raise UserError(
            f"{which}: strength {control.strength} is out of range; choose 0 to {STRONGEST:g}",
            field="control",
            value=control.strength,
        )
    if not 0 <= control.start < control.end <= 1:
        raise UserError(
            f"{which}: it is to act from {control.start} to {control.end} of the steps; give two shares from 0 to 1, "
            "the lower one first",
            field="control",
            value=(control.start, control.end),
        )
    if control.mode not in CONTROL_MODES:
        raise unknown("control mode", control.mode, CONTROL_MODES, field="control")
    if control.guess and control.mode != "balanced":
        raise UserError(f"{which}: guess and mode {control.mode!r} do not go together; choose one", field="control")
    if control.guess and isinstance(control.net, T2IAdapter):
        raise UserError(
            f"{which}: guess mode is for control nets, and this is a T2I-Adapter; leave it out", field="control"
        )


def _check_maps(control: Control, which: str) -> None:
    kinds, images, known = control.kinds, control.images, control.known_kinds
    if not known and (kinds or len(images) != 1):
        what = f"kind {control.kind}" if kinds else f"{len(images)} maps"
        raise UserError(f"{which}: {what} is for union nets, and this net is for one; give one map", field="control")
    if known and (len(kinds) != len(images) or not images or not all(0 <= kind < known for kind in kinds)):
        raise UserError(
            f"{which}: a union net wants the kind of each map, 0 to {known - 1}, and has {len(images)} maps and "
            f"{list(kinds)}",
            field="control",
        )


def mismatch(net: ControlNet | T2IAdapter, sd: StableDiffusion) -> str | None:
    """Why the net cannot speak to this model's UNet; None: it can."""
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


def fitted(controls: Iterable[Control], size: tuple[int, int]) -> list[Fitted]:
    """The maps at the size of a picture, and padded as it is. `size`: width and height."""
    return [Fitted(control, [as_map(image, size, control.net) for image in control.images]) for control in controls]


def as_map(image: Image.Image, size: tuple[int, int], net: ControlNet | T2IAdapter) -> Tensor:
    image, multiple = to_rgb(image, background="black"), PADDED_TO
    if isinstance(net, T2IAdapter):
        image, multiple = image.convert("L" if net.config.hint_channels == 1 else "RGB"), net.config.factor
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    levels = np.array(image).reshape(*image.size[::-1], -1)
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255  # (1, 3 or 1, H, W)
    return F.pad(pixels, (0, -size[0] % multiple, 0, -size[1] % multiple), mode="replicate")


# --- at each step ----------------------------------------------------------------------------------------------------


class Controls:
    """All controls of one run. What a net computes from its map alone is computed once, for all steps."""

    def __init__(self, sd: StableDiffusion, each: Sequence[Fitted], steps: int):
        """Moves the nets to the model's device and dtype, in place."""
        self.steps, self.controls = steps, [one.control for one in each]
        self.hints: list[Any] = []  # a tensor, of a T2I-Adapter all its features
        for control, maps in each:
            net = control.net.to(sd.device, sd.dtype)
            maps = [one.to(sd.device, sd.dtype) for one in maps]
            if isinstance(net, T2IAdapter):
                features = net(maps[0])
                weighted = [weight * one for weight, one in zip(control.weights(len(features)), features, strict=True)]
                self.hints.append(as_features(sd.unet, weighted))
            else:
                self.hints.append(net.read(maps, control.kinds, control.strength if len(maps) > 1 else 1.0))

    def __call__(
        self, step: int, prompted: Sequence[bool], x: Tensor, timestep: float, conditioning: Conditioning
    ) -> dict[str, list[Tensor | None]]:
        """What joins the UNet at a step, each (R, C, h, w) or (R, C, 1, 1), by its argument's name. `prompted`: of each
        row of x, whether it has its prompt."""
        joins: dict[str, list[Tensor | None]] = {}
        for control, hint in zip(self.controls, self.hints, strict=True):
            rows = [row for row, with_prompt in enumerate(prompted) if with_prompt or not control.prompted_only]
            if not rows or not control.acts(step, self.steps):
                continue
            if isinstance(control.net, T2IAdapter):
                name, found = "features", self._features(hint, rows, len(x))
            else:
                name, found = "residuals", self._residuals(control, hint, rows, x, timestep, conditioning)
            before = joins.get(name, [None] * len(found))
            joins[name] = [a if b is None else plus(b, a) for a, b in zip(before, found, strict=True)]
        return joins

    def _features(self, features: list[Tensor | None], rows: list[int], count: int) -> list[Tensor | None]:
        """A T2I-Adapter's, the same at every step, for some of so many rows; the others get zeros."""
        if len(rows) == count:
            return features
        on = torch.zeros(count, 1, 1, 1).index_fill(0, torch.tensor(rows), 1.0)
        return [None if one is None else on.to(one) * one for one in features]

    def _residuals(
        self, control: Control, hint: Tensor, rows: list[int], x: Tensor, timestep: float, conditioning: Conditioning
    ) -> list[Tensor]:
        """One net's residuals for some of the rows; the others get zeros."""
        assert isinstance(control.net, ControlNet)
        some = rows if len(rows) < len(x) else slice(None)
        vector = None if conditioning.vector is None else conditioning.vector[some]
        found = control.net(x[some], timestep, conditioning.context[some], hint, vector, control.kinds)
        found = [weight * one for weight, one in zip(control.weights(len(found)), found, strict=True)]
        if len(rows) == len(x):
            return found
        return [
            one.new_zeros(len(x), *one.shape[1:]).index_copy(0, torch.tensor(rows, device=x.device), one)
            for one in found
        ]
