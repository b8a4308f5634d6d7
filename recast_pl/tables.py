"""Tables: for the terminal, as CSV and as Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from recast_pl.data.catalogue import DataSet
from recast_pl.metrics import Matrix

Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows of a table."""


def stream_table(summary: Mapping[str, Any]) -> RenderableType:
    """The result of a stream, for the terminal.

    Args:
        summary: The content of `summary.json`.
    """
    title = f"{summary['method']} on {summary['backbone'].rpartition('.')[2]}, seed {summary['seed']}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("task", no_wrap=True)
    final = summary["accuracy_matrix"][-1]
    changed = final != [task["accuracy"] for task in summary["tasks"]]
    end = ("at the end %",) if changed else ()
    for heading in ("classes", "images", "probe %", "accuracy %", *end, "numbers", "patch bytes", "seconds"):
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
    return Group(table, facts)


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
        table.add_column(heading, justify="left" if column < texts else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _points(value: float) -> str:
    return f"{value + 0.0:.2f}"  # adding 0 turns -0.0 into 0.0
