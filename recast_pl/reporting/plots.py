"""Pictures of streams, of runs beside one another and of decompositions: for the colour-blind, and readable in grey."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recast_pl.decomposition.analysis import GroupAnalysis
from recast_pl.decomposition.similarity import FeatureSimilarity
from recast_pl.files import write_atomic
from recast_pl.runs.metrics import Matrix, Spread

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito

_MARKERS = "osD^vP*X"

_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")

_ROW = 4  # heat maps side by side, where no kind of weight has a row of its own

_TEXT_CELLS = 6  # layers of a group up to which a heat map has its values written in

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
        y: Its height, over seeds.
        numbers: Trained for a task; the marker's area grows with them.
        name: Written beside it; empty for nothing. Marks with names are not joined by lines.
    """

    series: str
    x: float | str
    y: Spread
    numbers: float = 0
    name: str = ""


def plot_marks(marks: Sequence[Mark], x: str, y: str = "average accuracy (%)") -> Figure:
    """Heights over numbers, as lines, or over names, as groups of bars; whiskers are a standard deviation.

    Args:
        marks: At least one; they are drawn in the order of their series.
        x: Name of the horizontal axis, or `task_parameters`. One of numbers is logarithmic where they span more than a
            factor of 20.
        y: Name of the vertical axis, with its unit.

    Returns:
        A figure.
    """
    figure = Figure(figsize=(8, 5.5) if any(mark.name for mark in marks) else (6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    series = list(dict.fromkeys(mark.series for mark in marks))
    axes.set_xlabel("numbers trained for a task" if x == "task_parameters" else x.replace("_", " "))
    axes.set_ylabel(y)
    if all(isinstance(mark.x, int | float) for mark in marks):
        _draw_lines(axes, marks, series)
    else:
        _draw_bars(axes, marks, series)
    if any(series):
        _add_legend(figure, axes, len(series))
    _write_names(figure, axes, [mark for mark in marks if mark.name])
    return figure


def _add_legend(figure: Figure, axes: Axes, names: int) -> None:
    """A legend above the axes, in as many columns as the picture is wide enough for."""
    for columns in range(min(4, names), 0, -1):
        legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        legend.remove()


def _draw_lines(axes: Axes, marks: Sequence[Mark], series: Sequence[str]) -> None:
    largest = max(mark.numbers for mark in marks) or 1
    looks = zip(series, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), itertools.cycle(_STYLES), strict=False)
    for name, colour, marker, style in looks:
        line = sorted((mark for mark in marks if mark.series == name), key=lambda mark: float(mark.x))
        xs, means = [float(mark.x) for mark in line], [mark.y.mean for mark in line]
        joined = style if not any(mark.name for mark in line) else "none"
        axes.errorbar(xs, means, _whiskers(line), color=colour, linestyle=joined, capsize=3)
        sizes = 40.0 if joined == "none" else [30 + 120 * math.sqrt(mark.numbers / largest) for mark in line]
        axes.scatter(xs, means, sizes, color=colour, marker=marker, edgecolors="black", zorder=3, label=name)
    _scale(axes, [float(mark.x) for mark in marks])
    axes.grid(alpha=0.3)


def _scale(axes: Axes, xs: Sequence[float]) -> None:
    """A logarithmic axis for numbers far apart, on which 0 has its place."""
    if max(xs) <= 20 * min((x for x in xs if x > 0), default=math.inf):
        if all(x == int(x) for x in xs) and len(set(xs)) < 10:
            axes.set_xticks(sorted(set(xs)))
    elif min(xs) <= 0:
        axes.set_xscale("symlog", linthresh=10)
    else:
        axes.set_xscale("log")


def _whiskers(marks: Sequence[Mark]) -> list[float]:
    return [mark.y.deviation or 0.0 for mark in marks]


def _write_names(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Writes names beside marks, each moved up until it is clear of those before."""
    figure.draw_without_rendering()  # so that it is known where marks are
    spots = [axes.transData.transform((float(mark.x), mark.y.mean)) for mark in marks]
    placed = [(x - 5, x + 5, y) for x, y in spots]  # left, right and height of what must stay clear, in pixels
    for mark, (x, y) in sorted(zip(marks, spots, strict=True), key=lambda pair: pair[0].y.mean):
        width, at = 5.7 * len(mark.name), y
        side = "left" if x + 7 + width < axes.bbox.x1 else "right"
        left = x + 7 if side == "left" else x - 7 - width
        while any(left < end and left + width > begin and abs(at - other) < 10 for begin, end, other in placed):
            at += 1
        placed.append((left, left + width, at))
        offset = (5 if side == "left" else -5, 72 * (at - y) / figure.dpi - 2.5)
        spot = (float(mark.x), mark.y.mean)
        axes.annotate(mark.name, spot, offset, textcoords="offset points", fontsize=7.5, ha=side)


def _draw_bars(axes: Axes, marks: Sequence[Mark], series: Sequence[str]) -> None:
    groups = list(dict.fromkeys(str(mark.x) for mark in marks))
    width = 0.8 / len(series)
    looks = zip(series, itertools.cycle(_COLOURS), itertools.cycle(_HATCHES), strict=False)
    for position, (name, colour, hatch) in enumerate(looks):
        bars = [mark for mark in marks if mark.series == name]
        xs = [groups.index(str(mark.x)) + (position - (len(series) - 1) / 2) * width for mark in bars]
        heights = [mark.y.mean for mark in bars]
        drawn = axes.bar(
            xs, heights, width, yerr=_whiskers(bars), color=colour, hatch=hatch, edgecolor="black", capsize=3
        )
        drawn.set_label(name)
        if len(marks) <= 16:  # else they would cover one another
            axes.bar_label(drawn, fmt="%.4g", fontsize=7, padding=2)
    long = max(map(len, groups)) * len(groups) > 70  # about as many letters as fit side by side
    axes.set_xticks(range(len(groups)), groups, rotation=30 if long else 0, ha="right" if long else "center")
    axes.grid(axis="y", alpha=0.3)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and SVG; equal figures give equal bytes.

    Args:
        figure: What is written.
        path: Without an ending.
    """
    write_atomic(f"{path}.png", to_png(figure))
    write_atomic(f"{path}.svg", to_svg(figure, path.name))


def to_svg(figure: Figure, name: str) -> str:
    """The content of an SVG file of a figure.

    Args:
        figure: What is drawn.
        name: From which its inner names are made.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def plot_template_diversity(groups: Sequence[GroupAnalysis]) -> Figure:
    """Frobenius diversity and entropy of the templates of each group (figure 9).

    Args:
        groups: Of all kinds of weights, each kind a line.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    frobenius, entropy = figure.subplots(1, 2)
    kinds = _by_kind(groups)
    single = len(kinds) == len(groups)  # then kinds are what there is to compare
    lines = {"each kind": list(groups)} if single else kinds
    for (kind, members), style in zip(lines.items(), _styles()):  # noqa: B905
        numbers = range(len(members))
        frobenius.plot(numbers, [group.frobenius for group in members], label=kind, **style)
        entropy.plot(numbers, [group.entropy for group in members], **style)
    frobenius.set_ylabel("Frobenius norm (units of weights)")
    entropy.set_ylabel("entropy (nats)")
    for axes in (frobenius, entropy):
        axes.grid(alpha=0.3)
        if single:
            axes.set_xticks(range(len(kinds)), list(kinds), rotation=45, ha="right", fontsize="small")
        else:
            axes.set_xlabel("group, in order of depth")
            axes.set_xticks(range(max(map(len, kinds.values()))))
    if all(math.isnan(group.frobenius) for group in groups):
        frobenius.text(0.5, 0.5, "banks of one template have no pairs", ha="center", transform=frobenius.transAxes)
    if not single:
        figure.legend(loc="outside lower center", ncols=min(2, len(kinds)), fontsize="small")
    return figure


def plot_coefficient_similarity(groups: Sequence[GroupAnalysis]) -> Figure:
    """Cosines of the coefficients of the layers of each group (figure 10).

    Each kind of weight is a row of maps; where all kinds have one group, they fill rows together.

    Args:
        groups: Of all kinds of weights.

    Returns:
        A figure; light colours are high values.
    """
    lines = list(_by_kind(groups).values())
    single = len(lines) == len(groups)
    if single:
        lines = [list(groups[start : start + _ROW]) for start in range(0, len(groups), _ROW)]
    rows, columns = len(lines), max(map(len, lines))
    figure = Figure(figsize=(1.6 + 1.7 * columns, 0.8 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for members, line in zip(lines, grid, strict=True):
        for group, axes in zip(members, line):  # noqa: B905
            image = _similarity_map(axes, group)
            axes.set_title(group.kind if single else f"group {group.number}", fontsize="small")
        line[0].set_ylabel("layer" if single else f"{members[0].kind}\nlayer", fontsize="small")
    figure.colorbar(image, ax=grid, label="cosine of coefficients", shrink=0.8)
    return figure


def plot_feature_similarity(features: Sequence[FeatureSimilarity]) -> Figure:
    """Cosine between features of the dense and of the decomposed network, through its depth.

    Args:
        features: In order of computation; the bars reach down to the least similar image.
    """
    shown = [feature for feature in features if feature.kind != "layer"]
    means = np.array([feature.mean for feature in shown])
    lowest = np.array([feature.lowest for feature in shown])
    figure = Figure(figsize=(2.5 + 0.4 * len(shown), 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    down = np.stack([np.maximum(means - lowest, 0), np.zeros_like(means)])  # (2, blocks)
    axes.errorbar(places, means, yerr=down, color=_COLOURS[0], marker="o", capsize=3)
    axes.set_xticks(places, [feature.name for feature in shown], rotation=45, ha="right")
    bottom = min(0.99, float(lowest.min()))
    axes.set_ylim(bottom - 0.05 * (1 - bottom), 1 + 0.05 * (1 - bottom))
    axes.set_xlabel("output of")
    axes.set_ylabel("cosine, mean and lowest over images")
    axes.grid(alpha=0.3)
    return figure


def plot_displacements(displacements: Mapping[str, Mapping[str, float]]) -> Figure:
    """How far each task (rows) has moved the coefficients of each weight (columns).

    Args:
        displacements: ‖ΔC‖ of each weight, by task.

    Returns:
        A figure; light colours are high values.
    """
    tasks, names = list(displacements), list(next(iter(displacements.values())))
    values = np.array([[displacements[task][name] for name in names] for task in tasks])
    figure = Figure(figsize=(3 + 0.3 * len(names), 3 + 0.35 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylabel("task")
    figure.colorbar(image, label="‖ΔC‖")
    return figure


def _similarity_map(axes: Any, group: GroupAnalysis) -> Any:
    values = np.array(group.similarity)  # (L, L)
    axes.set_axis_on()
    image = axes.imshow(values, cmap="cividis", vmin=-1, vmax=1)
    labels = [".".join(re.findall(r"(?<![^.])\d+(?=\.)", name)) for name in group.targets]
    axes.set_xticks(range(len(labels)), labels, fontsize="x-small")
    axes.set_yticks(range(len(labels)), labels, fontsize="x-small")
    for (row, column), value in np.ndenumerate(values) if len(labels) <= _TEXT_CELLS else ():
        colour = "black" if value > -0.3 else "white"
        axes.text(
            column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", color=colour, fontsize="x-small"
        )
    return image


def _by_kind(groups: Sequence[GroupAnalysis]) -> dict[str, list[GroupAnalysis]]:
    kinds: dict[str, list[GroupAnalysis]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return kinds


def _styles() -> Any:
    """Colour, marker and dashes of lines, no two of the first eight alike in grey."""
    cycles = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), itertools.cycle(_STYLES))
    return ({"color": colour, "marker": marker, "linestyle": line} for colour, marker, line in cycles)
