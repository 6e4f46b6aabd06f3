"""Data-parallel training with torchrun: each process takes its share of every step's pictures.

Pictures and random numbers of a step are those of a run on one process; so is the result, up to the order of summation.
Only the first process writes.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plainsd.device import own_gpu
from plainsd.errors import UserError

PATIENCE = timedelta(hours=6)  # for the first process, while it encodes, validates, draws or saves


class World(NamedTuple):
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # of the all-reduces
    sharded: bool = False  # each process holds a part of the weights: see shard.py

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def check(self, batch: int, accumulate: int) -> None:
        if accumulate % self.size and batch % self.size:
            raise UserError(
                f"{self.size} processes cannot share {accumulate} micro-batches of {batch}; make "
                f"--accumulate or --batch a multiple of {self.size}"
            )

    def share(self, parts: list[list]) -> list[list]:
        """This process's micro-batches: every size-th one, or a slice of each."""
        if len(parts) % self.size == 0:
            return parts[self.rank :: self.size]
        return [part[self.rank * len(part) // self.size : (self.rank + 1) * len(part) // self.size] for part in parts]

    def total(self, numbers: list[float]) -> list[float]:
        """Sums over all processes (all-reduce)."""
        if self.size == 1:
            return numbers
        together = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return together.tolist()

    def any(self, flag: bool) -> bool:
        return self.total([float(flag)])[0] > 0

    def replicated(self, module: nn.Module) -> nn.Module:
        """The module in DDP, which averages gradients over all processes."""
        if self.size == 1 or self.sharded:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def silent(self, module: nn.Module, last: bool):
        """Without communication, for all but the last micro-batch of a step."""
        return nullcontext() if self.size == 1 or self.sharded or last else module.no_sync()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Runs the body on the first process, then on the others, who find its files."""
        if self.size > 1 and not self.first:
            dist.barrier()
        yield
        if self.size > 1 and self.first:
            dist.barrier()


@contextmanager
def world_of_torchrun(device: torch.device, shard: bool = False) -> Iterator[World]:
    """The processes that torchrun started, or this one alone. Each has its own GPU, if there are any."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if shard:
            raise UserError(
                "--shard spreads a model over several processes; start them with torchrun --nproc-per-node N"
            )
        yield World(device=device)
        return
    if device.type == "cuda":
        device = own_gpu(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, shard)
    finally:
        dist.destroy_process_group()
        time.sleep(0.1)  # DDP keeps gloo's threads alive: time for them to let go of the last tensors, for
        # which they need Python, and would end the process if it were leaving already
