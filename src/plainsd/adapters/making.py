"""Builds one module's adapter from its tensors in a file and PEFT's settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plainsd.adapters.kinds import TERMS, Butterfly, Difference, Gains, Global, InputButterfly, InputRotation, Rotation
from plainsd.adapters.layers import Adapter, Hadamard, Kronecker, LowRank
from plainsd.adapters.names import split_name
from plainsd.adapters.peft import OWN, REMEDY, SETTINGS_FILE, PeftSettings, start_of
from plainsd.errors import WITH_NAMES, UserError
from plainsd.files.tensorfile import TensorFile
from plainsd.files.unusable import damaged

SIDE_PARTS = ("alpha", "dora_scale", "magnitude", "rescale", "diff_b", "on_input")  # parts that do not identify a kind


def adapter_kind(parts: Collection[str]) -> type[Adapter] | None:
    """The kind of adapter whose factors are complete."""

    def whole(*names: str) -> bool:
        return all(name in parts for name in names)

    if whole("down", "up"):
        return LowRank
    if whole("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        return Hadamard
    if all(whole(f"lokr_w{n}") or whole(f"lokr_w{n}_a", f"lokr_w{n}_b") for n in (1, 2)):
        return Kronecker
    return next((kind for needed, kind in KINDS_BY_PARTS if whole(*needed)), None)


KINDS_BY_PARTS: list[tuple[tuple[str, ...], type[Adapter]]] = [  # which parts identify which kind
    (("a1", "a2", "b1", "b2"), Global),
    (("oft_blocks",), Rotation),  # or Butterfly, by its shape
    (("gain", "on_input"), Gains),
    (("ia3_l",), Gains),
    (("oft_R",), InputRotation),
    (("boft_R", "boft_s"), InputButterfly),
    (("diff",), Difference),
    (("diff_b",), Difference),
]


SCALED = (LowRank, Hadamard, Kronecker)  # kinds whose change is times alpha / rank
PREFIXES: dict[Callable[..., Adapter], str] = {Hadamard: "hada_", Kronecker: "lokr_"}


def made_of(
    kind: Callable[..., Adapter],
    tensors: Mapping[str, Tensor],
    weight: Tensor,
    settings: PeftSettings,
    name: str,
    strength: float = 1.0,
) -> Adapter:
    """An adapter of these parts; alpha is 1, but for Rotation, whose is 0. `name`: of one of them in the file."""
    more: dict[str, Any] = {"magnitude": tensors.get("magnitude"), "bias": tensors.get("diff_b"), "strength": strength}
    if kind is LowRank:
        return LowRank(tensors["down"], tensors["up"], 1.0, mid=tensors.get("mid"), **more)
    factors = {part.removeprefix(PREFIXES.get(kind, "")): tensors[part] for part in tensors if part not in SIDE_PARTS}
    if kind is Rotation:
        turning = Butterfly if tensors["oft_blocks"].ndim == 4 else Rotation
        return turning(dict(blocks=tensors["oft_blocks"], rescale=tensors.get("rescale")), 0.0, weight.shape, **more)
    if kind is Gains:
        return gains(tensors, weight, settings, name, **more)
    if kind is InputRotation:
        return rotation(tensors["oft_R"], weight, settings, name, **more)
    if kind is InputButterfly:
        return InputButterfly(dict(blocks=tensors["boft_R"], gain=tensors["boft_s"]), 1.0, weight.shape, **more)
    return kind(factors, 1.0, weight.shape, **more)


def gains(tensors: Mapping[str, Tensor], weight: Tensor, settings: PeftSettings, name: str, **more) -> Gains:
    """IA3, LyCORIS' or PEFT's. LyCORIS stores the gain minus 1, and does not change biases."""
    o, i = weight.shape[:2]
    if "gain" in tensors:
        gain = tensors["gain"].flatten() + 1
        inputs = bool(tensors["on_input"]) if gain.device.type != "meta" else len(gain) == i
    else:
        gain = tensors["ia3_l"].flatten()
        by_shape = tensors["ia3_l"].shape == (1, i) if tensors["ia3_l"].ndim == 2 else len(gain) == i
        square = tensors["ia3_l"].ndim == 4 and o == i
        inputs = settings.feedforward(name) if square else by_shape
    if len(gain) != (i if inputs else o):
        raise ValueError("a gain for the other side")
    return Gains(gain, weight.shape, inputs=inputs, with_bias="ia3_l" in tensors, **more)


def rotation(blocks: Tensor, weight: Tensor, settings: PeftSettings, name: str, **more) -> InputRotation:
    table = settings.table(name)
    if "use_cayley_neumann" not in table:
        raise UserError(
            f"{settings.path} is an OFT of PEFT without its settings, which tell how it turns a weight; put the "
            f"adapter_config.json that came with it beside it"
        )
    if weight.ndim == 4:
        raise UserError(
            f"{settings.path} has an OFT of PEFT for a convolution, {name!r}, which in PEFT gives one thing kept apart "
            "and another merged; " + REMEDY
        )
    side = (1 + math.isqrt(1 + 8 * blocks.shape[1])) // 2  # of b (b - 1) / 2 numbers
    terms = table.get("num_cayley_neumann_terms", TERMS) if table["use_cayley_neumann"] else None
    return InputRotation(
        blocks,
        weight.shape,
        side=side,
        share=bool(table.get("block_share")),
        terms=terms,
        longest=table["eps"] if table.get("coft") else None,
        **more,
    )


def read_adapter(
    file: TensorFile, parts: Mapping[str, str], settings: PeftSettings, base: nn.Module, strength: float
) -> Adapter:
    """One module's adapter, on the module's device and in its dtype."""
    weight = base.weight
    sides = (1, 1) if weight.ndim == 4 else ()
    kind, tensors = adapter_kind(parts), {part: file.tensors[name].read() for part, name in parts.items()}
    known = split_name(next(iter(parts.values())))
    assert kind is not None and known is not None  # `located` leaves out what is incomplete or unknown
    alpha = tensors.pop("alpha", None)
    for part in ("down", "up") if kind is LowRank else ():
        if tensors[part].ndim == 2 or not sides:
            tensors[part] = tensors[part].flatten(1).unflatten(1, (-1, *sides))
    if (rows := tensors.pop("magnitude", None)) is not None:  # PEFT has norms of rows only
        tensors["magnitude"] = rows.reshape(-1, 1, *sides)
    if (lengths := tensors.pop("dora_scale", None)) is not None:
        by_column = lengths.ndim > 1 and len(lengths) == 1
        tensors["magnitude"] = lengths.reshape((1, -1, *sides) if by_column else (-1, 1, *sides))
    placed = {part: tensor.to(weight.device, weight.dtype).contiguous() for part, tensor in tensors.items()}
    name = known[0]
    if kind is Difference and "diff" in placed and isinstance(base, nn.Embedding):
        weight = weight[: len(placed["diff"])]
    adapter = made_of(kind, placed, weight, settings, name, strength)
    if kind is Kronecker and alpha is None:
        adapter.rank_if_whole = settings.rank(name)
    if alpha is not None:
        adapter.alpha = float(alpha)
    elif kind is not Rotation:
        told = settings.alpha(name, adapter.rank)
        if kind in SCALED and not settings.values and OWN in next(iter(parts.values())):
            warnings.warn(
                f"{file.path} has PEFT's names, and neither PEFT's settings nor an alpha: the alpha of each module is "
                f"taken to be its rank, so that the scale is 1; put the {SETTINGS_FILE} that came with it beside it",
                stacklevel=3,
            )
        adapter.alpha = float(adapter.rank or 1) if told is None else told
    if kind is LowRank and settings.beside and settings.rank(name) not in (None, adapter.rank):
        raise UserError(
            f"{file.path}: {parts['down']!r} is of rank {adapter.rank}, and {settings.beside} says "
            f"{settings.rank(name)}; "
            "they do not belong together, put the file into a folder with its own",
            most=WITH_NAMES,
        )
    if kind is LowRank and (start := settings.start(name)):
        redo_start(adapter, weight, start, file, parts["down"])
    if not (math.isfinite(adapter.alpha) and all(tensor.isfinite().all() for tensor in placed.values())):
        raise damaged(
            file.path, f"{next(iter(parts.values()))!r} or what belongs to it has values that are not finite numbers"
        )
    return adapter


@torch.no_grad()
def redo_start(adapter: LowRank, weight: Tensor, start: str, file: TensorFile, name: str) -> None:
    """Subtracts the part of the base that initialised a LoRA, B0 A0: s (B A - B0 A0) is `s [B, -B0] [A; A0]`, as PEFT
    converts such files."""
    if weight.ndim != 2:
        raise UserError(
            f"{file.path} began with a part of the base ({start}) at {name!r}, which is not a linear layer; convert it "
            "with PEFT (path_initial_model_for_weight_conversion)"
        )
    down, up = (part.to(weight.dtype) for part in start_of(weight, start, adapter.rank))
    scale = adapter.scale
    if start == "pissa":  # whose B0 A0 is without the scale
        up = up / scale
    adapter.down = nn.Parameter(torch.cat([adapter.down, down]), False)
    adapter.up = nn.Parameter(torch.cat([adapter.up, -up], dim=1), False)
    adapter.alpha = scale * adapter.rank
