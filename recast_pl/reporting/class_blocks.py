"""The part of the report about classes: which are recognised, and which are taken for one another."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from recast_pl.reporting.document import Block, Chart, DataTable, Heading, Line, Text
from recast_pl.reporting.plots import plot_confusions
from recast_pl.runs.class_results import ClassResults, class_measures, confusion_matrix, merge_seeds
from recast_pl.runs.collection import Run

_T = TypeVar("_T")

_CLASSES, _CONFUSIONS = 60, 20  # rows of the tables

_MATRICES, _LARGEST = 12, 40  # pictures, and classes in one


def class_blocks(chosen: Mapping[str, Sequence[Run]], what: str, file: str) -> Iterator[Block]:
    """Composes the tables and figures of some runs; none if the runs did not record results by class.

    Args:
        chosen: Runs of one backbone by name; those of one name differ in their seed.
        what: Names the runs in captions.
        file: Beginning of the file names of figures.
    """
    found = {name: tasks for name, runs in chosen.items() if (tasks := _by_task(runs))}
    if not found:
        return
    best = max(found, key=lambda name: statistics.mean([run.summary["average_accuracy"] for run in chosen[name]]))
    yield Heading(f"Classes of {what}", 3)
    yield _recall_table(found, what) if len(found) > 1 else _measures_table(found[best], f"{what}, run {best}")
    yield from _confusions(found, what)
    for index, task in enumerate(list(found[best])[:_MATRICES]):
        results = found[best][task]
        matrix = confusion_matrix(results)
        if matrix is not None and len(results["names"]) <= _LARGEST:
            caption = (
                f"{what}: test images of task {task} by class and predicted class, just after its training, {best}"
            )
            yield Chart(
                f"{file}_confusions_{index:02d}",
                caption,
                plot_confusions(matrix, results["names"], f"Test images of {task}"),
            )


def _by_task(runs: Sequence[Run]) -> dict[str, ClassResults]:
    """The results of each task, with the images of all seeds together."""
    found: dict[str, list[ClassResults]] = {}
    for run in runs:
        for files in run.folder.finished().values() if run.folder.is_trained else ():
            record = files.load_record()
            if "classes" in record:
                found.setdefault(files.task, []).append(record["classes"])
    return {task: merge_seeds(results) for task, results in found.items()}


def _recall_table(found: Mapping[str, Mapping[str, ClassResults]], what: str) -> DataTable:
    """One row for each class, one column for each run."""
    recalls: dict[tuple[str, str], dict[str, float]] = {}
    for name, tasks in found.items():
        for task, results in tasks.items():
            for measured in class_measures(results):
                if measured.recall is not None:
                    recalls.setdefault((task, measured.name), {})[name] = measured.recall
    rows, note = _lowest(list(recalls.items()), [statistics.mean(list(values.values())) for values in recalls.values()])
    cells: list[list[Line]] = [
        [[Text(task)], [Text(label)], *([Text(_percent(values.get(name)))] for name in found)]
        for (task, label), values in rows
    ]
    caption = f"{what}: recall of each class in %, just after the training of its task{note}"
    return DataTable(caption, ["task", "class", *found], cells, 2)


def _measures_table(tasks: Mapping[str, ClassResults], what: str) -> DataTable:
    measured = [(task, values) for task, results in tasks.items() for values in class_measures(results)]
    scores = [101 if values.f1 is None else values.f1 for _, values in measured]
    rows, note = _lowest(measured, scores)
    cells: list[list[Line]] = [
        [[Text(task)], [Text(name)], [Text(str(images))], *([Text(_percent(share))] for share in shares)]
        for task, (name, images, *shares) in rows
    ]
    header = ["task", "class", "test images", "recall %", "precision %", "F1 %"]
    return DataTable(f"{what}: each class, just after the training of its task{note}", header, cells, 2)


def _confusions(found: Mapping[str, Mapping[str, ClassResults]], what: str) -> Iterator[DataTable]:
    pairs = [
        (count, [name, task, results["names"][label], results["names"][predicted], str(count)])
        for name, tasks in found.items()
        for task, results in tasks.items()
        for label, predicted, count in results["confused"]
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows: list[list[Line]] = [[[Text(cell)] for cell in cells] for _, cells in pairs[:_CONFUSIONS]]
    if rows:
        header = ["run", "task", "class", "taken for", "images"]
        yield DataTable(f"{what}: the most frequent confusions", header, rows, 4)


def _lowest(rows: Sequence[_T], scores: Sequence[float]) -> tuple[Sequence[_T], str]:
    """All rows in their order, or those with the lowest scores, and a note that says so."""
    if len(rows) <= _CLASSES:
        return rows, ""
    order = sorted(range(len(rows)), key=lambda index: scores[index])[:_CLASSES]
    return [rows[index] for index in order], f"; the {_CLASSES} lowest of {len(rows):,} classes"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
