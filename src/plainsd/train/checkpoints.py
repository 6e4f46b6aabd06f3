"""The state of a run on the disk: one folder a state, whole or absent, whenever the process dies.

A state is written under another name, flushed, and gets its own name in one step; an old one loses its name in one step
before its files go. So whatever is called `step-...` is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plainsd.errors import UserError

if TYPE_CHECKING:
    from plainsd.train.loop import Trainer

UNFINISHED, UNWANTED = ".saving-", ".removing-"


class SaveError(OSError):
    """Something could not be written: a full disk, a quota, a disk gone."""


def checkpoints(folder: Path) -> list[Path]:
    """All states, oldest first."""
    return sorted(folder.glob("step-*[0-9]"))


def save_checkpoint(trainer: Trainer, folder: Path) -> Path:
    place = folder / f"step-{trainer.step:08d}"
    if place.exists():
        return place
    unfinished = folder / f"{UNFINISHED}{os.getpid()}"
    with saving(f"the state of step {trainer.step}"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            with open(unfinished / "state.pt", "wb") as file:
                torch.save(trainer.state(), file)
                file.flush()
                os.fsync(file.fileno())
            flush_folder(unfinished)
            os.replace(unfinished, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        flush_folder(folder)
        for old in checkpoints(folder)[: -trainer.options.keep]:
            os.replace(old, folder / f"{UNWANTED}{old.name}")
            shutil.rmtree(folder / f"{UNWANTED}{old.name}")
    return place


def restore(trainer: Trainer, folder: Path) -> None:
    """The newest state, if there is one."""
    if latest := checkpoints(folder):
        file = latest[-1] / "state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(f"cannot read {file} ({str(error).splitlines()[0]}); remove {latest[-1]} to go on from the "
                            "state before") from error
        trainer.restore(state)


def sweep(folder: Path) -> None:
    """Removes what a killed process left half done."""
    for mark in (UNFINISHED, UNWANTED):
        for rest in folder.glob(f"{mark}*"):
            shutil.rmtree(rest, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder safe against a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Inside, whatever the disk refuses becomes a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, RuntimeError, UserError) as error:      # torch and others wrap the disk's own error
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        raise SaveError(f"cannot write {what}: {cause.strerror or cause}") from error
