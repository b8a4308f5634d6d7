r"""A board: methods × streams × seeds. Each method has the learning rate that is best on validation images.

```yaml
seeds: [42, 1998]
rates: [2.0e-3, 8.0e-3]              # of every method that names no others; one without trained numbers needs none
variables: {photos: data/photos}     # values for ${photos}, which the command line may replace
methods:                             # a config, a list of pieces, or one of both with rates of its own
  probe: methods/probe.yaml
  lora: [{class_path: recast_pl.LoRA, init_args: {rank: 1}}]
  whole: {config: methods/finetune_each.yaml, rates: [2.0e-5, 2.0e-4]}
streams:
  photos:
    base: [vit.yaml]
    config: {data: {tasks: [{name: birds, path: '${photos}/birds'}]}}  # laid over the base
    methods: {lora: methods/melo.yaml}                                 # in place of those of the same name
```
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rich.console import Group, RenderableType

from recast_pl.config.files import find_config
from recast_pl.errors import RunError
from recast_pl.files import json_text, sha256, write_atomic
from recast_pl.reporting.board import (
    PAGE,
    Measured,
    Results,
    read_results,
    results_file,
    results_text,
    stream_cells,
    write_board,
)
from recast_pl.reporting.tables import terminal_table
from recast_pl.rules import TASK_RULE, is_task_name
from recast_pl.runs.collection import PLAN
from recast_pl.runs.folder import RunFolder, Summary
from recast_pl.runs.metrics import final_accuracies
from recast_pl.runs.origin import Origin
from recast_pl.studies.comparison import Comparison, Point
from recast_pl.studies.engines import Engine, run_unfinished
from recast_pl.studies.sweep_file import Values, check_entries, check_seeds, filled, read_entries, read_yaml

_KINDS: dict[str, type] = {"seeds": list, "rates": list, "variables": dict, "methods": dict, "streams": dict}

_STREAM: dict[str, type] = {"base": list, "config": dict, "methods": dict}

_METHOD: dict[str, type] = {"config": object, "rates": list}


class Method(NamedTuple):
    """A method of a board: the name of a config, or a list of pieces, and the rates that it tries."""

    config: str | list[Any]
    rates: Sequence[float]


class StreamConfig(NamedTuple):
    """A stream of a board: its configs, a config laid over them, and its methods by name.

    `settings` is a digest of what decides the numbers of each method, but not of the values of variables.
    """

    base: Sequence[str]
    config: Mapping[str, Any]
    methods: Mapping[str, Method]
    settings: dict[str, str]


class BoardConfig(NamedTuple):
    """The entries of a board's file; streams by name."""

    seeds: Sequence[int]
    streams: Mapping[str, StreamConfig]


def read_board(path: Path, variables: Mapping[str, str]) -> BoardConfig:
    """Reads the file of a board.

    Args:
        path: The file; the top of this module describes the format.
        variables: Values by name, in place of those of the file.

    Raises:
        RunError: If the file is damaged, or an entry is wrong; the message names the entry.
    """
    content = read_entries(path, _KINDS, "board")
    known = content.get("variables", {})
    for missing in [key for key in ("seeds", "rates", "methods", "streams") if not content.get(key)]:
        raise RunError(f"{path} has no {missing}; give at least one")
    for unknown in sorted(variables.keys() - known.keys()):
        raise RunError(f"{path} has no variable {unknown!r}; it has {', '.join(known) or 'none'}")
    check_seeds(content["seeds"], path)
    values: Values = {str(key): (None, value) for key, value in (known | variables).items()}
    plain = [content["methods"], content["streams"]]
    read, unfilled = (
        {name: _read_stream(path, name, entry, methods, content["rates"]) for name, entry in streams.items()}
        for methods, streams in (filled(plain, values), plain)
    )
    for name, stream in unfilled.items():
        for method, entry in stream.methods.items():
            read[name].settings[method] = _settings(stream, entry)
    return BoardConfig(content["seeds"], read)


def _settings(stream: StreamConfig, method: Method) -> str:
    """A digest of what decides the numbers of a method: the entries of the board, and the configs that they name."""
    configs = [*stream.base, *([method.config] if isinstance(method.config, str) else [])]
    contents = [read_yaml(Path(find_config(config))) for config in configs]
    return sha256(json_text([contents, stream.config or None, *method]).encode())[:16]


