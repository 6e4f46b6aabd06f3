"""Opt-in speed or memory at the cost of exactness: each of these changes the picture, a little or a lot.

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
    """Quantizes the UNet's Linear weights to int8 in place, with one scale per row; needs torchao.

    `activations`: quantizes activations too, for int8 matrix products. Apply it after adapters and before
    torch.compile. A quantized model can be neither trained nor saved.
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
    """Silences torchao's log of optional parts that it cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
