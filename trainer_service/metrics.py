"""Prometheus metrics of the jobs."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tandem.errors import TandemError
from trainer_service.jobs.store import Store


class JobMetrics(Collector):
    """Jobs by state, read from the store whenever somebody asks: never older than the answer."""

    def __init__(self, store: Store) -> None:
        """Be among what /metrics shows, until `close`."""
        self._store = store
        REGISTRY.register(self)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [_family()]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = _family()
        try:
            for state, count in self._store.count().items():
                family.add_metric([state], count)
        except TandemError:  # the store does not answer: then there is no figure, rather than a wrong one
            return
        yield family

    def close(self) -> None:
        REGISTRY.unregister(self)


def _family() -> GaugeMetricFamily:
    return GaugeMetricFamily("tandem_jobs", "Jobs of the trainer service, by state.", labels=["state"])
