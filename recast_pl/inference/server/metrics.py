"""The server's metrics, in the text format of Prometheus."""

import time
from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


class RequestMetrics:
    """ASGI middleware that counts and times requests.

    Args:
        app: The application.
        metrics: The metrics to update.
        paths: Paths that are counted one by one; all others are counted together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and records its status and time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def send_observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        finally:
            path = scope["path"].removeprefix(
                scope.get("root_path", "")
            )  # of an application that is mounted in another
            path = path if path in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)
