"""The accuracy matrix of a stream, and the measures that are computed from it."""

import json
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recast_pl.runs.folder import Record, Summary

Matrix = Sequence[Sequence[float | None]] | NDArray[np.float64]
"""`matrix[i][j]`: accuracy in percent on task j after training task i; None, or NaN in an array, for j > i."""


def accuracy_matrix(records: Sequence[Record]) -> list[list[float | None]]:
    """The accuracy matrix of the tasks that are finished.

    Where tasks are trained in another order or by several processes, some entries were never measured. That happens
    only if the method keeps tasks apart, so the accuracy of a task just after its own training fills them.

    Args:
        records: Of the finished tasks, in the order of the stream.

    Returns:
        A row for each task trained and a column for each task tested, in percent; None above the diagonal.
    """
    own: list[float | None] = [record["task"]["accuracy"] for record in records]
    columns = {record["task"]["name"]: column for column, record in enumerate(records)}
    matrix = [own[: row + 1] + [None] * (len(own) - row - 1) for row in range(len(own))]
    for row, record in enumerate(records):
        for name, accuracy in record["accuracies"].items():
            if columns.get(name, len(own)) <= row:
                matrix[row][columns[name]] = accuracy
    return matrix


def matrix_lines(matrix: Sequence[list[float | None]], separator: str, empty: str) -> list[str]:
    """Writes each row of an accuracy matrix as text.

    Where tasks are kept apart, a row begins like the one before it, so that part is copied: the matrix of 1,000 tasks
    has a million entries.

    Args:
        matrix: As `accuracy_matrix` returns it.
        separator: What stands between two entries.
        empty: What stands for None.
    """
    lines, begun, before = list[str](), "", list[float | None]()
    for count, row in enumerate(matrix, 1):
        if row[: count - 1] != before:
            begun, before = "", []
        for value in row[len(before) : count]:
            begun += (empty if value is None else json.dumps(value, allow_nan=False)) + separator
        before = row[:count]
        lines.append((begun + (empty + separator) * (len(row) - count)).removesuffix(separator))
    return lines


def final_accuracies(summary: Summary) -> dict[str, float]:
    """The accuracy in percent on every task after training the last one, by task."""
    rows = zip(summary["tasks"], summary["accuracy_matrix"][-1], strict=True)
    return {task["name"]: accuracy for task, accuracy in rows if accuracy is not None}


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy over all tasks, after training the last one."""
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: Matrix) -> float:
    """Mean over all tasks but the last of the final accuracy minus the accuracy just after training the task.

    Lopez-Paz and Ranzato, 2017, equation 3. 0 for a single task; a negative value means forgetting.
    """
    square = _square(matrix)
    return _mean((square[-1] - square.diagonal())[:-1])


def forgetting(matrix: Matrix) -> float:
    """Mean over all tasks but the last of the best earlier accuracy minus the final one.

    Chaudhry et al., 2018, equation 3. 0 for a single task.
    """
    square = _square(matrix)
    best = np.fmax.reduce(square[:-1, :-1], axis=0, initial=0)  # the upper triangle is NaN
    return _mean(best - square[-1, :-1])


def average_anytime_accuracy(matrix: Matrix) -> float:
    """Mean, over the ends of all tasks, of the mean accuracy over the tasks trained so far."""
    return float(np.nanmean(_square(matrix), axis=1).mean())  # the upper triangle is NaN


def forward_transfer(matrix: Matrix, alone: Sequence[float]) -> float:
    """Mean over all tasks but the first of the accuracy just after training minus the accuracy of the task alone.

    The original measure (Lopez-Paz and Ranzato, 2017) uses the accuracy before training, which is chance when every
    task has its own head. 0 for a single task.

    Args:
        matrix: Accuracies of the stream.
        alone: Accuracy in percent of each task in an independent run that trains nothing else.
    """
    return _mean((_square(matrix).diagonal() - np.asarray(alone, dtype=float))[1:])


class Spread(NamedTuple):
    """Mean and sample standard deviation of several values; the latter is None for a single value."""

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        mean = f"{round(self.mean, 2) + 0.0:.2f}"  # adding 0 turns -0.0 into 0.0
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.2f}"


def spread(values: Sequence[float]) -> Spread:
    """Computes mean and sample standard deviation of at least one value."""
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def _square(matrix: Matrix) -> NDArray[np.float64]:
    return np.asarray(matrix, dtype=float)  # None becomes NaN


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
