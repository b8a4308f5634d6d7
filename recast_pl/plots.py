"""Pictures of streams and of runs beside one another: for the colour-blind, and readable in grey."""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recast_pl.files import write_atomic
from recast_pl.metrics import Matrix, Spread

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito
_MARKERS = "osD^vP*X"
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_STYLES = ("-", "--", "-.", ":")


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


class Mark(NamedTuple):
    """One point of a figure.

    Args:
        series: Name of the line, or of the bars of one colour, that it belongs to; empty for none.
        x: Where it stands: a number, or the name of a group of bars.
        accuracy: In percent, over seeds.
        numbers: Trained for a task; the marker's area grows with them.
    """

    series: str
    x: float | str
    accuracy: Spread
    numbers: float = 0


def plot_marks(marks: Sequence[Mark], x: str) -> Figure:
    """Accuracy against numbers, as lines, or against names, as groups of bars; whiskers are a standard deviation.

    Args:
        marks: At least one; they are drawn in the order of their series.
        x: Name of the horizontal axis. That of numbers is logarithmic where they span more than a factor of 20.

    Returns:
        A figure.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    series = list(dict.fromkeys(mark.series for mark in marks))
    if all(isinstance(mark.x, int | float) for mark in marks):
        _draw_lines(axes, marks, series)
    else:
        _draw_bars(axes, marks, series)
    axes.set_xlabel(x)
    axes.set_ylabel("average accuracy (%)")
    if any(series):
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(series)))
    return figure


def _draw_lines(axes: Axes, marks: Sequence[Mark], series: Sequence[str]) -> None:
    largest = max(mark.numbers for mark in marks) or 1
    looks = zip(series, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), itertools.cycle(_STYLES), strict=False)
    for name, colour, marker, style in looks:
        line = sorted((mark for mark in marks if mark.series == name), key=lambda mark: float(mark.x))
        xs, means = [float(mark.x) for mark in line], [mark.accuracy.mean for mark in line]
        errors = [mark.accuracy.deviation or 0 for mark in line]
        axes.errorbar(xs, means, errors, color=colour, linestyle=style, capsize=3)
        sizes = [30 + 120 * math.sqrt(mark.numbers / largest) for mark in line]
        axes.scatter(xs, means, sizes, color=colour, marker=marker, edgecolors="black", zorder=3, label=name)
    xs = [float(mark.x) for mark in marks]
    if max(xs) > 20 * min(x for x in (*xs, math.inf) if x > 0):
        axes.set_xscale("symlog" if min(xs) <= 0 else "log", **({"linthresh": 10} if min(xs) <= 0 else {}))
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, marks: Sequence[Mark], series: Sequence[str]) -> None:
    groups = list(dict.fromkeys(str(mark.x) for mark in marks))
    width = 0.8 / len(series)
    looks = zip(series, itertools.cycle(_COLOURS), itertools.cycle(_HATCHES), strict=False)
    for position, (name, colour, hatch) in enumerate(looks):
        bars = [mark for mark in marks if mark.series == name]
        xs = [groups.index(str(mark.x)) + (position - (len(series) - 1) / 2) * width for mark in bars]
        errors = [mark.accuracy.deviation or 0 for mark in bars]
        heights = [mark.accuracy.mean for mark in bars]
        axes.bar(xs, heights, width, yerr=errors, color=colour, hatch=hatch, edgecolor="black", capsize=3, label=name)
    lowest = min(mark.accuracy.mean - (mark.accuracy.deviation or 0) for mark in marks)
    axes.set_ylim(bottom=max(0, 10 * math.floor(lowest / 10 - 0.5)))
    long = sum(map(len, groups)) > 60
    axes.set_xticks(range(len(groups)), groups, rotation=30 if long else 0, ha="right" if long else "center")
    axes.grid(axis="y", alpha=0.3)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and SVG; equal figures give equal bytes.

    Args:
        figure: What is written.
        path: Without an ending.
    """
    write_atomic(f"{path}.png", to_png(figure))
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(f"{path}.svg", buffer.getvalue())
