"""Benchmarks: the same work by us and by others, interleaved in one process.

Each row is a piece of work; its sides are functions that do it on the same weights. After a warm-up call, in which
compilers compile, each round runs every side once, so that other load on the machine hits all of them. Reported are
each side's minimum and median, its first call, and diffusers' minimum over ours. OpenVINO is included if installed.

Unless a model is given, weights are random, with the shapes of SD 1.5 or for some rows SDXL, which does not change the
time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from plainsd.checkpoint import load
from plainsd.errors import UserError
from plainsd.files.convert import read
from plainsd.generate import final, text_to_image
from plainsd.models.unet import UNet
from plainsd.pictures.conditioning import encode_prompts
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.sampling import through_vae
from plainsd.reports.apart import WORKS, apart_row
from plainsd.reports.processes import first_row, load_row, start_row
from plainsd.reports.rivals import (
    PROMPT,
    Sides,
    Timing,
    Workbench,
    diffusers_pipeline,
    openvino,
    our_models,
    race,
    random_folder,
    theirs_compiled,
)

CPU_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CXX")  # what limits a processor
LIBRARIES = ("torch", "diffusers", "transformers", "openvino")


def check_model(folder: Path) -> None:
    """UserError for a model that the rows cannot ask: they know the inputs of SD 1.x."""
    variant = read(folder, ask=False).variant
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is a single file; make a folder of it, which both sides open: plainsd convert FILE FOLDER",
            field="model",
        )
    if variant.unet.vector is not None or variant.unet.in_channels != variant.vae.latent_channels:
        raise UserError(
            f"{folder} is of another kind ({variant.name}); give a folder of SD 1.x or 2.x for text to image",
            field="model",
        )


def with_distances(row: Timing, sides: Sides, exact: torch.Tensor) -> Timing:
    """Adds each side's relative distance from the exact result; raises for sides that did different work."""
    with torch.inference_mode():
        row.errors = {side: ((work().float() - exact).norm() / exact.norm()).item() for side, work in sides.items()}
    for side, error in row.errors.items():
        if not error < 0.2:
            raise UserError(f"{row.name}: {side} gives another result (relative error {error:.2g}); nothing to compare")
    return row


# ---- rows


def unet_row(place: Workbench, compiled: bool) -> Timing:
    """One guided step: the UNet on two rows."""
    with torch.inference_mode():
        sd = load(place.folder, device=place.device, dtype="float32")
        x = torch.cat(2 * [noise(sd)]).to(place.device)
        context = encode_prompts(sd, [PROMPT, ""]).context
        exact = sd.unet(x, 500.0, context)
    name = f"UNet, guided step, {sd.variant.size} px"
    x, context = x.to(place.dtype), context.to(place.dtype)
    unet, timestep = diffusers_pipeline(place).unet, torch.tensor(500.0, device=place.device)
    sides: Sides = {"diffusers": lambda: unet(x, timestep, context, return_dict=False)[0]}
    if compiled:
        fused = theirs_compiled(place).unet
        sides["diffusers, compiled"] = lambda: fused(x, timestep, context, return_dict=False)[0]

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = diffusers_pipeline(place).unet

        def forward(self, x, context):
            return self.unet(x, torch.tensor(500.0), context, return_dict=False)[0]

    def step(unet: UNet) -> Callable[[], torch.Tensor]:
        return lambda: unet(x, 500.0, context)

    del sd
    if work := openvino(place, Theirs, x, context):
        sides["OpenVINO"] = work
    for side, sd in our_models(place, compiled).items():
        sides[side] = step(sd.unet)
    return with_distances(race(name, sides, place.rounds), sides, exact)


def decode_row(place: Workbench, compiled: bool) -> Timing:
    with torch.inference_mode():
        sd = load(place.folder, device=place.device, dtype="float32")
        z = noise(sd).to(place.device)
        exact = sd.vae.decode(z)
    name = f"VAE decode, {sd.variant.size} px"
    z = z.to(place.dtype)
    vae = diffusers_pipeline(place).vae
    sides: Sides = {"diffusers": lambda: vae.decode(z, return_dict=False)[0]}

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = diffusers_pipeline(place).vae

        def forward(self, z):
            return self.vae.decode(z, return_dict=False)[0]

    del sd
    if work := openvino(place, Theirs, z):
        sides["OpenVINO"] = work
    for side, sd in our_models(place, False).items():
        sides[side] = partial(through_vae, sd, lambda vae, z: vae.decode(z), z)  # as the pipeline does
    return with_distances(race(name, sides, place.rounds), sides, exact)


