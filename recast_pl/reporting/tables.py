"""Tables: for the terminal, as CSV and as Markdown."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recast_pl.data.catalogue import DataSet
from recast_pl.decomposition.analysis import Analysis, GroupAnalysis
from recast_pl.decomposition.bank import Scaling
from recast_pl.learning.patch import TaskPatch
from recast_pl.runs.metrics import Matrix
from recast_pl.runs.patch_tools import PatchDifference

Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows of a table."""


def stream_table(summary: Mapping[str, Any]) -> RenderableType:
    """The result of a stream, for the terminal.

    Args:
        summary: The content of `summary.json`.
    """
    title = f"{summary['method']} on {summary['backbone'].rpartition('.')[2]}, seed {summary['seed']}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("task", no_wrap=True)
    final = summary["accuracy_matrix"][-1]
    changed = final != [task["accuracy"] for task in summary["tasks"]]
    end = ("at the\nend %",) if changed else ()
    for heading in ("classes", "images", "probe\n%", "accuracy\n%", *end, "numbers", "patch\nbytes", "seconds"):
        table.add_column(heading, justify="right")
    for task, last in zip(summary["tasks"], final, strict=True):
        table.add_row(
            task["name"],
            str(task["classes"]),
            str(task["train_images"]),
            f"{task['probe_accuracy']:.2f}",
            f"{task['accuracy']:.2f}",
            *([f"{last:.2f}"] if changed else []),
            f"{task['task_parameters']:,}",
            f"{task['patch_bytes']:,}",
            f"{task['seconds']:.0f}",
        )
    probes = [task["probe_accuracy"] for task in summary["tasks"]]
    table.add_section()
    learnt = [f"{sum(task['accuracy'] for task in summary['tasks']) / len(final):.2f}"] if changed else []
    average = f"{summary['average_accuracy']:.2f}"
    table.add_row("average", "", "", f"{sum(probes) / len(probes):.2f}", *learnt, average)
    shared = f", {summary['shared_bytes'] / 1e6:,.1f} MB shared by all tasks" if summary["shared_bytes"] else ""
    facts = (
        f"forgetting {_points(summary['forgetting'])}, backward transfer {_points(summary['backward_transfer'])} "
        f"points{shared}; {summary['wall_seconds']:.0f} s in all"
    )
    return Group(table, "", facts)


def evaluation_table(rows: Sequence[tuple[str, float, float]]) -> Table:
    """Recorded and measured accuracies of tasks, for the terminal.

    Args:
        rows: Task, accuracy recorded in percent, accuracy measured in percent.
    """
    table = Table(box=box.SIMPLE)
    table.add_column("task")
    for heading in ("recorded %", "measured %", ""):
        table.add_column(heading, justify="right")
    for task, recorded, measured in rows:
        verdict = "equal" if recorded == measured else "[bold red]DIFFERENT[/]"
        table.add_row(task, f"{recorded:.4f}", f"{measured:.4f}", verdict)
    return table


