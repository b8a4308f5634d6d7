"""A comparison: several points, such as methods, each with several seeds, in one table."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from recast_pl.errors import RunError
from recast_pl.files import json_text, write_atomic
from recast_pl.reporting.measures import MEASURES, measures
from recast_pl.reporting.tables import Cells, markdown_table, table_csv, terminal_table
from recast_pl.runs.collection import PLAN, Label, is_complete
from recast_pl.runs.folder import RunFolder, Summary
from recast_pl.runs.metrics import forward_transfer, spread
from recast_pl.studies.engines import Engine, run_units


@dataclass(frozen=True)
class Point:
    """What runs with different seeds share.

    Args:
        name: Name of the folder that holds the runs.
        words: Command-line words for `fit`.
        labels: Labels by key, each a column of the table; empty if the name is enough.
    """

    name: str
    words: Sequence[str]
    labels: Mapping[str, Label] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs of points × seeds in one folder, as FOLDER/POINT/SEED.

    Args:
        folder: Output folder.
        points: What is compared, such as methods.
        seeds: Seeds of the runs of each point.
        options: Further command-line words for `fit`, for all runs.
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

    FILE = "comparison"
    """Name of the output files without suffix."""
    HEADING = "method"
    """What users call a point."""

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        folded = [name.casefold() for name in names]  # some file systems ignore case
        twice = [name for name in names if folded.count(name.casefold()) > 1]
        if not names:
            raise RunError(f"no {self.HEADING} is given; give at least one")
        if twice:
            raise RunError(f"two {self.HEADING}s are named {twice[0]!r}; rename one, which names the folder")
        if self.alone is not None and self.alone not in names:
            raise RunError(f"no {self.HEADING} is named --alone {self.alone!r}; choose one of {', '.join(names)}")

    def words(self, point: Point, seed: int) -> list[str]:
        """Returns the command line of `fit` that starts or resumes a run.

        Args:
            point: The point.
            seed: Seed of the run.
        """
        run_dir = self.folder / point.name / str(seed)
        own = ["--seed_everything", str(seed), "--run_dir", str(run_dir), "--resume", "true"]
        return ["fit", *point.words, *self.options, *own]

    def run(self, engine: Engine, is_finished: Callable[[Sequence[str]], bool]) -> int:
        """Trains the runs that are not finished, and writes the table after every run.

        Args:
            engine: Where to train.
            is_finished: Tells whether the run of a command line is finished. It raises RunError for a command line
                that `fit` would refuse, so that the user learns of a mistake before the first run.

        Returns:
            0, or the status of the first run that failed.
        """
        write_atomic(self.folder / PLAN, json_text(self.plan()))
        units = {f"{p.name} with seed {seed}": self.words(p, seed) for p in self.points for seed in self.seeds}
        left = {name: words for name, words in units.items() if not is_finished(words)}
        if len(left) < len(units):
            print(f"{len(units) - len(left)} of {len(units)} runs are finished", file=sys.stderr)
            self.write()
        status = run_units(engine, left, lambda name: self.write()) if left else 0
        if status:
            print("run the same command again to continue", file=sys.stderr)
        return status

    def plan(self) -> dict[str, Any]:
        """Describes the comparison for `plan.json`, from which a report knows which runs are missing."""
        return {"points": {point.name: dict(point.labels) for point in self.points}, "seeds": list(self.seeds)}

    def write(self) -> None:
        """Writes the table as CSV and Markdown, from all finished runs in the folder, including other seeds."""
        cells = self._cells()
        write_atomic(self.folder / f"{self.FILE}.csv", table_csv(*cells))
        write_atomic(self.folder / f"{self.FILE}.md", markdown_table(cells, 1 + len(self._keys)))

    def table(self) -> RenderableType:
        """Makes the same table for the terminal, without the names of points where labels tell them apart."""
        header, rows = self._cells()
        texts = 1 + len(self._keys)
        labels = {tuple(row[1:texts]) for row in rows}
        first = 1 if self._keys and len(labels) == len(rows) else 0
        return terminal_table((header[first:], [row[first:] for row in rows]), texts - first)

    def finished(self) -> dict[str, dict[int, Summary]]:
        """Reads the summaries of finished runs by point and seed; points without any are left out."""
        runs: dict[str, dict[int, Summary]] = {}
        for point in self.points:
            paths = sorted((self.folder / point.name).glob(f"*/{RunFolder.SUMMARY}"))
            found = [RunFolder(path.parent).read_summary() for path in paths]
            runs[point.name] = {run["seed"]: run for run in found}
        tasks = max((len(run["tasks"]) for seeds in runs.values() for run in seeds.values()), default=0)
        whole = {  # all runs have the same tasks
            name: {seed: run for seed, run in seeds.items() if is_complete(run) and len(run["tasks"]) == tasks}
            for name, seeds in runs.items()
        }
        return {name: seeds for name, seeds in whole.items() if seeds}

    @property
    def _keys(self) -> list[str]:
        """The keys of the labels of all points."""
        return list(dict.fromkeys(key for point in self.points for key in point.labels))

    def _cells(self) -> Cells:
        finished, keys = self.finished(), self._keys
        transfer = [] if self.alone is None else ["forward transfer"]
        rows = [
            [point.name, *(str(point.labels.get(key, "")) for key in keys), *self._measures(finished, point.name)]
            for point in self.points
            if point.name in finished
        ]
        return [self.HEADING, *keys, *MEASURES, *transfer], rows

    def _measures(self, finished: Mapping[str, Mapping[int, Summary]], name: str) -> list[str]:
        runs = finished[name]
        cells = measures(list(runs.values()))
        if self.alone is not None:
            alone = finished.get(self.alone, {})
            gains = [
                forward_transfer(runs[seed]["accuracy_matrix"], [task["accuracy"] for task in alone[seed]["tasks"]])
                for seed in runs.keys() & alone.keys()
            ]
            cells.append(str(spread(gains)) if gains else "")
        return cells
