"""Prediction type and zero terminal SNR where the files lack them or are wrong: found by probing the network, or given
by the user."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plainsd.diffusion.denoiser import PREDICTIONS
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError, unknown
from plainsd.files.configs import NOTE, NOTED
from plainsd.files.configs_out import write_variant
from plainsd.files.detect import predicting, probe
from plainsd.files.stored import Contents
from plainsd.json_reader import parsed_json
from plainsd.models.variants import Variant

CHOICES = PREDICTIONS  # of --prediction
SCHEDULER = "scheduler/scheduler_config.json"


def check_prediction(prediction: str | None) -> None:
    if prediction not in (None, *CHOICES):
        raise unknown("prediction", prediction, CHOICES, field="prediction")


def on_or_off(text: str | None) -> bool | None:
    """The flag --zero-snr: "on", "off", or None where it was not given."""
    if text not in (None, "on", "off"):
        raise unknown("zero-snr", text, ("on", "off"), field="zero_snr")
    return None if text is None else text == "on"


def told_otherwise(contents: Contents, path: Path, prediction: str | None, zero_snr: bool | None) -> Contents:
    """The contents with the user's prediction type and zero SNR, in their settings too. None: as in the files."""
    check_prediction(prediction)
    variant = with_noise(contents.variant, path, prediction, zero_snr)
    if variant == contents.variant:
        return contents
    return replace(contents, variant=variant, texts=contents.texts | changed_texts(contents.texts, variant))


def with_noise(variant: Variant, path: Path, prediction: str | None, zero_snr: bool | None) -> Variant:
    schedule = variant.schedule
    if isinstance(schedule, EDMSchedule):
        if zero_snr or prediction not in (None, variant.prediction):
            raise UserError(
                f"{path} was trained at all noise levels (EDM), and its own settings say what it predicts; "
                "leave --prediction and --zero-snr out"
            )
        return variant
    if prediction is not None:
        variant = replace(variant, prediction=prediction)
    if zero_snr is None or zero_snr == schedule.zero_terminal_snr:
        return variant
    bent = replace(schedule, zero_terminal_snr=zero_snr)
    return replace(variant, schedule=bent, spacing="trailing" if zero_snr else None)


def changed_texts(texts: dict[str, str], variant: Variant) -> dict[str, str]:
    """The settings of a folder that concern noise, and our entry in them."""
    ours = write_variant(variant)
    wanted = parsed_json(ours[SCHEDULER])
    names = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    config: dict[str, Any] = parsed_json(texts[SCHEDULER]) | {name: wanted[name] for name in names}
    index: dict[str, Any] = parsed_json(texts["model_index.json"])
    if NOTE in index:
        noted = parsed_json(ours["model_index.json"])[NOTE]
        index[NOTE] = index[NOTE] | {name: noted[name] for name in NOTED}
    changed = {SCHEDULER: config, "model_index.json": index}
    return {path: json.dumps(content, indent=2, sort_keys=True) + "\n" for path, content in changed.items()}


def asked(contents: Contents, path: Path, unet: nn.Module | None = None) -> Contents:
    """What a single file's UNet predicts where the file does not say, found by `detect.probe` and reported. `unet`: the
    network, if it is built already; otherwise it is built for this, in bfloat16."""
    if contents.certain:
        return contents
    if unet is None or next(unet.parameters()).dtype == torch.float16:
        unet = contents.networks["unet"].build(torch.device("cpu"), torch.bfloat16)
    found = probe(unet)
    variant = predicting(contents.variant, found or contents.variant.prediction, "ztsnr" in contents.leftovers)
    result = f"a trial says {found}" if found else f"a trial did not tell, so {variant.prediction} is assumed"
    warnings.warn(
        f"{path.name} does not say what its network predicts: {result}; where that is wrong, give --prediction",
        stacklevel=2,
    )
    return replace(contents, variant=variant, texts=write_variant(variant), certain=True)
