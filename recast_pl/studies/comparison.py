"""Runs beside one another: several points, such as methods, each with several seeds, and one table."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from recast_pl.errors import RunError
from recast_pl.files import json_text, read_json, write_atomic
from recast_pl.reporting.measures import MEASURES, measures
from recast_pl.reporting.tables import Cells, markdown_table, table_csv, terminal_table
from recast_pl.runs.collection import PLAN, Label, Summary, is_whole
from recast_pl.runs.metrics import forward_transfer, spread
from recast_pl.studies.engines import Engine, run_units


@dataclass(frozen=True)
class Point:
    """What runs with different seeds have in common.

    Args:
        name: Of the folder that holds the runs.
        words: Words of `fit`.
        labels: What the point stands for, by the key in whose column the table says it; none if the name is enough.
    """

    name: str
    words: Sequence[str]
    labels: Mapping[str, Label] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs of points × seeds below one folder, as `FOLDER/POINT/SEED`.

    Args:
        folder: Of the comparison.
        points: What is compared, such as methods.
        seeds: Of the runs.
        options: Further words of `fit`, for all runs.
        alone: The point, of those given, whose runs say what each task reaches by itself, such as `finetune_each`; it
            adds forward transfer, from runs of the same seed, to the table. None for none.

    Raises:
        RunError: If there is no point, two points have one name, or `alone` names none.
    """

    folder: Path
    points: Sequence[Point]
    seeds: Sequence[int]
    options: Sequence[str] = ()
    alone: str | None = None

    FILE = "comparison"
    """Name of the files that are written, less their endings."""
    HEADING = "method"
    """What a point is called."""

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        folded = [name.casefold() for name in names]  # some file systems do not tell them apart
        twice = [name for name in names if folded.count(name.casefold()) > 1]
        if not names:
            raise RunError(f"there is no {self.HEADING} to learn by; give at least one")
        if twice:
            raise RunError(f"two {self.HEADING}s are named {twice[0]!r}; rename one, as its runs are kept by that name")
        if self.alone is not None and self.alone not in names:
            raise RunError(f"--alone {self.alone!r} is none of the {self.HEADING}s; choose one of {', '.join(names)}")

    def words(self, point: Point, seed: int) -> list[str]:
        """The command line of `fit` for one run, which goes on with what is there.

        Args:
            point: What is learnt.
            seed: Seed of the run.
        """
        run_dir = self.folder / point.name / str(seed)
        own = ["--seed_everything", str(seed), "--run_dir", str(run_dir), "--resume", "true"]
        return ["fit", *point.words, *self.options, *own]

    def run(self, engine: Engine, is_finished: Callable[[Sequence[str]], bool]) -> int:
        """Learns what is not learnt yet, and writes the table after every run.

        Args:
            engine: Where the runs are made.
            is_finished: Whether the run of a command line is finished; refuses one that cannot be understood, so that
                this is known before the first run rather than hours later.

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
            print("the same command goes on from there", file=sys.stderr)
        return status

    def plan(self) -> dict[str, Any]:
        """What is to be learnt, for `plan.json`, by which a report knows what is missing."""
        return {"points": {point.name: dict(point.labels) for point in self.points}, "seeds": list(self.seeds)}

    def write(self) -> None:
        """Writes the table as CSV and Markdown, from all finished runs in the folder, whatever their seeds."""
        cells = self._cells()
        write_atomic(self.folder / f"{self.FILE}.csv", table_csv(*cells))
        write_atomic(self.folder / f"{self.FILE}.md", markdown_table(cells, 1 + len(self._keys)))

    def table(self) -> RenderableType:
        """The same table, for the terminal: where labels tell points apart, without their names."""
        header, rows = self._cells()
        texts = 1 + len(self._keys)
        labels = {tuple(row[1:texts]) for row in rows}
        first = 1 if self._keys and len(labels) == len(rows) else 0
        return terminal_table((header[first:], [row[first:] for row in rows]), texts - first)

    def finished(self) -> dict[str, dict[int, Summary]]:
        """What finished runs say, by name of the point and seed; points without any are left out."""
        runs = {point.name: self._runs(point.name) for point in self.points}
        tasks = max((len(run["tasks"]) for seeds in runs.values() for run in seeds.values()), default=0)
        whole = {  # all runs have the same tasks
            name: {seed: run for seed, run in seeds.items() if is_whole(run) and len(run["tasks"]) == tasks}
            for name, seeds in runs.items()
        }
        return {name: seeds for name, seeds in whole.items() if seeds}

    def _runs(self, name: str) -> dict[int, Summary]:
        """What the runs of a point say, by seed."""
        paths = sorted((self.folder / name).glob("*/summary.json"))
        return {
            run["seed"]: run
            for run in (read_json(path, RunError, seed=int, tasks=list, accuracy_matrix=list) for path in paths)
        }

    @property
    def _keys(self) -> list[str]:
        """Keys of the labels of all points."""
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
