"""One command on several processes and devices: each draws its share of the prompts; pictures are the same as with one.

    torchrun --nproc-per-node 4 -m plainsd generate --prompts prompts.txt --out pictures

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. The processes synchronise once, at the start, to agree on the first file
number.
"""

import os
from dataclasses import dataclass

from plainsd.errors import UserError


@dataclass(frozen=True)
class ProcessShare:
    """This process's rank, and the number of processes."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among those of this machine

    @property
    def alone(self) -> bool:
        return self.size == 1

    def part(self, count: int) -> range:
        """The range of prompts of this process: contiguous, so that batches stay whole."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def device(self, name: str) -> str:
        """This process's GPU, for "auto" and "cuda"."""
        import torch

        if self.alone or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local >= torch.cuda.device_count():
            raise UserError(
                f"{torch.cuda.device_count()} GPUs cannot serve process {self.local + 1} of this machine; "
                "start torchrun with as many processes as there are GPUs"
            )
        return f"cuda:{self.local}"

    def agreed(self, number: int) -> int:
        """The first process's number, broadcast to all."""
        if self.alone:
            return number
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        told = torch.tensor([number])
        dist.broadcast(told, 0)
        dist.destroy_process_group()
        return int(told)


def share_of_torchrun() -> ProcessShare:
    if "RANK" not in os.environ:
        return ProcessShare()
    return ProcessShare(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
