"""Measures of runs, for tables and figures."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from recast_pl.reporting.plots import Mark
from recast_pl.runs.collection import Label, Summary
from recast_pl.runs.metrics import forward_transfer, spread


def measures(runs: Sequence[Summary]) -> list[str]:
    """What finished runs with different seeds say, in the order of `MEASURES`.

    Args:
        runs: At least one.
    """
    facts = [f"{measure(runs):,.0f}" for measure in _FACTS.values()]
    return [*facts, *(str(spread([run[key] for run in runs])) for key in _ACCURACIES.values())]


def task_mean(key: str) -> Callable[[Sequence[Summary]], float]:
    """The mean, over all tasks of some runs, of what `summary.json` says of a task.

    Args:
        key: Of the task's facts.
    """
    return lambda runs: statistics.mean(task[key] for run in runs for task in run["tasks"])


def forward_gain(run: Summary, alone: Summary) -> float:
    return forward_transfer(run["accuracy_matrix"], [task["accuracy"] for task in alone["tasks"]])


_FACTS: dict[str, Callable[[Sequence[Summary]], float]] = {
    "seeds": len,
    "numbers per task": task_mean("task_parameters"),
    "bytes per task": task_mean("patch_bytes"),
    "bytes shared": lambda runs: statistics.mean(run.get("shared_bytes", 0) for run in runs),
}

_ACCURACIES = {
    "average accuracy %": "average_accuracy",
    "anytime accuracy %": "average_anytime_accuracy",
    "forgetting": "forgetting",
}

MEASURES = (*_FACTS, *_ACCURACIES)
"""Headings of what `measures` gives."""

TASK_PARAMETERS = "task_parameters"
"""As the axis of a figure: numbers that are trained for a task."""


def sweep_marks(
    points: Mapping[str, Mapping[str, Label]], finished: Mapping[str, Sequence[Summary]], x: str, series: Sequence[str]
) -> list[Mark]:
    """The points that have finished runs, as they are drawn.

    Args:
        points: Labels of each point, by its name.
        finished: Finished runs by name of the point.
        x: Key on the horizontal axis, or `task_parameters`.
        series: Keys of what lines or bars stand for.
    """
    marks = []
    for name, labels in points.items():
        if runs := finished.get(name, ()):
            numbers = task_mean("task_parameters")(runs)
            where = numbers if x == TASK_PARAMETERS else labels[x]
            parts = {key: labels[key] for key in series if key in labels}
            belongs = ", ".join(v if isinstance(v, str) else f"{k.rpartition('.')[2]} {v}" for k, v in parts.items())
            marks.append(Mark(belongs, where, spread([run["average_accuracy"] for run in runs]), numbers))
    return marks
