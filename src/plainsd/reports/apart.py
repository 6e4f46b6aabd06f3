"""The same work with glibc's allocator as it is and with freed memory kept (plainsd.allocator), on both sides.

How malloc behaves is one setting for a process, so each side here is a process of its own, which waits for its turns.
Reported are seconds, peak memory beyond what imports take, and page faults of the last turn.

    diffusers                    the default
    diffusers, memory kept       with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2^62 MALLOC_ARENA_MAX=1, as users set it
    plainsd, memory not kept     PLAINSD_KEEP_MEMORY=0
    plainsd                      as `plainsd generate` runs
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from plainsd.allocator import VARIABLE, keep_freed_memory
from plainsd.errors import UserError

if TYPE_CHECKING:
    from plainsd.reports.rivals import Timing, Workbench

VARIABLES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_ARENA_MAX": "1"}
SIDES: dict[str, dict[str, str]] = {
    "diffusers": {},
    "diffusers, memory kept": VARIABLES,
    "plainsd, memory not kept": {VARIABLE: "0"},
    "plainsd": {},
}
WORKS = {"decode": "VAE decode", "small": "embedded model, 20 steps of DPM++ 2M", "train": "training step of its UNet"}


class SideProcess:
    """A process that does one work each time it is asked."""

    def __init__(self, name: str, work: str, place: Workbench):
        command = [sys.executable, "-m", "plainsd.reports.apart", name.split(",")[0], work]
        told = [str(place.folder), str(place.dtype).removeprefix("torch.")]
        outside = {key: value for key, value in os.environ.items() if key != VARIABLE and not key.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [*command, *told],
            env=outside | SIDES[name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.name, self.faults = name, 0

    def turn(self) -> tuple[float, int]:
        """Seconds, and peak memory so far in bytes."""
        pipe = self.process
        assert pipe.stdin is not None and pipe.stdout is not None and pipe.stderr is not None  # opened above
        try:
            pipe.stdin.write("\n")
            pipe.stdin.flush()
            answer = pipe.stdout.readline().split()
        except BrokenPipeError:
            answer = []
        if len(answer) != 3:
            last = pipe.stderr.read().strip().splitlines()[-1:]
            raise UserError(f"{self.name}: the process ended ({' '.join(last)}); nothing to compare")
        self.faults = int(answer[1])
        return float(answer[0]), int(answer[2])

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def apart_row(work: str, place: Workbench, compiled: bool) -> Timing:
    """A row of the benchmark, on a CPU. Training has no side of diffusers' here; see bench/train_speed.py."""
    from plainsd.reports.rivals import Timing

    if place.device.type != "cpu":
        raise UserError(f"{work}-memory is about a CPU's memory; give --device cpu", field="device")
    names = [name for name in SIDES if work != "train" or name.startswith("plainsd")]
    row = Timing(f"{WORKS[work]}, each side its own process", {name: [] for name in names})
    with ExitStack() as stack:
        sides = [SideProcess(name, work, place) for name in names]
        for side in sides:
            stack.callback(side.end)
        for number in range(place.rounds + 1):
            for side in sides:
                seconds, row.peaks[side.name] = side.turn()
                if number:
                    row.seconds[side.name].append(seconds)
                else:
                    row.first[side.name] = seconds
        row.faults = {side.name: side.faults for side in sides}
    return row


# ---- in the process


def take_turns(side: str, work: str, folder: str, dtype: str) -> None:
    if side == "plainsd":
        keep_freed_memory()
    import resource  # not on Windows

    import torch

    from plainsd import checkpoint, generate  # noqa: F401
    from plainsd.reports import rivals
    from plainsd.speed import model, training  # noqa: F401

    if side != "plainsd":
        rivals.import_diffusers()
    before = status_bytes("VmRSS")
    ready = READY[work](side, Path(folder), getattr(torch, dtype))
    with torch.inference_mode(work != "train"):
        for _ in sys.stdin:
            began, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            ready()
            seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            print(seconds, after.ru_minflt - faults, status_bytes("VmHWM") - before, flush=True)


def status_bytes(name: str) -> int:
    """Of /proc/self/status. Not getrusage's maximum, which begins with that of the parent process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def decode_work(side: str, folder: Path, dtype) -> Callable[[], object]:
    import torch

    from plainsd.checkpoint import load
    from plainsd.files.convert import read
    from plainsd.reports.rivals import Workbench, diffusers_pipeline
    from plainsd.speed.model import faster

    variant = read(folder, ask=False).variant  # no weights
    pixels = variant.size // variant.vae.factor
    z = torch.randn(1, variant.vae.latent_channels, pixels, pixels).to(dtype)
    if side == "plainsd":
        vae = faster(load(folder, device="cpu", dtype=dtype)).vae
        return lambda: vae.decode(z)
    theirs = diffusers_pipeline(Workbench(folder, dtype, torch.device("cpu"), 1)).vae
    return lambda: theirs.decode(z, return_dict=False)[0]


def small_work(side: str, folder: Path, dtype) -> Callable[[], object]:
    import torch

    from plainsd.checkpoint import load
    from plainsd.files.convert import read
    from plainsd.files.hub import find
    from plainsd.generate import final, text_to_image
    from plainsd.reports.rivals import Workbench, diffusers_pipeline
    from plainsd.speed.model import faster

    prompt = "a red apple on a blue background"
    if side == "plainsd":
        sd = faster(load(device="cpu", dtype=dtype))
        return lambda: final(text_to_image(sd, prompt, steps=20, guidance=2.0, sampler="dpmpp_2m"))
    embedded = find(None)
    pipe, size = diffusers_pipeline(Workbench(embedded, dtype, torch.device("cpu"), 1)), read(embedded).variant.size
    return lambda: pipe(prompt, num_inference_steps=20, guidance_scale=2.0, height=size, width=size)


def train_work(side: str, folder: Path, dtype) -> Callable[[], object]:
    """A step of the embedded model's UNet on 64 latents, as recipes/emoji trains it."""
    import torch

    from plainsd.checkpoint import load
    from plainsd.speed.training import autocast, trained_faster

    unet = load(device="cpu", dtype="float32").unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    x, context = torch.randn(64, unet.config.in_channels, 8, 8), torch.randn(64, 77, unet.config.context)
    timestep = torch.arange(64) * 15.0

    def step() -> None:
        with trained_faster(unet), autocast("cpu", dtype == torch.bfloat16):
            loss = (unet(x, timestep, context).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


READY = {"decode": decode_work, "small": small_work, "train": train_work}

if __name__ == "__main__":
    take_turns(*sys.argv[1:])
