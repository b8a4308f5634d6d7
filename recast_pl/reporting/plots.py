"""Figures of streams and of compared runs, in colours for the colour-blind that also read in grey."""

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from recast_pl.files import write_atomic
from recast_pl.runs.metrics import Matrix, Spread

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito

_MARKERS = "osD^vP*X<"  # one more than there are colours, so that their pairs repeat after 72 lines

_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")

_STYLES = ("-", "--", "-.", ":")

_LABELLED = 20  # rows of a heat map that can have a name and numbers
_DRAWN = 250  # tasks of a heat map, at about two pixels each
_UNLABELLED = 12  # a heat map of more rows is as large as one of so many with numbers: drawing takes time


def plot_accuracy_matrix(matrix: Matrix, tasks: Sequence[str], title: str = "") -> Figure:
    """Draws the accuracy on each task (columns) after training each task (rows).

    Args:
        matrix: Accuracies in percent of the tasks trained so far; None where a task was not tested.
        tasks: Names of the tasks.
        title: What the picture shows; empty for no title.

    Returns:
        A heat map; light colours are high values. Its size is bounded: many tasks get small cells without numbers, and
        of more than 250 tasks, as many are drawn, evenly spaced.
    """
    drawn = np.linspace(0, len(tasks) - 1, min(len(tasks), _DRAWN)).round().astype(int)
    tasks = [tasks[index] for index in drawn]
    values = np.array([[matrix[row][column] for column in drawn] for row in drawn], dtype=float)  # None becomes NaN
    shown = values if len(values) <= _LABELLED else values[:0]  # small cells have no text
    texts = np.array([["" if np.isnan(value) else f"{value:.1f}" for value in row] for row in shown])
    figure, axes, image = _heat_map(values, texts, tasks, title)
    axes.set(xlabel="tested on", ylabel="after training")
    figure.colorbar(image, label="accuracy (%)")
    return figure


def plot_confusions(matrix: NDArray[np.int64], classes: Sequence[str], title: str = "") -> Figure:
    """Draws how many images of each class (rows) were taken for each class (columns).

    Args:
        matrix: Counts of images.
        classes: Names of the classes.
        title: What the picture shows; empty for no title.

    Returns:
        A heat map with counts, coloured by their share of the images of a class.
    """
    shares = 100 * matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    figure, axes, image = _heat_map(shares, matrix.astype(str), classes, title)
    axes.set(xlabel="predicted class", ylabel="class")
    figure.colorbar(image, label="share of the class (%)")
    return figure


def _heat_map(
    values: NDArray[np.float64], texts: NDArray[np.str_], names: Sequence[str], title: str
) -> tuple[Figure, Axes, AxesImage]:
    """Draws a square of percentages. Its size is bounded: many rows get small cells without texts."""
    shown = max(4, len(names)) if len(names) <= _LABELLED else _UNLABELLED
    figure = Figure(figsize=(2.2 + 0.8 * shown, 1.8 + 0.6 * shown), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100)
    if len(names) <= _LABELLED:
        for (row, column), text in np.ndenumerate(texts):
            colour = "black" if values[row, column] > 50 else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    _name_cells(axes, names)
    axes.set_title(textwrap.fill(plain_label(title), 9 * shown))
    return figure, axes, image


