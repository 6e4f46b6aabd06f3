"""Exactness for speed or memory, only when asked: each of these gives another picture, a little or a lot.

    cache       the UNet's deep layers run at every N-th call only      Settings.cache, --cache N (models/deep_cache.py)
    int8        the UNet's Linear weights in 8 bits                     --int8
    interval    guidance between two noise levels only (denoiser.py)    Settings.interval, --interval LOW HIGH

bench/tradeoffs.py prints what each costs and gains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from plainsd.errors import UserError
from plainsd.pictures.model import StableDiffusion


def int8(sd: StableDiffusion, *, activations: bool = False) -> StableDiffusion:
    """The weights of the UNet's Linear layers, in place, as 8-bit numbers with a scale for each row; needs torchao.

    `activations`: what goes in becomes 8-bit too, so that the processor multiplies in 8 bits. Comes after adapters, and
    before torch.compile. A model with such weights can be neither trained nor saved.
    """
    with _quiet():
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
        except ImportError:
            raise UserError("8-bit weights need torchao; install it with: pip install 'plainsd[int8]'") from None
    way = Int8DynamicActivationInt8WeightConfig() if activations else Int8WeightOnlyConfig()
    for model in (sd, sd.refiner):
        if model is not None:
            quantize_(model.unet, way)
    return sd


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao logs what it cannot load of itself and does without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
