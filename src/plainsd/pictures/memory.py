"""Memory: what a picture needs, what is free, and what saves memory if that is not enough.

    bands      the VAE runs band by band (models/vae_bands.py)                    the same picture
    rows       the UNet takes a few rows of its batch at a time, down to one:
               guidance, two rows per picture, then takes two calls               the same picture
    offload    networks stay on the CPU and move to the device only to run        the same picture

The first two are chosen automatically when free memory is short, with a line that says so; the same settings give the
same picture either way. `least` always turns both on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from plainsd.allocator import release_freed_memory
from plainsd.models.tiny_vae import AnyVAEConfig
from plainsd.models.unet import UNetConfig
from plainsd.pictures.model import Saving, StableDiffusion, Stage

GB = 10**9
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
MEMORY_SHARE = 0.8  # of the free memory that a network may take; the rest is for other processes
VAE_MAPS = 6  # peak of a plain decode, in feature maps of the widest full-size layer
UNET_MAPS = 36  # likewise of the widest level of the UNet, skip connections apart


NOTHING = Saving(bands=False, rows=2**31)
LEAST = Saving(bands=True, rows=1)


# --- what is free ----------------------------------------------------------------------------------------------------


def free(device: torch.device) -> float:
    """Bytes of free memory; infinite if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not MEMINFO.exists():
        return math.inf
    entries = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return min(int(entries["MemAvailable"].split()[0]) * 1024, _free_in_group())


def _free_for(needed: float, device: torch.device) -> float:
    """Bytes of free memory. Where `needed` of them would be more than MEMORY_SHARE, the process first gives back
    what it has freed and kept."""
    had = free(device)
    if device.type == "cpu" and needed > MEMORY_SHARE * had and release_freed_memory():
        had = free(device)
    return had


def _free_in_group() -> float:
    """Bytes left under the container's memory limit (cgroup v2), if any."""
    limit = CGROUP / "memory.max"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return math.inf
    counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    used = int((CGROUP / "memory.current").read_text()) - int(counts["inactive_file"])  # page cache can be reclaimed
    return int(most) - used


# --- what is needed --------------------------------------------------------------------------------------------------


def vae_needs(config: AnyVAEConfig, pixels: int, itemsize: int) -> int:
    """Peak bytes of a plain pass over so many pixels, without the weights. bench/memory.py measures it."""
    return VAE_MAPS * pixels * config.widest * itemsize


def unet_needs(config: UNetConfig, positions: int, itemsize: int) -> int:
    """Peak bytes of one row of so many latent positions, without the weights."""
    levels = [positions * width // 4**i for i, width in enumerate(config.channels)]  # elements of one feature map
    return (UNET_MAPS * max(levels) + (config.layers + 1) * sum(levels)) * itemsize


# --- what is done about it -------------------------------------------------------------------------------------------


def in_bands(sd: StableDiffusion, pixels: int) -> bool:
    """Whether the VAE works in bands on so many pixels."""
    if sd.saving.bands is not None:
        return sd.saving.bands
    needed = vae_needs(sd.vae.config, pixels, next(sd.vae.parameters()).itemsize)
    had = _free_for(needed, sd.device)
    if short := needed > MEMORY_SHARE * had:
        say(f"{had / GB:.1f} GB of memory are free and the VAE would take {needed / GB:.1f} GB: it works in bands")
    return short


def rows_at_once(sd: StableDiffusion, positions: int, rows: int) -> int:
    """How many rows of a step's batch go through the UNet together."""
    if sd.saving.rows is not None:
        return min(rows, sd.saving.rows)
    each = unet_needs(sd.unet.config, positions, sd.dtype.itemsize)
    had = _free_for(rows * each, sd.device)
    most = max(1, int(min(rows, MEMORY_SHARE * had / each)))
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
    """Keeps the networks, the refiner's too, on the CPU; each moves to the device only to run."""
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
    """A model on its device; offloaded to the CPU if it does not fit, or with `least`."""
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
