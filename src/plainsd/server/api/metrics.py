"""Prometheus metrics of `/metrics`: one registry per server, nothing global."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from plainsd import __version__
from plainsd.server.jobs.job import CANCELLED, DONE, FAILED
from plainsd.server.service import Service


def registry_of(service: Service) -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (ServiceCollector(service), service.queue.measures.waits, service.queue.measures.steps):
        registry.register(collector)
    return registry


class ServiceCollector(Collector):
    """Collects the counters that the parts of the server keep."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        queue, workers, models = self.service.queue, self.service.workers, self.service.models
        counts = queue.counts()
        with queue.changed:
            ended = {state: queue.ended[state] for state in (DONE, FAILED, CANCELLED)}
            seconds, finished = queue.seconds, sum(queue.ended.values())
        sizes = sum((worker.batches for worker in workers), Counter())
        batches = {str(size): count for size, count in sorted(sizes.items())}
        yield GaugeMetricFamily("plainsd_queue_length", "jobs that wait", counts["queued"])
        yield GaugeMetricFamily("plainsd_jobs_running", "jobs that are drawn", counts["running"])
        yield by_label("plainsd_jobs_ended", "jobs by how they ended", "state", ended)
        yield SummaryMetricFamily("plainsd_job_seconds", "from a job's arrival to its end", finished, seconds)
        yield CounterMetricFamily(
            "plainsd_drawing_seconds", "time of the workers in batches", sum(one.seconds for one in workers)
        )
        yield by_label("plainsd_batches", "batches by their number of pictures", "pictures", batches)
        yield CounterMetricFamily("plainsd_pictures", "pictures finished", sum(one.pictures for one in workers))
        failures, losses = sum(one.failures for one in workers), sum(one.losses for one in workers)
        yield CounterMetricFamily("plainsd_failures", "pictures that could not be drawn", failures)
        yield CounterMetricFamily("plainsd_workers_lost", "processes of workers that ended by themselves", losses)
        yield GaugeMetricFamily("plainsd_workers", "workers that are ready", sum(one.drawer.ready for one in workers))
        places = [one.drawer.place for one in workers]  # of processes of their own; else they count nothing
        loads, size = models.loads + sum(one.loads for one in places), models.bytes() + sum(one.bytes for one in places)
        yield CounterMetricFamily("plainsd_model_loads", "times that a model was loaded", loads)
        yield GaugeMetricFamily("plainsd_model_bytes", "memory of the models that are loaded", size)
        version = GaugeMetricFamily("plainsd_info", "this version", labels=["version"])
        version.add_metric([__version__], 1)
        yield version


def by_label(name: str, documentation: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
