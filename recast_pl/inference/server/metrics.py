"""The server's metrics, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LOSSES = ("time", "stuck", "crash")
"""Why a process that decodes images may be lost."""

_BATCHES = tuple(2**power for power in range(9))  # images


class Metrics:
    """The metrics of one server; other servers in the same process have their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter("recast_pl_requests", "Requests answered.", labels, registry=self._registry)
        self.seconds = Histogram(
            "recast_pl_request_seconds", "Time until a request is answered.", ("path",), registry=self._registry
        )
        self.batches = Histogram(
            "recast_pl_batch_images", "Images classified together.", buckets=_BATCHES, registry=self._registry
        )
        self.routed = Counter(
            "recast_pl_routed_images", "Images whose task was to be found.", ("outcome",), registry=self._registry
        )
        self.waiting = Gauge("recast_pl_waiting_images", "Images that wait for a label.", registry=self._registry)
        self.lost = Counter(
            "recast_pl_lost_decoders",
            "Decoding processes that an image ended: too much processor time, too long otherwise, or a crash.",
            ("reason",),
            registry=self._registry,
        )
        for reason in LOSSES:
            self.lost.labels(reason)  # so that they are there from the start
        self.decoding = Gauge(
            "recast_pl_decoding_seconds", "Time for which the slowest image is being decoded.", registry=self._registry
        )
        self.tasks = Gauge("recast_pl_tasks", "Tasks that are served.", registry=self._registry)

    def add(self, collector: Collector) -> None:
        """Adds metrics that are made when they are read."""
        self._registry.register(collector)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
