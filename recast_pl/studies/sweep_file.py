r"""The YAML file of a sweep: a grid over options of `fit`, or a list of points.

```yaml
base: [vit.yaml]                     # configs that every point starts from
seeds: [42, 1998, 3142592]
grid:                                # all combinations; or `points`, a list of mappings that may have a `name`
  groups: [6, 3, 1]                  # replaces ${groups} in `config`
  targets: {attention: 'attn\.qkv\.weight', MLP: 'mlp\.fc[12]\.weight'}  # labels with their values
  method: [methods/recast_vit.yaml]  # configs laid over the base
  trainer.max_epochs: [50, 100]      # an option of `fit`
config: {model: …}                   # laid over the base, with the values of the point for ${…}
x: groups                            # horizontal axis of the figure: a key, or task_parameters
series: [targets]                    # keys that tell lines or bars apart (default: all other keys)
over: groups                         # adds a table of means over points that differ only in this key
fits: {mse: [mimicry_vit.yaml, mimicry/mse.yaml]}  # fits of templates to run first, with the backbone of `base`
after: [paper/figure6.yaml]          # other such files to run first, each in a folder beside this one's
notes: [A sentence below the tables.]
```

A listed point may have `published: {average: 85.0, spread: 0.1, TASK: 98.6}`, accuracies that others report. In
`config`, `${folder}` is the folder of the sweep. A file with `fits` or `after` needs no points.
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
from recast_pl.reporting.published import Published
from recast_pl.runs.collection import Label
from recast_pl.studies.comparison import Point, config_words

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

_KINDS: dict[str, type] = {
    "base": list, "seeds": list, "grid": dict, "points": list, "config": dict, "x": str, "series": list, "over": str,
    "fits": dict, "after": list, "notes": list,
}  # fmt: skip

_FOLDER = "folder"  # the placeholder of the sweep's folder

_PUBLISHED = "published"  # the key of a point that holds values, and no option

Values = dict[str, tuple[Label | None, Any]]
"""Label and value by key; a value without a label appears in no name and no figure."""


class PlannedPoint(NamedTuple):
    """A point as the file describes it: its labels, the configs, config fragment and options of `fit`, and values."""

    labels: Mapping[str, Label]
    configs: Sequence[str]
    fragment: Mapping[str, Any]
    options: Sequence[str]
    published: Published


@dataclass(frozen=True)
class SweepConfig:
    """The entries of a sweep's file, with points by name; all may be empty, and `over` None."""

    base: Sequence[str]
    seeds: Sequence[int]
    points: Mapping[str, PlannedPoint]
    x: str
    series: Sequence[str]
    over: str | None
    fits: Mapping[str, Sequence[str]]
    after: Sequence[str]
    notes: Sequence[str]

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
                fragment = filled(plan.fragment, {_FOLDER: (None, str(folder))})
                write_atomic(path, yaml.safe_dump(fragment, sort_keys=False, allow_unicode=True))
                configs.append(str(path))
            points.append(Point(name, [*config_words(configs), *plan.options], plan.labels, plan.published))
        return points


def read_sweep(path: Path) -> SweepConfig:
    """Reads the file of a sweep.

    Args:
        path: The file; the top of this module describes the format.

    Raises:
        RunError: If the file is damaged, or an entry is wrong; the message names the entry.
    """
    content = _read(path)
    points = _product(content["grid"]) if "grid" in content else [_read_point(p) for p in content.get("points", ())]
    if not points and not content.keys() & {"fits", "after"}:
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
    _check_different(planned, path)
    lists = {key: content.get(key, []) for key in ("base", "seeds", "after", "notes")}
    return SweepConfig(points=planned, x=x, series=series, over=over, fits=content.get("fits", {}), **lists)


def _check_different(planned: Mapping[str, PlannedPoint], path: Path) -> None:
    """Raises RunError if two points would be the same run."""
    for (one, first), (other, second) in itertools.combinations(planned.items(), 2):
        if (first.configs, first.fragment, first.options) == (second.configs, second.fragment, second.options):
            raise RunError(
                f"{path}: points {one!r} and {other!r} are the same run; use ${{KEY}} in config where they differ, or "
                "a KEY with a dot, which sets an option of fit"
            )


