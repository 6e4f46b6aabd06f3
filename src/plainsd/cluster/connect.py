"""Connecting to a Ray cluster, or starting one on this machine alone; what its machines have room for."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from types import ModuleType

from plainsd.errors import UserError

LOCAL = "local"  # Ray's word for a cluster of this process, on this machine
CONNECT_SECONDS = 5.0  # for the look whether anything listens at the address
OBJECTS = 2**29  # bytes of Ray's store for pictures on their way, in a cluster of this process
joined: dict[str, str] = {}  # addresses that this process was given, and those of the clusters' heads


@dataclass(frozen=True)
class Share:
    """What one worker has of a machine."""

    cpus: int
    gpus: float = 0.0

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        return f"{self.cpus} CPU{'s' * (self.cpus > 1)}{gpus}"


def imported_ray() -> ModuleType:
    """UserError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed"
    )  # it would go to stdout; we log it
    try:
        import ray
    except ImportError:
        raise UserError(
            "--cluster needs ray, which is not installed; pip install 'plainsd[cluster]'", field="cluster"
        ) from None
    return ray


def connect(address: str = "", *, cpus: int | None = None) -> str:
    """Connects this process to the cluster at this address, HOST:PORT of its head or `auto`; without one to that of
    $RAY_ADDRESS or, if there is none, to one of this process alone, which ends with it and has `cpus` CPUs. Returns the
    address. UserError where that cannot be done, or this process is in another cluster."""
    asked = address
    address = address or os.environ.get("RAY_ADDRESS", "") or LOCAL
    if address == LOCAL and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:  # which reads these once
        # its ports answer this process and its workers alone
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = imported_ray()
    check_address(address)
    check_head(address)
    if ray.is_initialized():
        head = ray.get_runtime_context().gcs_address
        if asked not in ("", "auto") and joined.get(asked, asked) != head:
            raise UserError(
                f"--cluster {asked}: this process is in the Ray cluster at {head}; give that address, or none",
                field="cluster",
                value=asked,
            )
        return head
    options: dict = {"address": address, "log_to_driver": False, "logging_level": logging.WARNING}
    if address == LOCAL:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECTS}
    try:
        ray.init(**options)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"cannot join the Ray cluster at {address!r} ({first_line(error)}); give --cluster the address of one that "
            "runs, HOST:PORT, and start this on one of its machines (ray start --address=HOST:PORT)",
            field="cluster",
            value=address,
        ) from None
    joined[address] = ray.get_runtime_context().gcs_address
    return address


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160].rstrip(".")


def check_address(address: str) -> None:
    """UserError for one that can be none, or where nothing listens: Ray itself tries for a minute."""
    if address in (LOCAL, "auto"):
        return
    if "://" in address:
        raise UserError(
            f"--cluster {address}: Ray's client protocol cannot be used; give HOST:PORT of the cluster's head, and "
            "start this on one of its machines",
            field="cluster",
            value=address,
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536 or not can_be_host(host):
        raise UserError(
            f"--cluster {address!r} is no address; give HOST:PORT of the head, such as 10.0.0.5:6379, or auto",
            field="cluster",
            value=address,
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--cluster {address}: nothing answers there ({error.strerror or error}); start the cluster's head with "
            f"ray start --head --port={port}, or give another address",
            field="cluster",
            value=address,
        ) from None


def can_be_host(name: str) -> bool:
    """Whether the system can be asked for it: labels between dots have 1 to 63 characters."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def check_head(address: str) -> None:
    """UserError if what listens there is no head of a Ray cluster, or nothing like it: Ray would wait for one."""
    if address in (LOCAL, "auto") or os.environ.get("RAY_USE_TLS") == "1":
        return
    import grpc

    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            raise UserError(
                f"--cluster {address}: what listens there is not the head of a Ray cluster; give the address that "
                "ray start --head prints, usually with port 6379",
                field="cluster",
                value=address,
            ) from None


def own_node_lives() -> bool:
    """Whether this machine is still part of the cluster. If not, Ray waits for ever where a process is started."""
    ray = imported_ray()
    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())


# --- room ------------------------------------------------------------------------------------------------------------


def share_of(workers: int, cpus: int | None, gpus: float | None) -> Share:
    """What each of so many workers has, where nothing is said: one GPU if the cluster has any, and an equal part of
    its CPUs, or with a GPU one CPU."""
    living = machines()
    if gpus is None:
        gpus = 1.0 if any(one.get("GPU") for one in living) else 0.0
    if cpus is None:
        cpus = 1 if gpus else equal_part([one.get("CPU", 0) for one in living], workers)
    return Share(cpus, gpus)


def equal_part(cpus: list[float], workers: int) -> int:
    """The most CPUs that so many workers can have, each on one of the machines with these; at least 1."""
    most = int(max(cpus, default=0))
    return next((part for part in range(most, 1, -1) if sum(int(one // part) for one in cpus) >= workers), 1)


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has, of CPUs and GPUs."""
    return [node["Resources"] for node in imported_ray().nodes() if node["Alive"]]


def check_room(share: Share) -> None:
    """UserError if no machine of the cluster has room for even one worker."""
    living = machines()
    if any(one.get("CPU", 0) >= share.cpus and one.get("GPU", 0) >= share.gpus for one in living):
        return
    largest = Share(
        int(max((one.get("CPU", 0) for one in living), default=0)),
        max((one.get("GPU", 0) for one in living), default=0),
    )
    raise UserError(
        f"a worker needs {share}, and no machine of the cluster has more than {largest}; give less with "
        "--cpus-per-worker and --gpus-per-worker, or add a machine",
        field="cluster",
    )


def free_room() -> str:
    """What of the cluster's CPUs and GPUs nobody has, in words."""
    ray = imported_ray()
    free, whole = ray.available_resources(), ray.cluster_resources()
    return " and ".join(
        f"{free.get(kind, 0):g} of {whole[kind]:g} {kind}s" for kind in ("CPU", "GPU") if whole.get(kind)
    )
