"""The sides of the benchmark: diffusers, OpenVINO and ours, on the same weights.

Only `plainsd bench` imports this; it needs the packages of plainsd[bench].
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from plainsd.checkpoint import load, save
from plainsd.files.stored import parts
from plainsd.models.variants import VARIANTS
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.speed.model import compiler_options, faster, frozen_weights
from plainsd.text.tokenizer import Tokenizer, find_vocabulary

PROMPT = "a red apple on a blue background"


class Workbench(NamedTuple):
    """The model, device and dtype of a benchmark."""

    folder: Path  # the model, a diffusers folder
    dtype: torch.dtype
    device: torch.device
    rounds: int
    room: Path | None = None  # scratch space for other models


@dataclass
class Timing:
    """One piece of work: each side's seconds per round, and in the first call; the distance of its result from
    float32's; and its peak memory in bytes, imports excluded."""

    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)  # page faults of the last round, where they were counted


Sides = dict[str, Callable[[], Any]]  # name: what does the work


def race(name: str, sides: Sides, rounds: int, first: Sides | None = None) -> Timing:
    """Times `sides` in turns. `first`: cheaper warm-up calls, if they need not be the whole work."""
    row = Timing(name, {side: [] for side in sides})
    with torch.inference_mode():
        for side, work in (first or sides).items():
            row.first[side] = timed(work)
        for _ in range(rounds):
            for side, work in sides.items():
                row.seconds[side].append(timed(work))
    return row


def timed(work: Callable[[], object]) -> float:
    """Seconds until the work is done, with GPUs synchronized."""
    began = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def import_diffusers() -> None:
    """And what its pipelines import."""
    import diffusers.pipelines.stable_diffusion  # noqa: F401
    import transformers  # noqa: F401


def random_folder(folder: Path, dtype: torch.dtype, family: str = "sd1") -> Path:
    """A model of the family's shape with random weights, as a diffusers folder."""
    torch.manual_seed(0)
    variant, before = VARIANTS[family], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        networks = {name: kind(config) for name, (kind, config) in parts(variant).items()}
    finally:
        torch.set_default_dtype(before)
    tokenizers = [Tokenizer.from_vocabulary(find_vocabulary()) for _ in variant.text]
    sd = assemble(variant, networks, tokenizers)
    with torch.no_grad():
        save(sd, folder)
    return folder


def diffusers_pipeline(place: Workbench, folder: Path | None = None):
    """diffusers' pipeline on the same files."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    folder = folder or place.folder
    checks = "safety_checker" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    without = {"safety_checker": None, "requires_safety_checker": False} if checks else {}
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=place.dtype, **without).to(place.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def theirs_compiled(place: Workbench):
    """diffusers' pipeline with its UNet compiled, as ours is by speed.compile_unet."""
    pipe = diffusers_pipeline(place)
    options = compiler_options(place.device)
    compiled = torch.compile(pipe.unet.forward, dynamic=False, fullgraph=True, options=options)

    def forward(*args: Any, **named: Any) -> Any:
        with frozen_weights(place.device):
            return compiled(*args, **named)

    pipe.unet.forward = forward
    return pipe


def ours(place: Workbench, *, fast: bool, compiled: bool = False) -> StableDiffusion:
    sd = load(place.folder, device=place.device, dtype=place.dtype)
    return faster(sd, compiled=compiled) if fast else sd


def our_models(place: Workbench, compiled: bool) -> dict[str, StableDiffusion]:
    models = {"plainsd --plain": ours(place, fast=False), "plainsd": ours(place, fast=True)}
    return models | ({"plainsd --compile": ours(place, fast=True, compiled=True)} if compiled else {})


def openvino(place: Workbench, make: Callable[[], torch.nn.Module], *inputs: torch.Tensor) -> Callable | None:
    """diffusers' network run by OpenVINO in the same precision; None if it is not installed, or for a GPU."""
    if place.device.type != "cpu" or importlib.util.find_spec("openvino") is None:
        return None
    import openvino as ov

    clones = [part.float().clone() for part in inputs]  # inference tensors cannot be traced
    model = ov.convert_model(make().float(), example_input=tuple(clones))  # from float32, as their users export it
    wanted = "bf16" if place.dtype == torch.bfloat16 else "f32"
    compiled = ov.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": wanted,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    arrays = [part.numpy() for part in clones]
    return lambda: torch.from_numpy(compiled(arrays)[0])
