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

import torch

from plainsd.errors import UserError
from plainsd.pictures.model import StableDiffusion


def int8(sd: StableDiffusion, *, activations: bool = False) -> StableDiffusion:
    """Quantizes the UNet's Linear weights to int8 in place, with one scale per row; needs torchao.

    `activations`: quantizes activations too, for int8 matrix products. Apply it after adapters and before
    torch.compile. A quantized model can be neither trained nor saved. UserError for `activations` on a processor whose
    8-bit products are wrong (`exact_products`).
    """
    if activations and sd.device.type == "cpu" and not exact_products():
        raise UserError(
            "activations=True: 8-bit products overflow on this processor, which has no VNNI; leave it out, and weights"
            " alone are in 8 bits"
        )
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


def exact_products() -> bool:
    """Whether the CPU multiplies 8-bit numbers without overflow. oneDNN, without the instructions of VNNI, adds two
    products of 8 bits in 16, which saturate: at full range the sum is wrong by a fifth.
    """
    rows, columns = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 32), 127, dtype=torch.int8)
    rows[:, ::3] = -127  # what oneDNN adds to make them positive makes them overflow
    return torch.equal(torch._int_mm(rows, columns).double(), rows.double() @ columns.double())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torchao's log of optional parts that it cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
