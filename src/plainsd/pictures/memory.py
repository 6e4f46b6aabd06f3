"""Memory: what a picture needs, what is free, and what is done where that is not enough.

    bands      the VAE works through its maps band by band (models/vae_bands.py)  the same picture
    rows       the UNet takes a few rows of its batch at a time, down to one:
               guidance, two rows a picture, then takes two calls                 the same picture
    offload    networks wait on the CPU and come to the device for their turn     the same picture

The first two are chosen by themselves where the free memory asks for it, and said in one line when that happens; a
picture of settings is the same either way. `least` asks for both always.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from plainsd.models.tiny_vae import AnyVAEConfig
from plainsd.models.unet import UNetConfig
from plainsd.pictures.model import Saving, StableDiffusion, Stage

GB = 10**9
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
SHARE = 0.8  # of the free memory that a network may take; the rest is for what others do meanwhile
VAE_MAPS = 6  # maps of the widest full-size layer that a plain decode has in memory at its peak
UNET_MAPS = 36  # likewise of the widest level of the UNet, beside what the way up is handed


NOTHING = Saving(bands=False, rows=2**31)
LEAST = Saving(bands=True, rows=1)


# --- what is free ----------------------------------------------------------------------------------------------------


def free(device: torch.device) -> float:
    """Bytes that can still be had; infinite where that cannot be known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not MEMINFO.exists():
        return math.inf
    entries = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return min(int(entries["MemAvailable"].split()[0]) * 1024, _free_in_group())


def _free_in_group() -> float:
    """What a container may still take, where it is one with a limit (cgroup v2)."""
    limit = CGROUP / "memory.max"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return math.inf
    counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    used = int((CGROUP / "memory.current").read_text()) - int(counts["inactive_file"])  # cached files make way
    return int(most) - used


# --- what is needed --------------------------------------------------------------------------------------------------


def vae_needs(config: AnyVAEConfig, pixels: int, itemsize: int) -> int:
    """Bytes at the peak of a plain pass over so many pixels, beside the weights. bench/memory.py measures it."""
    return VAE_MAPS * pixels * config.widest * itemsize


def unet_needs(config: UNetConfig, positions: int, itemsize: int) -> int:
    """Bytes at the peak of one row of so many latent positions, beside the weights."""
    levels = [positions * width // 4**i for i, width in enumerate(config.channels)]  # numbers in one map
    return (UNET_MAPS * max(levels) + (config.layers + 1) * sum(levels)) * itemsize


# --- what is done about it -------------------------------------------------------------------------------------------


def in_bands(sd: StableDiffusion, pixels: int) -> bool:
    """Whether the VAE works in bands on so many pixels."""
    if sd.saving.bands is not None:
        return sd.saving.bands
    needed, had = vae_needs(sd.vae.config, pixels, next(sd.vae.parameters()).itemsize), free(sd.device)
    if short := needed > SHARE * had:
        say(f"{had / GB:.1f} GB of memory are free and the VAE would take {needed / GB:.1f} GB: it works in bands")
    return short


def rows_at_once(sd: StableDiffusion, positions: int, rows: int) -> int:
    """How many of the rows that a step asks for go through the UNet together."""
    if sd.saving.rows is not None:
        return min(rows, sd.saving.rows)
    each, had = unet_needs(sd.unet.config, positions, sd.dtype.itemsize), free(sd.device)
    most = max(1, int(min(rows, SHARE * had / each)))
    if most < rows:
        say(
            f"{had / GB:.1f} GB of memory are free and {rows} rows at once would take {rows * each / GB:.1f} GB: "
            f"the UNet takes {most} at a time"
        )
    return most


def say(line: str) -> None:
    warnings.warn(line, stacklevel=3)


# --- networks that take turns ----------------------------------------------------------------------------------------


def offload(sd: StableDiffusion, device: torch.device | str) -> StableDiffusion:
    """From now on the networks, the refiner's too, wait on the CPU, and each comes to the device for its turn."""
    models = [sd] if sd.refiner is None else [sd, sd.refiner]
    networks = [network for model in models for network in (*model.text_encoders, model.unet, model.vae)]
    stage = Stage(torch.device(device), networks)
    for model in models:
        model.to("cpu")
        model.stage = stage
    return sd


def on_stage(sd: StableDiffusion, network: nn.Module) -> nn.Module:
    """The network, ready to run on the model's device."""
    if sd.stage is not None:
        sd.stage.call(network)
    return network


def placed(make: Callable[[torch.device], StableDiffusion], device: torch.device, least: bool) -> StableDiffusion:
    """A model on its device; where it does not fit there, or the least memory is asked for, offloaded to the CPU."""
    sd = None
    if device.type == "cpu" or not least:
        try:
            sd = make(device)
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
            say(f"the model does not fit on {device}: its networks wait on the CPU, and come one at a time")
    if sd is None:
        sd = offload(make(torch.device("cpu")), device)
    if least:
        for model in (sd, sd.refiner):
            if model is not None:
                model.saving = LEAST
    return sd
