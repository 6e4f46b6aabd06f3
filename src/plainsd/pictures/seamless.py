"""Seamlessly tiling pictures: every convolution pads circularly.

A1111's "Tiling". The networks' padding is changed for the duration of a call only, so that other pictures of the same
model stay the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from plainsd.errors import UserError


@contextmanager
def wrapped_edges(network: nn.Module) -> Iterator[None]:
    """Circular padding instead of zeros inside this context."""
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and any(layer.padding)]
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


def check_seamless(*networks: nn.Module) -> None:
    """UserError if a network's convolutions are packed, which always pad with zeros."""
    for network in networks:
        convs = [name for name, layer in network.named_modules() if name.rpartition(".")[2] in ("conv_in", "conv_out")]
        if any(not isinstance(network.get_submodule(name), nn.Conv2d) for name in convs):
            raise UserError("tiling needs plain layers, and this model's are packed; leave --fast out", field="tiling")
