"""Rows of the benchmark whose sides are processes: how long one takes to start, to draw one picture, and to load."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from plainsd.checkpoint import load, save
from plainsd.reports.rivals import PROMPT, Timing, Workbench, race


def process(*arguments: str) -> Callable[[], object]:
    """A run of Python with these arguments, to its end; raises CalledProcessError where it fails."""
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_row(place: Workbench, compiled: bool) -> Timing:
    """Start-up of a new process, until it can take work."""

    return race(
        "start of a process",
        {
            "import torch": process("-c", "import torch"),
            "diffusers": process("-c", "from diffusers import StableDiffusionPipeline"),
            "plainsd": process("-c", "import plainsd; plainsd.load"),
            "plainsd --help": process("-m", "plainsd", "--help"),
        },
        place.rounds,
    )


FIRST_PICTURE = """
import sys, torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
folder, prompt, size, steps, guidance, dtype, device, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.unet.to(memory_format=torch.channels_last)
pipe.vae.to(memory_format=torch.channels_last)
generator = torch.Generator().manual_seed(0)
options = {"num_inference_steps": int(steps), "guidance_scale": float(guidance), "generator": generator}
pipe(prompt, height=int(size), width=int(size), **options).images[0].save(out)
"""


def first_row(place: Workbench, compiled: bool) -> Timing:
    """From the shell to a written picture of the embedded model: imports, loading, 20 guided steps, the end."""
    embedded, kept = load(device="cpu"), str(place.dtype).removeprefix("torch.")
    steps, guidance = "20", "2.0"
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "picture.png")
        theirs = [str(embedded.path), PROMPT, str(embedded.variant.size), steps, guidance, kept, str(place.device), out]
        ours = ["-m", "plainsd", "generate", PROMPT, "--seed", "0", "--steps", steps, "--guidance", guidance]
        ours += ["--sampler", "dpmpp_2m", "--dtype", kept, "--device", str(place.device), "--out", out]
        sides = {
            "import torch": process("-c", "import torch"),
            "diffusers": process("-c", FIRST_PICTURE, *theirs),
            "plainsd --plain": process(*ours, "--plain"),
            "plainsd": process(*ours),
        }
        return race("embedded model, from the shell to a file", sides, place.rounds)


LOADING = """
import re, sys, time, torch
from {module} import {name} as kind
def resident(name): return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before, began = resident("VmRSS"), time.perf_counter()
model = {call}
print(time.perf_counter() - began, resident("VmHWM") - before)
"""
LOADERS = {
    "diffusers": LOADING.format(
        module="diffusers",
        name="StableDiffusionPipeline",
        call=(
            "kind.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]), safety_checker=None, "
            "requires_safety_checker=False).to(sys.argv[3])"
        ),
    ),
    "plainsd": LOADING.format(
        module="plainsd.checkpoint", name="load", call=("kind(sys.argv[1], dtype=sys.argv[2], device=sys.argv[3])")
    ),
}


def load_row(place: Workbench, compiled: bool) -> Timing:
    """The model from float32 files, each time in a new process, after the imports; the files are in the page cache."""
    kept, row = str(place.dtype).removeprefix("torch."), Timing("", {side: [] for side in LOADERS})
    row.name = f"loading float32 files as {kept}"
    with tempfile.TemporaryDirectory() as folder:
        save(load(place.folder, device="cpu", dtype="float32"), Path(folder) / "model")
        for number in range(place.rounds + 1):
            for side, code in LOADERS.items():
                command = [sys.executable, "-c", code, str(Path(folder) / "model"), kept, str(place.device)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds, peak = done.stdout.split()[-2:]
                if number:  # the first turn does not count
                    row.seconds[side].append(float(seconds))
                    row.peaks[side] = max(row.peaks.get(side, 0), int(peak))
    return row
