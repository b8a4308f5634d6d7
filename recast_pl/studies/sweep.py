r"""Grids over options of `fit`: a YAML file says the points; each is learnt with several seeds.

```yaml
base: [vit.yaml]                     # configurations laid under every point
seeds: [42, 1998, 3142592]
grid:                                # the product of all values; or `points`, a list of mappings, each with a `name`
  groups: [6, 3, 1]                  # for ${groups} in `config`
  targets: {attention: 'attn\.qkv\.weight', MLP: 'mlp\.fc[12]\.weight'}  # labels, and their values
  method: [methods/recast.yaml]      # configurations, laid over the base
  trainer.max_epochs: [50, 100]      # an option of `fit`, given as it is
config: {model: …}                   # laid over the base, with the point's values in place of ${…}
x: groups                            # axis of the figure: a key, or task_parameters
series: [targets]                    # what its lines or bars stand for; all other keys if left out
over: groups                         # adds a table of means over the points that differ in this key alone
```
"""

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader
from rich.console import Group, RenderableType

from recast_pl.errors import RunError
from recast_pl.files import write_atomic
from recast_pl.reporting.measures import TASK_PARAMETERS, sweep_marks
from recast_pl.reporting.plots import plot_marks, write_figure
from recast_pl.reporting.tables import Cells, markdown_table, table_csv, terminal_table
from recast_pl.runs.collection import Label, Summary
from recast_pl.runs.metrics import spread
from recast_pl.studies.comparison import Comparison, Point

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

_KINDS: dict[str, type] = {
    "base": list, "seeds": list, "grid": dict, "points": list, "config": dict, "x": str, "series": list, "over": str
}  # fmt: skip

Values = dict[str, tuple[Label | None, Any]]
"""Label and value by key; a value without a label is in no name and no figure."""


class Plan(NamedTuple):
    """A point before anything is written.

    Args:
        labels: What it stands for, by key.
        configs: Names of configurations.
        fragment: A configuration laid over them.
        options: Words of `fit`.
    """

    labels: Mapping[str, Label]
    configs: Sequence[str]
    fragment: Mapping[str, Any]
    options: Sequence[str]


@dataclass(frozen=True)
class SweepConfig:
    """A sweep as its file describes it; `read_sweep` makes one.

    Args:
        base: Configurations laid under every point.
        seeds: Of the runs.
        points: By their names.
        x: Key on the horizontal axis of the figure, or `task_parameters`.
        series: Keys of what its lines or bars stand for.
        over: Key over which means are taken; None for no such table.
    """

    base: Sequence[str]
    seeds: Sequence[int]
    points: Mapping[str, Plan]
    x: str
    series: Sequence[str]
    over: str | None

    def write_points(self, folder: Path, base: Sequence[str]) -> list[Point]:
        """Writes what each point has of `config` to FOLDER/POINT/point.yaml.

        Args:
            folder: Of the sweep.
            base: Further configurations, laid over those of the file.

        Returns:
            The points.
        """
        points = []
        for name, plan in self.points.items():
            configs = [*self.base, *base, *plan.configs]
            if plan.fragment:
                path = folder / name / "point.yaml"
                write_atomic(path, yaml.safe_dump(plan.fragment, sort_keys=False, allow_unicode=True))
                configs.append(str(path))
            words = [word for config in configs for word in ("--config", config)]
            points.append(Point(name, [*words, *plan.options], plan.labels))
        return points


