"""Low-rank adapters: a weight W becomes W + s * alpha/r * B A, with B and A narrow.

Hu et al. 2021 (LoRA, arXiv:2106.09685). For a k x k convolution A is a k x k convolution to r channels and B a 1x1
convolution back (LoCon), or A 1x1, a k x k one between r channels, and B 1x1 (`mid`). DoRA (Liu et al. 2024,
arXiv:2402.09353) then gives each row (in some files each column) of the sum a length of its own, the magnitude.
Strength s leads in a straight line from the bare weight at 0 to the adapted one at 1, for DoRA too.

A module that carries adapters becomes a LoraLinear or LoraConv in place. It stays the same object, and its weight keeps
its name, so that optimizers, hooks and names see no difference; without its last adapter it is what it was before.

Shape letters: o, i the outputs and inputs of a module, r the rank, k the side of a convolution's kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """One adapter of one module: down = A (r, i) or (r, i, k, k), up = B (o, r) or (o, r, 1, 1), mid (r, r, k, k).

    magnitude: (o, 1) or (o, 1, 1, 1) the length of each row, or (1, i) or (1, i, 1, 1) of each column.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, *, mid: Tensor | None = None,
                 magnitude: Tensor | None = None, strength: float = 1.0, trainable: bool = False):
        super().__init__()
        for name, tensor in (("down", down), ("up", up), ("mid", mid), ("magnitude", magnitude)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, trainable))
        self.alpha, self.strength = alpha, strength
        self.by_column = magnitude is not None and magnitude.shape[0] == 1 and up.shape[0] > 1

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def product(self, dtype: torch.dtype) -> Tensor:
        """alpha/r * B A, in the weight's shape."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        if self.mid is None:
            return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]) * self.scale
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), self.mid.to(dtype), down.flatten(1)) * self.scale

    def lengths(self, full: Tensor) -> Tensor:
        """Of each row of a weight, or of each column."""
        others = [axis for axis in range(full.ndim) if axis != self.by_column]
        return torch.linalg.vector_norm(full, dim=others, keepdim=True)

    @torch.no_grad()
    def change(self, weight: Tensor) -> Tensor:
        """What the adapter adds to a weight, in at least float32."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = self.product(wide)
        if self.magnitude is not None:
            full = weight.to(wide) + change
            change = full * (self.magnitude.to(wide) / self.lengths(full)) - weight.to(wide)
        return change * self.strength

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
        with torch.no_grad():                    # section 4.3 of the paper: the lengths are a constant to the gradient
            lengths = self.lengths(base.weight.to(x.dtype) + self.product(x.dtype))
        gain, bias = (self.magnitude / lengths).flatten(), base.bias
        if isinstance(base, nn.Conv2d):
            gain, bias = gain[:, None, None], None if bias is None else bias[:, None, None]
        if self.by_column:
            return self.low(x * gain, base) + without_bias(base, x * (gain - 1))
        return self.low(x, base) * gain + (out if bias is None else out - bias) * (gain - 1)


def without_bias(base: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    weight = base.weight.to(x.dtype)
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


def attach(base: nn.Linear | nn.Conv2d, name: str, adapter: LowRank) -> None:
    if not isinstance(base, Adapted):
        base.__class__ = WITH[type(base)]
        base.adapters = nn.ModuleDict()
    base.adapters[name] = adapter


def detach(base: LoraLinear | LoraConv, name: str) -> None:
    del base.adapters[name]
    if not base.adapters:
        del base.adapters
        base.__class__ = WITHOUT[type(base)]
