"""The flags of `--cluster`, which `serve`, `generate` and `eval` share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from plainsd.arguments import flag
from plainsd.errors import UserError

if TYPE_CHECKING:
    from plainsd.cluster.connect import Share

LEAST_GPU = 0.0001  # Ray counts in such parts


@dataclass(frozen=True)
class ClusterFlags:
    """Drawing by several processes, on this machine or others (pip install 'plainsd[cluster]')."""

    cluster: Annotated[tuple[str, ...] | None, flag("[ADDRESS]")] = None
    """draw in worker processes of a Ray cluster: HOST:PORT of its head, or auto; without ADDRESS, that of
    $RAY_ADDRESS or, if it is not set, this machine"""
    workers: Annotated[int | None, flag("N")] = None
    """number of workers, each with models of its own; needed with --cluster"""
    cpus_per_worker: Annotated[int | None, flag("N")] = None
    """CPU cores and threads of each (default: an equal share; with GPUs 1)"""
    gpus_per_worker: Annotated[float | None, flag("N")] = None
    """GPUs of each; several can share one, as with 0.5 (default: 1 if the cluster has GPUs)"""

    @property
    def address(self) -> str | None:
        """Of the cluster, "" for the default one; None without --cluster."""
        return None if self.cluster is None else "".join(self.cluster)

    def join(self) -> Share:
        """Connects to the cluster; what each worker has of it. UserError."""
        from plainsd.cluster.connect import check_room, connect, share_of

        workers = self.workers or 1
        connect(self.address or "", cpus=max(os.cpu_count() or 1, workers * (self.cpus_per_worker or 1)))
        share = share_of(workers, self.cpus_per_worker, self.gpus_per_worker)
        check_room(share)
        return share

    def check(self) -> None:
        if self.cluster is None:
            for name in ("workers", "cpus_per_worker", "gpus_per_worker"):
                if getattr(self, name) is not None:
                    flag_name = f"--{name.replace('_', '-')}"
                    raise UserError(f"{flag_name} needs --cluster; give both, or leave it out", field=name)
            return
        if len(self.cluster) > 1:
            raise UserError(
                f"--cluster takes one address, not {' '.join(self.cluster)}; put other values before it",
                field="cluster",
            )
        if self.workers is None:
            raise UserError("--cluster needs --workers, how many processes draw; give both", field="workers")
        for name, least in (("workers", 1), ("cpus_per_worker", 1), ("gpus_per_worker", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 10**6:
                raise UserError(
                    f"{name.replace('_', ' ')} {value} is out of range; give {least} or more", field=name, value=value
                )
        gpus = self.gpus_per_worker or 0.0
        if 0 < gpus < LEAST_GPU or gpus > 1 and gpus != int(gpus):
            raise UserError(
                f"gpus per worker {gpus} is out of range; give a whole number, or a fraction below 1 and not below "
                f"{LEAST_GPU}",
                field="gpus_per_worker",
                value=gpus,
            )
