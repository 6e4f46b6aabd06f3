"""ControlNet in the sampling loop: which nets act at a step, on which rows, and what they add to the UNet.

The networks are in models/control.py. Residuals of several nets add up. Each is multiplied by the control's strength
and by a weight by its index k, from conv_in's output to the middle block's:

    balanced   1                      all rows         diffusers' own, and A1111's "Balanced"
    guess      0.1 to 1, logspace     prompted rows    Zhang et al. 2023, "guess mode", as diffusers has it
    prompt     0.825 ** (12 - k)      all rows         A1111's "My prompt is more important"
    control    0.825 ** (12 - k)      prompted rows    A1111's "ControlNet is more important"

A control without a map of its own reads the picture that is drawn over, through its preprocessor; under a mask with the
masked pixels at -1 ("inpaint"), as the inpainting nets of ControlNet 1.1 were trained. Union nets read 0 there.

T2I-Adapters' features add up likewise; "prompt" and "control" weigh them by 0.25, 0.62, 0.825 and 1, as A1111 does, and
guess mode is not for them.

"Prompted rows": the estimate without the prompt, from which guidance leads away, is made without the map, so that the
map's effect is multiplied by the guidance as the prompt's is. For SDXL's ten residuals A1111 counts from 12 as well.

Shape letters: R rows of the batch, C channels, H W height and width in pixels, h w those of the latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from plainsd.files.hashes import legacy_hash
from plainsd.models.control import ControlNet
from plainsd.models.t2i_adapter import T2IAdapter, as_features
from plainsd.models.unet import plus
from plainsd.pictures.conditioning import Conditioning
from plainsd.pictures.images import to_rgb
from plainsd.pictures.masks import resized
from plainsd.pictures.model import StableDiffusion, moved
from plainsd.pictures.preprocess import INPAINT, preprocessed
from plainsd.pictures.seamless import wrapped_edges
from plainsd.pictures.settings import THRESHOLDS, ControlNote

PADDED_TO = 8  # maps are padded to multiples of this, as pictures are
SOFT = 0.825  # A1111's ratio from one residual to the next
SOFT_FEATURES = (0.25, 0.62, 0.825, 1.0)  # its weights of a T2I-Adapter's features
STRONGEST = 10.0


@dataclass(frozen=True, eq=False)
class Control:
    """A control map and the net that reads it. Pictures of any mode; they are scaled to the size of the result."""

    net: ControlNet | T2IAdapter
    image: Image.Image | Sequence[Image.Image] | None = None  # several: for a union net only; None: what is drawn over
    strength: float = 1.0
    start: float = 0.0  # from this fraction of the steps ...
    end: float = 1.0  # ... to this: only steps that lie entirely between the two, as in diffusers
    guess: bool = False
    mode: str = "balanced"  # or "prompt", "control"
    kind: int | Sequence[int] | None = None  # for a union net: the type of the map, or of each, from 0
    name: str = "control"  # of the net, for the metadata
    module: str = "none"  # the preprocessor, likewise; where there is no map, it makes one of the picture drawn over
    thresholds: tuple[float, float] | None = None  # its own, likewise ...
    resolution: int | None = None  # ... and that at which it read the picture
    resize: str = "stretch"  # how its maps get the picture's size: see `masks.resized`

    @property
    def images(self) -> list[Image.Image]:
        """Its own maps: none where the picture that is drawn over is read."""
        return [] if self.image is None else [self.image] if isinstance(self.image, Image.Image) else list(self.image)

    @property
    def kinds(self) -> tuple[int, ...]:
        return () if self.kind is None else (self.kind,) if isinstance(self.kind, int) else tuple(self.kind)

    @property
    def note(self) -> ControlNote:
        values = (self.module, self.name, float(self.strength), float(self.start), float(self.end), self.mode)
        return ControlNote(*values, self.guess, self.kinds, self.thresholds, self.resolution, self.resize)

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
        return acts_between(self.start, self.end, step, steps)


def acts_between(start: float, end: float, step: int, steps: int) -> bool:
    """Whether a step lies between two fractions of the steps with its whole length, as in diffusers."""
    return start <= step / steps and (step + 1) / steps <= end


class Fitted(NamedTuple):
    """A control with its maps as tensors for the net."""

    control: Control
    maps: list[Tensor]  # (1, 3, H, W), 0 to 1


def control_name(path: Path) -> str:
    """The name in a picture's metadata: the file's, with the hash by which A1111 tells files apart."""
    return f"{path.name if path.is_dir() else path.stem} [{legacy_hash(path)}]"


# --- maps -------------------------------------------------------------------------------------------------------------


def with_module(control: Control, masked: bool) -> Control:
    """Under a mask, a control without a map and a preprocessor reads the inpainting map."""
    inpaints = masked and control.image is None and control.module == "none"
    return replace(control, module=INPAINT) if inpaints else control


def fitted(
    controls: Iterable[Control],
    size: tuple[int, int],
    source: Image.Image | None = None,
    hole: Image.Image | None = None,
) -> list[Fitted]:
    """The maps at the size of a picture, and padded as it is. `size`: width and height; `source`: the picture of this
    size that is drawn over, `hole`: its mask, L."""
    return [Fitted(one, maps_of(with_module(one, hole is not None), size, source, hole)) for one in controls]


def maps_of(
    control: Control, size: tuple[int, int], source: Image.Image | None, hole: Image.Image | None
) -> list[Tensor]:
    if control.image is not None:
        images = control.images
        if control.resize != "stretch":
            images = [resized(to_rgb(image, background="black"), size, control.resize) for image in images]
        return [as_map(image, size, control.net) for image in images]
    assert source is not None  # `_check_source` sees to it
    if control.module != INPAINT:
        made = preprocessed(source, control.module, control.thresholds or THRESHOLDS, control.resolution)
        return [as_map(made, size, control.net)]
    assert hole is not None
    return [inpaint_map(source, hole, control)]


def inpaint_map(image: Image.Image, hole: Image.Image, control: Control) -> Tensor:
    """The picture, 0 to 1, with -1 under the light part of the mask, of the same size; for union nets with 0."""
    map = as_map(image, image.size, control.net)
    masked = torch.from_numpy(np.array(hole) > 127)
    height, width = masked.shape
    masked = F.pad(masked[None, None].float(), (0, map.shape[3] - width, 0, map.shape[2] - height), mode="replicate")
    return torch.where(masked > 0, 0.0 if control.known_kinds else -1.0, map)


def as_map(image: Image.Image, size: tuple[int, int], net: ControlNet | T2IAdapter) -> Tensor:
    """(1, 3 or 1, H, W), 0 to 1."""
    own = net.config if isinstance(net, T2IAdapter) else net.control
    multiple = own.factor if isinstance(net, T2IAdapter) else max(PADDED_TO, own.factor)
    image = to_rgb(image, background="black").convert("L" if own.hint_channels == 1 else "RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    levels = np.array(image).reshape(*image.size[::-1], -1)
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255  # (1, 3 or 1, H, W)
    return F.pad(pixels, (0, -size[0] % multiple, 0, -size[1] % multiple), mode="replicate")


# --- at each step ----------------------------------------------------------------------------------------------------


def dtype_of(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


class Controls:
    """All controls of one run. What a net computes from its map alone is computed once, for all steps.

    A net computes in its own dtype, which models of others may share; it is moved to the model's device, in place.
    """

    def __init__(self, sd: StableDiffusion, each: Sequence[Fitted], steps: int, *, tiling: bool = False):
        self.steps, self.device, self.controls = steps, sd.device, [one.control for one in each]
        self.tiling = tiling  # see seamless.py
        self.hints: list[Any] = []  # a tensor, of a T2I-Adapter all its features
        for control, maps in each:
            net = moved(control.net, sd.device)
            maps = [one.to(sd.device, dtype_of(net)) for one in maps]
            with self._edges(net):
                if isinstance(net, T2IAdapter):
                    features = [one.to(sd.dtype) for one in net(maps[0])]
                    weights = control.weights(len(features))
                    weighted = [weight * one for weight, one in zip(weights, features, strict=True)]
                    self.hints.append(as_features(sd.unet, weighted))
                else:
                    self.hints.append(net.read(maps, control.kinds, control.strength if len(maps) > 1 else 1.0))

    def _edges(self, net: nn.Module) -> AbstractContextManager[None]:
        return wrapped_edges(net) if self.tiling else nullcontext()

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
        net, own = moved(control.net, self.device), dtype_of(control.net)
        some = rows if len(rows) < len(x) else slice(None)
        vector = None if conditioning.vector is None else conditioning.vector[some].to(own)
        with self._edges(net):
            found = net(x[some].to(own), timestep, conditioning.context[some].to(own), hint, vector, control.kinds)
        found = [weight * one.to(x) for weight, one in zip(control.weights(len(found)), found, strict=True)]
        if len(rows) == len(x):
            return found
        return [
            one.new_zeros(len(x), *one.shape[1:]).index_copy(0, torch.tensor(rows, device=x.device), one)
            for one in found
        ]
