"""A sweep: the points of a grid, each with several seeds, in tables and a figure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import Group, RenderableType
from rich.text import Text

from recast_pl.files import write_atomic
from recast_pl.reporting.measures import TASK_PARAMETERS, sweep_marks
from recast_pl.reporting.plots import plot_marks, write_figure
from recast_pl.reporting.published import published_tables
from recast_pl.reporting.tables import Cells, markdown_table, table_csv, terminal_table
from recast_pl.runs.folder import Summary
from recast_pl.runs.metrics import final_accuracies, spread
from recast_pl.studies.comparison import Comparison


@dataclass(frozen=True)
class Sweep(Comparison):
    """A comparison of the points of a grid, with a figure. It takes the arguments of `Comparison`, and four more.

    If others report accuracies for some points, two more tables show ours beside them.

    Args:
        x: Key on the horizontal axis, or `task_parameters`.
        series: Keys that tell lines or bars apart.
        over: Key over which the second table takes means; None for no second table.
        notes: Sentences below the tables.
    """

    x: str = TASK_PARAMETERS
    series: Sequence[str] = field(default=())
    over: str | None = None
    notes: Sequence[str] = ()

    FILE: ClassVar[str] = "sweep"
    HEADING = "point"

    def write(self) -> None:
        """Writes the tables as CSV and Markdown and the figure as PNG and SVG, from all finished runs in the folder."""
        super().write()
        if self.over is not None:
            cells = self._over_cells(self.over)
            name = f"{self.FILE}_over_{self.over.rpartition('.')[2]}"
            write_atomic(self.folder / f"{name}.csv", table_csv(*cells))
            write_atomic(self.folder / f"{name}.md", markdown_table(cells, len(cells[0]) - _OVER_COLUMNS))
        notes = "".join(f"\n{note}\n" for note in self.notes)
        for name, cells in self._published().items():
            write_atomic(self.folder / f"{self.FILE}_{name}.csv", table_csv(*cells))
            write_atomic(self.folder / f"{self.FILE}_{name}.md", markdown_table(cells) + notes)
        finished = {name: list(runs.values()) for name, runs in self.finished().items()}
        if marks := sweep_marks({point.name: point.labels for point in self.points}, finished, self.x, self.series):
            write_figure(
                plot_marks(marks, self.x, title=f"Average accuracy by {self.x.replace('_', ' ')}"),
                self.folder / self.FILE,
            )

    def table(self) -> RenderableType:
        """Returns the same tables for the terminal; those beside reported accuracies take the place of the first."""
        published = [terminal_table(cells) for cells in self._published().values()]
        tables = published or [super().table()]
        if self.over is not None:
            cells = self._over_cells(self.over)
            tables.append(terminal_table(cells, len(cells[0]) - _OVER_COLUMNS, f"over {self.over}"))
        return Group(*tables, *map(Text, self.notes))

    def plan(self) -> dict[str, Any]:
        """Returns the content of `plan.json`, with the axes of the figure and what others report."""
        published = {point.name: dict(point.published) for point in self.points if point.published}
        return {**super().plan(), "x": self.x, "series": list(self.series), "published": published}

    def _published(self) -> dict[str, Cells]:
        """Returns the tables beside reported accuracies by name; none if there are no such accuracies."""
        points = {point.name: (point.labels, point.published) for point in self.points}
        finished = {name: list(runs.values()) for name, runs in self.finished().items()}
        return published_tables(points, finished, len(self.seeds))

    def _over_cells(self, over: str) -> Cells:
        """Returns the table of means over points that differ only in one key."""
        finished = self.finished()
        by_others: dict[tuple[str, ...], list[Mapping[int, Summary]]] = {}
        for point in self.points:
            if point.name in finished:
                others = tuple(str(label) for key, label in point.labels.items() if key != over)
                by_others.setdefault(others, []).append(finished[point.name])
        keys = [key for key in self._keys if key != over]
        header = [*keys, f"values of {over}", "average accuracy %", "range", "largest change of a task"]
        return header, [[*others, *_over_measures(points)] for others, points in by_others.items()]


_OVER_COLUMNS = 4


def _over_measures(points: Sequence[Mapping[int, Summary]]) -> list[str]:
    """Formats the mean and range of accuracy over points, and the largest change of a task's accuracy at equal seed."""
    means = [statistics.mean(run["average_accuracy"] for run in runs.values()) for runs in points]
    by_task: dict[tuple[int, str], list[float]] = {}
    for seed in set.intersection(*(set(runs) for runs in points)):
        for runs in points:
            for task, accuracy in final_accuracies(runs[seed]).items():
                by_task.setdefault((seed, task), []).append(accuracy)
    changes = [max(values) - min(values) for values in by_task.values()]
    largest = f"{max(changes):.2f}" if changes else ""
    return [str(len(points)), str(spread(means)), f"{max(means) - min(means):.2f}", largest]
