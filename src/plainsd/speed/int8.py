"""Opt-in speed or memory at the cost of exactness: each of these changes the picture, a little or a lot.

    cache       the UNet's deep layers run at every N-th call only      Settings.cache, --cache N (models/deep_cache.py)
    int8        the UNet's Linear weights in 8 bits                     --int8
    interval    guidance between two noise levels only (denoiser.py)    Settings.interval, --interval LOW HIGH

bench/tradeoffs.py prints what each costs and gains.
"""

from __future__ import annotations

import logging
import warnings

import torch

from plainsd.errors import UserError
from plainsd.models import forms
from plainsd.pictures.model import StableDiffusion


def int8(sd: StableDiffusion, *, activations: bool = False) -> StableDiffusion:
    """Quantizes the UNet's Linear weights to int8 in place, with one scale per row; needs torchao.

    `activations`: quantizes activations too, for int8 matrix products. Apply it after adapters and before `faster`; a
    packed UNet is made plain for it, with a warning. A quantized model can be neither trained, cast nor saved.
    UserError for one that is quantized already, and for `activations` on a processor whose 8-bit products are wrong
    (`exact_products`).
    """
    models = [model for model in (sd, sd.refiner) if model is not None]
    if any(forms.quantized(model.unet) for model in models):
        raise UserError("the model's weights are in 8 bits already; load it anew for other ones")
    if activations and sd.device.type == "cpu" and not exact_products():
        raise UserError(
            "activations=True: 8-bit products overflow on this processor, which has no VNNI; leave it out, and weights"
            " alone are in 8 bits"
        )
    log = logging.getLogger("torchao")
    if log.level == logging.NOTSET:
        log.setLevel(logging.ERROR)  # it warns of optional parts that it cannot load
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("8-bit weights need torchao; install it with: pip install 'plainsd[int8]'") from None
    way = Int8DynamicActivationInt8WeightConfig() if activations else Int8WeightOnlyConfig()
    unpacked = [forms.make_plain(model.unet) for model in models]
    if any(unpacked):
        warnings.warn("the model was packed, and 8 bits need plain layers: call faster again after them", stacklevel=2)
    for model in models:
        quantize_(model.unet, way)
    return sd


def exact_products() -> bool:
    """Whether the CPU multiplies 8-bit numbers without overflow. oneDNN, without the instructions of VNNI, adds two
    products of 8 bits in 16, which saturate: at full range the sum is wrong by a fifth.
    """
    rows, columns = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 32), 127, dtype=torch.int8)
    rows[:, ::3] = -127  # what oneDNN adds to make them positive makes them overflow
    return torch.equal(torch._int_mm(rows, columns).double(), rows.double() @ columns.double())
