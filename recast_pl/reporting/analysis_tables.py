"""Tables of an analysis of a decomposition, for the terminal and for Markdown files."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from recast_pl.decomposition.analysis import Analysis
from recast_pl.reporting.tables import markdown_table, terminal_table


class Sheet(NamedTuple):
    """A table that reads the same on the terminal and in a file; its first column holds names."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def printed(self) -> RenderableType:
        """Renders the table for the terminal."""
        title = Text(self.title, style="bold")
        return Group(title, terminal_table((self.headings, self.rows)), *(Text(note) for note in self.notes), "")

    def markdown(self) -> str:
        """Renders the table for a file."""
        table = markdown_table((self.headings, self.rows)).rstrip("\n")
        return "\n\n".join([f"## {self.title}", table, *self.notes]).replace("*", "\\*") + "\n"


def analysis_sheets(analysis: Analysis) -> list[Sheet]:
    """Makes the tables of an analysis.

    Args:
        analysis: Results for one decomposition. A measure without results has no table.
    """
    names, name_note = _group_names(analysis)
    sheets = [_templates_sheet(analysis, names, name_note), _scaling_sheet(analysis, names)]
    if analysis.targets:
        sheets.append(_weights_sheet(analysis, names))
    if analysis.features:
        sheets.append(_features_sheet(analysis))
    if analysis.displacements:
        sheets.append(_displacements_sheet(analysis))
    return sheets


def _templates_sheet(analysis: Analysis, names: dict[str, str], name_note: str) -> Sheet:
    rows = [
        [
            names[group.name],
            "×".join(map(str, group.shape)),
            str(len(group.targets)),
            str(group.templates),
            _number(group.frobenius, 4),
            _number(group.frobenius_mean, 4),
            _number(group.entropy, 4),
            _number(100 * group.entropy / group.entropy_limit if group.entropy_limit else math.nan, 2),
            _number(group.similarity_mean, 4),
        ]
        for group in analysis.groups
    ]
    single = any(1 in (group.templates, len(group.targets)) for group in analysis.groups)
    return Sheet(
        "Templates and coefficients of each group",
        ["group", "shape", "L", "n", "Frobenius", "pair", "entropy", "% max", "coefficients"],
        rows,
        [
            f"{name_note} A group holds one kind of weight; the paper's groups hold all weights of a layer.",
            "Frobenius: Σ ‖Ti − Tj‖ over pairs i<j, divided by n(n−1), as printed in the paper: half the mean over "
            "pairs. Entropy: of the singular values divided by their sum, in nats, averaged over templates; its "
            "maximum is ln min(rows, columns). Coefficients: cosine between those of two layers, averaged over pairs."
            + (" –: one template, or one layer, has no pairs." if single else ""),
        ],
    )


def _scaling_sheet(analysis: Analysis, names: dict[str, str]) -> Sheet:
    rows = []
    for name, scaling in [*((names[g.name], g.scaling) for g in analysis.groups), ("total", analysis.scaling)]:
        counts = (scaling.dense, scaling.templates, scaling.coefficients, scaling.kept, scaling.saved)
        rows.append([name, *(f"{count:,}" for count in (*counts, scaling.approximation))])
    paper = analysis.paper
    note = (
        f"In the paper's symbols: d²={paper.d2:,}, M={paper.modules}, L={paper.layers}, G={paper.groups}, "
        f"n={paper.templates}, K={paper.coefficient_sets}; d²·M·(L − G·n) = {paper.approximation:,}."
        if paper
        else "Groups differ in d², n, K or their number, so the paper's formula does not apply; ≈ S sums d²·(L − n)."
    )
    return Sheet(
        "Parameters saved (section 3.3)",
        ["group", "dense", "templates", "coefficients", "kept", "S", "≈ S"],
        rows,
        [
            "S = dense − templates − coefficients. A task trains the coefficients and keeps the mean of their sets. "
            + note
        ],
    )


def _weights_sheet(analysis: Analysis, names: dict[str, str]) -> Sheet:
    found = {target.name: target for target in analysis.targets}
    rows = []
    for group in analysis.groups:
        cosines = [found[name].cosine for name in group.targets]
        errors = [found[name].relative_error for name in group.targets]
        numbers = (statistics.mean(cosines), min(cosines), statistics.mean(errors), max(errors))
        rows.append([names[group.name], *(f"{number:.6g}" for number in numbers)])
    return Sheet(
        "Generated weights compared with the pretrained ones",
        ["group", "weight cosine", "lowest", "relative error", "largest"],
        rows,
        [f"Mean over all {len(analysis.targets)} weights: weight cosine {analysis.weight_cosine:.6f}."],
    )


def _features_sheet(analysis: Analysis) -> Sheet:
    rows = [[f.name, f"{f.mean:.6f}", f"{f.lowest:.6f}"] for f in analysis.features if f.kind != "layer"]
    note = "Cosine of the flattened output: mean and lowest over images. analysis.json also has every layer. "
    return Sheet(
        "Features of the decomposed network compared with the dense one",
        ["output of", "feature similarity", "lowest"],
        rows,
        [f"{note}Mean over blocks: feature similarity {analysis.feature_similarity:.6f}."],
    )


def _displacements_sheet(analysis: Analysis) -> Sheet:
    rows = []
    for task, moved in analysis.displacements.items():
        farthest = max(moved, key=lambda name: moved[name])
        rows.append([task, f"{statistics.mean(moved.values()):.4f}", f"{moved[farthest]:.4f}", farthest])
    return Sheet("Change of the coefficients by each task", ["task", "mean ‖ΔC‖", "largest", "in weight"], rows)


def _group_names(analysis: Analysis) -> tuple[dict[str, str], str]:
    """Shortens the names of groups to their differences: the parts that all kinds share are left out.

    Returns:
        Short name by group name, and a note that gives the shared parts.
    """
    kinds = [group.kind.split(".") for group in analysis.groups]
    start = _common_length(kinds)
    end = _common_length([kind[: start - 1 if start else None : -1] for kind in kinds])
    names = {
        group.name: f"{'.'.join(kind[start : len(kind) - end])}:{group.number}"
        for group, kind in zip(analysis.groups, kinds, strict=True)
    }
    pattern = ".".join([*kinds[0][:start], "…", *kinds[0][len(kinds[0]) - end :]])
    return names, f"Groups are NAME:NUMBER, for weights {pattern} in order of depth."


def _common_length(names: Sequence[Sequence[str]]) -> int:
    """Counts the leading parts that all names share; at least one part of each name is left over."""
    shortest = min(map(len, names))
    return next((i for i in range(shortest - 1) if len({name[i] for name in names}) > 1), shortest - 1)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"
