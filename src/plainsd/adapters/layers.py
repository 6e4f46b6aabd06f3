"""Adapters: small parameters that change a weight W.

    LowRank      LoRA: W + s * alpha/r * B A, with B and A narrow
    Hadamard     LoHa: W + s * alpha/r * (B1 A1) o (B2 A2), the elementwise product (Hyeon-Woo et al. 2022,
                 arXiv:2108.06098)
    Kronecker    LoKr: W + s * alpha/r * K1 x K2, the Kronecker product (Edalati et al. 2022, arXiv:2212.10650)

kinds.py has more of them: whole differences, rotations, gains. LoRA is by Hu et al. 2021 (arXiv:2106.09685). For a
k x k convolution A is a k x k convolution to r channels and B a 1x1 convolution back (LoCon), or A 1x1, a k x k one
between r channels, and B 1x1 (`mid`). The other two come from LyCORIS (Yeh et al. 2024, arXiv:2309.14859).

Several adapters on a module act in the order in which they were added, each on the result of those before it. That
matters for DoRA (Liu et al. 2024, arXiv:2402.09353), which sets the norm m of each row (in some files each column): as
in PEFT, and thus in diffusers, the weight W' so far becomes

    (W' + s * change) * m / |W + s * change|          W: the module's own weight, without any adapter

so that a strength s of 0 still sets the norms, and the rows of an earlier LoRA are scaled too, those of a later one
not.

A module with adapters becomes a LoraLinear, LoraConv, ... in place. It stays the same object, and its weight keeps its
name, so that optimizers, hooks and names are unaffected; removing its last adapter restores its class.

Shape letters: o, i the outputs and inputs of a module, r the rank, k the side of a convolution's kernel.
"""

from collections.abc import Container, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """The base of all kinds. Its parameters are the factors, under their names in the code below.

    magnitude: (o, 1) or (o, 1, 1, 1) the norm of each row, or (1, i) or (1, i, 1, 1) of each column.
    bias: (o,) added to the module's bias.
    """

    lora: str | None = None  # what people call the LoRA that it is of

    def __init__(
        self,
        factors: Mapping[str, Tensor | None],
        alpha: float,
        *,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        strength: float = 1.0,
        trainable: bool = False,
    ):
        super().__init__()
        for name, tensor in (*factors.items(), ("magnitude", magnitude), ("bias", bias)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, trainable))
        self.alpha, self.strength = alpha, strength
        self.by_column = magnitude is not None and magnitude.shape[0] == 1 and magnitude.shape[1] > 1

    @property
    def rank(self) -> int | None:
        """The rank; None for kinds without one."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        return 1.0 if self.rank is None else self.alpha / self.rank

    def product(self, dtype: torch.dtype) -> Tensor:
        """The change before magnitude and strength, in the weight's shape."""
        raise NotImplementedError

    def lengths(self, full: Tensor) -> Tensor:
        """The norms of a weight's rows, or columns."""
        others = [axis for axis in range(full.ndim) if axis != self.by_column]
        return torch.linalg.vector_norm(full, dim=others, keepdim=True)

    def change(self, weight: Tensor, own: Tensor | None = None) -> Tensor:
        """The change of the weight so far, in at least float32. own: the module's weight without adapters, if
        different. Gradients pass through the norms, as in LyCORIS."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        change = self.product(weight.dtype) * self.strength
        if self.magnitude is None:
            return change
        lengths = self.lengths((weight if own is None else own.to(weight.dtype)) + change)
        return (weight + change) * (self.magnitude.to(weight.dtype) / lengths) - weight

    def bias_change(self, bias: Tensor) -> Tensor | None:
        """The change of the bias so far."""
        return None if self.bias is None else self.bias.to(bias.dtype) * self.strength

    def forward(self, x: Tensor, base: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        """What the adapter adds to the module's output `out` so far, for the input x."""
        with torch.autocast(x.device.type, enabled=False):
            change = self.change(base.weight)
        return base.with_others(x, change.to(x.dtype), None).to(out.dtype)


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
        padding = base.padding
        if base.padding_mode != "zeros":  # seamless tiling
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        moves = (None, base.stride, padding, base.dilation)
        h = F.conv2d(x, self.down, *moves) if self.mid is None else F.conv2d(F.conv2d(x, self.down), self.mid, *moves)
        return F.conv2d(h * self.scale, self.up)

    def forward(self, x: Tensor, base: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        """What the adapter adds to the module's output `out` so far, for the input x."""
        x = x.to(self.down.dtype)
        if self.by_column:
            return super().forward(x, base, out)
        added = self.low(x, base) * self.strength if self.magnitude is None else self._dora(x, base, out)
        return added.to(out.dtype)

    def _dora(self, x: Tensor, base: nn.Linear | nn.Conv2d, out: Tensor) -> Tensor:
        with torch.no_grad():  # section 4.3 of the paper: no gradient through the norms
            lengths = self.lengths(base.weight.to(x.dtype) + self.product(x.dtype) * self.strength)
        gain, bias = (self.magnitude / lengths).flatten(), base.bias
        if isinstance(base, nn.Conv2d):
            gain, bias = gain[:, None, None], None if bias is None else bias[:, None, None]
        return self.low(x, base) * self.strength * gain + (out if bias is None else out - bias) * (gain - 1)


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
            product_of_factors(*(factor if factor is None else factor.to(dtype) for factor in side))
            for side in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        )
        return reshaped(w1 * w2, self.shape) * self.scale


