"""Drift: whether the images that a task gets have moved away from its validation images.

Two histograms of each task are compared with those of its validation images by the test of Kolmogorov and Smirnov, see
`recast_pl.learning.histogram`: how sure the task is of an image (the probability of the label) and, for images whose
task was found, how familiar the router finds it. Older images count less: whenever a histogram has 1,000 images, all
its counts are halved.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from recast_pl.errors import PatchError, RunError
from recast_pl.inference.prediction import Prediction, RoutedPrediction
from recast_pl.inference.predictor import Predictor
from recast_pl.learning.histogram import BINS, certainty, distance, distance_limit, histogram
from recast_pl.rules import NO_TASK

FEWEST = 50
"""Images from which on a histogram is compared."""

_MOST = 1000  # images of a histogram before its counts are halved

Measure = Literal["confidence", "familiar"]


@dataclass(frozen=True)
class Drift:
    """How far the images of a task are from its validation images, by one measure.

    Args:
        task: Name of the task.
        measure: `confidence`, the probability of the label, or `familiar`, the share of known images that are stranger.
        images: How many recent images are compared.
        distance: The largest difference of the cumulative shares of the two histograms, from 0 to 1.
        limit: The distance that images like the validation images exceed with a probability of 0.1 %.
        drifted: Whether the distance is above the limit.
    """

    task: str
    measure: Measure
    images: int
    distance: float
    limit: float
    drifted: bool


@dataclass
class _Seen:
    """Histograms of the recent images of a task, and those of its validation images once they are needed."""

    counts: dict[Measure, list[int]] = field(default_factory=dict)
    known: dict[Measure, tuple[int, ...]] = field(default_factory=dict)

    def add(self, measure: Measure, value: float) -> None:
        counts = self.counts.setdefault(measure, [0] * BINS)
        if sum(counts) >= _MOST:
            counts[:] = [count // 2 for count in counts]
        counts[min(BINS - 1, int(value * BINS))] += 1


class DriftMonitor(Collector):
    """Watches the answers of a server, for any number of threads. A task takes a few hundred bytes.

    Args:
        predictor: The tasks. Their signatures are read when they are first compared; a task without one is not watched.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._lock = predictor, threading.Lock()
        self._tasks: dict[str, _Seen] = {}
        self._router: object = None

    def observe(self, prediction: Prediction) -> None:
        """Counts the answer for an image. A refused image counts for the likeliest task."""
        task, refused = prediction.task, prediction.task == NO_TASK
        if refused and isinstance(prediction, RoutedPrediction) and prediction.second is not None:
            task = prediction.second.task
        with self._lock:
            seen = self._tasks.setdefault(task, _Seen())
            if not refused:
                seen.add("confidence", float(certainty(torch.tensor(prediction.probability))))
            if isinstance(prediction, RoutedPrediction):
                seen.add("familiar", prediction.familiar)

    def forget(self, task: str) -> None:
        """Forgets the images of a task that has changed."""
        with self._lock:
            self._tasks.pop(task, None)

    def measure(self) -> list[Drift]:
        """Compares the images of all tasks that had enough of them; reads files."""
        with self._lock:
            names = self._predictor.tasks
            self._tasks = {name: seen for name, seen in self._tasks.items() if name in names}
            if any("familiar" in seen.counts for seen in self._tasks.values()):
                self._follow_router()
            return [drift for name, seen in self._tasks.items() for drift in self._compare(name, seen)]

    def _follow_router(self) -> None:
        """Forgets how familiar images were to another set of tasks."""
        try:
            router = self._predictor.router
        except (RunError, PatchError):  # no task is found any more
            router = None
        if self._router not in (None, router):
            for seen in self._tasks.values():
                seen.counts.pop("familiar", None)
                seen.known.pop("familiar", None)
        self._router = router

    def _compare(self, task: str, seen: _Seen) -> Iterator[Drift]:
        for measure, counts in seen.counts.items():
            images = sum(counts)
            if images < FEWEST:
                continue
            if measure not in seen.known:
                seen.known[measure] = self._known(task, measure)
            if known := sum(seen.known[measure]):
                apart, limit = distance(counts, seen.known[measure]), distance_limit(images, known)
                yield Drift(task, measure, images, apart, limit, apart > limit)

    def _known(self, task: str, measure: Measure) -> tuple[int, ...]:
        """The histogram of the validation images; empty if nothing is known of them."""
        try:
            signature = self._predictor.signature(task)
        except (RunError, PatchError):
            return ()
        if measure == "confidence":
            return signature.confidence
        features = signature.held_out.features
        return histogram(self._predictor.router.route(features).familiar) if len(features) else ()

    def collect(self) -> Iterator[Metric]:
        """The metrics: distance, limit, and whether a task has drifted by either measure."""
        apart = GaugeMetricFamily(
            "recast_pl_drift_distance", "Distance of images from validation images.", labels=("task", "measure")
        )
        limit = GaugeMetricFamily(
            "recast_pl_drift_limit", "Distance that 0.1 % of like images exceed.", labels=("task", "measure")
        )
        drifted = GaugeMetricFamily("recast_pl_drifted", "Whether images have moved away.", labels=("task",))
        found = self.measure()
        for drift in found:
            apart.add_metric((drift.task, drift.measure), drift.distance)
            limit.add_metric((drift.task, drift.measure), drift.limit)
        for task in dict.fromkeys(drift.task for drift in found):
            drifted.add_metric((task,), any(drift.drifted for drift in found if drift.task == task))
        yield from (apart, limit, drifted)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering compares nothing."""
        yield from ()