@dataclass(frozen=True)
class Sweep(Comparison):
    """A comparison of points that values describe, which is drawn too.

    Args:
        folder: Of the sweep.
        points: What is compared.
        seeds: Of the runs.
        options: Further words of `fit`, for all runs.
        alone: None.
        x: Key on the horizontal axis, or `task_parameters`.
        series: Keys of what lines or bars stand for.
        over: Key over which means are taken; None for no such table.
    """

    x: str = TASK_PARAMETERS
    series: Sequence[str] = field(default=())
    over: str | None = None

    FILE = "sweep"
    HEADING = "point"

    def write(self) -> None:
        """Writes tables as CSV and Markdown, and the figure as PNG and SVG, from all finished runs in the folder."""
        super().write()
        if self.over is not None:
            cells = self._over_cells(self.over)
            name = f"{self.FILE}_over_{_short(self.over)}"
            write_atomic(self.folder / f"{name}.csv", table_csv(*cells))
            write_atomic(self.folder / f"{name}.md", markdown_table(cells, len(cells[0]) - _OVER_COLUMNS))
        finished = {name: list(runs.values()) for name, runs in self.finished().items()}
        if marks := sweep_marks({point.name: point.labels for point in self.points}, finished, self.x, self.series):
            write_figure(plot_marks(marks, self.x), self.folder / self.FILE)

    def table(self) -> RenderableType:
        """The same tables, for the terminal."""
        if self.over is None:
            return super().table()
        cells = self._over_cells(self.over)
        return Group(super().table(), terminal_table(cells, len(cells[0]) - _OVER_COLUMNS, f"over {self.over}"))

    def plan(self) -> dict[str, Any]:
        """What is to be learnt, and how it is drawn."""
        return {**super().plan(), "x": self.x, "series": list(self.series)}

    def _over_cells(self, over: str) -> Cells:
        """Means over the points that differ in one key alone."""
        finished = self.finished()
        alike: dict[tuple[str, ...], list[Mapping[int, Summary]]] = {}
        for point in self.points:
            if point.name in finished:
                others = tuple(str(label) for key, label in point.labels.items() if key != over)
                alike.setdefault(others, []).append(finished[point.name])
        keys = [key for key in self._keys if key != over]
        header = [*keys, f"values of {over}", "average accuracy %", "range", "largest change of a task"]
        return header, [[*others, *_over_measures(points)] for others, points in alike.items()]


_OVER_COLUMNS = 4


def _over_measures(points: Sequence[Mapping[int, Summary]]) -> list[str]:
    """What means over seeds say of points, and by how much a task's final accuracy differs at equal seed."""
    means = [statistics.mean(run["average_accuracy"] for run in runs.values()) for runs in points]
    seeds = set.intersection(*(set(runs) for runs in points))
    changes = [
        max(values) - min(values) for seed in seeds for values in _by_task([runs[seed] for runs in points]).values()
    ]
    largest = f"{max(changes):.2f}" if changes else ""
    return [str(len(points)), str(spread(means)), f"{max(means) - min(means):.2f}", largest]


