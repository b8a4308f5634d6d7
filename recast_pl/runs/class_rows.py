"""Accuracies where the classes of all tasks so far are one label space (class-incremental learning)."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict, cast

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.files import read_sealed_json, sealed_json, sha256, write_atomic
from recast_pl.learning.til_module import TILModule
from recast_pl.runs.folder import ClassSummary, Record, TaskFiles

Accuracies = dict[str, dict[str, float]]
"""Accuracy in percent on the test images of each task, by measure and task."""


class ClassRow(TypedDict):
    """The content of `class_evaluation/NN_TASK.json`: accuracies after this task, on its test images and all before.

    `patches` is the digest of the patches that were measured.
    """

    patches: str
    accuracies: Accuracies


class ClassEvaluation(Protocol):
    """Measures how images are classified among the classes of all tasks so far.

    Args:
        measures: Names of its measures.
    """

    measures: Sequence[str]

    def measure(
        self, module: TILModule, data: SequentialTaskDataModule, files: Sequence[TaskFiles], evaluator: Trainer
    ) -> Accuracies:
        """Measures the first tasks of a stream; for the same stream, it is called with more and more of them.

        Args:
            module: The method and backbone, built; any task may be the current one afterwards.
            data: The stream; any task may be selected afterwards.
            files: Of the first tasks, all finished.
            evaluator: Decides the device and the precision.
        """


class ClassRows:
    """The rows of a run. The row after a task depends on no file but those of this task and all before.

    So it does not matter which process trained a task, nor when: rows that are missing are measured later.

    Args:
        files: Of all tasks, in the order of the stream.
        evaluation: Measures them; None to measure none, and only read those that exist.
    """

    def __init__(self, files: Sequence[TaskFiles], evaluation: ClassEvaluation | None) -> None:
        self._files = files
        self._evaluation = evaluation
        self._rows: list[ClassRow] = []  # after each of the first tasks

    def check(self, module: TILModule) -> None:
        """Raises RunError if classes are to be evaluated, but tasks share weights."""
        sharing = [type(piece).__name__ for piece in module.pieces if not piece.isolated]
        if self._evaluation is not None and sharing:
            raise RunError(
                "--evaluation class finds tasks by the features of a frozen network, but tasks share what "
                f"{sharing[0]} trains; leave it out, or use a method that keeps tasks apart"
            )

    def extend(
        self, module: TILModule, data: SequentialTaskDataModule, records: Mapping[int, Record], evaluator: Trainer
    ) -> None:
        """Reads or measures the rows after the first tasks, as far as these are finished; on the main process only.

        Args:
            module: The method and backbone, built.
            data: The stream.
            records: Of the finished tasks, by position.
            evaluator: Decides the device and the precision.
        """
        for index in range(len(self._rows), len(self._files)):
            if index not in records or not evaluator.is_global_zero:
                return
            patches = sha256("".join(records[i]["patch"] for i in range(index + 1)).encode())
            row = self._read(index, patches)
            if row is None and self._evaluation is not None and self._can_measure(index, data):
                oracle = {task["name"]: task["accuracy"] for task in (records[i]["task"] for i in range(index + 1))}
                others = self._evaluation.measure(module, data, self._files[: index + 1], evaluator)
                row = ClassRow(patches=patches, accuracies={"oracle": oracle, **others})
                write_atomic(self._files[index].class_row, sealed_json(row))
            if row is None:
                return
            self._rows.append(row)

    def read(self, records: Mapping[int, Record]) -> ClassSummary:
        """The summary of the rows that exist, of the finished tasks by position in the stream."""
        digests = [records[index]["patch"] for index in sorted(records)]
        rows = [self._read(index, sha256("".join(digests[: index + 1]).encode())) for index in range(len(digests))]
        self._rows = [row for row in rows if row is not None]
        return self.summary(len(rows))

    def _can_measure(self, index: int, data: SequentialTaskDataModule) -> bool:
        """Whether the images of a task and all before are there; warns if they are not."""
        lost = [self._files[i].task for i in range(index + 1) if not data.is_there(i)]
        if lost:
            rank_zero_warn(
                f"classes of all tasks are not evaluated after {self._files[index].task!r}: the images of task "
                f"{lost[0]!r} are not here"
            )
        return not lost

    def _read(self, index: int, patches: str) -> ClassRow | None:
        """The row after a task; None if it is missing, of other patches, or lacks a measure."""
        path = self._files[index].class_row
        if not path.is_file():
            return None
        row = cast(ClassRow, read_sealed_json(path, RunError))
        wanted = {"oracle", *self._evaluation.measures} if self._evaluation else row["accuracies"].keys()
        return row if row["patches"] == patches and row["accuracies"].keys() == wanted else None

    def summary(self, count: int) -> ClassSummary:
        """Averages over tasks, after each task and at the end; nothing unless there is a row for each of `count`."""
        if len(self._rows) != count or not count:
            return {}
        means = {
            measure: [statistics.mean(row["accuracies"][measure].values()) for row in self._rows]
            for measure in self._rows[-1]["accuracies"]
        }
        return {
            "oracle_accuracy": means["oracle"][-1],
            "routed_accuracy": means["routed"][-1],
            "joint_accuracy": means["joint"][-1],
            "class_accuracies": means,
        }