class Kronecker(Adapter):
    """LoKr. w1 (a, b) and w2 (c, d) or (c, d, k, k) with a c = o and b d = i; each whole, or of factors: w1_a (a, r)
    and w1_b (r, b), w2_a (c, r) and w2_b (r, d k k), or t2 (r, r, k, k), w2_a (r, c) and w2_b (r, d). If both are
    whole the rank is unknown: LyCORIS then omits alpha, and PEFT stores the rank elsewhere. shape: the weight's."""

    def __init__(self, factors: Mapping[str, Tensor], alpha: float, shape: torch.Size, **more):
        none = dict.fromkeys(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
        super().__init__(none | dict(factors), alpha, **more)
        self.shape = shape
        self.rank_if_whole: int | None = None

    @property
    def rank(self) -> int | None:
        return next((len(factor) for factor in (self.w1_b, self.w2_b) if factor is not None), self.rank_if_whole)

    def product(self, dtype: torch.dtype) -> Tensor:
        sides = ((self.w1, self.w1_a, self.w1_b, None), (self.w2, self.w2_a, self.w2_b, self.t2))
        w1, w2 = (
            product_of_factors(a.to(dtype), b.to(dtype), None if t is None else t.to(dtype))
            if whole is None
            else whole.to(dtype)
            for whole, a, b, t in sides
        )
        if w2.ndim == 4:
            w1 = w1[:, :, None, None]
        return reshaped(torch.kron(w1, w2.contiguous()), self.shape) * self.scale


def product_of_factors(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """a b; with t, the convolution whose outputs and inputs they mix: (r, r, k, k), (r, o), (r, i) -> (o, i, k, k)."""
    return a @ b if t is None else torch.einsum("rskl,ro,si->oikl", t, a, b)


def reshaped(change: Tensor, shape: torch.Size) -> Tensor:
    """Reshaped to the weight's shape, if outputs and element count agree. ValueError otherwise."""
    if change.shape[0] != shape[0] or change.numel() != shape.numel():
        raise ValueError(f"a change of shape {list(change.shape)} for a weight of shape {list(shape)}")
    return change.reshape(shape)


class Adapted(nn.Module):
    """What the modules below share: `adapters`, from the name of a LoRA to its adapter, in the order they came."""

    adapters: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        alone = len(self.adapters) == 1
        if not (
            isinstance(self, nn.Linear | nn.Conv2d)
            and all(computed_beside(one, alone) for one in self.adapters.values())
        ):
            with torch.autocast(x.device.type, enabled=False):
                weight, bias = self.adapted(self.adapters)
            weight = weight.to(self.weight.dtype)
            return self.with_others(x, weight, None if bias is None else bias.to(weight.dtype))
        out = super().forward(x)
        for adapter in self.adapters.values():
            out = out + adapter(x, self, out)
        return out

    def adapted(self, names: Container[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the adapters of these names, in at least float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        own, bias = self.weight.to(wide), getattr(self, "bias", None)
        weight, bias = own, None if bias is None else bias.to(wide)
        for name, adapter in self.adapters.items():
            if name in names:
                change = adapter.change(weight, own)
                if len(change) < len(weight):  # a table of tokens that has learned words since
                    change = F.pad(change, (0, 0, 0, len(weight) - len(change)))
                weight = weight + change
                shift = None if bias is None else adapter.bias_change(bias)
                bias = bias if shift is None else bias + shift
        return weight, bias

    def with_others(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module gives with another weight and bias."""
        raise NotImplementedError


def computed_beside(adapter: Adapter, alone: bool) -> bool:
    """Whether its part is computed beside the weight: it is cheaper, and nothing of a small change is rounded away.
    What it adds must then not hang on what other adapters do."""
    if adapter.bias is not None:
        return False
    if isinstance(adapter, LowRank):
        return alone or not adapter.by_column
    return isinstance(adapter, Hadamard | Kronecker) and (alone or adapter.magnitude is None)


class LoraLinear(Adapted, nn.Linear):
    def with_others(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class LoraConv(Adapted, nn.Conv2d):
    def with_others(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class LoraLayerNorm(Adapted, nn.LayerNorm):
    def with_others(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LoraGroupNorm(Adapted, nn.GroupNorm):
    def with_others(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class LoraEmbedding(Adapted, nn.Embedding):
    def with_others(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)


WITH = {
    nn.Linear: LoraLinear,
    nn.Conv2d: LoraConv,
    nn.LayerNorm: LoraLayerNorm,
    nn.GroupNorm: LoraGroupNorm,
    nn.Embedding: LoraEmbedding,
}
UNADAPTED = {adapted: bare for bare, adapted in WITH.items()}


def attach(base: nn.Module, name: str, adapter: Adapter) -> None:
    if not isinstance(base, Adapted):
        base.__class__ = WITH[type(base)]
        base.adapters = nn.ModuleDict()
    base.adapters[name] = adapter


def detach(base: Adapted, name: str) -> None:
    del base.adapters[name]
    if not base.adapters:
        del base.adapters
        base.__class__ = UNADAPTED[type(base)]
