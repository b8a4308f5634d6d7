"""Methods beside one another: several configurations, each with several seeds, and one table."""

import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from recast_pl.engines import Engine, run_units
from recast_pl.errors import RunError
from recast_pl.files import read_json, write_atomic
from recast_pl.metrics import forward_transfer
from recast_pl.report import table_csv

Summary = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Runs of methods × seeds below one folder, as `FOLDER/METHOD/SEED`.

    Args:
        folder: Of the comparison.
        base: Configurations that all methods share, in order; empty for none.
        configs: One configuration for each method, laid over the base.
        seeds: Of the runs.
        options: Further words of `fit`, for all runs.
        alone: The method, of those in `configs`, whose runs say what each task reaches by itself, such as
            `finetune_each`; it adds forward transfer, from runs of the same seed, to the table. None for none.

    Raises:
        RunError: If two configurations have one name, or `alone` names none.
    """

    folder: Path
    base: Sequence[str]
    configs: Sequence[str]
    seeds: Sequence[int]
    options: Sequence[str] = field(default=())
    alone: str | None = None

    def __post_init__(self) -> None:
        names = self.methods
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise RunError(f"two configurations are named {twice[0]!r}; rename one, as its runs are kept by that name")
        if self.alone is not None and self.alone not in names:
            raise RunError(f"--alone {self.alone!r} is none of the configurations; choose one of {', '.join(names)}")

    @property
    def methods(self) -> list[str]:
        """Names of the configurations, less their folders."""
        return [Path(config).stem for config in self.configs]

    def words(self, method: int, seed: int) -> list[str]:
        """The command line of `fit` for one run, which goes on with what is there.

        Args:
            method: Position of the configuration.
            seed: Seed of the run.
        """
        configs = [word for config in (*self.base, self.configs[method]) for word in ("--config", config)]
        run_dir = self.folder / self.methods[method] / str(seed)
        own = ["--seed_everything", str(seed), "--run_dir", str(run_dir), "--resume", "true"]
        return ["fit", *configs, *self.options, *own]

    def run(self, engine: Engine) -> int:
        """Learns what is not learnt yet, and writes the table after every run.

        Args:
            engine: Where the runs are made.

        Returns:
            0, or the status of the first run that failed.
        """
        runs = itertools.product(enumerate(self.methods), self.seeds)
        units = {f"{name} with seed {seed}": self.words(method, seed) for (method, name), seed in runs}
        status = run_units(engine, units, lambda name: self.write())
        if status:
            print("the same command goes on from there", file=sys.stderr)
        return status

    def write(self) -> None:
        """Writes `comparison.csv` and `comparison.md` from all finished runs in the folder, whatever their seeds."""
        header, *rows = self._cells()
        write_atomic(self.folder / "comparison.csv", table_csv(header, rows))
        write_atomic(self.folder / "comparison.md", _markdown(header, rows))

    def table(self) -> Table:
        """The same table, for the terminal."""
        table = Table(box=box.SIMPLE, pad_edge=False)
        header, *rows = self._cells()
        for heading in header:
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for row in rows:
            table.add_row(*row)
        return table

    def _cells(self) -> list[list[str]]:
        runs = {name: self._runs(name) for name in self.methods}
        tasks = max((len(run["tasks"]) for seeds in runs.values() for run in seeds.values()), default=0)
        finished = {  # all runs have the same tasks
            name: {seed: run for seed, run in seeds.items() if len(run["tasks"]) == tasks}
            for name, seeds in runs.items()
        }
        alone = None if self.alone is None else finished[self.alone]
        header = [*_FACTS, *_MEASURES, *([] if alone is None else ["forward transfer"])]
        return [header, *(_row(name, seeds, alone) for name, seeds in finished.items() if seeds)]

    def _runs(self, name: str) -> dict[int, Summary]:
        """What the runs of a method say, by seed."""
        paths = sorted((self.folder / name).glob("*/summary.json"))
        return {
            run["seed"]: run
            for run in (read_json(path, RunError, seed=int, tasks=list, accuracy_matrix=list) for path in paths)
        }


def _row(name: str, runs: Mapping[int, Summary], alone: Mapping[int, Summary] | None) -> list[str]:
    summaries = list(runs.values())
    tasks = [task for summary in summaries for task in summary["tasks"]]
    cells = [
        name,
        str(len(summaries)),
        f"{statistics.mean(task['task_parameters'] for task in tasks):,.0f}",
        f"{statistics.mean(task['patch_bytes'] for task in tasks):,.0f}",
        f"{statistics.mean(summary.get('shared_bytes', 0) for summary in summaries):,.0f}",
        *(_spread([summary[key] for summary in summaries]) for key in _MEASURES.values()),
    ]
    if alone is not None:
        gains = [_forward_transfer(runs[seed], alone[seed]) for seed in runs.keys() & alone.keys()]
        cells.append(_spread(gains) if gains else "")
    return cells


def _forward_transfer(run: Summary, alone: Summary) -> float:
    return forward_transfer(run["accuracy_matrix"], [task["accuracy"] for task in alone["tasks"]])


_FACTS = ["method", "seeds", "numbers per task", "bytes per task", "bytes shared"]
_MEASURES = {
    "average accuracy %": "average_accuracy",
    "anytime accuracy %": "average_anytime_accuracy",
    "forgetting": "forgetting",
}


def _spread(values: Sequence[float]) -> str:
    """Mean and, of several values, the sample standard deviation."""
    mean = f"{statistics.mean(values) + 0.0:.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))
