"""A folder belongs to one run, and to one process at a time.

    RUN/options.json       the options of the run; it resumes only with the same ones
    RUN/run.toml           the same, as a config file that starts it again
    RUN/.lock              held while a process trains; the system releases it when the process ends, however it ends

A refused start writes none of these.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.disk import read_json, written_whole
from plainsd.errors import UserError
from plainsd.pictures.model import StableDiffusion
from plainsd.train.checkpoints import saving
from plainsd.train.checks import each_option
from plainsd.train.data.sources import real_source
from plainsd.train.processes import World

OPTIONS_FILE, CONFIG_FILE, LOCK_FILE = "options.json", "run.toml", ".lock"
PATHS = ("data", "heldout", "prior", "base", "control", "vae", "model", "tokenizer", "carry")  # or names on the hub
DAMAGED = "put it back from a copy, or give another --out"


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Holds the folder's lock."""
    lock, taken = FileLock(folder / LOCK_FILE), False
    made = [place for place in (folder, *folder.parents) if not place.exists()] if world.first else []
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken = True
    if world.any(taken):
        ended = "wait until it has ended, or give another --out"
        if getattr(lock, "pid", None) is not None:  # a disk without flock, where the file outlives its process
            ended += f", or, where it has ended, remove {folder / LOCK_FILE}"
        raise UserError(f"another training is at work in {folder}; {ended}")
    try:
        yield
    finally:
        if world.first:
            if not (folder / OPTIONS_FILE).exists():
                (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):  # what is not empty stays
                for place in made:
                    place.rmdir()


def claim(folder: Path, identity: Mapping[str, Any], config: str) -> None:
    """Writes the options of the run."""
    with saving("the options"):
        for name, text in ((OPTIONS_FILE, json.dumps(identity, indent=1)), (CONFIG_FILE, config)):
            with written_whole(folder / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")


def longer(old: object, now: str) -> bool:
    """Of two numbers of steps or epochs as text, None among them."""
    return isinstance(old, str) and old.isdecimal() and now.isdecimal() and int(now) > int(old[:20])


def recorded_seed(file: Path) -> int:
    """Of the run with these options."""
    seed = read_json(file, DAMAGED).get("seed", "0")
    if not (isinstance(seed, str) and re.fullmatch(r"\d{1,20}", seed)):
        raise UserError(f"{file} is damaged: it has the seed {seed!r}; {DAMAGED}")
    return int(seed)


def flat(options) -> dict[str, str]:
    """Every option by its own name, as text."""
    return {
        entry.name: " ".join(value) if entry.name == "data" else str(value) for entry, value in each_option(options)
    }


def real_places(options) -> dict[str, list[str]]:
    """Where the options lead that are paths, however they are written: `pics`, `./pics/`, `/work/pics`."""
    given = {entry.name: value for entry, value in each_option(options) if entry.name in PATHS and value}
    each = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    return {name: [real_source(str(value)) for value in values] for name, values in each.items()}


def weights_digest(*networks: nn.Module) -> str:
    """Sixteen hexadecimal digits that other weights do not have: of up to 16 numbers of each tensor."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            some = tensor.flatten()[:: max(1, tensor.numel() // 16)][:16]
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def model_identity(sd: StableDiffusion, size: int | None) -> dict[str, str]:
    """What a model's settings say of its training, beside its weights. `size`: of the pictures, if not the model's."""
    schedule = sd.schedule
    table = schedule.alphas_cumprod.tolist() if isinstance(schedule, NoiseSchedule) else [repr(schedule)]
    told = " ".join(f"{entry:.6g}" if isinstance(entry, float) else entry for entry in table)  # on any processor
    return {
        "model_prediction": sd.prediction,
        "model_schedule": hashlib.sha256(told.encode()).hexdigest()[:16],
        "model_size": str(size or sd.variant.size),
    }