def _plan(values: Values, config: Mapping[str, Any]) -> PlannedPoint:
    """Turns the values of a point into configs, a config fragment and options."""
    used = set(_PLACEHOLDER.findall(json.dumps(config)))
    unknown = sorted(used - values.keys() - {_FOLDER})
    if unknown:
        raise RunError(f"config uses ${{{unknown[0]}}}, but a point has no such key; it has {', '.join(values)}")
    configs, options, published = [], [], {}
    for key, (_, value) in values.items():
        if key == _PUBLISHED:
            published = value
        elif key not in used and "." in key:
            options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        elif key not in used:
            configs += _config_names(value)
    labels = {key: label for key, (label, _) in values.items() if label is not None}
    return PlannedPoint(labels, configs, filled(config, values), options, published)


def read_entries(path: Path, kinds: Mapping[str, type], what: str = "sweep") -> dict[str, Any]:
    """Reads a YAML file of entries; raises RunError if it is damaged, or an entry is unknown or of another type.

    Args:
        path: The file.
        kinds: Type of each entry by its name.
        what: What the file is, for messages.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RunError(f"{path} is not a {what}; it needs some of {', '.join(kinds)}")
    check_entries(content, kinds, f"{path}: a {what}")
    return content


def read_yaml(path: Path) -> Any:
    """Reads a YAML file; raises RunError if it is damaged."""
    try:
        return get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); fix it") from cause


def check_entries(content: Mapping[str, Any], kinds: Mapping[str, type], what: str) -> None:
    """Raises RunError if an entry is unknown or of another type."""
    for key, value in content.items():
        if key not in kinds:
            raise RunError(f"{what} has no entry {key!r}; choose one of {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise RunError(f"{what}: {key} is {value!r}; it must be a {kinds[key].__name__}")


def check_seeds(seeds: Sequence[Any], path: Path) -> None:
    """Raises RunError if a seed in a file is not an integer."""
    wrong = [seed for seed in seeds if not isinstance(seed, int)]
    if wrong:
        raise RunError(f"{path}: seed {wrong[0]!r} is not an integer; correct it")


def _read(path: Path) -> dict[str, Any]:
    content = read_entries(path, _KINDS)
    if {"grid", "points"} <= content.keys():
        raise RunError(f"{path} has both of grid and points; give one")
    if not content.keys() & {"grid", "points", "fits", "after"}:
        raise RunError(f"{path} has neither grid nor points; give one")
    for name, configs in content.get("fits", {}).items():
        if not (isinstance(configs, list) and _config_names(configs)):
            raise RunError(f"{path}: fits has {name}: {configs}; it must be a list of configs")
    check_seeds(content.get("seeds", []), path)
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
    values: Values = {}
    for key, value in point.items():
        if key == _PUBLISHED:
            values[key] = (None, _read_published(value))
        elif isinstance(value, dict) and len(value) != 1:
            raise RunError(f"a point has {key}: {value}; write {{LABEL: VALUE}}, a scalar or a list")
        else:
            values[key] = (None, value) if isinstance(value, list) else _choices(key, value)[0]
    return values


def _read_published(values: Any) -> Published:
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise RunError(f"a point has published: {values}; write {{average: NUMBER, spread: NUMBER, TASK: NUMBER}}")
    return {str(name): float(value) for name, value in values.items()}


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


def filled(part: Any, values: Values) -> Any:
    """Replaces ${KEY} in a config by values; a text that is only ${KEY} becomes the value itself, with its type."""
    if isinstance(part, dict):
        return {key: filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [filled(value, values) for value in part]
    if not isinstance(part, str):
        return part
    single = _PLACEHOLDER.fullmatch(part)
    if single and single[1] in values:
        return values[single[1]][1]
    return _PLACEHOLDER.sub(lambda match: str(values[match[1]][1]) if match[1] in values else match[0], part)


def _config_names(value: Any) -> list[str]:
    """Returns the value as names of configs, or nothing if it is something else."""
    names = value if isinstance(value, list) else [value]
    return names if all(isinstance(name, str) and name.endswith(".yaml") for name in names) else []
