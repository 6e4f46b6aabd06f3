"""New adapters for training: their target modules and their initialisation.

One factor of each is zero, so that the change is; the others are random, as in the reference trainers: LoRA as in
kohya's and PEFT, LoHa and LoKr as in LyCORIS 4.
"""

import math
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from plainsd.adapters.layers import Adapter, Hadamard, Kronecker, LowRank
from plainsd.adapters.names import modules_of
from plainsd.errors import unknown

CONV = "*.conv1 *.conv2 *.skip *.resample.conv"  # the convolutions of ResBlocks and between levels
TARGETS = {  # presets: patterns of our names
    "attention": "*attn.q *attn.k *attn.v *attn.out",
    "transformers": "*.attn.proj_* *.attn.blocks.* blocks.*",  # what kohya's trainer takes
    "all-linear": "*",
    "all": "*",
}


def targeted(network: nn.Module, targets: str | Sequence[str], *, conv: bool) -> list[str]:
    """The names of the matching modules."""
    if isinstance(targets, str) and targets not in TARGETS:
        if not re.search(r"[*?.\[]", targets):
            raise unknown("LoRA targets", targets, TARGETS)
        patterns, convolutions = [targets], True
    elif isinstance(targets, str):
        patterns, convolutions = TARGETS[targets].split(), targets == "all"
    else:
        patterns, convolutions = list(targets), True
    found = []
    for name in modules_of(network):
        is_conv = isinstance(network.get_submodule(name), nn.Conv2d)
        fits = (convolutions or not is_conv) and any(fnmatchcase(name, pattern) for pattern in patterns)
        if fits or (conv and is_conv and any(fnmatchcase(name, pattern) for pattern in CONV.split())):
            found.append(name)
    return found


@torch.no_grad()
def new_adapter(
    kind: str,
    base: nn.Linear | nn.Conv2d,
    rank: int,
    alpha: float,
    factor: int | None = None,
    *,
    dora: bool = False,
    generator: torch.Generator | None = None,
) -> Adapter:
    """A new adapter of a kind in NEW, on the module's device, in at least float32."""
    weight = base.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def draw(*shape: int, std: float | None = None) -> Tensor:
        """Normal numbers, or without std Kaiming-uniform ones with a = sqrt(5), PyTorch's default for layers."""
        drawn = torch.empty(shape, dtype=dtype)
        if std is None:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        else:
            drawn.normal_(std=std, generator=generator)
        return drawn.to(weight.device)

    magnitude = weight.to(dtype).flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1)) if dora else None
    return NEW[kind](weight, rank, alpha, factor, draw, magnitude=magnitude, trainable=True)


Initializer = Callable[..., Tensor]


def new_low_rank(weight: Tensor, rank: int, alpha: float, factor: int | None, draw: Initializer, **more) -> LowRank:
    down = draw(rank, *weight.shape[1:])
    up = down.new_zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return LowRank(down, up, alpha, **more)


def new_hadamard(weight: Tensor, rank: int, alpha: float, factor: int | None, draw: Initializer, **more) -> Hadamard:
    o, numbers = weight.shape[0], weight[0].numel()
    factors = {"w1_a": draw(o, rank, std=0.1), "w1_b": draw(rank, numbers, std=1), "w2_b": draw(rank, numbers, std=1)}
    return Hadamard(factors | {"w2_a": factors["w1_a"].new_zeros(o, rank)}, alpha, weight.shape, **more)


def new_kronecker(weight: Tensor, rank: int, alpha: float, factor: int | None, draw: Initializer, **more) -> Kronecker:
    """The smaller matrix is whole, and so is the other if the rank is at least half of its longer side: then alpha has
    no effect."""
    (a, c), (b, d) = (halves(count, factor) for count in weight.shape[:2])
    sides = weight.shape[2:]
    factors = {"w1": draw(a, b)}
    if whole := rank >= max(c, d) / 2:
        factors["w2"] = factors["w1"].new_zeros(c, d, *sides)
    else:
        factors |= {"w2_a": draw(c, rank), "w2_b": factors["w1"].new_zeros(rank, d * math.prod(sides))}
    adapter = Kronecker(factors, float(rank) if whole else alpha, weight.shape, **more)
    adapter.rank_if_whole = rank
    return adapter


def halves(count: int, factor: int | None = None) -> tuple[int, int]:
    """`count` as a product of two integers, the smaller first: as square as possible, with the smaller at most
    `factor`; or with `factor` itself where that divides it."""
    if factor is not None and count % factor == 0:
        return min(factor, count // factor), max(factor, count // factor)
    most = min(math.isqrt(count), factor or count)
    small = next(n for n in range(most, 0, -1) if count % n == 0)
    return small, count // small


NEW = {"lora": new_low_rank, "loha": new_hadamard, "lokr": new_kronecker}
