"""`plainsd generate` under torchrun: each process takes its share of the prompts. The pictures are the same
as from one process.

    torchrun --nproc-per-node 4 -m plainsd generate --prompts prompts.txt --out pictures

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. The processes synchronise once, at the start, to agree on the first file
number.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessShare:
    """This process's rank, and the number of processes."""

    rank: int = 0
    size: int = 1
    local: int = 0  # local rank, on this machine

    @property
    def alone(self) -> bool:
        return self.size == 1

    def part(self, count: int) -> range:
        """Indices of this process's prompts out of `count`: contiguous, so that batches stay whole."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def device(self, name: str) -> str:
        """The device `name`; for "auto" and "cuda", the GPU of the local rank. UserError if there are too few GPUs."""
        import torch

        from plainsd.device import own_gpu

        if self.alone or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return str(own_gpu(self.local))

    def agreed(self, number: int) -> int:
        """The first process's number, broadcast to all."""
        if self.alone:
            return number
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        value = torch.tensor([number])
        dist.broadcast(value, 0)
        dist.destroy_process_group()
        return int(value)


def share_of_torchrun() -> ProcessShare:
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return ProcessShare()
    rank, size, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return ProcessShare(rank, size, local)
