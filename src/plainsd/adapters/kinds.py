"""Adapters of other kinds than LoRA, LoHa and LoKr (layers.py): whole differences, rotations, gains.

    Difference   full: W + s * D, for biases too; for norms and embeddings as well as layers
    Global       GLoRA: W + s * alpha/r * (W A1 A2 + B1 B2) (Chavan et al. 2023, arXiv:2306.07967)
    Gains        IA3: rows or columns of W times 1 + s (g - 1) (Liu et al. 2022, arXiv:2205.05638)
    Rotation     OFT: rows, or in PEFT's files columns, of W turned in blocks (Qiu et al. 2023, arXiv:2306.07280)
    Butterfly    BOFT: several such turns, between which the rows or columns change places (Liu et al. 2023,
                 arXiv:2311.06243)

LyCORIS rotates the outputs, PEFT the inputs. A rotation R is the Cayley transform (I + Q) (I - Q)^-1 of a
skew-symmetric Q. Only LyCORIS defines strengths for them: s R + (1 - s) I for each rotation, with `rescale` unchanged.
For PEFT's the weight is interpolated linearly from W at strength 0 to the rotated weight at 1.

Shape letters: o, i outputs and inputs, f = i k k a filter's numbers, n blocks of b x b, m successive rotations.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plainsd.adapters.layers import Adapter, reshaped

TERMS = 5  # default of PEFT's series for the Cayley transform


class Whole(Adapter):
    """Kinds without a rank, whose change depends on the weight. shape: the weight's."""

    def __init__(self, factors: Mapping[str, Tensor | None], alpha: float, shape: torch.Size, **more):
        super().__init__(factors, alpha, **more)
        self.shape = shape

    @property
    def rank(self) -> int | None:
        return None

    def changed(self, weight: Tensor) -> Tensor:
        """The weight with the adapter at strength 1."""
        raise NotImplementedError

    def change(self, weight: Tensor, own: Tensor | None = None) -> Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (self.changed(weight) - weight) * self.strength


class Difference(Whole):
    """diff: in the weight's shape, or None where only the bias changes."""

    def __init__(self, factors: Mapping[str, Tensor], alpha: float, shape: torch.Size, **more):
        super().__init__({"diff": None} | dict(factors), alpha, shape, **more)

    def product(self, dtype: torch.dtype) -> Tensor:
        if self.diff is None:
            return torch.zeros(self.shape, dtype=dtype, device=self.bias.device)
        return reshaped(self.diff.to(dtype), self.shape)

    change = Adapter.change


