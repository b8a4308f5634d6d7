"""A comparison: several points, such as methods, each with several seeds, in one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from rich.console import RenderableType

from recast_pl.errors import RunError
from recast_pl.files import json_text, write_atomic
from recast_pl.reporting.measures import known_measures, measures
from recast_pl.reporting.published import Published
from recast_pl.reporting.tables import Cells, markdown_table, table_csv, terminal_table
from recast_pl.runs.collection import PLAN, Label, is_complete
from recast_pl.runs.folder import RunFolder, Summary
from recast_pl.runs.metrics import forward_transfer, spread
from recast_pl.runs.pace import Pace
from recast_pl.studies.engines import Engine, run_unfinished


class Point(NamedTuple):
    """An entry of a comparison, such as a method.

    Args:
        name: Name of its folder.
        words: Options of `fit`.
        labels: Labels for the table.
        published: Accuracies that others report for it; empty if there are none.
    """

    name: str
    words: Sequence[str]
    labels: Mapping[str, Label]
    published: Published = MappingProxyType({})


def config_words(configs: Sequence[str]) -> list[str]:
    """Returns the options of `fit` that lay configs over one another, in the given order."""
    return [word for config in configs for word in ("--config", config)]


@dataclass(frozen=True)
class Comparison:
    """Runs of points × seeds in one folder, as FOLDER/POINT/SEED.

    Args:
        folder: Output folder.
        points: The points.
        seeds: Seeds of the runs of each point.
        options: Further options of `fit`, for all runs.
        alone: Name of the point that trains each task by itself, such as `finetune_each`; the table then shows forward
            transfer against its runs of the same seed. None for no forward transfer.

    Raises:
        RunError: If there are no points, two points have one name, or no point is named `alone`.
    """

    folder: Path
    points: Sequence[Point]
    seeds: Sequence[int]
    options: Sequence[str] = ()
    alone: str | None = None

    FILE: ClassVar[str] = "comparison"
    """Name of the output files, without suffix."""
    HEADING = "method"
    """The word for a point in tables and errors."""

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        folded = [name.casefold() for name in names]  # some file systems ignore case
        twice = [name for name in names if folded.count(name.casefold()) > 1]
        if not names:
            raise RunError(f"no {self.HEADING} is given; give at least one")
        if twice:
            raise RunError(f"two {self.HEADING}s are named {twice[0]!r}; rename one, which names the folder")
        if self.alone is not None and self.alone not in names:
            raise RunError(f"--alone {self.alone!r} is not one of the {self.HEADING}s; choose from {', '.join(names)}")

    def units(self) -> dict[str, list[str]]:
        """Returns the command line that starts or resumes each run, by name."""
        return {f"{p.name} with seed {seed}": self._words(p, seed) for p in self.points for seed in self.seeds}

    def run(self, engine: Engine, is_finished: Callable[[Sequence[str]], bool]) -> int:
        """Trains what is not trained, and writes the table now and then, and at the end; arguments as in `Study`."""
        write_atomic(self.folder / PLAN, json_text(self.plan()))
        pace = Pace()
        try:
            return run_unfinished(engine, self.units(), is_finished, lambda name: pace.run(self.write))
        finally:
            if self.finished():
                self.write()

    def _words(self, point: Point, seed: int) -> list[str]:
        """Returns the command line that starts or resumes a run."""
        run_dir = self.folder / point.name / str(seed)
        own = ["--seed_everything", str(seed), "--run_dir", str(run_dir), "--resume", "true"]
        return ["fit", *point.words, *self.options, *own]

    def plan(self) -> dict[str, Any]:
        """Returns the content of `plan.json`, which tells a report which runs are missing."""
        return {"points": {point.name: dict(point.labels) for point in self.points}, "seeds": list(self.seeds)}

    def write(self) -> None:
        """Writes the table as CSV and Markdown, from all finished runs in the folder, including other seeds."""
        cells = self._cells()
        write_atomic(self.folder / f"{self.FILE}.csv", table_csv(*cells))
        write_atomic(self.folder / f"{self.FILE}.md", markdown_table(cells, 1 + len(self._keys)))

    def table(self) -> RenderableType:
        """Returns the same table for the terminal, without the names of points if their labels are unique."""
        header, rows = self._cells()
        texts = 1 + len(self._keys)
        labels = {tuple(row[1:texts]) for row in rows}
        first = 1 if self._keys and len(labels) == len(rows) else 0
        return terminal_table((header[first:], [row[first:] for row in rows]), texts - first)

    def finished(self) -> dict[str, dict[int, Summary]]:
        """Reads the summaries of finished runs by point and seed; points without any are left out."""
        found: dict[str, list[Summary]] = {}
        for point in self.points:
            paths = sorted((self.folder / point.name).glob(f"*/{RunFolder.SUMMARY}"))
            found[point.name] = [RunFolder(path.parent).read_summary() for path in paths]
        tasks = max((len(run["tasks"]) for runs in found.values() for run in runs), default=0)
        finished = {  # a run with fewer tasks than another one is still missing some
            name: {run["seed"]: run for run in runs if is_complete(run) and len(run["tasks"]) == tasks}
            for name, runs in found.items()
        }
        return {name: runs for name, runs in finished.items() if runs}

    @property
    def has_results(self) -> bool:
        """Returns whether any run is finished."""
        return bool(self.finished())

    @property
    def _keys(self) -> list[str]:
        """Returns the keys of the labels of all points."""
        return list(dict.fromkeys(key for point in self.points for key in point.labels))

    def _cells(self) -> Cells:
        finished, keys = self.finished(), self._keys
        values = {name: measures(list(runs.values())) for name, runs in finished.items()}
        known = known_measures(values.values())
        rows = [
            [
                point.name,
                *(str(point.labels.get(key, "")) for key in keys),
                *(values[point.name][heading] for heading in known),
                *self._transfer(finished, point.name),
            ]
            for point in self.points
            if point.name in finished
        ]
        return [self.HEADING, *keys, *known, *([] if self.alone is None else ["forward transfer"])], rows

    def _transfer(self, finished: Mapping[str, Mapping[int, Summary]], name: str) -> list[str]:
        """Returns the forward transfer of a point, empty if there are no runs to compare with; none without `alone`."""
        if self.alone is None:
            return []
        runs, alone = finished[name], finished.get(self.alone, {})
        gains = [
            forward_transfer(runs[seed]["accuracy_matrix"], [task["accuracy"] for task in alone[seed]["tasks"]])
            for seed in runs.keys() & alone.keys()
        ]
        return [str(spread(gains)) if gains else ""]