def patch_tables(patch: TaskPatch, path: Path) -> list[RenderableType]:
    """What a patch is, for the terminal.

    Args:
        patch: The patch.
        path: Its file.
    """
    numbers = sum(tensor.numel() for state in patch.pieces for tensor in state.values())
    head = sum(tensor.numel() for tensor in patch.head.values())
    facts = {
        "task": patch.task,
        "classes": f"{len(patch.classes)}: {', '.join(patch.classes)}",
        "method": " + ".join(patch.method),
        "base": patch.base,
        "input": f"{patch.image_size}×{patch.image_size}, mean {patch.mean}, std {patch.std}",
        "metrics": ", ".join(f"{name} {value:.2f}" for name, value in patch.metrics.items()) or "none",
        "numbers": f"{numbers:,} and a head of {head:,}",
        "bytes": f"{path.stat().st_size:,}",
    }
    rows = [
        [name, "×".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."), f"{tensor.nbytes:,}"]
        for name, tensor in patch.tensors.items()
    ]
    tensors = terminal_table((["tensor", "shape", "type", "bytes"], rows))
    return [terminal_table((["", ""], [*map(list, facts.items())]), 2, str(path)), tensors]


def difference_tables(difference: PatchDifference) -> list[RenderableType]:
    """What differs between two patches, for the terminal.

    Args:
        difference: Of the patches.
    """
    told = [[name, *("–" if fact is None else str(fact) for fact in facts)] for name, *facts in difference.facts]
    rows = [[t.name, f"{t.largest:.3e}", f"{t.relative:.3e}", f"{t.cosine:.6f}"] for t in difference.tensors]
    facts = terminal_table((["", "first", "second"], told), 3) if told else "all facts are equal"
    return [facts, terminal_table((["tensor", "largest |b − a|", "‖b − a‖ / ‖a‖", "cosine"], rows))]


def catalogue_table(catalogue: Mapping[str, DataSet], root: Path) -> RenderableType:
    """The data sets known by name, for the terminal.

    Args:
        catalogue: Data sets by name.
        root: Folder in which they are looked for.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("name", "classes", "images", "pixels", "on disk", "what it is"):
        right = heading in ("classes", "images", "pixels")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for name, row in catalogue.items():
        size = f"{row.native}×{row.native}" if row.native else "various"
        on_disk = "yes" if row.is_present(root) else "no"
        table.add_row(name, str(row.classes), f"{sum(row.images.values()):,}", size, on_disk, row.title)
    notes = [f"{name}: {row.note}" for name, row in catalogue.items() if row.note]
    return Group(
        table, *notes, f"looked for in {root}; any classification set of torchvision too, as torchvision/CLASS"
    )


@dataclass(frozen=True)
class Sheet:
    """A table that reads the same on the terminal and in a file.

    Args:
        title: What it shows.
        headings: Of its columns; the first column holds names.
        rows: Cells.
        notes: What a reader must know, a paragraph each.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def printed(self) -> RenderableType:
        """For the terminal."""
        title = Text(self.title, style="bold")
        return Group(title, terminal_table((self.headings, self.rows)), *(Text(note) for note in self.notes), "")

    def markdown(self) -> str:
        """For a file."""
        table = markdown_table((self.headings, self.rows)).rstrip("\n")
        return "\n\n".join([f"## {self.title}", table, *self.notes]).replace("*", "\\*") + "\n"


def analysis_sheets(analysis: Analysis) -> list[Sheet]:
    """What an analysis found, as tables.

    Args:
        analysis: Of a decomposition; what it has no numbers of has no table.
    """
    sheets = [_templates_sheet(analysis), _scaling_sheet(analysis)]
    if analysis.targets:
        sheets.append(_targets_sheet(analysis))
    if analysis.features:
        sheets.append(_features_sheet(analysis))
    if analysis.displacements:
        sheets.append(_displacements_sheet(analysis))
    return sheets


def _templates_sheet(analysis: Analysis) -> Sheet:
    names, meaning = _short_names(analysis)
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
        ["group", "shape", "L", "n", "Frobenius", "pair", "entropy", "% max", "cosine"],
        rows,
        [
            f"{meaning} Groups are of one kind of weight; the paper's hold all weights of a layer.",
            "Frobenius: Σ ‖Ti − Tj‖ over pairs i<j / (n(n−1)), as the paper prints it: half the mean of a pair. "
            "Entropy: of the singular values divided by their sum, in nats, mean over templates; its largest value is "
            "ln min(rows, columns). Cosine: of the coefficients of two layers, mean over pairs."
            + (" –: one template, or one layer, has no pairs." if single else ""),
        ],
    )


def _scaling_sheet(analysis: Analysis) -> Sheet:
    names, _ = _short_names(analysis)
    parts = [(names[group.name], group.scaling) for group in analysis.groups]
    paper = analysis.paper
    approximation = (
        f"Paper's symbols: d²={paper.d2:,}, M={paper.modules}, L={paper.layers}, G={paper.groups}, "
        f"n={paper.templates}, K={paper.coefficient_sets}; d²·M·(L − G·n) = {paper.approximation:,}."
        if paper
        else "Groups differ in d², n, K or number, so that the paper's symbols have no one value; ≈ S sums d²·(L − n)."
    )
    return Sheet(
        "Numbers saved (section 3.3)",
        ["group", "dense", "templates", "coefficients", "kept", "S", "≈ S"],
        [[name, *_scaling_cells(scaling)] for name, scaling in [*parts, ("total", analysis.scaling)]],
        [
            "S = dense − templates − coefficients. A task trains the coefficients, and keeps the mean of their sets. "
            + approximation
        ],
    )