class Global(Whole):
    """a1 (i, r), a2 (r, i), b1 (o, r), b2 (r, i) or (r, i, k, k); as 1x1 convolutions too."""

    @property
    def rank(self) -> int:
        return self.a2.shape[0]

    def changed(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (factor.to(weight.dtype).flatten(1) for factor in (self.a1, self.a2, self.b1, self.b2))
        mixed = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return weight + (mixed + reshaped(b1 @ b2, self.shape)) * self.scale


class Gains(Whole):
    """gain: (o,), or (i,) if `inputs`. with_bias: outputs are multiplied, bias and all, as PEFT does."""

    def __init__(self, gain: Tensor, shape: torch.Size, *, inputs: bool, with_bias: bool, **more):
        super().__init__({"gain": gain}, 1.0, shape, **more)
        self.inputs, self.with_bias = inputs, with_bias

    def changed(self, weight: Tensor) -> Tensor:
        sides = [1] * (weight.ndim - 2)
        return weight * self.gain.to(weight.dtype).view(*((1, -1) if self.inputs else (-1, 1)), *sides)

    def bias_change(self, bias: Tensor) -> Tensor | None:
        return bias * (self.gain.to(bias.dtype) - 1) * self.strength if self.with_bias and not self.inputs else None


class Rotation(Whole):
    """LyCORIS' OFT: blocks (n, b, b) rotate the outputs, then `rescale` (o, 1, ...) multiplies them. The norm of Q is
    at most alpha * o, if alpha is above 0."""

    def __init__(self, factors: Mapping[str, Tensor], alpha: float, shape: torch.Size, **more):
        super().__init__({"rescale": None} | dict(factors), alpha, shape, **more)

    def turns(self, dtype: torch.dtype) -> Tensor:
        """(n, b, b) or (m, n, b, b), at this strength."""
        q = self.blocks.to(dtype)
        q = q - q.mT
        if self.alpha > 0:
            q = q * (self.alpha * self.shape[0] / (q.norm() + 1e-8)).clamp(max=1)
        unit = torch.eye(q.shape[-1], dtype=dtype, device=q.device)
        return ((unit + q) @ torch.linalg.inv(unit - q)) * self.strength + unit * (1 - self.strength)

    def turned(self, rows: Tensor) -> Tensor:
        """(o, f) -> (o, f)"""
        turns = self.turns(rows.dtype)
        blocks = rows.unflatten(0, (len(turns), -1))  # (n, b, f)
        return torch.einsum("npq,npf->nqf", turns, blocks).flatten(0, 1)

    def change(self, weight: Tensor, own: Tensor | None = None) -> Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        turned = self.turned(weight.flatten(1)).view_as(weight)
        if self.rescale is not None:
            turned = turned * self.rescale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
        return turned - weight


class Butterfly(Rotation):
    """LyCORIS' BOFT: blocks (m, n, b, b). Rotation j pairs rows that are 2^j b/2 apart."""

    def turned(self, rows: Tensor) -> Tensor:
        for j, turn in enumerate(self.turns(rows.dtype)):
            apart = 2**j * (turn.shape[-1] // 2)
            rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
            rows = (turn @ rows.unflatten(0, (len(turn), -1))).flatten(0, 1)
            rows = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        return rows


class InputRotation(Whole):
    """PEFT's OFT: blocks (n, b (b - 1) / 2), the upper triangle of Q, rotate the filters; one block may be shared by
    all (`share`). terms: of the series 1 + 2 Q + 2 Q^2 + ... that approximates the Cayley transform; None: the exact
    transform, of -Q. longest: largest norm of Q, in COFT."""

    def __init__(
        self,
        blocks: Tensor,
        shape: torch.Size,
        *,
        side: int,
        share: bool = False,
        terms: int | None = TERMS,
        longest: float | None = None,
        **more,
    ):
        super().__init__({"blocks": blocks}, 1.0, shape, **more)
        self.side, self.share, self.terms, self.longest = side, share, terms, longest

    def turns(self, dtype: torch.dtype) -> Tensor:
        """(n, b, b)"""
        above, unit = self.blocks.to(dtype), torch.eye(self.side, dtype=dtype, device=self.blocks.device)
        q = above.new_zeros(len(above), self.side, self.side)
        rows, columns = torch.triu_indices(self.side, self.side, 1, device=above.device)
        q[:, rows, columns] = above
        q = q - q.mT
        if self.longest is not None:
            q = q * (self.longest * len(q) ** -0.5 / torch.linalg.matrix_norm(q, keepdim=True)).clamp(max=1)
        return torch.linalg.solve(unit + q, unit - q, left=False) if self.terms is None else series(q, self.terms)

    def changed(self, weight: Tensor) -> Tensor:
        turns = self.turns(weight.dtype)
        filters = weight.flatten(1).unflatten(1, (-1, self.side))  # (o, n, b)
        turned = torch.einsum("onq,npq->onp", filters, turns.expand(filters.shape[1], -1, -1) if self.share else turns)
        return turned.flatten(1).view_as(weight)


def series(q: Tensor, terms: int) -> Tensor:
    """PEFT's truncated series of (I + Q) (I - Q)^-1: every power twice, except the 0th and, from three terms on, the
    last, which is at least the third."""
    unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms < 3:
        return unit + 2 * q * (terms == 2)
    total, power, last = unit + 2 * q, q, max(terms - 1, 3)
    for exponent in range(2, last + 1):
        power = power @ q
        total = total + power * (1 if exponent == last else 2)
    return total


class InputButterfly(Whole):
    """PEFT's BOFT: blocks (m, n, b, b) rotate the filters, `gain` (o, 1) or (1, o) multiplies the rows. If m > 1,
    rotation j pairs half-blocks that are 2^j apart."""

    def changed(self, weight: Tensor) -> Tensor:
        filters, blocks = weight.flatten(1), self.blocks.to(weight.dtype)
        q, unit = (blocks - blocks.mT) / 2, torch.eye(blocks.shape[-1], dtype=weight.dtype, device=weight.device)
        for j, turn in enumerate(torch.linalg.solve(unit + q, unit - q, left=False)):
            halves = (-1, 2, 2**j, len(unit) // 2) if len(q) > 1 else (-1, 1, 1, len(unit))
            paired = filters.unflatten(1, halves).transpose(2, 3).flatten(1)
            turned = torch.einsum("npq,onq->onp", turn, paired.unflatten(1, (len(turn), -1)))
            filters = turned.flatten(1).unflatten(1, (-1, halves[2], halves[1], halves[3])).transpose(2, 3).flatten(1)
        return (filters * self.gain.to(weight.dtype).view(-1, 1)).view_as(weight)
