"""Checkpoints of a run: one folder each, complete or absent, even if the process is killed.

A checkpoint is written under a temporary name, flushed and renamed atomically; an old one is renamed atomically before
it is deleted. So every folder named `step-...` is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from plainsd.disk import flush, flush_folder, read_json
from plainsd.errors import DiskError, UserError, shortened
from plainsd.files.pickles import check_pickle
from plainsd.train.shard_reader import SafePlanner, SafeReader
from plainsd.train.trainer import Trainer

UNFINISHED, UNWANTED = ".saving-", ".removing-"


class SaveError(OSError):
    """A failed write: disk full, quota exceeded, disk gone."""


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first. Other entries of the folder are ignored."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


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
            own = (f"__{world.rank}_*", *((".metadata",) if world.first else ())) if world.sharded else ("*",)
            write_sums(unfinished, own, f"sums-{world.rank}.json")
            if world.sharded:
                world.wait()
                tables = {unfinished / f"sums-{rank}.json" for rank in range(world.size)}
                if world.any(world.first and not tables <= {*unfinished.iterdir()}):
                    raise UserError(
                        f"{unfinished} has not all processes' parts; give one --out, on a disk that all share"
                    )
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


def write_sums(folder: Path, patterns: Sequence[str], name: str) -> None:
    """The CRC-32 of each file that was just written, beside them."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    sums = {path.name: checksum(path) for path in files}
    with open(folder / name, "w", encoding="utf-8") as file:
        file.write(json.dumps(sums))
    flush(folder / name)


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(2**22):
            total = zlib.crc32(part, total)
    return total


def check_sums(folder: Path) -> None:
    """UserError for a file that is not as it was written. States of older runs have no sums."""
    remedy = f"remove {folder} to go on from the state before"
    for table in sorted(folder.glob("sums-*.json")):
        for name, total in read_json(table, remedy).items():
            path = folder / Path(name).name
            if not path.is_file() or checksum(path) != total:
                raise UserError(f"{path} is damaged: its bytes are not those that were written; {remedy}")


def restore(trainer: Trainer, folder: Path) -> None:
    """Loads the newest checkpoint, if there is one. UserError where it is damaged or another model's."""
    found = checkpoints(folder)
    if not found:
        return
    try:
        check_sums(found[-1])
    except OSError as error:
        raise UserError(f"cannot read {found[-1]} ({error.strerror}); give another --out") from error
    if not any((found[-1] / name).is_file() for name in ("state.pt", ".metadata")):
        raise UserError(f"{found[-1]} holds no state; remove it to go on from the state before")
    if trainer.world.sharded != (not (found[-1] / "state.pt").is_file()):
        how = "without" if trainer.world.sharded else "with"
        raise UserError(f"{found[-1]} was saved {how} --shard; go on as the run began")
    if trainer.world.sharded:
        return load_shards(trainer, found[-1])
    file = found[-1] / "state.pt"
    try:
        check_pickle(file)
    except UserError as error:
        raise UserError(f"{error.what}; remove {found[-1]} to go on from the state before") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        trainer.load_state(state)
    except (UserError, torch.OutOfMemoryError):  # the latter says nothing of the file
        raise
    except Exception as error:  # a damaged file can raise anything, and so can one that holds something else
        what = shortened(f"{type(error).__name__}: {error}", 100)
        raise UserError(f"cannot read {file} ({what}); remove {found[-1]} to go on from the state before") from error


def sweep(folder: Path) -> None:
    """Removes what a killed process left behind."""
    for mark in (UNFINISHED, UNWANTED):
        for rest in folder.glob(f"{mark}*"):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turns errors of the disk into SaveError. What is wrong with a file that is read meanwhile stays what it is."""
    try:
        yield
    except (SaveError, BrokenPipeError):  # the latter comes from the progress bar, not from a file
        raise
    except DiskError as error:
        raise SaveError(f"cannot write {what}: {error.reason}") from error
    except (OSError, RuntimeError) as error:  # torch and others wrap the disk's own error
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
        dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise UserError(
            f"cannot read the state {folder} ({shortened(reason, 100)}); it may be of another model, or damaged: give "
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