def noise(sd: StableDiffusion) -> torch.Tensor:
    """A random latent of the model's default size, (1, L, h, w)."""
    config, generator = sd.vae.config, torch.Generator().manual_seed(0)
    side = sd.variant.size // config.factor
    return torch.randn((1, config.latent_channels, side, side), generator=generator)


def picture_row(place: Workbench, compiled: bool, family: str | None = None, steps: int = 20, count: int = 1) -> Timing:
    """From a prompt to pictures, by DPM++ 2M at guidance 7.5. `family`: random weights, not the place's model."""
    if family and place.room:
        folder = place.room / family
        place = place._replace(folder=folder if folder.exists() else random_folder(folder, place.dtype, family))
    pipes = {"diffusers": diffusers_pipeline(place)} | (
        {"diffusers, compiled": theirs_compiled(place)} if compiled else {}
    )
    models = our_models(place, compiled)
    size = models["plainsd"].variant.size

    def sides(steps: int) -> Sides:
        named = {"num_inference_steps": steps, "guidance_scale": 7.5, "height": size, "width": size}
        options = {"steps": steps, "guidance": 7.5, "sampler": "dpmpp_2m", "count": count}
        return {
            **{side: partial(pipe, PROMPT, num_images_per_prompt=count, **named) for side, pipe in pipes.items()},
            **{side: partial(sampled_images, sd, options) for side, sd in models.items()},
        }

    drawing = "a picture" if count == 1 else f"{count} pictures"
    name = f"{drawing}{f' of {family}' if family else ''}, {size} px, {steps} steps of DPM++ 2M"
    return race(name, sides(steps), max(1, place.rounds // 2), first=sides(2))


def sampled_images(sd: StableDiffusion, options: dict[str, Any]) -> list[Image.Image]:
    return final(text_to_image(sd, PROMPT, **options))


def small_row(place: Workbench, compiled: bool) -> Timing:
    """The embedded model, 20 guided steps: mostly call overhead."""
    embedded = load(device=place.device)
    assert embedded.path is not None  # it was loaded from there
    pipe, size = diffusers_pipeline(place, embedded.path), embedded.variant.size
    options = {"steps": 20, "guidance": 2.0, "sampler": "dpmpp_2m"}
    sides: Sides = {
        "diffusers": lambda: pipe(PROMPT, num_inference_steps=20, guidance_scale=2.0, height=size, width=size)
    }
    place = place._replace(folder=embedded.path)
    for name, sd in our_models(place, compiled).items():
        sides[name] = partial(sampled_images, sd, options)
    return race(f"embedded model, {size} px, 20 steps of DPM++ 2M", sides, 3 * place.rounds)


BENCHMARKS: dict[str, Callable[[Workbench, bool], Timing]] = {
    "small": small_row,
    "unet": unet_row,
    "decode": decode_row,
    "picture": picture_row,
    "load": load_row,
    "start": start_row,
    "first": first_row,
}
ALLOCATOR_BENCHMARKS: dict[str, Callable[[Workbench, bool], Timing]] = {  # for a CPU, by name only
    f"{work}-memory": partial(apart_row, work) for work in WORKS
}
GPU_BENCHMARKS: dict[str, Callable[[Workbench, bool], Timing]] = {  # for a GPU; on a CPU they take hours
    f"{name}-{count}": partial(picture_row, family=family, steps=30, count=count)
    for name, family in {"sd1": "sd1", "sdxl": "sdxl-base"}.items()
    for count in (1, 8)
}


# ---- where it was measured


def machine(place: Workbench) -> dict[str, object]:
    def version(name: str) -> str | None:
        return importlib.metadata.version(name) if importlib.util.find_spec(name) else None

    names = {"cpu": processor, "cuda": lambda: torch.cuda.get_device_name(place.device)}
    return {
        "device": names.get(place.device.type, lambda: f"{place.device.type} of {processor()}")(),
        "threads": torch.get_num_threads(),
        "dtype": str(place.dtype).removeprefix("torch."),
        "rounds": place.rounds,
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        **{name: os.environ[name] for name in CPU_LIMITS if name in os.environ},
    }


def processor() -> str:
    """The processor's name, and the relevant instruction sets it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in text.split("\n\n")[0].replace("\t", "").splitlines() if ":" in line)
    had = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    return f"{facts.get('model name', '').strip()} ({', '.join(had)})"
