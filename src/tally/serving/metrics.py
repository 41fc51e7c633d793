"""Figures of the server of endpoints, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tally.serving.messages import Batch
from tally.serving.recent import Recent

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192, 65536)


class Metrics:
    """All figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on = self.registry
        model = ("model", "version")
        self.requests = Counter(
            "tally_endpoint_requests", "Requests, by status", (*model, "protocol", "status"), registry=on
        )
        self.latency = Histogram(
            "tally_endpoint_seconds", "From a request's arrival to its answer", model, buckets=_SECONDS, registry=on
        )
        self.stages = Histogram(
            "tally_endpoint_stage_seconds",
            "waiting: until the batch was given to the model; scoring: the model",
            (*model, "stage"),
            buckets=_SECONDS,
            registry=on,
        )
        self.batches = Counter(
            "tally_endpoint_batches", "Batches, by why they were closed", (*model, "release"), registry=on
        )
        self.rows = Histogram("tally_endpoint_batch_rows", "Items in a batch", model, buckets=_ROWS, registry=on)
        self.lost = Counter("tally_endpoint_replicas_lost", "Replicas that died or hung", (*model, "how"), registry=on)
        self.replicas = Gauge("tally_endpoint_replicas", "Replicas that answer", model, registry=on)
        self.waiting = Gauge("tally_endpoint_waiting", "Requests that wait for a replica", model, registry=on)
        self.open = Gauge("tally_endpoint_connections", "Connections of clients", registry=on)

    def text(self) -> bytes:
        """All of them in the format of Prometheus."""
        return generate_latest(self.registry)


class PoolMetrics:
    """The figures of one version of one model."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics, self._labels = metrics, (model, version)
        self._latency = metrics.latency.labels(*self._labels)
        self._waiting = metrics.stages.labels(*self._labels, "waiting")
        self._scoring = metrics.stages.labels(*self._labels, "scoring")
        self._rows = metrics.rows.labels(*self._labels)
        self.recent = Recent()
        self._counts: dict[tuple[str, int], Counter] = {}

    def batch(self, batch: Batch) -> None:
        """A batch was scored."""
        self._metrics.batches.labels(*self._labels, batch.release).inc()
        self._rows.observe(batch.rows)
        self.recent.batch(batch.rows)
        self._scoring.observe(batch.seconds)

    def request(self, protocol: str, status: int, seconds: float, waited: float | None) -> None:
        """A request was answered."""
        key = protocol, status
        counter = self._counts.get(key)
        if counter is None:
            counter = self._counts[key] = self._metrics.requests.labels(*self._labels, protocol, str(status))
        counter.inc()
        self._latency.observe(seconds)
        self.recent.request(seconds, status)
        if waited is not None:
            self._waiting.observe(waited)

    def lost(self, how: str) -> None:
        """A replica died or hung."""
        self._metrics.lost.labels(*self._labels, how).inc()

    def now(self, replicas: int, waiting: int) -> None:
        """How many replicas answer, and requests wait."""
        self._metrics.replicas.labels(*self._labels).set(replicas)
        self._metrics.waiting.labels(*self._labels).set(waiting)

    def forget(self) -> None:
        """This version is served no more: its gauges go."""
        for gauge in (self._metrics.replicas, self._metrics.waiting):
            gauge.remove(*self._labels)