def _scaling_cells(scaling: Scaling) -> list[str]:
    counts = (scaling.dense, scaling.templates, scaling.coefficients, scaling.kept, scaling.saved)
    return [f"{count:,}" for count in (*counts, scaling.approximation)]


def _targets_sheet(analysis: Analysis) -> Sheet:
    found = {target.name: target for target in analysis.targets}
    names, _ = _short_names(analysis)
    rows = [[names[g.name], *_fidelity(g, [found[name].cosine for name in g.targets], min)] for g in analysis.groups]
    errors = [_fidelity(g, [found[name].relative_error for name in g.targets], max) for g in analysis.groups]
    mean = sum(target.cosine for target in analysis.targets) / len(analysis.targets)
    return Sheet(
        "Generated weights beside the pretrained ones",
        ["group", "cosine", "lowest", "relative error", "largest"],
        [[*row, *error] for row, error in zip(rows, errors, strict=True)],
        [f"Mean over all {len(analysis.targets)} weights: cosine {mean:.6f}."],
    )


def _fidelity(group: GroupAnalysis, values: Sequence[float], worst: Any) -> list[str]:
    return [f"{value:.6g}" for value in (sum(values) / len(group.targets), worst(values))]


def _features_sheet(analysis: Analysis) -> Sheet:
    rows = [[f.name, f"{f.mean:.6f}", f"{f.lowest:.6f}"] for f in analysis.features if f.kind != "layer"]
    return Sheet(
        "Features of the decomposed network beside those of the dense one",
        ["output of", "cosine", "lowest"],
        rows,
        ["Cosine of the flattened output, mean over images and lowest of them; layers are in analysis.json."],
    )


def _displacements_sheet(analysis: Analysis) -> Sheet:
    rows = []
    for task, moved in analysis.displacements.items():
        farthest = max(moved, key=lambda name: moved[name])
        rows.append([task, f"{sum(moved.values()) / len(moved):.4f}", f"{moved[farthest]:.4f}", farthest])
    return Sheet("Coefficients moved by each task", ["task", "mean ‖ΔC‖", "largest", "of"], rows)


def _short_names(analysis: Analysis) -> tuple[dict[str, str], str]:
    """Names of groups without what all kinds have in common, and what that is."""
    kinds = [group.kind.split(".") for group in analysis.groups]
    start, end = 0, 0
    while len({tuple(kind[: start + 1]) for kind in kinds}) == 1 and start + 1 < min(map(len, kinds)):
        start += 1
    while len({tuple(kind[len(kind) - end - 1 :]) for kind in kinds}) == 1 and start + end + 1 < min(map(len, kinds)):
        end += 1
    names = {
        group.name: f"{'.'.join(kind[start : len(kind) - end])}:{group.number}"
        for group, kind in zip(analysis.groups, kinds, strict=True)
    }
    whole = ".".join([*kinds[0][:start], "…", *kinds[0][len(kinds[0]) - end :]])
    return names, f"Groups NAME:NUMBER, of weights {whole} in order of depth."


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def matrix_csv(matrix: Matrix, tasks: Sequence[str]) -> str:
    """The accuracy matrix as CSV: a row for each task learnt, a column for each task tested, blank where none."""
    return table_csv(
        ["after", *tasks],
        ([name, *("" if v is None else v for v in row)] for name, row in zip(tasks, matrix, strict=True)),
    )


def table_csv(header: Sequence[str], rows: Any) -> str:
    """Rows as CSV text with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(cells: Cells, texts: int = 1) -> str:
    """A table as Markdown.

    Args:
        cells: Header and rows.
        texts: How many columns, from the left, hold text; the others are set flush right.
    """
    header, rows = cells
    rule = ["---" if column < texts else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def terminal_table(cells: Cells, texts: int = 1, title: str | None = None) -> Table:
    """A table for the terminal.

    Args:
        cells: Header and rows.
        texts: How many columns, from the left, hold text; the others are set flush right.
        title: What stands above it; None for nothing.
    """
    header, rows = cells
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
    for column, heading in enumerate(header):
        table.add_column(
            heading, justify="left" if column < texts else "right", overflow="fold", no_wrap=column >= texts
        )
    for row in rows:
        table.add_row(*row)
    return table


def _points(value: float) -> str:
    return f"{value + 0.0:.2f}"  # adding 0 turns -0.0 into 0.0
