"""What a GPU does, in one run with a time limit: parity, speed beside diffusers, training beside diffusers and peft.

    python bench/gpu.py --out bench/results                        nine minutes on a GPU, about 40 GB of its memory
    python bench/gpu.py --device cpu --tiny --out /tmp/rehearsal   the same path with tiny networks, on any machine

Parts, in this order, each in a process of its own:

    parity     the networks of SD 1.5 and SDXL, random weights, float32 without TF32: relative distance from diffusers'
    waiting    no step of a sampler may wait for the GPU (torch.cuda.set_sync_debug_mode); CUDA only
    sd1-1 ...  30 steps of 1 and of 8 pictures: diffusers, plainsd; the rows of `plainsd bench`
    train      a LoRA step and a step of all weights, see train_memory.py: seconds and peak memory
    compiled   the rows again with torch.compile on both sides, which takes a minute a side to compile

OUT/DEVICE.json is written anew after each part. A part that the limit cuts off is listed there as left out, as is one
that fails, with the last line of its error.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_memory

from plainsd.checkpoint import load
from plainsd.commands.bench import timing_table
from plainsd.device import choose_device, choose_dtype
from plainsd.disk import written_whole
from plainsd.models.variants import VARIANTS, Variant
from plainsd.reports import bench, rivals

FAMILIES = {"sd1": "sd1", "sdxl": "sdxl-base"}
TRAINING = ("ours", "diffusers + peft, half base", "ours, half base", "ours, all weights", "diffusers, all weights")
STEPS = 30


# ---- the parts: each gives what JSON can hold


def parity(place: rivals.Workbench) -> dict[str, dict[str, float]]:
    """Relative distance of each network's output from diffusers' and transformers', by family."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return {name: family_parity(place, family) for name, family in FAMILIES.items()}


@torch.inference_mode()
def family_parity(place: rivals.Workbench, family: str) -> dict[str, float]:
    place = place._replace(folder=model_folder(place, family), dtype=torch.float32)
    sd, pipe = load(place.folder, device=place.device, dtype="float32"), rivals.diffusers_pipeline(place)
    ids = torch.randint(0, 1000, (2, 77), generator=torch.Generator().manual_seed(0)).to(place.device)
    ids[:, -1] = sd.variant.text[0].eos
    found = {}
    for number, encoder in enumerate(sd.text_encoders):
        theirs = getattr(pipe, "text_encoder" if number == 0 else f"text_encoder_{number + 1}")
        found[f"text encoder {number + 1}"] = distance(encoder(ids).hidden[-1], theirs(ids, output_hidden_states=True))
    z, unet = bench.noise(sd).to(place.device), sd.variant.unet
    x, context = torch.cat([z, z]), torch.randn(2, 77, unet.context).to(place.device)
    vector = torch.randn(2, unet.vector).to(place.device) if unet.vector else None
    more = {}
    if unet.vector:  # theirs is made of two parts
        ids, pooled = torch.full((2, 6), 512.0, device=place.device), vector[:, : unet.vector - 6 * 256]
        vector = torch.cat([pooled, time_ids_embedding(ids)], dim=1)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    t = torch.tensor(500.0, device=place.device)
    found["UNet"] = distance(sd.unet(x, 500.0, context, vector), pipe.unet(x, t, context, return_dict=False, **more)[0])
    found["decoder"] = distance(sd.vae.decode(z), pipe.vae.decode(z, return_dict=False)[0])
    pixels = torch.rand(1, 3, sd.variant.size, sd.variant.size).to(place.device) * 2 - 1
    found["encoder"] = distance(sd.vae.encode(pixels).mean, pipe.vae.encode(pixels).latent_dist.mean)
    return found


def time_ids_embedding(ids: torch.Tensor) -> torch.Tensor:
    """(B, 6) -> (B, 6 * 256), as diffusers embeds them."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(ids.flatten(), 256, True, 0).unflatten(0, ids.shape).flatten(1)


def distance(ours: torch.Tensor, theirs: Any) -> float:
    theirs = getattr(theirs, "hidden_states", (theirs,))[-1]
    return ((ours - theirs).norm() / theirs.norm()).item()


def waiting(place: rivals.Workbench) -> str:
    """Raises where a step waits for the GPU."""
    from plainsd.generate import text_to_image

    sd = load(model_folder(place, "sd1"), device=place.device, dtype=place.dtype)
    for sampler in ("dpmpp_2m", "euler_a", "dpmpp_sde", "unipc"):
        events = text_to_image(sd, bench.PROMPT, steps=6, sampler=sampler)
        next(events)
        with no_waiting(place.device):
            for _ in range(events.steps - 1):
                next(events)
        events.close()
    return "no step waits" if place.device.type == "cuda" else "not on CUDA: only run, not watched"


class no_waiting:
    """In this context CUDA raises where the CPU waits for the GPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")


