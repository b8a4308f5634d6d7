"""Measures of finished runs, for tables and figures."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from recast_pl.reporting.plots import Mark
from recast_pl.runs.collection import Label
from recast_pl.runs.folder import Summary
from recast_pl.runs.metrics import spread

TASK_PARAMETERS: Literal["task_parameters"] = "task_parameters"
"""Key of the count of numbers that a task trains; also names the axis of a figure."""


def task_mean(runs: Sequence[Summary], key: Literal["task_parameters", "patch_bytes"]) -> float:
    """Averages an entry of `tasks` in `summary.json` over all tasks of some runs."""
    return statistics.mean(task[key] for run in runs for task in run["tasks"])


_COUNTS: dict[str, Callable[[Sequence[Summary]], float]] = {
    "seeds": len,
    "numbers per task": lambda runs: task_mean(runs, TASK_PARAMETERS),
    "bytes per task": lambda runs: task_mean(runs, "patch_bytes"),
    "bytes shared": lambda runs: statistics.mean(run.get("shared_bytes", 0) for run in runs),
}

AVERAGE = "average accuracy %"

_ACCURACIES: dict[str, Literal["average_accuracy", "average_anytime_accuracy", "forgetting"]] = {
    AVERAGE: "average_accuracy",
    "anytime accuracy %": "average_anytime_accuracy",
    "forgetting": "forgetting",
}

_BALANCED = "balanced accuracy %"  # the mean over tasks, each just after training

_CLASS_ACCURACIES: dict[str, Literal["routed_accuracy", "joint_accuracy"]] = {  # of runs with `evaluation: class`
    "routed accuracy %": "routed_accuracy",
    "joint accuracy %": "joint_accuracy",
}

MEASURES = (*_COUNTS, *_ACCURACIES, _BALANCED, *_CLASS_ACCURACIES)
"""Headings of the values that `measures` returns."""


def measures(runs: Sequence[Summary]) -> dict[str, str]:
    """Formats the measures of at least one run by heading; the runs differ in their seed.

    A measure that one of the runs has not recorded is an empty text.
    """
    counts = {heading: f"{measure(runs):,.0f}" for heading, measure in _COUNTS.items()}
    accuracies = {heading: str(spread([run[key] for run in runs])) for heading, key in _ACCURACIES.items()}
    classes = {
        heading: str(spread([run[key] for run in runs])) if all(key in run for run in runs) else ""
        for heading, key in _CLASS_ACCURACIES.items()
    }
    return counts | accuracies | {_BALANCED: _balanced(runs)} | classes


def known_measures(of_runs: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns the headings that have a value in at least one of several results of `measures`, in their order."""
    of_runs = list(of_runs)
    return [heading for heading in MEASURES if any(values[heading] for values in of_runs)]


def _balanced(runs: Sequence[Summary]) -> str:
    """Formats balanced accuracy, which older versions did not record."""
    if not all("balanced_accuracy" in task for run in runs for task in run["tasks"]):
        return ""
    return str(spread([statistics.mean(task["balanced_accuracy"] for task in run["tasks"]) for run in runs]))


def sweep_marks(
    points: Mapping[str, Mapping[str, Label]], finished: Mapping[str, Sequence[Summary]], x: str, series: Sequence[str]
) -> list[Mark]:
    """Returns the points of a sweep's figure; points without finished runs are left out.

    Args:
        points: Labels of each point, by its name.
        finished: Summaries of finished runs, by name of the point.
        x: Label on the horizontal axis, or `task_parameters`.
        series: Labels that tell lines or bars apart.
    """
    marks = []
    for name, labels in points.items():
        if runs := finished.get(name):
            numbers = task_mean(runs, TASK_PARAMETERS)
            parts = [(key.rpartition(".")[2], labels[key]) for key in series if key in labels]
            line = ", ".join(label if isinstance(label, str) else f"{key} {label}" for key, label in parts)
            position = numbers if x == TASK_PARAMETERS else labels[x]
            marks.append(Mark(line, position, spread([run["average_accuracy"] for run in runs]), numbers))
    return marks
