r"""The YAML file of a sweep: a grid over options of `fit`, or a list of points.

```yaml
base: [vit.yaml]                     # configs that every point starts from
seeds: [42, 1998, 3142592]
grid:                                # all combinations; or `points`, a list of mappings that may have a `name`
  groups: [6, 3, 1]                  # replaces ${groups} in `config`
  targets: {attention: 'attn\.qkv\.weight', MLP: 'mlp\.fc[12]\.weight'}  # labels with their values
  method: [methods/recast_vit.yaml]      # configs laid over the base
  trainer.max_epochs: [50, 100]      # an option of `fit`
config: {model: …}                   # laid over the base, with the values of the point for ${…}
x: groups                            # horizontal axis of the figure: a key, or task_parameters
series: [targets]                    # keys that tell lines or bars apart (default: all other keys)
over: groups                         # adds a table of means over points that differ only in this key
```
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

from recast_pl.errors import RunError
from recast_pl.files import write_atomic
from recast_pl.reporting.measures import TASK_PARAMETERS
from recast_pl.runs.collection import Label
from recast_pl.studies.comparison import Point, config_words

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

_KINDS: dict[str, type] = {
    "base": list, "seeds": list, "grid": dict, "points": list, "config": dict, "x": str, "series": list, "over": str
}  # fmt: skip

Values = dict[str, tuple[Label | None, Any]]
"""Label and value by key; a value without a label appears in no name and no figure."""


class PlannedPoint(NamedTuple):
    """A point as the file describes it: its labels, and the configs, config fragment and options of `fit` to use."""

    labels: Mapping[str, Label]
    configs: Sequence[str]
    fragment: Mapping[str, Any]
    options: Sequence[str]


@dataclass(frozen=True)
class SweepConfig:
    """The entries of a sweep's file, with points by name; `seeds` may be empty, and `over` None."""

    base: Sequence[str]
    seeds: Sequence[int]
    points: Mapping[str, PlannedPoint]
    x: str
    series: Sequence[str]
    over: str | None

    def write_points(self, folder: Path, base: Sequence[str]) -> list[Point]:
        """Writes the config fragment of each point to FOLDER/POINT/point.yaml.

        Args:
            folder: Folder of the sweep.
            base: Further configs, laid over the base of the file.
        """
        points = []
        for name, plan in self.points.items():
            configs = [*self.base, *base, *plan.configs]
            if plan.fragment:
                path = folder / name / "point.yaml"
                write_atomic(path, yaml.safe_dump(plan.fragment, sort_keys=False, allow_unicode=True))
                configs.append(str(path))
            points.append(Point(name, [*config_words(configs), *plan.options], plan.labels))
        return points


def read_sweep(path: Path) -> SweepConfig:
    """Reads the file of a sweep.

    Args:
        path: The file; the top of this module describes the format.

    Raises:
        RunError: If the file is damaged, or an entry is wrong; the message names the entry.
    """
    content = _read(path)
    points = _product(content["grid"]) if "grid" in content else [_read_point(point) for point in content["points"]]
    if not points:
        raise RunError(f"{path} has no points; give every key of the grid at least one value, or list points")
    named = _named(points, path)
    keys = list(dict.fromkeys(key for values in points for key, (label, _) in values.items() if label is not None))
    x = content.get("x") or _first_numeric(points, keys)
    over = content.get("over")
    series = content.get("series", [key for key in keys if key != x])
    for key in (None if x == TASK_PARAMETERS else x, over, *series):
        if key is not None and key not in keys:
            raise RunError(f"{path}: {key!r} is not a key of its points; choose one of {', '.join(keys)}")
    planned = {name: _plan(values, content.get("config", {})) for name, values in named.items()}
    if x in keys and any(x not in plan.labels for plan in planned.values()):
        raise RunError(f"{path}: x is {x!r}, but some points have no label for it; add one to each point")
    for (one, first), (other, second) in itertools.combinations(planned.items(), 2):
        if first[1:] == second[1:]:
            raise RunError(
                f"{path}: points {one!r} and {other!r} are the same run; use ${{KEY}} in config where they differ, or "
                "a KEY with a dot, which sets an option of fit"
            )
    return SweepConfig(content.get("base", []), content.get("seeds", []), planned, x, series, over)


