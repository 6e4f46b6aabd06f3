"""Gradient checkpointing: less memory for more time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint

from plainsd.models.unet import UNet, WayDown
from plainsd.speed.training import same_attention


@contextmanager
def checkpointing(network: WayDown, wanted: bool = True) -> Iterator[None]:
    """Within, each block stores only its input, and recomputes the rest in the backward pass (Chen et al. 2016,
    arXiv:1604.06174). Gradients are the same."""
    up = network.up if isinstance(network, UNet) else ()
    blocks = [*network.down, network.mid, *up] if wanted else []
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=same_attention)
    for block in blocks:
        block.forward = partial(again, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's method
