"""Layers in another form: the same numbers laid out for a processor, and the way back (speed/packed.py has them).

What reads a model's weights (files, adapters, copies) sees those of the plain layers, whatever form they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Self

from torch import Tensor, nn

from plainsd.device import can_pack


class OtherForm(nn.Module):
    """A layer made from a plain one, `kind(plain)`, that gives it back by `plain()`, with the same numbers.

    Its state is the plain layer's. To copy or cast it is to do so with the plain layer, and to make it anew: in a dtype
    and on a device that it is for, or RuntimeError. Weights are loaded into plain layers only.
    """

    trained: frozenset[str] = frozenset()  # those of the plain layer's parameters that have gradients

    def plain(self) -> nn.Module:
        raise NotImplementedError

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.plain().state_dict(*args, **options)

    def _load_from_state_dict(self, *args: Any) -> None:
        raise RuntimeError("weights cannot be loaded into a packed model; call plainsd.speed.plain_again first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        plain = self.plain()._apply(fn, recurse)
        if not packable(plain):
            raise RuntimeError(f"{of_weights(plain)} cannot be packed; call plainsd.speed.plain_again before")
        self.__dict__.update(type(self)(plain).__dict__)
        return self

    def __reduce__(self) -> tuple:
        return type(self), (self.plain(),), {"trained": self.trained}


def in_form(kind: type[OtherForm], plain: nn.Module) -> OtherForm:
    """The layer in a form that knows which of its weights are trained."""
    layer = kind(plain)
    layer.trained = frozenset(name for name, weight in plain.named_parameters() if weight.requires_grad)
    return layer


def quantized(network: nn.Module) -> bool:
    """Whether some of its weights are in 8 bits (speed/int8.py)."""
    return any(type(weight) is not nn.Parameter for weight in network.parameters())


def of_weights(layer: nn.Module) -> str:
    weight = next(layer.parameters())
    return f"weights in {weight.dtype} on {weight.device}"


def packable(layer: nn.Module) -> bool:
    """Whether its weights can be in another form where they are."""
    weight = next(layer.parameters())
    return weight.device.type == "cpu" and can_pack(weight.dtype)


def make_plain(network: nn.Module) -> bool:
    """Replaces all layers in another form by the plain ones they were made from. Whether there were any."""
    found = False
    for name, child in network.named_children():
        if isinstance(child, OtherForm):
            setattr(network, name, plain_of(child))
            found = True
        else:
            found |= make_plain(child)
    return found


def plain_of(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, OtherForm):
        return layer
    plain = layer.plain()
    for name, weight in plain.named_parameters():
        if name in layer.trained and not weight.is_inference():  # those cannot be
            weight.requires_grad_()
    return plain


def refilled(
    layer: nn.Module, weights: Mapping[str, Tensor | None], children: Mapping[str, nn.Module] | None = None
) -> Any:
    """A copy of the layer with these weights, without gradients, and these children, and no others; none are drawn."""
    twin = copy(layer)
    twin._parameters = {
        name: None if weight is None else nn.Parameter(weight, False) for name, weight in weights.items()
    }
    twin._modules = dict(children or {})
    return twin
