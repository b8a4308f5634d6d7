"""The results of a run: a summary of the records of its tasks, and the files that show it."""

from collections.abc import Sequence

import numpy as np

from recast_pl.files import json_text, write_atomic
from recast_pl.runs import metrics
from recast_pl.runs.class_rows import ClassRows
from recast_pl.runs.folder import ClassSummary, Record, RunFolder, Summary
from recast_pl.runs.presentation import Presentation


def summarize(
    records: Sequence[Record], method: str, backbone: str, seed: int, unlearnt: Sequence[str], classes: ClassSummary
) -> Summary:
    """Sums up the records of at least one task.

    Args:
        records: Of the finished tasks, in the order of the stream.
        method: Name of the method.
        backbone: Name of the backbone.
        seed: The seed of the run.
        unlearnt: Names of the tasks that are not trained yet.
        classes: Results among the classes of all tasks; empty if they were not measured.
    """
    matrix = metrics.accuracy_matrix(records)
    square = np.full((len(matrix), len(matrix)), np.nan)  # a third of the time that np.array takes with None
    for index, row in enumerate(matrix):
        square[index, : index + 1] = row[: index + 1]
    return Summary(
        method=method,
        backbone=backbone,
        seed=seed,
        tasks=[record["task"] for record in records],
        unlearnt=list(unlearnt),
        accuracy_matrix=matrix,
        average_accuracy=metrics.average_accuracy(square),
        average_anytime_accuracy=metrics.average_anytime_accuracy(square),
        backward_transfer=metrics.backward_transfer(square),
        forgetting=metrics.forgetting(square),
        shared_bytes=records[-1]["shared_bytes"],
        wall_seconds=round(sum(record["wall_seconds"] for record in records), 2),
        **classes,
    )


def write_results(folder: RunFolder, summary: Summary, presentation: Presentation | None) -> None:
    """Writes a summary and what presents it, unless the folder has them."""
    content, path = _text(summary), folder.summary
    if not (path.exists() and path.read_text(encoding="utf-8") == content):
        if presentation:
            presentation.write(folder, summary)
        write_atomic(path, content)


def _text(summary: Summary) -> str:
    """JSON with a line for each row of the matrix: a line for each number takes seconds where there are a million."""
    rows = ",\n".join(f"    [{line}]" for line in metrics.matrix_lines(summary["accuracy_matrix"], ", ", "null"))
    text = json_text({**summary, "accuracy_matrix": None})
    return text.replace('"accuracy_matrix": null', f'"accuracy_matrix": [\n{rows}\n  ]')


def refresh_results(folder: RunFolder, tasks: Sequence[str], presentation: Presentation | None) -> None:
    """Makes the results of a run again from the records of its tasks, after some were removed, renamed or merged.

    A run without results is left to `fit`, which knows its method.

    Args:
        folder: The run folder.
        tasks: Names of its tasks, trained or not, in the order of the stream.
        presentation: Writes tables and pictures; None for `summary.json` alone.
    """
    if not folder.summary.is_file():
        return
    finished = sorted((f for f in folder.files_of(tasks) if f.patch.exists()), key=lambda files: files.position)
    if not finished:
        for path in (folder.matrix_csv, folder.matrix_png, folder.summary):
            path.unlink(missing_ok=True)
        return
    before, records = folder.read_summary(), [files.load_record() for files in finished]
    trained = [files.task for files in finished]
    summary = summarize(
        records,
        method=before["method"],
        backbone=before["backbone"],
        seed=before["seed"],
        unlearnt=[task for task in tasks if task not in trained],
        classes=ClassRows(finished, None).read(dict(enumerate(records))),
    )
    write_results(folder, summary, presentation)
