"""Learns a stream of tasks: one Trainer for each, a run folder that is the truth, and resume."""

import itertools
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from lightning import seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.data.tasks import derive_seed
from recast_pl.errors import RunError
from recast_pl.files import is_whole_checkpoint, json_text, sealed_json, sha256, write_atomic
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.til_module import TILModule
from recast_pl.learning.trainer import (
    BestEpoch,
    CoefficientHistograms,
    FiniteLoss,
    SeedEpochs,
    TrainerFactory,
    tensorboard,
)
from recast_pl.reporting.plots import plot_accuracy_matrix, to_png
from recast_pl.reporting.tables import matrix_csv, stream_table
from recast_pl.runs.evaluation import measure
from recast_pl.runs.folder import Record, accuracy_matrix, load_finished, load_shared, percent
from recast_pl.runs.metrics import average_accuracy, average_anytime_accuracy, backward_transfer, forgetting


class Stream:
    """Learns the tasks of a datamodule in order, into a run folder.

    A task is finished when its patch is in place; `tasks/` holds a record of each, from which all results are made.
    What stood before is never overwritten; with `resume`, finished tasks are kept and an interrupted one goes on from
    its last epoch. Where a method keeps tasks apart, they may be learnt in any order and by several processes; where
    it does not, `shared/` holds what they share as it was after the last finished one.

    Args:
        module: The method and backbone.
        data: The tasks.
        run_dir: The run folder.
        trainers: Makes a trainer for each task.
        seed: Decides all randomness, together with task, epoch and process.
        config: Content of `config.yaml`, with which the command line finds the run again; None for none.
        console: Where tables are printed; None for the terminal.
    """

    def __init__(
        self,
        module: TILModule,
        data: SequentialTaskDataModule,
        run_dir: str | Path,
        trainers: TrainerFactory,
        seed: int = 42,
        config: str | None = None,
        console: Console | None = None,
    ) -> None:
        self.module, self.data, self.run_dir, self.trainers, self.seed = module, data, Path(run_dir), trainers, seed
        self.config, self.console = config, console or Console()
        self.evaluator = trainers.for_evaluation()
        self._names = [task.name for task in data.tasks]
        self.patches: dict[int, TaskPatch] = {}
        self.records: dict[int, Record] = {}
        self.started = time.monotonic()

    def run(self, only: Sequence[str] = ()) -> dict[str, Any]:
        """Learns all tasks that are not finished.

        Args:
            only: Names of the tasks to learn, and to look at, whatever others are there; `merge` makes the results
                of all. Empty for all tasks.

        Returns:
            The content of `summary.json`; with `only` it is of these tasks and not written, as other processes may be
            learning others.

        Raises:
            RunError: If there is no such task, or the method does not keep tasks apart.
        """
        for name in self.begin(only):
            self._learn(self._names.index(name))
            if not only:
                self._write_results()
        return self._conclude(write=not only)

    def begin(self, only: Sequence[str] = ()) -> list[str]:
        """Gets the images, writes what tasks are learnt upon into the run folder, and takes what is finished.

        Args:
            only: As of `run`.

        Returns:
            Names of the tasks that are left to learn, in order.

        Raises:
            RunError: As `run`.
        """
        wanted = self._positions(only)
        self._prepare()
        self._take_finished(wanted)
        return [self._names[index] for index in wanted if index not in self.records]

    def _prepare(self) -> None:
        self.data.prepare_data()
        for piece in self.module.pieces:
            piece.load_base(self.run_dir)
        seed_everything(self.seed, verbose=False)  # random weights, if asked for, must be found again
        self.module.build(self.data.image_size)
        if self.evaluator.is_global_zero:
            if self.config is not None:
                write_atomic(self.run_dir / "config.yaml", self.config)
            for piece in self.module.pieces:
                piece.save_base(self.run_dir)
                for part in piece.describe():
                    self.console.print(part)

    def merge(self) -> None:
        """Makes the results of all finished tasks, whoever learnt them. Call `begin` before."""
        self._take_finished(range(len(self._names)))
        if self.records:
            self._conclude(write=True)

    def check_isolated(self, option: str) -> None:
        """Refuses to learn tasks apart from one another where later ones need what earlier ones leave.

        Args:
            option: What asks for it.

        Raises:
            RunError: Naming the piece that tasks share.
        """
        sharing = [type(piece).__name__ for piece in self.module.pieces if not piece.isolated]
        if sharing:
            raise RunError(
                f"{option} learns tasks apart from one another, but they share what {sharing[0]} trains; "
                f"learn them in order, without {option}"
            )

    def _positions(self, only: Sequence[str]) -> list[int]:
        """Where tasks stand in the stream, in order; all for no names."""
        unknown = [name for name in only if name not in self._names]
        if unknown:
            raise RunError(f"--only {unknown[0]!r} is none of the tasks; choose of {', '.join(self._names)}")
        if only:
            self.check_isolated("--only")
        return [index for index, name in enumerate(self._names) if name in only or not only]

    def _take_finished(self, indices: Iterable[int]) -> None:
        """Reads patches in place, their records, and what they share, which is as it was after the last one."""
        there = [(index, self._path("patches", index).exists()) for index in indices]
        if not self.module.isolated:
            there = list(itertools.takewhile(itemgetter(1), there))
        finished = [index for index, found in there if found]
        both = {index: load_finished(self.run_dir, self._file_name(index)) for index in finished}
        self.patches = {index: patch for index, (patch, _) in both.items()}
        self.records = {index: record for index, (_, record) in both.items()}
        if finished:
            load_shared(self.module, self._path("shared", finished[-1]))
        for patch in self.patches.values():
            self.module.activate(patch)

    def _learn(self, index: int) -> None:
        self.data.select(index)
        name = self.data.task_name
        if self.evaluator.is_global_zero:
            position = f"task {index + 1} of {len(self.data.tasks)}"
            self.console.print(f"{position}: {name}, {len(self.data.classes)} classes, {self.data.sizes}")
        seed_everything(derive_seed(self.seed, name), verbose=False)
        self.module.begin_task(name, self.data.classes)
        best, timer = BestEpoch(), Timer(verbose=False)
        checkpoints = self.run_dir / "checkpoints" / self._file_name(index)
        saving = ModelCheckpoint(
            checkpoints, "last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
        )
        watching = [FiniteLoss(name), LearningRateMonitor(), CoefficientHistograms(), SeedEpochs(self.seed, name)]
        trainer = self.trainers.for_training(self.run_dir, self._file_name(index), [best, timer, saving, *watching])
        trainer.fit(self.module, datamodule=self.data, ckpt_path=self._checkpoint(checkpoints), weights_only=True)
        self._finish(index, trainer.current_epoch, timer.time_elapsed("train"))
        if trainer.is_global_zero:
            shutil.rmtree(checkpoints, ignore_errors=True)

    def _checkpoint(self, folder: Path) -> Path | None:
        """Where to resume a task; None to begin it, which ends with the same bytes as resuming it."""
        last = folder / "last.ckpt"
        if not last.exists():
            return None
        if is_whole_checkpoint(last):
            return last
        self.console.print(f"{last} is damaged; the task begins anew", soft_wrap=True)
        return None

    def _finish(self, index: int, epochs: int, seconds: float) -> None:
        """Measures the task and those before it, and writes all else first, then the patch that marks it finished."""
        probe, trained = percent(self.module.probe_accuracy), self.module.task_parameters
        patch = self.module.patch({"probe_accuracy": probe})
        seen = {j: p for j, p in self.patches.items() if j < index} | {index: patch}
        accuracies = {p.task: measure(self.module, self.data, j, p, self.evaluator) for j, p in seen.items()}
        patch = replace(patch, metrics={"accuracy": accuracies[patch.task], "probe_accuracy": probe})
        self.data.select(index)
        sizes = self.data.sizes
        content = patch.to_bytes()
        task = {
            "name": patch.task,
            "classes": len(patch.classes),
            "accuracy": accuracies[patch.task],
            "probe_accuracy": probe,
            "task_parameters": trained,
            "head_parameters": sum(t.numel() for t in patch.head.values()),
            "patch_bytes": len(content),
            "train_images": sizes["train"],
            "test_images": sizes["test"],
            "split": self.data.split_digest,
            "epochs": epochs,
            "seconds": round(seconds, 2),
        }
        shared_bytes = 0 if self.module.isolated else self._write_shared(index)
        record = {
            "task": task,
            "accuracies": accuracies,
            "patch": sha256(content),
            "shared_bytes": shared_bytes,
            "wall_seconds": round(time.monotonic() - self.started, 2),
        }
        self.started = time.monotonic()
        self.patches[index], self.records[index] = patch, record
        if self.evaluator.is_global_zero:
            write_atomic(self._path("tasks", index), sealed_json(record))
            write_atomic(self._path("patches", index), content)
            for before in range(index):
                self._path("shared", before).unlink(missing_ok=True)

    def _write_shared(self, index: int) -> int:
        state = self.module.shared_state()
        if self.evaluator.is_global_zero:
            state.save(self._path("shared", index))
        return state.nbytes

    def _conclude(self, write: bool) -> dict[str, Any]:
        if write:
            self._write_results()
        summary = self._summary()
        if self.evaluator.is_global_zero:
            self.console.print(stream_table(summary))
        return summary

    def _write_results(self) -> None:
        """Writes the results of all finished tasks, unless they are there."""
        summary, path = self._summary(), self.run_dir / "summary.json"
        content = json_text(summary)
        if not self.evaluator.is_global_zero or (path.exists() and path.read_text() == content):
            return
        matrix, names = summary["accuracy_matrix"], [task["name"] for task in summary["tasks"]]
        write_atomic(self.run_dir / "accuracy_matrix.csv", matrix_csv(matrix, names))
        figure = plot_accuracy_matrix(matrix, names)
        write_atomic(self.run_dir / "accuracy_matrix.png", to_png(figure))
        if self.trainers.settings.get("logger") in (None, True):
            _log_stream(tensorboard(self.run_dir, "stream"), summary, figure)
        write_atomic(path, content)

    def _summary(self) -> dict[str, Any]:
        records = [record for _, record in sorted(self.records.items())]
        matrix = accuracy_matrix(records)
        return {
            "method": " + ".join(self.module.method),
            "backbone": self.module.backbone_config.name,
            "seed": self.seed,
            "tasks": [record["task"] for record in records],
            "unlearnt": [name for index, name in enumerate(self._names) if index not in self.records],
            "accuracy_matrix": matrix,
            "average_accuracy": average_accuracy(matrix),
            "average_anytime_accuracy": average_anytime_accuracy(matrix),
            "backward_transfer": backward_transfer(matrix),
            "forgetting": forgetting(matrix),
            "shared_bytes": records[-1]["shared_bytes"],
            "wall_seconds": round(sum(record["wall_seconds"] for record in records), 2),
        }

    def _file_name(self, index: int) -> str:
        return f"{index:02d}_{self.data.tasks[index].name}"

    def _path(self, kind: str, index: int) -> Path:
        suffix = ".json" if kind == "tasks" else ".safetensors"
        return self.run_dir / kind / f"{self._file_name(index)}{suffix}"


def _log_stream(logger: Logger, summary: Mapping[str, Any], figure: Figure) -> None:
    """Writes the accuracy matrix as a picture and the stream's measures, as they stand after a task."""
    assert isinstance(logger, TensorBoardLogger)
    keys = ("average_accuracy", "average_anytime_accuracy", "backward_transfer", "forgetting")
    measures = {f"stream/{key}": summary[key] for key in keys}
    names = [task["name"] for task in summary["tasks"]]
    step = len(names)
    final = {f"accuracy/{name}": value for name, value in zip(names, summary["accuracy_matrix"][-1], strict=True)}
    logger.log_metrics(measures | final, step=step)
    logger.experiment.add_figure("accuracy_matrix", figure, step)
    logger.finalize("success")