def _read_stream(path: Path, name: str, entry: Any, methods: Mapping[str, Any], rates: Sequence[float]) -> StreamConfig:
    what = f"{path}: stream {name!r}"
    if not isinstance(entry, dict):
        raise RunError(f"{what} is {entry!r}; give it base, config or methods")
    check_entries(entry, _STREAM, what)
    methods = {**methods, **entry.get("methods", {})}
    for key in (name, *methods):
        if not is_task_name(str(key)):
            raise RunError(f"{path}: {key!r} cannot name a file; choose {TASK_RULE}")
    read = {key: _read_method(f"{what}: method {key!r}", method, rates) for key, method in methods.items()}
    return StreamConfig(entry.get("base", []), entry.get("config", {}), read, {})


def _read_method(what: str, entry: Any, rates: Sequence[float]) -> Method:
    method = entry if isinstance(entry, dict) else {"config": entry}
    check_entries(method, _METHOD, what)
    if not isinstance(method.get("config"), str | list):
        raise RunError(f"{what} is {entry!r}; give a config or a list of pieces")
    own: Sequence[Any] = method.get("rates") or rates
    for rate in own:
        if not isinstance(rate, int | float) or rate <= 0:
            raise RunError(f"{what}: rate {rate!r} is not a number above 0; write it as 2.0e-3")
    return Method(method["config"], own)


@dataclass(frozen=True)
class Trial:
    """A method on a stream: it chooses the rate with the first seed, and trains all seeds with it.

    Args:
        folder: Folder of the board; the results are in STREAM/METHOD.json.
        runs: Folder of the runs, POINT/SEED in it.
        stream: Name of the stream.
        method: Name of the method.
        points: One for each rate, with the label `rate`; a single one without labels if the method trains no numbers.
        seeds: Seeds; the first one chooses the rate.
        options: Further options of `fit`, for all runs.
        command: The command line that is recorded with the results.
        settings: A digest of the settings.
    """

    folder: Path
    runs: Path
    stream: str
    method: str
    points: Sequence[Point]
    seeds: Sequence[int]
    options: Sequence[str]
    command: str
    settings: str

    def units(self) -> dict[str, list[str]]:
        """Returns the command line of each run that is known to be needed, by name: those of all rates come first."""
        known = self._known()
        units = (self._search if known is None else self._rest(known)).units()
        return {f"{self.stream}, {self.method}: {name}": words for name, words in units.items()}

    def write(self) -> bool:
        """Writes the results if all runs are finished and some of them are new; returns whether it did.

        Comparisons of the rates and of the seeds go beside their runs.
        """
        known = self._known()
        comparison = self._search if known is None else self._rest(known)
        if comparison.has_results:
            write_atomic(comparison.folder / PLAN, json_text(comparison.plan()))
            comparison.write()
        if known is None or not comparison.seeds:
            return False
        runs = comparison.finished().get(comparison.points[0].name, {})
        if not runs.keys() >= set(comparison.seeds):
            return False
        new = {str(seed): _run_results(runs[seed]) for seed in comparison.seeds}
        measured: dict[str, Measured] = {}  # by machine
        for seed in comparison.seeds:
            made = _origin(self.runs / comparison.points[0].name / str(seed))
            entry = Measured(command=self.command, seeds=[], **made)
            measured.setdefault(made["machine"], entry)["seeds"].append(seed)
        results = Results({**known, "runs": known["runs"] | new, "measured": [*known["measured"], *measured.values()]})
        write_atomic(self.file, results_text(results))
        return True

    @property
    def file(self) -> Path:
        """The results."""
        return results_file(self.folder, self.stream, self.method)

    @property
    def _search(self) -> Comparison:
        return Comparison(self.runs, self.points, self.seeds[:1], self.options)

    def _known(self) -> Results | None:
        """The results so far, without runs if only the rate is chosen; None if it is not."""
        if self.file.is_file():
            return read_results(self.folder)[self.stream][self.method]
        if len(self.points) == 1:
            return self._results(next(map(float, self.points[0].labels.values()), None), {})
        found = self._search.finished()
        if len(found) < len(self.points) or any(self.seeds[0] not in runs for runs in found.values()):
            return None
        return self._choose({name: runs[self.seeds[0]] for name, runs in found.items()})

    def _choose(self, found: Mapping[str, Summary]) -> Results:
        """Results without runs, of the rate with the highest validation accuracy, then the lowest loss."""
        rates = {float(point.labels["rate"]): _validation(found[point.name]) for point in self.points}
        best = min(rates, key=lambda r: (-rates[r]["validation_accuracy"], rates[r]["validation_loss"]))
        return self._results(best, {str(rate): values for rate, values in rates.items()})

    def _results(self, rate: float | None, rates: dict[str, dict[str, float]]) -> Results:
        return Results(
            stream=self.stream,
            method=self.method,
            settings=self.settings,
            rate=rate,
            rates=rates,
            runs={},
            measured=[],
        )

    def _rest(self, known: Results) -> Comparison:
        """The runs of the chosen rate that have no results."""
        point = next((point for point in self.points if point.labels.get("rate") == known["rate"]), None)
        if point is None:
            raise RunError(f"{self.file} has rate {known['rate']}, which is not among the rates; add it, or delete it")
        return Comparison(self.runs, [point], [s for s in self.seeds if str(s) not in known["runs"]], self.options)