def row(place: rivals.Workbench, name: str, compiled: bool) -> dict[str, Any]:
    family, count = name.split("-")
    model_folder(place, FAMILIES[family])
    timing = bench.picture_row(place, compiled, FAMILIES[family], STEPS, int(count))
    if place.device.type == "cuda":
        timing.peaks["all sides"] = torch.cuda.max_memory_allocated()
    return asdict(timing)


def train(place: rivals.Workbench) -> dict[str, dict[str, float]]:
    """Each in a process of its own, so that peaks do not mix."""
    folder = place.room / "training"
    if not folder.exists():
        folder.mkdir()
        (folder / "model").symlink_to(model_folder(place, "sd1"))
        train_memory.make_pictures(folder, load(folder / "model", device="cpu").variant.size)
    found = {}
    for case in TRAINING:
        peak, seconds = train_memory.in_a_child(case, str(folder), place.device.type)
        found[case] = {"peak_bytes": int(peak), "seconds": float(seconds)}
    return found


PARTS: dict[str, Callable[[rivals.Workbench], Any]] = {
    "parity": parity,
    "waiting": waiting,
    **{name: partial(row, name=name, compiled=False) for name in ("sd1-1", "sd1-8", "sdxl-1", "sdxl-8")},
    "train": train,
    **{f"{name} compiled": partial(row, name=name, compiled=True) for name in ("sd1-1", "sdxl-1", "sd1-8", "sdxl-8")},
}


# ---- the models


def model_folder(place: rivals.Workbench, family: str) -> Path:
    """The random model of a family, made once for all parts."""
    folder = place.room / family
    if not folder.exists():
        draft = folder.with_name(f"{family}.draft")
        rivals.random_folder(draft, place.dtype, family)
        draft.rename(folder)
    return folder


def tiny(variant: Variant) -> Variant:
    """Networks of the same build, a few hundred thousand weights, 64 px."""
    levels = len(variant.unet.channels)
    text = tuple(
        replace(one, width=64, layers=2, heads=2, mlp=128, projection=one.projection and 64) for one in variant.text
    )
    unet = replace(
        variant.unet,
        channels=(32, 64, 64, 64)[:levels],
        heads=(1, 2, 2, 2)[:levels],
        depth=tuple(min(1, depth) for depth in variant.unet.depth),
        mid_depth=1,
        context=64 * len(text),
        vector=variant.unet.vector and 64 + 6 * 256,
    )
    return replace(variant, unet=unet, text=text, vae=replace(variant.vae, channels=(32, 32, 32, 32)), size=64)


def workbench(options: argparse.Namespace) -> rivals.Workbench:
    global STEPS
    device = choose_device(options.device)
    if options.tiny:
        VARIANTS.update({family: tiny(VARIANTS[family]) for family in FAMILIES.values()})
        STEPS = 2
    dtype = choose_dtype(options.dtype, device)
    return rivals.Workbench(options.room / "sd1", dtype, device, options.rounds, options.room)


# ---- the whole


def in_a_child(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What the part found, or why nothing."""
    answer = options.room / "answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", part, "--room", str(options.room), "--device", options.device]
    command += ["--dtype", options.dtype, "--rounds", str(options.rounds), *(["--tiny"] if options.tiny else [])]
    try:
        done = subprocess.run(command, timeout=seconds, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return {"left out": f"cut off after {seconds:.0f} s"}
    if done.returncode or not answer.is_file():
        print(done.stderr[-2000:], file=sys.stderr)
        return {"left out": (done.stderr.strip().splitlines() or ["no error was printed"])[-1][:300]}
    return {"found": json.loads(answer.read_text())}


def write(out: Path, results: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", str(results["machine"]["device"]).lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / f"{name}.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return out / f"{name}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all if none is named: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=540, help="the time limit of the whole")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and two steps, to rehearse")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--room", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        answer = PARTS[options.part](workbench(options))
        (options.room / "answer.json").write_text(json.dumps(answer))
        return 0
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    began, environment = time.monotonic(), {"HF_HUB_OFFLINE": "1"}
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as room:
        options.room = Path(room)
        place = workbench(options)
        results: dict[str, Any] = {"machine": bench.machine(place), "tiny": options.tiny, "parts": {}}
        for part in options.parts or PARTS:
            left = options.seconds - (time.monotonic() - began)
            print(f"{part}: {left:.0f} s left", file=sys.stderr, flush=True)
            results["parts"][part] = in_a_child(part, options, left) if left > 1 else {"left out": "no time was left"}
            path = write(options.out, results)
    show(results)
    print(f"written to {path}")
    return int(any("left out" in result for result in results["parts"].values()))


def show(results: dict[str, Any]) -> None:
    rows = []
    for part, result in results["parts"].items():
        if "left out" in result:
            print(f"{part}: left out: {result['left out']}")
        elif "-" in part:
            rows.append(rivals.Timing(**result["found"]))
        else:
            print(f"{part}: {json.dumps(result['found'], indent=1)}")
    print(timing_table(rows, results["machine"]))


if __name__ == "__main__":
    sys.exit(main())
