"""Pictures of a stream."""

import io

import numpy as np
from matplotlib.figure import Figure

from recast_pl.metrics import Matrix


def plot_accuracy_matrix(matrix: Matrix, tasks: list[str]) -> Figure:
    """Accuracy on each task (columns) after learning each task (rows).

    Args:
        matrix: In percent, of the tasks learnt so far.
        tasks: Their names.

    Returns:
        A figure; light colours are high values, readable in grey.
    """
    values = np.array([[np.nan if v is None else v for v in row] for row in matrix], dtype=float)
    figure = Figure(figsize=(2.2 + 0.8 * len(tasks), 1.8 + 0.6 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if value > 50 else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("tested on")
    axes.set_ylabel("after learning")
    figure.colorbar(image, label="accuracy (%)")
    return figure


def to_png(figure: Figure) -> bytes:
    """The content of a PNG file of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
