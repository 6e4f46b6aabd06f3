"""Checkpoints of a run: one folder each, complete or absent, even if the process is killed.

A checkpoint is written under a temporary name, flushed and renamed atomically; an old one is renamed atomically before
it is deleted. So every folder named `step-...` is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from plainsd.disk import flush, flush_folder
from plainsd.errors import UserError
from plainsd.train.trainer import Trainer

UNFINISHED, UNWANTED = ".saving-", ".removing-"


class SaveError(OSError):
    """A failed write: disk full, quota exceeded, disk gone."""


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder.glob("step-*[0-9]"))


def save_checkpoint(trainer: Trainer, folder: Path) -> Path:
    """Called by every process. The first one writes; with sharded weights all write, and the first one renames."""
    place, world = folder / f"step-{trainer.step:08d}", trainer.world
    unfinished = folder / f"{UNFINISHED}{trainer.step}"
    if (not world.first and not world.sharded) or place.exists():
        return place
    with saving(f"the state of step {trainer.step}"):
        try:
            if world.first:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            if world.sharded:
                world.wait()
                save_shards(trainer, unfinished)
            else:
                save_whole(trainer, unfinished / "state.pt")
            if world.first:
                flush_folder(unfinished)
                os.replace(unfinished, place)
                flush_folder(folder)
        finally:
            if world.first:
                shutil.rmtree(unfinished, ignore_errors=True)
        if world.first:
            for old in checkpoints(folder)[: -trainer.options.keep]:
                os.replace(old, folder / f"{UNWANTED}{old.name}")
                shutil.rmtree(folder / f"{UNWANTED}{old.name}")
        if world.sharded:
            world.wait()
    return place


def save_whole(trainer: Trainer, path: Path) -> None:
    with open(path, "wb") as file:  # torch would wrap an error of the disk in its own
        torch.save(trainer.state(), file)
    flush(path)


def restore(trainer: Trainer, folder: Path) -> None:
    """Loads the newest checkpoint, if there is one."""
    found = checkpoints(folder)
    if not found:
        return
    if trainer.world.sharded != (not (found[-1] / "state.pt").is_file()):
        how = "without" if trainer.world.sharded else "with"
        raise UserError(f"{found[-1]} was saved {how} --shard; go on as the run began")
    if trainer.world.sharded:
        return load_shards(trainer, found[-1])
    file = found[-1] / "state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"cannot read {file} ({str(error).splitlines()[0]}); remove {found[-1]} to go on from the state before"
        ) from error
    trainer.load_state(state)


def sweep(folder: Path) -> None:
    """Removes what a killed process left behind."""
    for mark in (UNFINISHED, UNWANTED):
        for rest in folder.glob(f"{mark}*"):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turns errors of the disk into SaveError."""
    try:
        yield
    except (SaveError, BrokenPipeError):  # the latter comes from the progress bar, not from a file
        raise
    except (OSError, RuntimeError, UserError) as error:  # torch and others wrap the disk's own error
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        raise SaveError(f"cannot write {what}: {cause.strerror or cause}") from error


def save_shards(trainer: Trainer, folder: Path) -> None:
    """Collective: called by all processes."""
    try:
        dcp.save(_state(trainer) | {"skipped": trainer.skipped}, checkpoint_id=folder)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def load_shards(trainer: Trainer, folder: Path) -> None:
    """Into the trainer's own tensors."""
    state = _state(trainer) | {"skipped": 0}
    try:
        dcp.load(state, checkpoint_id=folder)
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise UserError(
            f"cannot read the state {folder} ({reason}); it may be of another model, or damaged: give "
            "another --out, or remove it to go on from the state before"
        ) from error
    set_optimizer_state_dict(trainer.loss, trainer.optimizer, state["optimizer"])
    trainer.step, trainer.skipped = int(folder.name.removeprefix("step-")), state["skipped"]


def _state(trainer: Trainer) -> dict[str, Any]:
    return {
        "parameters": {str(i): p.detach() for i, p in enumerate(trainer.parameters)},
        "ema": {str(i): value for i, value in enumerate(trainer.ema.values if trainer.ema else [])},
        "optimizer": get_optimizer_state_dict(trainer.loss, trainer.optimizer),
    }
