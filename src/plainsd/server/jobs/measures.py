"""Histograms of the queue and its workers, by model and worker, for `/metrics`."""

from prometheus_client import Histogram

LABELS = ("model", "worker")  # the served model's name, the worker thread's
WAIT_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600)  # seconds, bounds of the buckets
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Measures:
    """Of one server: registered nowhere but in its own `/metrics`."""

    def __init__(self) -> None:
        self.waits = Histogram(
            "plainsd_queue_wait_seconds",
            "from a job's arrival to its first batch",
            LABELS,
            buckets=WAIT_BUCKETS,
            registry=None,
        )
        self.steps = Histogram(
            "plainsd_step_seconds",
            "of one step of a batch; the first with its text and images",
            LABELS,
            buckets=STEP_BUCKETS,
            registry=None,
        )
