"""Seamlessly tiling pictures: convolutions pad circularly. Halvings of the VAE's encoder do not, as in A1111: they pad
two sides alone.

A1111's "Tiling". The networks' padding is changed for the duration of a call only, so that other pictures of the same
model stay the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def wrapped_edges(network: nn.Module) -> Iterator[None]:
    """Circular padding instead of zeros inside this context, of convolutions in any form (models/forms.py)."""
    convs: list[Any] = [layer for layer in network.modules() if hasattr(layer, "padding_mode") and any(layer.padding)]
    before = [conv.padding_mode for conv in convs]
    try:
        for conv in convs:
            conv.padding_mode = "circular"
        yield
    finally:
        for conv, mode in zip(convs, before, strict=True):
            conv.padding_mode = mode


def seamless(network: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which runs the network, with wrapped edges."""

    def run(*args, **kwargs):
        with wrapped_edges(network):
            return call(*args, **kwargs)

    return run
