"""Learns a stream of tasks: one Trainer for each, a run folder that is the truth, and resume."""

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from recast_pl.data.images import FileDataset
from recast_pl.data.module import SequentialTaskDataModule
from recast_pl.data.tasks import derive_seed
from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.module import MimicryModule
from recast_pl.errors import PatchError, RunError
from recast_pl.files import is_whole_checkpoint, read_json, write_atomic, write_json
from recast_pl.metrics import average_accuracy, average_anytime_accuracy, backward_transfer, forgetting
from recast_pl.plots import plot_accuracy_matrix, to_png
from recast_pl.report import matrix_csv, stream_table
from recast_pl.til.module import TILModule
from recast_pl.til.patch import SharedState, TaskPatch
from recast_pl.training import (
    BestEpoch,
    CoefficientHistograms,
    FiniteLoss,
    SeedEpochs,
    TrainerFactory,
    tensorboard,
)

_RECORDED = {"tasks": list, "accuracy_matrix": list, "wall_seconds": float}  # of summary.json, what is read again


class Stream:
    """Learns the tasks of a datamodule in order, into a run folder.

    A task is finished when its patch is in place. What stood before is never overwritten; with `resume`,
    finished tasks are kept and an interrupted one goes on from its last epoch. Where a method does not keep tasks
    apart, `shared/` holds what they share as it was after the last finished one.

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
        self.rows: list[dict[str, Any]] = []
        self.matrix: list[list[float | None]] = []
        self.patches: list[TaskPatch] = []
        self.shared_bytes = 0
        self.seconds_before, self.started = 0.0, time.monotonic()

    def run(self) -> dict[str, Any]:
        """Learns all tasks that are not finished.

        Returns:
            The content of `summary.json`.
        """
        self.data.prepare_data()
        self._build()
        self._take_finished()
        for index in range(len(self.patches), len(self.data.tasks)):
            self._learn(index)
        summary = self._summary()
        if self.evaluator.is_global_zero:
            self.console.print(stream_table(summary))
        return summary

    def _build(self) -> None:
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

    def _take_finished(self) -> None:
        """Reads the patches in place, what they share, and the results of just those tasks."""
        paths = [self._path("patches", index) for index in range(len(self.data.tasks))]
        self.patches = [_load_patch(path) for path in itertools.takewhile(Path.exists, paths)]
        if self.patches:
            self.shared_bytes = _load_shared(self.module, self._path("shared", len(self.patches) - 1))
            for patch in self.patches:
                self.module.activate(patch)
            summary = read_json(self.run_dir / "summary.json", RunError, **_RECORDED)
            count = len(self.patches)
            self.rows = summary["tasks"][:count]
            self.matrix = [row[:count] for row in summary["accuracy_matrix"][:count]]
            self.seconds_before = summary["wall_seconds"]

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
        """Measures all tasks seen, and writes all else first, then the patch that marks the task finished."""
        probe, trained = percent(self.module.probe_accuracy), self.module.task_parameters
        patch = self.module.patch({"probe_accuracy": probe})
        accuracies = [self._measure(j, p) for j, p in enumerate([*self.patches, patch])]
        patch = replace(patch, metrics={"accuracy": accuracies[-1], "probe_accuracy": probe})
        self.data.select(index)
        self.patches.append(patch)
        self.matrix = [[*row, None] for row in self.matrix] + [list(accuracies)]
        sizes = self.data.sizes
        content = patch.to_bytes()
        row = {
            "name": patch.task,
            "classes": len(patch.classes),
            "accuracy": accuracies[-1],
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
        self.rows.append(row)
        if not self.module.isolated:
            self._write_shared(index)
        if self.evaluator.is_global_zero:
            self._write_results()
            write_atomic(self._path("patches", index), content)
            for before in range(index):
                self._path("shared", before).unlink(missing_ok=True)

    def _measure(self, index: int, patch: TaskPatch) -> float:
        return measure(self.module, self.data, index, patch, self.evaluator)

    def _write_shared(self, index: int) -> None:
        state = self.module.shared_state()
        self.shared_bytes = state.nbytes
        if self.evaluator.is_global_zero:
            state.save(self._path("shared", index))

    def _write_results(self) -> None:
        summary = self._summary()
        names = [row["name"] for row in self.rows]
        write_atomic(self.run_dir / "accuracy_matrix.csv", matrix_csv(self.matrix, names))
        figure = plot_accuracy_matrix(self.matrix, names)
        write_atomic(self.run_dir / "accuracy_matrix.png", to_png(figure))
        write_json(self.run_dir / "summary.json", summary)
        if self.trainers.settings.get("logger") in (None, True):
            _log_stream(tensorboard(self.run_dir, "stream"), summary, figure)

    def _summary(self) -> dict[str, Any]:
        return {
            "method": " + ".join(self.module.method),
            "backbone": self.module.backbone_config.name,
            "seed": self.seed,
            "tasks": self.rows,
            "accuracy_matrix": self.matrix,
            "average_accuracy": average_accuracy(self.matrix),
            "average_anytime_accuracy": average_anytime_accuracy(self.matrix),
            "backward_transfer": backward_transfer(self.matrix),
            "forgetting": forgetting(self.matrix),
            "shared_bytes": self.shared_bytes,
            "wall_seconds": round(self.seconds_before + time.monotonic() - self.started, 2),
        }

    def _file_name(self, index: int) -> str:
        return f"{index:02d}_{self.data.tasks[index].name}"

    def _path(self, kind: str, index: int) -> Path:
        return self.run_dir / kind / f"{self._file_name(index)}.safetensors"


def measure(
    module: TILModule, data: SequentialTaskDataModule, index: int, patch: TaskPatch, evaluator: Trainer
) -> float:
    """Accuracy in percent of a learnt task on its test split.

    Args:
        module: Built, of the method and base of the patch.
        data: Its stream.
        index: Position of the task in the stream.
        patch: The learnt task.
        evaluator: Runs the test.
    """
    data.select(index)
    if data.classes != patch.classes:
        raise PatchError(
            f"task {patch.task!r} has classes {data.classes}, its patch has {patch.classes}; restore the images"
        )
    module.activate(patch)
    (result,) = evaluator.test(module, datamodule=data, verbose=False)
    return percent(result["test/accuracy"])


def evaluate_run(
    module: TILModule, data: SequentialTaskDataModule, run_dir: Path, trainers: TrainerFactory
) -> list[tuple[str, float, float]]:
    """Measures every learnt task of a run again, from its patch.

    Returns:
        Task, accuracy recorded in percent, accuracy measured in percent.

    Raises:
        RunError: If nothing has been learnt.
    """
    data.prepare_data()
    evaluator = trainers.for_evaluation()
    patches = load_patches(run_dir)
    _restore(module, run_dir, data.image_size)
    recorded = _recorded(run_dir / "summary.json")
    unknown = [name for name in patches if name not in recorded]
    if unknown:
        raise RunError(f"{run_dir / 'summary.json'} says nothing of task {unknown[0]!r}; restore it")
    positions = {task.name: index for index, task in enumerate(data.tasks)}
    return [
        (name, recorded[name], measure(module, data, positions[name], patch, evaluator))
        for name, patch in patches.items()
    ]


def predict_images(
    module: TILModule, run_dir: Path, task: str, images: Sequence[Path], trainers: TrainerFactory
) -> list[tuple[Path, str, float]]:
    """Classifies image files with a learnt task.

    Args:
        module: Of the run's method and backbone.
        run_dir: The run folder.
        task: Name of the learnt task.
        images: Files.
        trainers: Makes the trainer that runs it.

    Returns:
        For each image its path, the most probable class, and its probability.

    Raises:
        RunError: If the run has not learnt the task.
    """
    patches = load_patches(run_dir)
    if task not in patches:
        raise RunError(f"task {task!r} is not learnt in {run_dir}; learnt are {', '.join(patches)}")
    patch = patches[task]
    _restore(module, run_dir, patch.image_size)
    module.activate(patch)
    loader = DataLoader(FileDataset(images, patch.image_size), batch_size=64)
    batches = trainers.for_evaluation().predict(module, loader)
    probabilities = torch.cat([b for b in batches or [] if isinstance(b, Tensor)])  # (N, classes)
    best, labels = probabilities.max(1)
    return [(path, patch.classes[int(label)], float(p)) for path, label, p in zip(images, labels, best, strict=True)]


def load_patches(run_dir: Path) -> dict[str, TaskPatch]:
    """The learnt tasks of a run by name, in order.

    Raises:
        RunError: If there are none.
    """
    patches = (_load_patch(path) for path in _patch_paths(run_dir))
    return {patch.task: patch for patch in patches}


def fit_mimicry(
    module: MimicryModule, run_dir: Path, trainers: TrainerFactory, seed: int = 42, config: str | None = None
) -> Decomposition:
    """Fits templates by gradient, and writes `decomposition.safetensors` into the run folder.

    Args:
        module: What to fit.
        run_dir: The run folder; TensorBoard's events go there too.
        trainers: Makes the trainer.
        seed: Seed of the start and the noise.
        config: Content of `config.yaml`; None for none.
    """
    seed_everything(seed, verbose=False)
    module.configure_model()
    if config is not None:
        write_atomic(run_dir / "config.yaml", config)
    trainer = trainers.for_training(run_dir, "mimicry", [])
    trainer.fit(module)
    decomposition = module.decomposition()
    if trainer.is_global_zero:
        decomposition.save(run_dir / "decomposition.safetensors")
    return decomposition


def check_run_folder(run_dir: Path, resume: bool) -> None:
    """Makes sure that a new run does not touch an old one.

    Raises:
        RunError: If the folder has content and is not to be resumed.
    """
    if not resume and run_dir.exists() and any(run_dir.iterdir()):
        raise RunError(f"run folder {run_dir} exists; add --resume true to continue it, or name another --run_dir")


def percent(fraction: float) -> float:
    """A fraction as a percentage, rounded so that it reads the same wherever it is printed."""
    return round(100 * fraction, 4)


def _patch_paths(run_dir: Path) -> list[Path]:
    paths = sorted((run_dir / "patches").glob("*.safetensors"))
    if not paths:
        raise RunError(f"{run_dir} holds no learnt task; give the folder of a run made by 'fit'")
    return paths


def _load_patch(path: Path) -> TaskPatch:
    """Reads a patch, which must be in its own place."""
    patch = TaskPatch.load(path)
    if path.stem.partition("_")[2] != patch.task:
        raise PatchError(f"{path} holds the patch of task {patch.task!r}; put the right one there")
    return patch


def _recorded(path: Path) -> dict[str, float]:
    """The last row of the accuracy matrix in `summary.json`, by task."""
    summary = read_json(path, RunError, **_RECORDED)
    try:
        return dict(zip([row["name"] for row in summary["tasks"]], summary["accuracy_matrix"][-1], strict=True))
    except (TypeError, ValueError, KeyError, IndexError) as cause:
        raise RunError(f"{path} is damaged ({cause!r}); restore it") from cause


def _restore(module: TILModule, run_dir: Path, image_size: int) -> None:
    """Builds the module as the run's tasks need it."""
    for piece in module.pieces:
        piece.load_base(run_dir)
    module.build(image_size)
    _load_shared(module, run_dir / "shared" / _patch_paths(run_dir)[-1].name)


def _load_shared(module: TILModule, path: Path) -> int:
    """Takes what tasks share, if they share anything, and returns its bytes."""
    if module.isolated:
        return 0
    state = SharedState.load(path)
    module.load_shared_state(state)
    return state.nbytes


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
