"""Measures of finished runs, for tables and figures."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from recast_pl.reporting.plots import Mark
from recast_pl.runs.collection import Label, Summary
from recast_pl.runs.metrics import spread

TASK_PARAMETERS = "task_parameters"
"""Key of the count of numbers that a task trains; also names the axis of a figure."""


def task_mean(key: str) -> Callable[[Sequence[Summary]], float]:
    """Makes a function that averages an entry of `tasks` in `summary.json` over all tasks of some runs.

    Args:
        key: Name of the entry.
    """
    return lambda runs: statistics.mean(task[key] for run in runs for task in run["tasks"])


_COUNTS: dict[str, Callable[[Sequence[Summary]], float]] = {
    "seeds": len,
    "numbers per task": task_mean(TASK_PARAMETERS),
    "bytes per task": task_mean("patch_bytes"),
    "bytes shared": lambda runs: statistics.mean(run.get("shared_bytes", 0) for run in runs),
}

_ACCURACIES = {
    "average accuracy %": "average_accuracy",
    "anytime accuracy %": "average_anytime_accuracy",
    "forgetting": "forgetting",
}

MEASURES = (*_COUNTS, *_ACCURACIES)
"""Headings of the values that `measures` returns."""


def measures(runs: Sequence[Summary]) -> list[str]:
    """Formats the measures of runs that differ in their seed, in the order of `MEASURES`.

    Args:
        runs: Summaries of at least one run.
    """
    counts = [f"{measure(runs):,.0f}" for measure in _COUNTS.values()]
    return [*counts, *(str(spread([run[key] for run in runs])) for key in _ACCURACIES.values())]


def sweep_marks(
    points: Mapping[str, Mapping[str, Label]], finished: Mapping[str, Sequence[Summary]], x: str, series: Sequence[str]
) -> list[Mark]:
    """Makes the points of a sweep's figure; points without finished runs are left out.

    Args:
        points: Labels of each point, by its name.
        finished: Summaries of finished runs, by name of the point.
        x: Label on the horizontal axis, or `task_parameters`.
        series: Labels that tell lines or bars apart.
    """
    marks = []
    for name, labels in points.items():
        if runs := finished.get(name, ()):
            numbers = task_mean(TASK_PARAMETERS)(runs)
            parts = {key: labels[key] for key in series if key in labels}
            line = ", ".join(v if isinstance(v, str) else f"{k.rpartition('.')[2]} {v}" for k, v in parts.items())
            position = numbers if x == TASK_PARAMETERS else labels[x]
            marks.append(Mark(line, position, spread([run["average_accuracy"] for run in runs]), numbers))
    return marks