@dataclass(frozen=True)
class Board:
    """Trials in one folder: those of all rates run first, on one engine, and then those of the other seeds.

    Args:
        folder: Output folder.
        trials: The trials without results for some seeds.
    """

    folder: Path
    trials: Sequence[Trial]

    FILE: ClassVar[str] = PAGE
    """Name of the page, without suffix."""

    def units(self) -> dict[str, list[str]]:
        """Returns the command line of each run that is known to be needed, by name."""
        return {name: words for trial in self.trials for name, words in trial.units().items()}

    def run(self, engine: Engine, is_finished: Callable[[Sequence[str]], bool]) -> int:
        """Trains what is not trained, and writes results and the page; arguments as in `Study`."""
        done: set[str] = set()
        while units := {name: words for name, words in self.units().items() if name not in done}:
            if status := self._run(units, engine, is_finished):
                return status
            done |= units.keys()
        return 0

    def _run(
        self, units: Mapping[str, Sequence[str]], engine: Engine, is_finished: Callable[[Sequence[str]], bool]
    ) -> int:
        trials = {name: trial for trial in self.trials for name in trial.units()}
        status = run_unfinished(engine, units, is_finished, lambda name: self._written(trials[name]))
        for trial in self.trials:  # whose runs may have been finished before
            self._written(trial)
        return status

    def _written(self, trial: Trial) -> None:
        if trial.write():
            write_board(self.folder)

    @property
    def has_results(self) -> bool:
        """Returns whether a trial has results."""
        return any(trial.file.is_file() for trial in self.trials)

    def table(self) -> RenderableType:
        """Returns the tables of the streams of the trials for the terminal."""
        results = read_results(self.folder)
        streams = dict.fromkeys(trial.stream for trial in self.trials if trial.stream in results)
        return Group(*(terminal_table(stream_cells(results[stream]), title=stream) for stream in streams))


_VERSIONS = ("recast-pl", "torch")

_KEPT = ("probe_accuracy", "task_parameters", "patch_bytes", "seconds", "train_images", "test_images")


def _validation(run: Summary) -> dict[str, float]:
    """Means over the tasks of a run of accuracy and loss on validation images."""
    tasks: Sequence[Mapping[str, Any]] = run["tasks"]
    keys = ("validation_accuracy", "validation_loss")
    try:
        return {key: statistics.mean(task[key] for task in tasks) for key in keys}
    except KeyError as cause:
        raise RunError(f"a task of the run with seed {run['seed']} has no {cause}; train it again") from cause


def _origin(run: Path) -> Origin:
    """Where and when the last task of a run was trained, and the versions of what decides its numbers."""
    records = [files.load_record() for files in RunFolder(run).finished().values()]
    made = max((record["origin"] for record in records), key=lambda facts: facts["date"])
    return {**made, "versions": {name: made["versions"][name] for name in _VERSIONS if name in made["versions"]}}


def _run_results(run: Summary) -> dict[str, dict[str, Any]]:
    """What the board keeps of each task of a run."""
    final = final_accuracies(run)
    tasks: Sequence[Mapping[str, Any]] = run["tasks"]
    return {task["name"]: {key: task[key] for key in _KEPT} | {"accuracy": final[task["name"]]} for task in tasks}
