"""Measures of a stream, from its accuracy matrix."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Matrix = Sequence[Sequence[float | None]]
"""`matrix[i][j]`: accuracy in percent on task j after learning task i; None for j > i."""


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy over all tasks, after the last has been learnt."""
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: Matrix) -> float:
    """Mean over all tasks but the last of the final accuracy less that just after learning it.

    Lopez-Paz and Ranzato, 2017, equation 3. 0 for a single task; negative means forgetting.
    """
    square = _square(matrix)
    changes = square[-1] - square.diagonal()
    return float(changes[:-1].mean()) if len(changes) > 1 else 0.0


def forgetting(matrix: Matrix) -> float:
    """Mean over all tasks but the last of the best earlier accuracy less the final one.

    Chaudhry et al., 2018, equation 3. 0 for a single task.
    """
    square = _square(matrix)
    if len(square) == 1:
        return 0.0
    best = np.nanmax(square[:-1, :-1], axis=0)  # the upper triangle is NaN
    return float((best - square[-1, :-1]).mean())


def average_anytime_accuracy(matrix: Matrix) -> float:
    """Mean, over the moments after each task, of the mean accuracy over the tasks learnt until then."""
    return float(np.nanmean(_square(matrix), axis=1).mean())  # the upper triangle is NaN


def forward_transfer(matrix: Matrix, alone: Sequence[float]) -> float:
    """Mean over all tasks but the first of the accuracy just after learning it less that of learning it alone.

    With a head for each task the original measure (Lopez-Paz and Ranzato, 2017), accuracy before learning, is chance.

    Args:
        matrix: Accuracies of the stream.
        alone: Accuracy in percent of each task in an independent run that learns nothing else.

    Returns:
        The mean difference in points; 0 for a single task.
    """
    differences = _square(matrix).diagonal() - np.asarray(alone, dtype=float)
    return float(differences[1:].mean()) if len(differences) > 1 else 0.0


class Spread(NamedTuple):
    """What several values have in common.

    Args:
        mean: Their mean.
        deviation: Their sample standard deviation; None of a single value.
    """

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        mean = f"{round(self.mean, 2) + 0.0:.2f}"  # adding 0 turns -0.0 into 0.0
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.2f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and, of several values, the sample standard deviation.

    Args:
        values: At least one.
    """
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def _square(matrix: Matrix) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
