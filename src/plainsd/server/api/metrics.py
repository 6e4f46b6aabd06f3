"""`/metrics` in Prometheus' text form (version 0.0.4)."""

from plainsd import __version__
from plainsd.server.jobs.job import CANCELLED, DONE, FAILED
from plainsd.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def text(service: Service) -> str:
    queue, worker, models = service.queue, service.worker, service.models
    counts = queue.counts()
    with queue.changed:
        ended = {f'{{state="{state}"}}': queue.ended[state] for state in (DONE, FAILED, CANCELLED)}
        seconds, finished = queue.seconds, sum(queue.ended.values())
    rows = (
        ("plainsd_queue_length", "gauge", "jobs that wait", {"": counts["queued"]}),
        ("plainsd_jobs_running", "gauge", "jobs that are drawn", {"": counts["running"]}),
        ("plainsd_jobs_ended_total", "counter", "jobs by how they ended", ended),
        ("plainsd_job_seconds", "summary", "from a job's arrival to its end", {"_sum": seconds, "_count": finished}),
        ("plainsd_drawing_seconds_total", "counter", "time of the worker in batches", {"": worker.seconds}),
        ("plainsd_batches_total", "counter", "batches by their number of pictures",
         {f'{{pictures="{size}"}}': count for size, count in sorted(worker.batches.items())}),
        ("plainsd_pictures_total", "counter", "pictures finished", {"": worker.pictures}),
        ("plainsd_failures_total", "counter", "pictures that could not be drawn", {"": worker.failures}),
        ("plainsd_model_loads_total", "counter", "times that a model was loaded", {"": models.loads}),
        ("plainsd_model_bytes", "gauge", "memory of the models that are loaded", {"": models.bytes()}),
        ("plainsd_info", "gauge", "this version", {f'{{version="{__version__}"}}': 1}),
    )  # fmt: skip
    lines = []
    for name, kind, says, values in rows:
        lines += [f"# HELP {name} {says}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"
