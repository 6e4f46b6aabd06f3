"""Adapters: a weight W becomes W + s * change, and the change is small in a file.

    LowRank      LoRA: alpha/r * B A, with B and A narrow
    Hadamard     LoHa: alpha/r * (B1 A1) o (B2 A2), the product of numbers at the same place (Hyeon-Woo et al. 2022,
                 arXiv:2108.06098)
    Kronecker    LoKr: alpha/r * K1 x K2, the Kronecker product (Edalati et al. 2022, arXiv:2212.10650)

LoRA is by Hu et al. 2021 (arXiv:2106.09685). For a k x k convolution A is a k x k convolution to r channels and B a 1x1
convolution back (LoCon), or A 1x1, a k x k one between r channels, and B 1x1 (`mid`). The other two came to Stable
Diffusion by LyCORIS (Yeh et al. 2024, arXiv:2309.14859). DoRA (Liu et al. 2024, arXiv:2402.09353) then gives each row
(in some files each column) of the sum a length of its own, the magnitude.
Strength s leads in a straight line from the bare weight at 0 to the adapted one at 1, for DoRA too.

A module that carries adapters becomes a LoraLinear or LoraConv in place. It stays the same object, and its weight keeps
its name, so that optimizers, hooks and names see no difference; without its last adapter it is what it was before.

Shape letters: o, i the outputs and inputs of a module, r the rank, k the side of a convolution's kernel.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """What all kinds share. Its parameters are the factors by their names in the code below.

    magnitude: (o, 1) or (o, 1, 1, 1) the length of each row, or (1, i) or (1, i, 1, 1) of each column.
    """

    def __init__(
        self,
        factors: Mapping[str, Tensor | None],
        alpha: float,
        *,
        magnitude: Tensor | None = None,
        strength: float = 1.0,
        trainable: bool = False,
    ):
        super().__init__()
        for name, tensor in (*factors.items(), ("magnitude", magnitude)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, trainable))
        self.alpha, self.strength = alpha, strength
        self.by_column = magnitude is not None and magnitude.shape[0] == 1 and magnitude.shape[1] > 1

    @property
    def rank(self) -> int:
        raise NotImplementedError

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def product(self, dtype: torch.dtype) -> Tensor:
        """The change before magnitude and strength, in the weight's shape."""
        raise NotImplementedError

    def lengths(self, full: Tensor) -> Tensor:
        """Of each row of a weight, or of each column."""
        others = [axis for axis in range(full.ndim) if axis != self.by_column]
        return torch.linalg.vector_norm(full, dim=others, keepdim=True)

    def change(self, weight: Tensor) -> Tensor:
        """What the adapter adds to a weight, in at least float32. Gradients pass through the lengths, as in LyCORIS."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = self.product(wide)
        if self.magnitude is not None:
            full = weight.to(wide) + change
            change = full * (self.magnitude.to(wide) / self.lengths(full)) - weight.to(wide)
        return change * self.strength

    def forward(self, x: Tensor, base: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        """What the adapter adds to the base's output `out` for the input x."""
        with torch.autocast(x.device.type, enabled=False):
            change = self.change(base.weight)
        return without_bias(base, x, change.to(x.dtype)).to(out.dtype)