def _name_cells(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows and columns of a square heat map; where there are too many, only some of them."""
    chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), _LABELLED)).round().astype(int))
    labels = [_shorten(names[index]) for index in chosen]
    axes.set_xticks(chosen, labels, rotation=30, ha="right")
    axes.set_yticks(chosen, labels)


def _shorten(name: str) -> str:
    """The name as plain text that leaves room for the picture."""
    return plain_label(name if len(name) <= 24 else f"{name[:23]}…")


def plain_label(text: str) -> str:
    """Any text as matplotlib shows it unchanged: `$` would begin a formula, and a legend leaves out `_` names."""
    known = text.encode(errors="replace").decode()  # names of files may be no text
    return f"{' ' if known.startswith('_') else ''}{known}".replace("$", r"\$")


def to_png(figure: Figure) -> bytes:
    """Renders a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


class Mark(NamedTuple):
    """One point of a figure.

    Args:
        series: Line, or bars of one colour, that the point belongs to; empty for none.
        x: Position: a number, or the name of a group of bars.
        y: Height, with its spread over seeds, or with another length of error bar.
        numbers: Count of numbers trained for a task; larger counts get larger markers.
        name: Label beside the point; empty for none. Labelled points are not joined by lines.
    """

    series: str
    x: float | str
    y: Spread
    numbers: float = 0
    name: str = ""


def plot_marks(marks: Sequence[Mark], x: str, y: str = "average accuracy (%)", title: str = "") -> Figure:
    """Draws lines where x is numeric, and groups of bars where x is a name; error bars are those of the marks.

    Args:
        marks: At least one point; series are drawn in order of appearance.
        x: Name of the horizontal axis, or `task_parameters`. A numeric axis becomes logarithmic when its values span
            more than a factor of 20.
        y: Name and unit of the vertical axis.
        title: What the figure shows; empty for no title.
    """
    figure = Figure(figsize=(8, 5.5) if any(mark.name for mark in marks) else (6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    series = list(dict.fromkeys(mark.series for mark in marks))
    axes.set_xlabel("numbers trained for a task" if x == "task_parameters" else x.replace("_", " "))
    axes.set_ylabel(y)
    if title:
        axes.set_title(textwrap.fill(plain_label(title), 70), fontsize=9)  # below the legend
    if all(isinstance(mark.x, int | float) for mark in marks):
        _draw_lines(axes, marks, series)
    else:
        _draw_bars(axes, marks, series)
    if any(series):
        _add_legend(figure, axes, len(series))
    _write_names(figure, axes, [mark for mark in marks if mark.name])
    return figure


def plot_panels(panels: Mapping[str, Sequence[Mark]], x: str, y: str = "average accuracy (%)") -> Figure:
    """Draws points over a logarithmic axis, in several panels with one legend.

    Args:
        panels: At least one point each, by title.
        x: Name of the horizontal axis.
        y: Name and unit of the vertical axis.
    """
    figure, grid = _grid(len(panels))
    series = list(dict.fromkeys(mark.series for marks in panels.values() for mark in marks))
    for axes, (title, marks) in zip(grid, panels.items(), strict=False):
        _draw_lines(axes, marks, series)
        axes.set(xscale="log", xlabel=x, ylabel=y, title=plain_label(title))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k: longer labels overlap on a wide axis
        axes.xaxis.set_minor_formatter(NullFormatter())
        _widen(axes)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
    _add_legend(figure, figure.axes[0], len(series))
    return figure


def _widen(axes: Axes) -> None:
    """Lets a logarithmic axis span at least a factor of ten, so that small differences look small."""
    low, high = axes.get_xlim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        axes.set_xlim(middle / 10**0.5, middle * 10**0.5)


class Panel(NamedTuple):
    """A part of a figure: title, names and units of its axes, and at least one point with a numeric x."""

    title: str
    x: str
    y: str
    marks: Sequence[Mark]


def plot_series(panels: Iterable[Panel]) -> Figure:
    """Draws lines in several panels, each with axes of its own, and one legend."""
    drawn = list(panels)
    figure, grid = _grid(len(drawn))
    series = list(dict.fromkeys(mark.series for panel in drawn for mark in panel.marks))
    for axes, panel in zip(grid, drawn, strict=False):
        _draw_lines(axes, panel.marks, series)
        axes.set(xlabel=panel.x, ylabel=panel.y, title=plain_label(panel.title))
    _add_legend(figure, figure.axes[0], len(series))
    return figure


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with room for some panels, three in a row; the axes that are left over are hidden."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(6.4, 3.6 * columns), 0.8 + 3 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


def _add_legend(figure: Figure, axes: Axes, names: int) -> None:
    """Adds a legend above the axes, with as many columns as fit."""
    for columns in range(min(4, names), 0, -1):
        legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        legend.remove()


def _draw_lines(axes: Axes, marks: Sequence[Mark], series: Sequence[str]) -> None:
    largest = max(mark.numbers for mark in marks) or 1
    for name, (colour, marker, style) in zip(series, line_styles(), strict=False):
        line = sorted((mark for mark in marks if mark.series == name), key=lambda mark: float(mark.x))
        xs, means = [float(mark.x) for mark in line], [mark.y.mean for mark in line]
        joined = style if not any(mark.name for mark in line) else "none"
        deviations = [mark.y.deviation or 0.0 for mark in line]
        axes.errorbar(xs, means, deviations, color=colour, linestyle=joined, capsize=3)
        sizes = 40.0 if joined == "none" else [30 + 120 * math.sqrt(mark.numbers / largest) for mark in line]
        axes.scatter(
            xs, means, sizes, color=colour, marker=marker, edgecolors="black", zorder=3, label=plain_label(name)
        )
    _scale(axes, [float(mark.x) for mark in marks])
    axes.grid(alpha=0.3)


def _scale(axes: Axes, xs: Sequence[float]) -> None:
    """Makes the axis logarithmic for values far apart; a linear part near 0 keeps 0 visible."""
    if max(xs) <= 20 * min((x for x in xs if x > 0), default=math.inf):
        if all(x == int(x) for x in xs) and len(set(xs)) < 10:
            axes.set_xticks(sorted(set(xs)))
    elif min(xs) <= 0:
        axes.set_xscale("symlog", linthresh=10)
    else:
        axes.set_xscale("log")


def _write_names(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Labels points, moving each label up until it overlaps no earlier one."""
    figure.draw_without_rendering()  # places the points
    spots = [axes.transData.transform((float(mark.x), mark.y.mean)) for mark in marks]
    placed = [(x - 5, x + 5, y) for x, y in spots]  # left, right and height of occupied areas, in pixels
    for mark, (x, y) in sorted(zip(marks, spots, strict=True), key=lambda pair: pair[0].y.mean):
        width, at = 5.7 * len(mark.name), y
        side = "left" if x + 7 + width < axes.bbox.x1 else "right"
        left = x + 7 if side == "left" else x - 7 - width
        while any(left < end and left + width > begin and abs(at - other) < 10 for begin, end, other in placed):
            at += 1
        placed.append((left, left + width, at))
        offset = (5 if side == "left" else -5, 72 * (at - y) / figure.dpi - 2.5)
        spot = (float(mark.x), mark.y.mean)
        axes.annotate(plain_label(mark.name), spot, offset, textcoords="offset points", fontsize=7.5, ha=side)


def _draw_bars(axes: Axes, marks: Sequence[Mark], series: Sequence[str]) -> None:
    groups = list(dict.fromkeys(str(mark.x) for mark in marks))
    width = 0.8 / len(series)
    fills = zip(series, itertools.cycle(COLOURS), itertools.cycle(_HATCHES), strict=False)
    for position, (name, colour, hatch) in enumerate(fills):
        bars = [mark for mark in marks if mark.series == name]
        xs = [groups.index(str(mark.x)) + (position - (len(series) - 1) / 2) * width for mark in bars]
        heights, deviations = [mark.y.mean for mark in bars], [mark.y.deviation or 0.0 for mark in bars]
        drawn = axes.bar(
            xs,
            heights,
            width,
            yerr=deviations,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            capsize=3,
            label=plain_label(name),
        )
        if len(marks) <= 16:  # more values would overlap
            axes.bar_label(drawn, fmt="%.4g", fontsize=7, padding=2)
    long = max(map(len, groups)) * len(groups) > 70  # about as many letters as fit on one line
    axes.set_xticks(
        range(len(groups)), map(plain_label, groups), rotation=30 if long else 0, ha="right" if long else "center"
    )
    axes.grid(axis="y", alpha=0.3)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and SVG; equal figures give equal bytes.

    Args:
        figure: The figure.
        path: File name without suffix.
    """
    write_atomic(f"{path}.png", to_png(figure))
    write_atomic(f"{path}.svg", to_svg(figure, path.name))


def to_svg(figure: Figure, name: str) -> str:
    """Renders a figure as SVG.

    Args:
        figure: The figure.
        name: Seed of the identifiers inside the SVG, so that equal figures give equal bytes.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def line_styles() -> Iterator[tuple[str, str, str]]:
    """Yields colour, marker and dashes without end; the first nine differ in grey, too."""
    return zip(itertools.cycle(COLOURS), itertools.cycle(_MARKERS), itertools.cycle(_STYLES), strict=False)
