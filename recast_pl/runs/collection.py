"""Finds finished runs in folders and groups those that are compared with one another."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recast_pl.errors import RunError
from recast_pl.files import read_json
from recast_pl.runs.folder import RunFolder, Summary

Label = str | int | float

PLAN = "plan.json"
"""File of a comparison or sweep that lists its points and seeds."""


def is_complete(summary: Summary) -> bool:
    """Whether a run has trained all its tasks, according to its summary."""
    return bool(summary["tasks"]) and not summary.get("unlearnt")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and the content of its `summary.json`."""

    folder: RunFolder
    summary: Summary


@dataclass
class Collection:
    """Runs that are compared: those of one folder, as `FOLDER/POINT/SEED` or `FOLDER/RUN`.

    Args:
        folder: The folder of the comparison or sweep, or the parent of a single run's folder.
        runs: Finished runs by name of the point or of the run folder.
        labels: Labels of the points of a sweep, by name of the point.
        x: Horizontal axis of a sweep's figure; None if this is not a sweep.
        series: Keys of the labels that tell its lines or bars apart.
        published: Accuracies that others report, by name of the point.
        seeds: Number of seeds that each point is meant to have; 0 if there is no plan.
        unfinished: Why a run is missing, by its folder.
    """

    folder: Path
    runs: dict[str, list[Run]] = field(default_factory=dict)
    labels: dict[str, dict[str, Label]] = field(default_factory=dict)
    x: str | None = None
    series: Sequence[str] = ()
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    seeds: int = 0
    unfinished: dict[Path, str] = field(default_factory=dict)


def find_collections(folders: Iterable[Path]) -> list[Collection]:
    """Groups all runs in some folders, at any depth, in order of folders.

    Raises:
        RunError: If a folder holds no run, or a file of a run is damaged.
    """
    collections: dict[Path, Collection] = {}
    for folder in folders:
        runs = RunFolder.find(folder)
        if not runs:
            raise RunError(f"{folder} holds no run, at any depth; give a folder made by fit")
        for run in runs:
            home = run.path.parent.parent if run.path.name.isdigit() else run.path.parent
            _add(collections.setdefault(home.resolve(), Collection(home)), run)
    for collection in collections.values():
        _leave_out_parts(collection)
        _apply_plan(collection)
    return list(collections.values())


def _add(collection: Collection, run: RunFolder) -> None:
    if run.summary.is_file():
        name = run.path.parent.name if run.path.name.isdigit() else run.path.name
        known = collection.runs.setdefault(name, [])
        if run.path.resolve() not in [other.folder.path.resolve() for other in known]:
            known.append(Run(run, run.read_summary()))
    elif not run.mimicry.is_file():
        collection.unfinished[run.path] = "no task is trained, or templates are not fitted yet"


def _leave_out_parts(collection: Collection) -> None:
    """Moves runs with fewer tasks than others to the unfinished ones: all runs of a collection have the same tasks."""
    tasks = max((len(run.summary["tasks"]) for runs in collection.runs.values() for run in runs), default=0)
    for name, runs in list(collection.runs.items()):
        complete = [run for run in runs if is_complete(run.summary) and len(run.summary["tasks"]) == tasks]
        for run in runs:
            if run not in complete:
                trained = ", ".join(task["name"] for task in run.summary["tasks"]) or "nothing"
                collection.unfinished[run.folder.path] = f"only {trained} trained"
        collection.runs[name] = sorted(complete, key=lambda run: run.summary["seed"])
    collection.runs = {name: runs for name, runs in collection.runs.items() if runs}


def _apply_plan(collection: Collection) -> None:
    """Takes the order of points, the axes and the missing runs from `plan.json`, if there is one."""
    path = collection.folder / PLAN
    if not path.is_file():
        return
    plan = read_json(path, RunError, points=dict, seeds=list)
    collection.labels, collection.x, collection.series = plan["points"], plan.get("x"), plan.get("series", ())
    collection.published, collection.seeds = plan.get("published", {}), len(plan["seeds"])
    order = [*plan["points"], *(name for name in collection.runs if name not in plan["points"])]
    collection.runs = {name: collection.runs[name] for name in order if name in collection.runs}
    for name, seed in itertools.product(plan["points"], plan["seeds"]):
        run = collection.folder / name / str(seed)
        if not run.is_dir():
            collection.unfinished[run] = "not begun"
