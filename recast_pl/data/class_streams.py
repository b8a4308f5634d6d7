"""Streams of tasks that have a few random classes of one source, so that classes come back.

Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting and Knowledge Accumulation", CoLLAs 2023
("SCoLe"). A task draws its classes one after another, without replacement, each in proportion to

    p_i = ρ^(−i/(C − 1)) for i = 0 … C − 1

where ρ is the ratio of the most frequent of C classes to the rarest. Names and seed decide which class is at place i.

Deviations: the authors make classes rare by a power of probabilities that fall linearly. Their network has one head for
all classes with a mask that leaves those of the task; here each task has a head of its own, for its classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recast_pl.data.tasks import ClassSubset, TaskConfig, derive_seed, name_places

_TaskT = TypeVar("_TaskT")


def drawn_tasks(task: _TaskT) -> list[_TaskT]:
    """The tasks that one entry of `data.tasks` stands for, in order.

    Args:
        task: A `TaskConfig`, or what a parser has made of its options, which has only those that were given. If its
            `subset` has no number of `tasks`, it stands for itself.
    """
    entry: dict[str, Any] = vars(task)
    subset: Any = entry.get("subset")
    options: dict[str, Any] = {} if subset is None else vars(subset)
    count, first = options.get("tasks"), options.get("draw", 0)
    if count is None or count < 1:
        return [task]
    name = entry["name"]
    shared = entry | {"split_as": entry.get("split_as") or name}
    if entry.get("path") is None and entry.get("dataset") is None:
        shared["dataset"] = name
    subsets = [type(subset)(**options | {"tasks": None, "draw": draw}) for draw in range(first, first + count)]
    entries = [shared | {"name": f"{name}_{first + i:03}", "subset": each} for i, each in enumerate(subsets)]
    return [type(task)(**each) for each in entries]


def whole_task(task: TaskConfig) -> TaskConfig:
    """A task of all classes, equal for all tasks that are drawn from the same images."""
    dataset = task.name if task.path is None and task.dataset is None else task.dataset
    return replace(
        task, name=task.split_as or task.name, dataset=dataset, split_as=None, subset=None, transforms=(), flip=True
    )


def choose_classes(subset: ClassSubset, names: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Draws the classes of a task.

    Args:
        subset: How many, which draw, and ρ.
        names: The names of all C classes.
        seed: Of the source. Draws depend on it and on the names, not on one another.

    Returns:
        Indices of classes in ascending order.
    """
    order = np.argsort(name_places(names, derive_seed(seed, "frequency")), kind="stable")
    weights = np.empty(len(names))
    weights[order] = subset.ratio ** -(np.arange(len(names)) / max(1, len(names) - 1))
    # the smallest of exponential waiting times, which is to draw one after another (Efraimidis and Spirakis, 2006)
    waiting = -np.log1p(-name_places(names, derive_seed(seed, "draw", subset.draw))) / weights
    return np.sort(np.argsort(waiting, kind="stable")[: subset.classes]).astype(np.int64)
