"""Figures of an analysis of a decomposition: templates, coefficients, features, and what tasks change."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from recast_pl.decomposition.analysis import Analysis, GroupAnalysis
from recast_pl.decomposition.similarity import FeatureSimilarity
from recast_pl.reporting.plots import COLOURS, line_styles


def analysis_figures(analysis: Analysis) -> dict[str, Figure]:
    """Draws an analysis; a measure without results has no figure.

    Returns:
        Figures by file name without suffix.
    """
    figures = {
        "template_diversity": plot_template_diversity(analysis.groups),
        "coefficient_similarity": plot_coefficient_similarity(analysis.groups),
    }
    if analysis.features:
        figures["feature_similarity"] = plot_feature_similarity(analysis.features)
    if analysis.displacements:
        figures["coefficient_displacement"] = plot_displacements(analysis.displacements)
    return figures


def plot_template_diversity(groups: Sequence[GroupAnalysis]) -> Figure:
    """Draws the Frobenius diversity and the entropy of the templates of each group (figure 9 of the paper).

    Args:
        groups: Groups of all kinds of weights; each kind is a line.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    frobenius, entropy = figure.subplots(1, 2)
    kinds = _by_kind(groups)
    single = len(kinds) == len(groups)  # one group for each kind: compare kinds instead of depth
    lines = {"each kind": list(groups)} if single else kinds
    for (kind, members), (colour, marker, dashes) in zip(lines.items(), line_styles(), strict=False):
        numbers, style = range(len(members)), {"color": colour, "marker": marker, "linestyle": dashes}
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
        frobenius.text(0.5, 0.5, "one template has no pairs", ha="center", transform=frobenius.transAxes)
    if not single:
        figure.legend(loc="outside lower center", ncols=min(2, len(kinds)), fontsize="small")
    return figure


def plot_coefficient_similarity(groups: Sequence[GroupAnalysis]) -> Figure:
    """Draws the cosines between the coefficients of the layers of each group (figure 10 of the paper).

    Args:
        groups: Groups of all kinds of weights.

    Returns:
        Heat maps, a row for each kind of weight, or rows of four where each kind has one group; light colours are high
        values.
    """
    lines = list(_by_kind(groups).values())
    single = len(lines) == len(groups)
    if single:
        lines = [list(groups[start : start + 4]) for start in range(0, len(groups), 4)]
    rows, columns = len(lines), max(map(len, lines))
    figure = Figure(figsize=(1.6 + 1.7 * columns, 0.8 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for members, line in zip(lines, grid, strict=True):
        for group, axes in zip(members, line, strict=False):
            image = _similarity_map(axes, group)
            axes.set_title(group.kind if single else f"group {group.number}", fontsize="small")
        line[0].set_ylabel("layer" if single else f"{members[0].kind}\nlayer", fontsize="small")
    figure.colorbar(image, ax=grid, label="cosine of coefficients", shrink=0.8)
    return figure


def plot_feature_similarity(features: Sequence[FeatureSimilarity]) -> Figure:
    """Draws the cosine between features of the dense and of the decomposed network over depth.

    Args:
        features: Results in order of computation; the error bars reach down to the least similar image.
    """
    shown = [feature for feature in features if feature.kind != "layer"]
    means = np.array([feature.mean for feature in shown])
    lowest = np.array([feature.lowest for feature in shown])
    figure = Figure(figsize=(2.5 + 0.4 * len(shown), 4), layout="constrained")
    axes = figure.subplots()
    down = np.stack([np.maximum(means - lowest, 0), np.zeros_like(means)])  # (2, blocks)
    axes.errorbar(range(len(shown)), means, yerr=down, color=COLOURS[0], marker="o", capsize=3)
    axes.set_xticks(range(len(shown)), [feature.name for feature in shown], rotation=45, ha="right")
    bottom = min(0.99, float(lowest.min()))
    axes.set_ylim(bottom - 0.05 * (1 - bottom), 1 + 0.05 * (1 - bottom))
    axes.set_xlabel("output of")
    axes.set_ylabel("feature similarity, mean and lowest over images")
    axes.grid(alpha=0.3)
    return figure


def plot_displacements(displacements: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draws how far each task (rows) has moved the coefficients of each weight (columns).

    Args:
        displacements: ‖ΔC‖ by task and weight.

    Returns:
        A heat map; light colours are high values.
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


def _similarity_map(axes: Axes, group: GroupAnalysis) -> AxesImage:
    values = np.array(group.similarity)  # (L, L)
    axes.set_axis_on()
    image = axes.imshow(values, cmap="cividis", vmin=-1, vmax=1)
    labels = [".".join(re.findall(r"(?<![^.])\d+(?=\.)", name)) for name in group.targets]
    axes.set_xticks(range(len(labels)), labels, fontsize="x-small")
    axes.set_yticks(range(len(labels)), labels, fontsize="x-small")
    for (row, column), value in np.ndenumerate(values) if len(labels) <= 6 else ():  # more would not fit
        colour, text = "black" if value > -0.3 else "white", f"{round(value, 2) + 0.0:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="x-small")
    return image


def _by_kind(groups: Sequence[GroupAnalysis]) -> dict[str, list[GroupAnalysis]]:
    kinds: dict[str, list[GroupAnalysis]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return kinds
