"""Tables: for the terminal, as CSV and as Markdown."""

import csv
import io
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from recast_pl.data.catalogue import DataSet
from recast_pl.learning.patch import TaskPatch
from recast_pl.rules import size_text
from recast_pl.runs.class_results import ClassResults, class_measures
from recast_pl.runs.metrics import matrix_lines
from recast_pl.runs.patch_merging import MergedAccuracy
from recast_pl.runs.patch_tools import PatchDifference, storage

Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows of a table."""

_CONFUSIONS = 20  # that a table shows

MOST_TASKS = 100
"""How many tasks the table of a stream shows, unless told otherwise."""

_LONGEST = 100  # characters of a line in a cell

_UNLIMITED = 10**6  # characters of a line


def stream_title(summary: Mapping[str, Any]) -> str:
    """Names a run by its method, backbone and seed, from the content of `summary.json`."""
    return f"{summary['method']} on {summary['backbone'].rpartition('.')[2]}, seed {summary['seed']}"


def stream_table(summary: Mapping[str, Any], most: int = MOST_TASKS) -> RenderableType:
    """Makes the terminal table of a stream's results from the content of `summary.json`, with the last `most` tasks."""
    final = summary["accuracy_matrix"][-1]
    changed = final != [task["accuracy"] for task in summary["tasks"]]
    end = ["at the\nend %"] if changed else []
    header = ["task", "classes", "images", "probe\n%", "accuracy\n%", *end, "numbers", "patch\nbytes", "seconds"]
    rows = []
    for task, last in list(zip(summary["tasks"], final, strict=True))[-most:]:
        accuracies = [task["probe_accuracy"], task["accuracy"], *([last] if changed else [])]
        sizes = f"{task['task_parameters']:,}", f"{task['patch_bytes']:,}", f"{task['seconds']:.0f}"
        counts = str(task["classes"]), str(task["train_images"])
        rows.append([task["name"], *counts, *(f"{accuracy:.2f}" for accuracy in accuracies), *sizes])
    keys = ("probe_accuracy", "accuracy") if changed else ("probe_accuracy",)
    means = [*(statistics.mean(task[key] for task in summary["tasks"]) for key in keys), summary["average_accuracy"]]
    total = ["average", "", "", *(f"{mean:.2f}" for mean in means), "", "", ""]

    def make(columns: Sequence[int], narrow: bool) -> Table:
        title = Text(stream_title(summary))
        table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), show_edge=False)
        for column in columns:
            table.add_column(
                Text(header[column]), justify="right" if column else "left", no_wrap=not narrow or column > 0
            )
        for row in rows:
            table.add_row(*(Text(row[column]) for column in columns))
        table.add_section()
        table.add_row(*(Text(total[column]) for column in columns))
        return table

    shared = f", {summary['shared_bytes'] / 1e6:,.1f} MB shared by all tasks" if summary["shared_bytes"] else ""
    facts = (  # adding 0 turns -0.0 into 0.0
        f"forgetting {summary['forgetting'] + 0.0:.2f}, backward transfer {summary['backward_transfer'] + 0.0:.2f} "
        f"points{shared}; {summary['wall_seconds']:.0f} s in all"
    )
    count = len(summary["tasks"])
    left_out = [f"the last {most} of {count:,} tasks; list shows all"] if count > most else []
    return Group(FoldingTable(make, len(header), 1), *left_out, "", facts, *_class_facts(summary))


def _class_facts(summary: Mapping[str, Any]) -> Iterator[str]:
    """Says how well images are classified among the classes of all tasks, if that was measured."""
    if "class_accuracies" in summary:
        count = sum(task["classes"] for task in summary["tasks"])
        values = (f"{name} {values[-1]:.2f}" for name, values in summary["class_accuracies"].items())
        yield f"accuracy % over all {count} classes: {', '.join(values)}"


def evaluation_table(rows: Sequence[tuple[str, float, float | None]]) -> RenderableType:
    """Makes the terminal table of tasks with their recorded accuracy and, if any, their measured one in percent."""
    same, other = Text("equal"), Text("DIFFERENT", style="bold red")
    cells: list[list[str | Text]] = [
        [task, f"{recorded:.4f}", "", Text("not measured: its images are not here")]
        if measured is None
        else [task, f"{recorded:.4f}", f"{measured:.4f}", same if recorded == measured else other]
        for task, recorded, measured in rows
    ]
    return terminal_table((["task", "recorded %", "measured %", ""], cells))


