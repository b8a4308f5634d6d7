"""Accuracies of runs beside those that others report, such as the tables of the paper."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

from recast_pl.reporting.measures import task_mean
from recast_pl.reporting.tables import Cells
from recast_pl.runs.collection import Label
from recast_pl.runs.folder import Summary
from recast_pl.runs.metrics import Spread, final_accuracies, spread

Published = Mapping[str, float]
"""Reported accuracies in percent: `average`, its standard deviation `spread`, and those of tasks by name."""

MISSING = "missing"
"""What a table shows for runs that are not finished."""

Points = Mapping[str, tuple[Mapping[str, Label], Published]]
"""Labels and reported accuracies of each point of a sweep, by its name."""


def published_tables(points: Points, finished: Mapping[str, Sequence[Summary]], seeds: int) -> dict[str, Cells]:
    """Makes the tables of our accuracies beside the reported ones.

    Args:
        points: The rows.
        finished: Summaries of finished runs, by name of the point.
        seeds: Number of seeds that each point is meant to have; a row with fewer says so.

    Returns:
        `published`, the averages over tasks, and `tasks`, each only if something of the kind is reported.
    """
    tasks = list(dict.fromkeys(key for _, reported in points.values() for key in reported if key not in _OVERALL))
    tables = {}
    if any(reported for _, reported in points.values()):
        tables["published"] = _average_cells(points, finished, seeds, set(tasks))
    if tasks:
        tables["tasks"] = _task_cells(points, finished, tasks)
    return tables


_OVERALL = ("average", "spread")


def _average_cells(
    points: Points, finished: Mapping[str, Sequence[Summary]], seeds: int, tasks: AbstractSet[str]
) -> Cells:
    """The averages; there is no difference to runs that lack some of the tasks, whose averages mean something else."""
    rows = []
    for name, title in _titles(points).items():
        published, runs = points[name][1], finished.get(name, ())
        theirs = Spread(published["average"], published.get("spread")) if "average" in published else None
        ours = spread([run["average_accuracy"] for run in runs]) if runs else None
        sizes = [f"{task_mean(runs, key):,.0f}" if runs else "" for key in _SIZES]
        count = f"{len(runs)} of {seeds}" if len(runs) < seeds else str(len(runs))
        comparable = all(tasks <= {task["name"] for task in run["tasks"]} for run in runs)
        difference = f"{ours.mean - theirs.mean:+.2f}" if ours and theirs and comparable else ""
        rows.append([title, str(ours or MISSING), str(theirs or ""), difference, *sizes, count])
    return ["method", "ours %", "paper %", "difference", "numbers per task", "bytes per task", "seeds"], rows


_SIZES: tuple[Literal["task_parameters"], Literal["patch_bytes"]] = ("task_parameters", "patch_bytes")


def _task_cells(points: Points, finished: Mapping[str, Sequence[Summary]], tasks: Sequence[str]) -> Cells:
    rows = []
    for name, title in _titles(points).items():
        published, finals = points[name][1], [final_accuracies(run) for run in finished.get(name, ())]
        row = [title]
        for task in tasks:
            found = [final[task] for final in finals if task in final]
            row += [str(spread(found)) if found else MISSING, f"{published[task]:.2f}" if task in published else ""]
        rows.append(row)
    return ["method", *(heading for task in tasks for heading in (f"{task} %", f"paper: {task}"))], rows


def _titles(points: Points) -> dict[str, str]:
    """Names each row by its labels, if no two rows have the same ones, or else by the point."""
    by_labels = {name: ", ".join(map(str, labels.values())) for name, (labels, _) in points.items()}
    unique = len(set(by_labels.values())) == len(by_labels) and all(by_labels.values())
    return by_labels if unique else {name: name for name in points}