class LowRank(Adapter):
    """down = A (r, i) or (r, i, k, k), up = B (o, r) or (o, r, 1, 1), mid (r, r, k, k)."""

    def __init__(self, down: Tensor, up: Tensor, alpha: float, *, mid: Tensor | None = None, **more):
        super().__init__({"down": down, "up": up, "mid": mid}, alpha, **more)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self, dtype: torch.dtype) -> Tensor:
        """alpha/r * B A"""
        down, up = self.down.to(dtype), self.up.to(dtype)
        if self.mid is None:
            return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]) * self.scale
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), self.mid.to(dtype), down.flatten(1)) * self.scale

    def low(self, x: Tensor, base: nn.Linear | nn.Conv2d) -> Tensor:
        """alpha/r * B A x"""
        if isinstance(base, nn.Linear):
            return F.linear(F.linear(x, self.down) * self.scale, self.up)
        moves = (None, base.stride, base.padding, base.dilation)
        h = F.conv2d(x, self.down, *moves) if self.mid is None else F.conv2d(F.conv2d(x, self.down), self.mid, *moves)
        return F.conv2d(h * self.scale, self.up)

    def forward(self, x: Tensor, base: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        """What the adapter adds to the base's output `out` for the input x."""
        x = x.to(self.down.dtype)
        added = self.low(x, base) if self.magnitude is None else self._dora(x, base, out)
        return (added * self.strength).to(out.dtype)

    def _dora(self, x: Tensor, base: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        with torch.no_grad():  # section 4.3 of the paper: the lengths are a constant to the gradient
            lengths = self.lengths(base.weight.to(x.dtype) + self.product(x.dtype))
        gain, bias = (self.magnitude / lengths).flatten(), base.bias
        if isinstance(base, nn.Conv2d):
            gain, bias = gain[:, None, None], None if bias is None else bias[:, None, None]
        if self.by_column:
            return self.low(x * gain, base) + without_bias(base, x * (gain - 1), base.weight.to(x.dtype))
        return self.low(x, base) * gain + (out if bias is None else out - bias) * (gain - 1)


class Hadamard(Adapter):
    """LoHa. Of each of two products w1 and w2: w1_a (o, r) and w1_b (r, i k k); or, for a convolution, t1 (r, r, k, k),
    w1_a (r, o) and w1_b (r, i). shape: the weight's."""

    def __init__(self, factors: Mapping[str, Tensor], alpha: float, shape: torch.Size, **more):
        super().__init__({"t1": None, "t2": None} | dict(factors), alpha, **more)
        self.shape = shape

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def product(self, dtype: torch.dtype) -> Tensor:
        w1, w2 = (
            spread(*(factor if factor is None else factor.to(dtype) for factor in side))
            for side in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        )
        return fitted(w1 * w2, self.shape) * self.scale


class Kronecker(Adapter):
    """LoKr. w1 (a, b) and w2 (c, d) or (c, d, k, k) with a c = o and b d = i; each whole, or of factors: w1_a (a, r) and
    w1_b (r, b), w2_a (c, r) and w2_b (r, d k k), or t2 (r, r, k, k), w2_a (r, c) and w2_b (r, d). Where both are whole
    there is no rank to be seen: LyCORIS then leaves alpha out, and PEFT has its rank elsewhere. shape: the weight's."""

    def __init__(self, factors: Mapping[str, Tensor], alpha: float, shape: torch.Size, **more):
        none = dict.fromkeys(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
        super().__init__(none | dict(factors), alpha, **more)
        self.shape = shape
        self.rank_if_whole: int | None = None

    @property
    def rank(self) -> int | None:
        return next((len(factor) for factor in (self.w1_b, self.w2_b) if factor is not None), self.rank_if_whole)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    def product(self, dtype: torch.dtype) -> Tensor:
        sides = ((self.w1, self.w1_a, self.w1_b, None), (self.w2, self.w2_a, self.w2_b, self.t2))
        w1, w2 = (
            spread(a.to(dtype), b.to(dtype), None if t is None else t.to(dtype)) if whole is None else whole.to(dtype)
            for whole, a, b, t in sides
        )
        if w2.ndim == 4:
            w1 = w1[:, :, None, None]
        return fitted(torch.kron(w1, w2.contiguous()), self.shape) * self.scale


def spread(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """a b; with t, the convolution whose outputs and inputs they mix: (r, r, k, k), (r, o), (r, i) -> (o, i, k, k)."""
    return a @ b if t is None else torch.einsum("rskl,ro,si->oikl", t, a, b)


def fitted(change: Tensor, shape: torch.Size) -> Tensor:
    """In the weight's shape, if it has its outputs and as many numbers. ValueError otherwise."""
    if change.shape[0] != shape[0] or change.numel() != shape.numel():
        raise ValueError(f"a change of shape {list(change.shape)} for a weight of shape {list(shape)}")
    return change.reshape(shape)


def without_bias(base: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What a module with another weight gives."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation)


class Adapted:
    """What LoraLinear and LoraConv share: `adapters`, from the name of a LoRA to its adapter."""

    adapters: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return sum((adapter(x, self, out) for adapter in self.adapters.values()), start=out)


class LoraLinear(Adapted, nn.Linear):
    pass


class LoraConv(Adapted, nn.Conv2d):
    pass


WITH = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv}
WITHOUT = {adapted: bare for bare, adapted in WITH.items()}


def attach(base: nn.Linear | nn.Conv2d, name: str, adapter: Adapter) -> None:
    if not isinstance(base, Adapted):
        base.__class__ = WITH[type(base)]
        base.adapters = nn.ModuleDict()
    base.adapters[name] = adapter


def detach(base: LoraLinear | LoraConv, name: str) -> None:
    del base.adapters[name]
    if not base.adapters:
        del base.adapters
        base.__class__ = WITHOUT[type(base)]
