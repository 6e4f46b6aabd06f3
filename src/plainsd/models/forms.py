"""Layers in another form: the same numbers laid out for a processor, and the way back (speed/packed.py has them).

What reads a model's weights (files, adapters, copies) sees those of the plain layers, whatever form they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Self

from torch import Tensor, nn


class OtherForm(nn.Module):
    """A layer made from a plain one, `kind(plain)`, that gives it back by `plain()`, with the same numbers.

    Its state is the plain layer's. To copy, move or cast it is to do so with the plain layer, and to make it anew.
    Weights are loaded into plain layers only.
    """

    def plain(self) -> nn.Module:
        raise NotImplementedError

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.plain().state_dict(*args, **options)

    def _load_from_state_dict(self, *args: Any) -> None:
        raise RuntimeError("weights cannot be loaded into a packed model; call plainsd.speed.plain_again first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.__dict__.update(type(self)(self.plain()._apply(fn, recurse)).__dict__)
        return self

    def __reduce__(self) -> tuple:
        return type(self), (self.plain(),)


def make_plain(network: nn.Module) -> bool:
    """Replaces all layers in another form by the plain ones they were made from. Whether there were any."""
    found = False
    for name, child in network.named_children():
        if isinstance(child, OtherForm):
            setattr(network, name, child.plain())
            found = True
        else:
            found |= make_plain(child)
    return found


def plain_of(layer: nn.Module) -> nn.Module:
    return layer.plain() if isinstance(layer, OtherForm) else layer


def refilled(
    layer: nn.Module, weights: Mapping[str, Tensor | None], children: Mapping[str, nn.Module] | None = None
) -> Any:
    """A copy of the layer with these weights and children and no others; none are drawn."""
    twin = copy(layer)
    twin._parameters = {name: None if weight is None else nn.Parameter(weight) for name, weight in weights.items()}
    twin._modules = dict(children or {})
    return twin