def _plan(values: Values, config: Mapping[str, Any]) -> PlannedPoint:
    """Turns the values of a point into configs, a config fragment and options."""
    used = set(_PLACEHOLDER.findall(json.dumps(config)))
    configs, options = [], []
    for key, (_, value) in values.items():
        if key in used:
            continue
        if "." in key:
            options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        else:
            configs += _config_names(value)
    labels = {key: label for key, (label, _) in values.items() if label is not None}
    return PlannedPoint(labels, configs, _filled(config, values), options)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); fix it") from cause
    if not isinstance(content, dict):
        raise RunError(f"{path} is not a sweep; it needs a grid or points")
    for key, value in content.items():
        if key not in _KINDS:
            raise RunError(f"{path}: a sweep has no entry {key!r}; choose one of {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[key]):
            raise RunError(f"{path}: {key} is {value!r}; it must be a {_KINDS[key].__name__}")
    if ("grid" in content) == ("points" in content):
        raise RunError(f"{path} has {'both' if 'grid' in content else 'neither'} of grid and points; give one")
    wrong = [seed for seed in content.get("seeds", []) if not isinstance(seed, int)]
    if wrong:
        raise RunError(f"{path}: seed {wrong[0]!r} is not an integer; correct it")
    return content


def _product(grid: Mapping[str, Any]) -> list[Values]:
    """Lists all combinations of the values of a grid; none if a key has no values."""
    choices = [[(key, labelled) for labelled in _choices(key, values)] for key, values in grid.items()]
    return [dict(combination) for combination in itertools.product(*choices)] if grid else []


def _choices(key: str, values: Any) -> list[tuple[Label, Any]]:
    if isinstance(values, dict):
        return [(str(label), value) for label, value in values.items()]
    listed = values if isinstance(values, list) else [values]
    wrong = [value for value in listed if isinstance(value, list | dict)]
    if wrong:
        raise RunError(f"value {wrong[0]} of {key} needs a label; write {key}: {{LABEL: VALUE, …}}")
    return [(_label(key, value), value) for value in listed]


def _read_point(point: Any) -> Values:
    """Reads a listed point: a scalar is its own label, {LABEL: VALUE} gives one, and a list has none."""
    if not isinstance(point, dict):
        raise RunError(f"point {point!r} is not a mapping; write keys and values")
    for key, value in point.items():
        if isinstance(value, dict) and len(value) != 1:
            raise RunError(f"a point has {key}: {value}; write {{LABEL: VALUE}}, a scalar or a list")
    return {key: (None, value) if isinstance(value, list) else _choices(key, value)[0] for key, value in point.items()}


def _label(key: str, value: Any) -> Label:
    """Labels a scalar: a number by itself, a config by its name, true, false and null with their key."""
    if value is None or isinstance(value, bool):
        return f"{key.rpartition('.')[2]} {json.dumps(value)}"
    if isinstance(value, int | float):
        return value
    return Path(value).stem if _config_names(value) else str(value)


def _named(points: Sequence[Values], path: Path) -> dict[str, Values]:
    """Names the points: by the given name, or else by their labels, in characters that every file system takes."""
    named: dict[str, Values] = {}
    for values in points:
        _, given = values.pop("name", (None, None))
        labels = [(key.rpartition(".")[2], label) for key, (label, _) in values.items() if label is not None]
        parts = (label if isinstance(label, str) else f"{key}-{label}" for key, label in labels)
        text = str(given) if given is not None else "_".join(parts)
        name = re.sub(r"[^\w.+=-]+", "-", text).strip("-.")
        if not name:
            raise RunError(f"{path}: a point has no name; give it one: name: …")
        if name in named:
            raise RunError(f"{path}: two points are named {name!r}; give one another name: …")
        named[name] = values
    return named


def _first_numeric(points: Sequence[Values], keys: Sequence[str]) -> str:
    """Returns the first key whose labels are all numbers; `task_parameters` if there is none."""
    numeric = (key for key in keys if all(key in p and isinstance(p[key][0], int | float) for p in points))
    return next(numeric, TASK_PARAMETERS)


def _filled(part: Any, values: Values) -> Any:
    """Replaces ${KEY} in a config by values; a text that is only ${KEY} becomes the value itself, with its type."""
    if isinstance(part, dict):
        return {key: _filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(value, values) for value in part]
    if not isinstance(part, str):
        return part
    for key in _PLACEHOLDER.findall(part):
        if key not in values:
            raise RunError(f"config uses ${{{key}}}, but a point has no such key; it has {', '.join(values)}")
    single = _PLACEHOLDER.fullmatch(part)
    return values[single[1]][1] if single else _PLACEHOLDER.sub(lambda match: str(values[match[1]][1]), part)


def _config_names(value: Any) -> list[str]:
    """Returns the value as names of configs, or nothing if it is something else."""
    names = value if isinstance(value, list) else [value]
    return names if all(isinstance(name, str) and name.endswith(".yaml") for name in names) else []
