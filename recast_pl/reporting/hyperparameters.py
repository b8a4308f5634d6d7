"""The hyperparameters of a run, for the table in TensorBoard."""

from collections.abc import Iterator, Mapping
from typing import Any

from recast_pl.runs.folder import RunFolder, Summary
from recast_pl.runs.layout import parse_yaml

_DATA = ("image_size", "batch_size", "split", "order_seed")

_TRAINER = ("max_epochs", "max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches", "devices")


def hyperparameters(folder: RunFolder, summary: Summary) -> dict[str, Any]:
    """Lists what decides a run as numbers, texts and flags, by name.

    Args:
        folder: The run; one that was made from Python has no config.yaml, and fewer entries.
        summary: The content of its `summary.json`.
    """
    facts: dict[str, Any] = {key: summary[key] for key in ("method", "backbone", "seed")}
    if folder.config.is_file():
        config = parse_yaml(folder.config.read_bytes()) or {}
        chosen = {name: _arguments(config.get(name)) for name in ("model", "data", "trainer")}
        facts |= dict(_leaves({key: value for key, value in chosen["model"].items() if key != "backbone"}))
        for part, keys in (("data", _DATA), ("trainer", _TRAINER)):
            facts |= dict(_leaves({f"{part}.{key}": chosen[part].get(key) for key in keys}))
    return facts


def _arguments(value: Any) -> dict[str, Any]:
    """The arguments of a class in a config, or the entries of a mapping; empty if there are none."""
    if not isinstance(value, Mapping):
        return {}
    return dict(value.get("init_args") or {}) if "class_path" in value else dict(value)


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields numbers, texts and flags by dotted name; a class counts as a text, and its arguments are below it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            if "class_path" in value:
                yield name, _short(value)
            yield from _leaves({f"{name}.{key}": part for key, part in _arguments(value).items()})
        elif isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
            yield from _leaves({f"{name}.{_short(part)}": _arguments(part) for part in value})
        elif isinstance(value, bool | int | float | str):
            yield name, value


def _short(value: Mapping[str, Any]) -> str:
    return str(value.get("class_path", "")).rpartition(".")[2]
