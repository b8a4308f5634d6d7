"""Finished runs in folders, gathered to what is compared with one another."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recast_pl.errors import RunError
from recast_pl.files import read_json

Summary = dict[str, Any]

Label = str | int | float

PLAN = "plan.json"
"""What the last command in a folder was to learn."""


def is_whole(summary: Summary) -> bool:
    """Whether a run has learnt all its tasks, as far as it says so."""
    return bool(summary["tasks"]) and not summary.get("unlearnt")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Of the run.
        summary: The content of `summary.json`.
    """

    folder: Path
    summary: Summary


@dataclass
class Collection:
    """Runs that are compared: those of one folder, as `FOLDER/POINT/SEED` or `FOLDER/RUN`.

    Args:
        folder: Of the comparison or sweep, or that of a single run's folder.
        runs: Finished runs by name of the point, or of the run folder.
        labels: Of the points of a sweep.
        x: Horizontal axis of a sweep's figure; None if this is none.
        series: What its lines or bars stand for.
        unfinished: What is missing, by where it should be; why.
    """

    folder: Path
    runs: dict[str, list[Run]] = field(default_factory=dict)
    labels: dict[str, dict[str, Label]] = field(default_factory=dict)
    x: str | None = None
    series: Sequence[str] = ()
    unfinished: dict[Path, str] = field(default_factory=dict)


def find_collections(folders: Iterable[Path]) -> list[Collection]:
    """Finds all runs in some folders.

    Args:
        folders: Run folders, or folders of them at any depth.

    Returns:
        What belongs together, in order of folders.

    Raises:
        RunError: If a folder holds no run, or a file of a run is damaged.
    """
    collections: dict[Path, Collection] = {}
    for folder in folders:
        runs = sorted({path.parent for name in ("summary.json", "config.yaml") for path in folder.rglob(name)})
        if not runs:
            raise RunError(f"{folder} holds no run, that is no summary.json at any depth; give a folder made by fit")
        for run in runs:
            home = run.parent.parent if run.name.isdigit() else run.parent
            collection = collections.setdefault(home.resolve(), Collection(home))
            _take(collection, run)
    for collection in collections.values():
        _leave_out_parts(collection)
        _take_plan(collection)
    return list(collections.values())


def _take(collection: Collection, run: Path) -> None:
    path = run / "summary.json"
    if path.is_file():
        entries = {"seed": int, "tasks": list, "accuracy_matrix": list, "method": str, "backbone": str}
        known = collection.runs.setdefault(run.parent.name if run.name.isdigit() else run.name, [])
        if run.resolve() not in [other.folder.resolve() for other in known]:
            known.append(Run(run, read_json(path, RunError, **entries)))
    elif not (run / "mimicry.json").is_file():
        collection.unfinished[run] = "no task is learnt, or templates are not fitted yet"


def _leave_out_parts(collection: Collection) -> None:
    """All runs of a collection have the same tasks: those with fewer are not finished."""
    tasks = max((len(run.summary["tasks"]) for runs in collection.runs.values() for run in runs), default=0)
    for name, runs in list(collection.runs.items()):
        whole = [run for run in runs if is_whole(run.summary) and len(run.summary["tasks"]) == tasks]
        for run in runs:
            if run not in whole:
                learnt = ", ".join(task["name"] for task in run.summary["tasks"]) or "nothing"
                collection.unfinished[run.folder] = f"only {learnt} learnt"
        collection.runs[name] = whole
    collection.runs = {
        name: sorted(runs, key=lambda run: int(run.summary["seed"])) for name, runs in collection.runs.items() if runs
    }


def _take_plan(collection: Collection) -> None:
    """Knows from `plan.json` in which order points come, how they are drawn, and what has not even been begun."""
    path = collection.folder / PLAN
    if not path.is_file():
        return
    plan = read_json(path, RunError, points=dict, seeds=list)
    collection.labels, collection.x, collection.series = plan["points"], plan.get("x"), plan.get("series", ())
    order = [*plan["points"], *(name for name in collection.runs if name not in plan["points"])]
    collection.runs = {name: collection.runs[name] for name in order if name in collection.runs}
    for name, seed in itertools.product(plan["points"], plan["seeds"]):
        run = collection.folder / name / str(seed)
        if not run.is_dir():
            collection.unfinished[run] = "not begun"
