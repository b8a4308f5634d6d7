"""Pictures of a stream, and of a decomposition. All are told apart in grey and by those who see no colours."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from recast_pl.analysis import FeatureSimilarity, GroupAnalysis
from recast_pl.metrics import Matrix

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
_ROW = 4  # heat maps side by side, where no kind of weight has a row of its own
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
_TEXT_CELLS = 6  # layers of a group up to which a heat map has its values written in


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


def to_svg(figure: Figure) -> bytes:
    """The content of an SVG file of a figure; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "recast_pl"}):
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
    """Colour, marker and dashes of lines, no two of the first 28 alike in grey."""
    cycles = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), itertools.cycle(_LINES))
    return ({"color": colour, "marker": marker, "linestyle": line} for colour, marker, line in cycles)