def _by_task(runs: Iterable[Summary]) -> dict[str, list[float]]:
    """Final accuracies of each task, by its name."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for task, accuracy in zip(run["tasks"], run["accuracy_matrix"][-1], strict=True):
            values.setdefault(task["name"], []).append(accuracy)
    return values


def read_sweep(path: Path) -> SweepConfig:
    """Reads the file of a sweep.

    Args:
        path: The file, as described at the top of this module.

    Raises:
        RunError: Naming what is wrong with it.
    """
    content = _read(path)
    points = _product(content["grid"]) if "grid" in content else [_listed(point) for point in content["points"]]
    if not points:
        raise RunError(f"{path} has no point; give values to every key of its grid, or points")
    named = _named(points, path)
    keys = list(dict.fromkeys(key for values in points for key, (label, _) in values.items() if label is not None))
    x = content.get("x") or _first_numeric(points, keys)
    over = content.get("over")
    series = content.get("series", [key for key in keys if key != x])
    for key in (x, over, *series):
        if key is not None and key not in (*keys, TASK_PARAMETERS):
            raise RunError(f"{path}: {key!r} is no key of its points; choose of {', '.join(keys)}")
    if x != TASK_PARAMETERS and any(x not in values for values in points):
        raise RunError(f"{path}: not every point has a value of x, which is {x!r}; give it one")
    plans = {name: _plan(values, content.get("config", {})) for name, values in named.items()}
    for (one, plan), (other, same) in itertools.combinations(plans.items(), 2):
        if plan[1:] == same[1:]:
            raise RunError(
                f"{path}: points {one!r} and {other!r} would learn the same; say what they differ in by ${{KEY}} in "
                "config, or by the option that a KEY with a dot names"
            )
    return SweepConfig(content.get("base", []), content.get("seeds", []), plans, x, series, over)


def _plan(values: Values, config: Mapping[str, Any]) -> Plan:
    """What makes a point of its values."""
    used = set(_PLACEHOLDER.findall(json.dumps(config)))
    left = {key: value for key, (_, value) in values.items() if key not in used}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in left.items() if "." in key}
    return Plan(
        labels={key: label for key, (label, _) in values.items() if label is not None},
        configs=[name for key, value in left.items() if "." not in key for name in _config_names(value)],
        fragment=_filled(config, values),
        options=[word for key, text in texts.items() for word in (f"--{key}", text)],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = get_loader("yaml")(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); mend it") from cause
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no sweep; it needs a grid or points")
    for key, value in content.items():
        if key not in _KINDS:
            raise RunError(f"{path}: {key!r} is nothing of a sweep; choose of {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[key]):
            raise RunError(f"{path}: {key} is {value!r}; it must be a {_KINDS[key].__name__}")
    if ("grid" in content) == ("points" in content):
        raise RunError(f"{path} has {'both' if 'grid' in content else 'neither'} of grid and points; give one")
    wrong = [seed for seed in content.get("seeds", []) if not isinstance(seed, int)]
    if wrong:
        raise RunError(f"{path}: seed {wrong[0]!r} is no whole number; give one that is")
    return content


def _product(grid: Mapping[str, Any]) -> list[Values]:
    """All combinations of the values of a grid; none if a key has none."""
    choices = [[(key, labelled) for labelled in _choices(key, values)] for key, values in grid.items()]
    return [dict(combination) for combination in itertools.product(*choices)] if grid else []


def _choices(key: str, values: Any) -> list[tuple[Label, Any]]:
    if isinstance(values, dict):
        return [(str(label), value) for label, value in values.items()]
    listed = values if isinstance(values, list) else [values]
    wrong = [value for value in listed if isinstance(value, list | dict)]
    if wrong:
        raise RunError(f"{key} has the value {wrong[0]}, which needs a label; write {key}: {{LABEL: VALUE, …}}")
    return [(_label(key, value), value) for value in listed]


def _listed(point: Any) -> Values:
    """A point of a list: scalars are their own labels, {label: value} gives one, and a list has none."""
    if not isinstance(point, dict):
        raise RunError(f"point {point!r} is no mapping; write keys and values")
    for key, value in point.items():
        if isinstance(value, dict) and len(value) != 1:
            raise RunError(f"a point has {key}: {value}; write {{LABEL: VALUE}}, a scalar or a list")
    return {key: (None, value) if isinstance(value, list) else _choices(key, value)[0] for key, value in point.items()}


def _label(key: str, value: Any) -> Label:
    """How a scalar is called: a number by itself, a configuration by its name, true, false and null with their key."""
    if value is None or isinstance(value, bool):
        return f"{_short(key)} {json.dumps(value)}"
    if isinstance(value, int | float):
        return value
    return Path(value).stem if _config_names(value) else str(value)


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _named(points: Sequence[Values], path: Path) -> dict[str, Values]:
    """Points by name: the one given, or else made of their labels."""
    named: dict[str, Values] = {}
    for values in points:
        _, given = values.pop("name", (None, None))
        parts = [
            f"{key.rpartition('.')[2]}-{v}" if not isinstance(v, str) else v
            for key, (v, _) in values.items()
            if v is not None
        ]
        name = _safe(str(given) if given is not None else "_".join(parts))
        if not name:
            raise RunError(f"{path}: a point has no name; give it one: name: …")
        if name in named:
            raise RunError(f"{path}: two points are named {name!r}; give them names that differ: name: …")
        named[name] = values
    return named


def _safe(name: str) -> str:
    """A name for a folder on any system."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-.")


def _first_numeric(points: Sequence[Values], keys: Sequence[str]) -> str:
    """The first key whose labels are all numbers; task parameters if there is none."""
    numeric = (key for key in keys if all(key in p and isinstance(p[key][0], int | float) for p in points))
    return next(numeric, TASK_PARAMETERS)


def _filled(part: Any, values: Values) -> Any:
    """A part of a configuration with values in place of ${key}: of their type where that is the whole text."""
    if isinstance(part, dict):
        return {key: _filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(value, values) for value in part]
    if not isinstance(part, str):
        return part
    for key in _PLACEHOLDER.findall(part):
        if key not in values:
            raise RunError(f"config has ${{{key}}}, of which a point has no value; it has {', '.join(values)}")
    whole = _PLACEHOLDER.fullmatch(part)
    return values[whole[1]][1] if whole else _PLACEHOLDER.sub(lambda match: str(values[match[1]][1]), part)


def _config_names(value: Any) -> list[str]:
    """Names of configurations, if that is what a value is."""
    names = value if isinstance(value, list) else [value]
    return names if all(isinstance(name, str) and name.endswith(".yaml") for name in names) else []