def patch_tables(patch: TaskPatch, path: Path) -> list[RenderableType]:
    """Makes the terminal tables that describe a patch and its file."""
    tensors = [tensor for state in patch.pieces for tensor in state.values()]
    codes = sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.uint8)  # several to a byte
    numbers = f"{sum(tensor.numel() for tensor in tensors) - codes:,}"
    if codes:
        numbers += f", {codes:,} bytes of codes"
    head = sum(tensor.numel() for tensor in patch.head.values())
    facts = {
        "task": patch.task,
        "classes": f"{len(patch.classes)}: {', '.join(patch.classes)}",
        "method": " + ".join(patch.method),
        "base": patch.base,
        "input": f"{size_text(patch.image_size)}, mean {patch.mean}, std {patch.std}",
        "metrics": ", ".join(f"{name} {value:.2f}" for name, value in patch.metrics.items()) or "none",
        "numbers": f"{numbers} and a head of {head:,}",
        "file": storage(patch),
        "bytes": f"{path.stat().st_size:,}",
    }
    rows = [
        [name, "×".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."), f"{tensor.nbytes:,}"]
        for name, tensor in patch.stored.items()
    ]
    listed = terminal_table((["tensor", "shape", "type", "bytes"], rows))
    return [terminal_table((["", ""], [*map(list, facts.items())]), 2, str(path)), listed]


def difference_tables(difference: PatchDifference) -> list[RenderableType]:
    """Makes the terminal tables of the result of `compare_patches`."""
    changed = [[name, *("–" if fact is None else str(fact) for fact in facts)] for name, *facts in difference.facts]
    rows = [[t.name, f"{t.largest:.3e}", f"{t.relative:.3e}", f"{t.cosine:.6f}"] for t in difference.tensors]
    facts = terminal_table((["", "first", "second"], changed), 3) if changed else "all facts are equal"
    return [facts, terminal_table((["tensor", "largest |b − a|", "‖b − a‖ / ‖a‖", "cosine"], rows))]


def merge_table(rows: Sequence[MergedAccuracy], now: str = "merged") -> RenderableType:
    """Makes the terminal table of tasks with their test accuracies, and the means if all were measured.

    Args:
        rows: The tasks.
        now: What they are now, in a word.
    """
    cells = [
        [row.task, "", "", "not measured: its images are not here"]
        if row.alone is None or row.merged is None
        else [row.task, f"{row.alone:.2f}", f"{row.merged:.2f}", f"{row.merged - row.alone:+.2f}"]
        for row in rows
    ]
    known = [(row.alone, row.merged) for row in rows if row.alone is not None and row.merged is not None]
    if len(known) == len(rows):
        alone, merged = (statistics.fmean(values) for values in zip(*known, strict=True))
        cells.append(["average", f"{alone:.2f}", f"{merged:.2f}", f"{merged - alone:+.2f}"])
    return terminal_table((["task", "own patch %", f"{now} %", "difference"], cells))


def catalogue_table(catalogue: Mapping[str, DataSet], root: Path) -> RenderableType:
    """Makes the terminal table of the data sets known by name.

    Args:
        catalogue: The data sets.
        root: Folder of the downloaded data sets.
    """
    rows = []
    for name, row in catalogue.items():
        size = f"{row.native}×{row.native}" if row.native else "various"
        on_disk = "yes" if row.is_present(root) else "no"
        rows.append([name, row.title, on_disk, str(row.classes), f"{sum(row.images.values()):,}", size])
    table = terminal_table((["name", "what it is", "on disk", "classes", "images", "pixels"], rows), 3, keys=1)
    notes = [f"{name}: {row.note}" for name, row in catalogue.items() if row.note]
    return Group(table, *notes, f"folder: {root}; any torchvision classification set also works, as torchvision/CLASS")


def classes_markdown(results: ClassResults) -> str:
    """Writes the measures of the classes of a task as Markdown, and the most frequent confusions."""
    rows = [
        [plain(name), str(images), *("–" if value is None else f"{value:.2f}" for value in shares)]
        for name, images, *shares in class_measures(results)
    ]
    table = markdown_table((["class", "test images", "recall %", "precision %", "F1 %"], rows))
    names = [plain(name) for name in results["names"]]
    confused = [[names[label], names[predicted], str(n)] for label, predicted, n in results["confused"][:_CONFUSIONS]]
    return table + "\n" + (markdown_table((["class", "taken for", "images"], confused), 2) if confused else "")


def plain(text: str) -> str:
    """Escapes what Markdown would read as markup."""
    return "".join(f"\\{character}" if character in r"\`*_[]<>|#" else character for character in text)


def matrix_csv(matrix: Sequence[list[float | None]], tasks: Sequence[str]) -> str:
    """Writes the accuracy matrix as CSV: a row for each trained task, a column for each tested one."""
    names = (table_csv([name], []).rstrip("\n") for name in tasks)  # quoted where that is needed
    rows = zip(names, matrix_lines(matrix, ",", ""), strict=True)
    return table_csv(["after", *tasks], []) + "".join(f"{name},{line}\n" for name, line in rows)


def table_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Writes rows as CSV with a header line; a cell that is None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(cells: Cells, text_columns: int = 1) -> str:
    """Writes a table as Markdown; escapes `|` in cells.

    Args:
        cells: Header and rows.
        text_columns: Number of columns, from the left, that hold text; the others are aligned right.
    """
    header, rows = cells
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    plain = ([cell.replace("|", r"\|") for cell in row] for row in (header, rule, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in plain)


def terminal_table(
    cells: tuple[Sequence[str], Sequence[Sequence[str | Text]]],
    text_columns: int = 1,
    title: str | None = None,
    keys: int | None = None,
) -> RenderableType:
    """Makes a table for the terminal.

    Args:
        cells: Header and rows.
        text_columns: Number of columns, from the left, that hold text; the others are aligned right.
        title: Line above the table; None for no title.
        keys: Number of columns, from the left, that name a row; None for all that hold text.
    """
    header, rows = cells

    def make(columns: Sequence[int], narrow: bool) -> Table:
        table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
        for column in columns:
            text = column < text_columns
            heading = _fold(header[column], [row[column] for row in rows]) if narrow else header[column]
            align: Literal["left", "right"] = "left" if text else "right"
            table.add_column(Text(heading), justify=align, overflow="fold", no_wrap=not text, max_width=_LONGEST)
        for row in rows:
            table.add_row(*(_cell(row[column]) for column in columns))
        return table

    return FoldingTable(make, len(header), max(1, text_columns) if keys is None else keys)


class FoldingTable:
    """A table that loses no column on a narrow terminal: it continues below itself, and repeats its first columns.

    In a file or a pipe it is as wide as its content; `Console.print` then needs `crop=False`.

    Args:
        make: Makes the table of some columns, by position, or of narrow ones.
        columns: Number of columns.
        keys: Number of columns, from the left, that are repeated, because they name a row.
    """

    def __init__(self, make: Callable[[Sequence[int], bool], Table], columns: int, keys: int) -> None:
        self.make, self.columns, self.keys = make, columns, keys

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(max_width=_UNLIMITED)
        limit = options.max_width if console.is_terminal else _UNLIMITED

        def width(columns: Sequence[int], narrow: bool) -> int:
            return Measurement.get(console, free, self.make(columns, narrow)).maximum

        def fits(columns: Sequence[int], narrow: bool) -> bool:
            return limit == _UNLIMITED or width(columns, narrow) <= limit  # to measure a long table takes a while

        narrow = not fits(range(self.columns), False)
        for part in self._parts(lambda columns: fits(columns, narrow)):
            table = self.make(part, narrow)
            if part[-1] >= self.keys and self.keys not in part and self.columns > self.keys:
                table.title = None  # continued
            yield from console.render(table, options.update(width=min(limit, width(part, narrow))))

    def _parts(self, fits: Callable[[Sequence[int]], bool]) -> Iterator[list[int]]:
        """Yields the columns of each table, as many as fit."""
        names = list(range(self.keys))
        part = list(names)
        for column in range(self.keys, self.columns):
            if len(part) > self.keys and not fits([*part, column]):
                yield part
                part = list(names)
            part.append(column)
        yield part


def _fold(heading: str, cells: Sequence[str | Text]) -> str:
    """Breaks a heading into lines that are about as long as the cells below it."""
    longest = max((len(cell) for cell in cells), default=0)
    return textwrap.fill(heading, max(longest, *map(len, heading.split()), 1), break_long_words=False)


def _cell(content: str | Text) -> Text:
    return Text(content) if isinstance(content, str) else content  # not as markup: names may have brackets
