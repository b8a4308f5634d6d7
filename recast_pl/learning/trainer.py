"""The Trainer of one task, and the callbacks that every task needs."""

import copy
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from recast_pl.compat.lightning import ignore_signals, lightning_errors, of_task
from recast_pl.data.tasks import derive_seed
from recast_pl.errors import RunError
from recast_pl.learning.checkpoint import AtomicCheckpoints, load_trainable_state, trainable_state
from recast_pl.learning.cost import TaskCost
from recast_pl.learning.options import check_settings, check_trainer, listed


@dataclass(frozen=True)
class TrainerFactory:
    """Makes a new `Trainer` for each task, so that no state of one task reaches the next.

    Args:
        settings: Arguments of `Trainer`. Loggers replace TensorBoard, and False turns logging off. Callbacks, loggers
            and the profiler are copied for each task.

    A setting that cannot work raises RunError as soon as a trainer is made.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps(self) -> bool:
        """Whether the results are kept; not after a `fast_dev_run`, which makes only a few steps."""
        return not self.settings.get("fast_dev_run")

    def for_training(self, folder: Path, version: str, callbacks: Sequence[Callback]) -> Trainer:
        """Makes a trainer that fits.

        Args:
            folder: Where checkpoints and logs go by default.
            version: TensorBoard's logs go to `folder/tensorboard/version`.
            callbacks: More callbacks, without those that need something the settings turn off.
        """
        settings = dict(self.settings)
        loggers = settings.get("logger")
        if loggers in (None, True):
            settings["logger"] = tensorboard(folder, version)
        elif loggers is not False:
            settings["logger"] = [of_task(logger, version) for logger in listed(loggers)]
        needs = {LearningRateMonitor: "logger", LastEpoch: "enable_checkpointing"}
        refused = tuple(kind for kind, setting in needs.items() if settings.get(setting) is False)
        own = copy.deepcopy(listed(settings.get("callbacks")))
        added = [callback for callback in callbacks if not isinstance(callback, refused)]
        if settings.get("enable_progress_bar") in (None, True) and not any(isinstance(c, ProgressBar) for c in own):
            added.append(TaskProgressBar())
        settings["callbacks"], settings["profiler"] = [*own, *added], copy.deepcopy(settings.get("profiler"))
        plugins = listed(settings.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            settings["plugins"] = [*plugins, AtomicCheckpoints()]
        return _trainer({"default_root_dir": folder, **settings})

    def for_evaluation(self) -> Trainer:
        """Makes a trainer that only tests, and prints and writes nothing."""
        check_settings(self.settings)
        quiet = {"logger": False, "callbacks": None, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet["profiler"] = None
        return _trainer({**self.settings, **quiet})

    def alone(self, **settings: Any) -> "TrainerFactory":
        """A factory with the same settings and some others, for a single process."""
        return TrainerFactory({**self.settings, "devices": 1, "num_nodes": 1, "strategy": "auto", **settings})

    def without_checkpoints(self) -> "TrainerFactory":
        """A factory for fits that cannot be resumed: it writes checkpoints only if the settings ask for them."""
        if self.settings.get("enable_checkpointing") is not None:
            return self
        asked = any(isinstance(callback, ModelCheckpoint) for callback in listed(self.settings.get("callbacks")))
        return TrainerFactory({**self.settings, "enable_checkpointing": asked})


def tensorboard(folder: Path, version: str) -> TensorBoardLogger:
    """A TensorBoard logger that writes to `folder/tensorboard/version` and shows new values within seconds."""
    return TensorBoardLogger(folder, name="tensorboard", version=version, flush_secs=5)


def _trainer(settings: Mapping[str, Any]) -> Trainer:
    with _without_notices(), lightning_errors():
        trainer = Trainer(**settings)
    check_trainer(trainer, settings.get("strategy"))
    ignore_signals(trainer)
    return trainer


@contextmanager
def _without_notices() -> Iterator[None]:
    """A context in which Lightning does not announce which devices there are and are not used; warnings stay."""
    loggers = {
        logging.getLogger(name): logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")
    }
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*available but not used.*")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


class TaskProgressBar(RichProgressBar):
    """Lightning's progress bar with the time left of all tasks, and without the version number of the logger."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The values at the right of the bar."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for left in (callback.stream_left for callback in callbacks if isinstance(callback, TaskCost)):
            if left is not None:
                metrics["all tasks"] = f"{timedelta(seconds=round(left))} left"
        return metrics


Score = tuple[float, float]
"""Validation accuracy in [0, 1], and cross-entropy."""


class BestEpoch(Callback):
    """Keeps the trained parameters of the best epoch: highest validation accuracy, then lowest loss.

    They are kept in the checkpoint itself, so that one file, written atomically, holds all that resuming needs.
    """

    def __init__(self) -> None:
        self.score: Score | None = None
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts a head that does not start at random as epoch 0, if validation can compare it with later epochs."""
        if pl_module.probes.start is not None and trainer.limit_val_batches and not self.weights:
            self._compare(pl_module, *pl_module.probes.start)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the epoch that ended with the best one before."""
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            fraction = float(metrics["val/accuracy"]) / 100  # like the probe's, and as checkpoints keep it
            self._compare(pl_module, fraction, float(metrics["val/loss"]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the best epoch, before the module ends the task; does nothing if there was no validation."""
        if self.weights:
            load_trainable_state(pl_module, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps; the loss with a minus sign, as earlier versions wrote it."""
        return {"score": self.score and [self.score[0], -self.score[1]], "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the checkpoint kept."""
        score, self.weights = state_dict["score"], state_dict["weights"]
        self.score = (score[0], -score[1]) if self.weights else None

    def _compare(self, module: LightningModule, accuracy: float, loss: float) -> None:
        best, least = self.score or (float("-inf"), 0.0)
        if (accuracy, -loss) > (best, -least):
            self.score, self.weights = (accuracy, loss), trainable_state(module)


class SeedEpochs(Callback):
    """Seeds every epoch from (seed, task, epoch, process), so that a resumed run equals an uninterrupted one.

    Until then random numbers continue as they were when this callback was made: where Lightning starts several
    processes, it would begin them again, and the probe would be another one than on one process.
    """

    def __init__(self, seed: int, task: str) -> None:
        self.seed, self.task = seed, task
        self._random = torch.get_rng_state()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continues the random numbers."""
        torch.set_rng_state(self._random)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds before the first step of an epoch, which is after the data loaders have drawn their seeds."""
        if batch_idx == 0:
            seed = derive_seed(self.seed, self.task, trainer.current_epoch, trainer.global_rank)
            seed_everything(seed, verbose=False)


class FiniteLoss(Callback):
    """Stops a task whose loss is NaN or infinite, before the checkpoint of that epoch is written.

    It looks every `log_every_n_steps` steps and at the end of the epoch, because the processor must wait for the device
    each time.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.finite: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records whether the loss of a step is finite."""
        finite = outputs["loss"].isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks once more before the checkpoint is written."""
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        finite = self.finite is None or bool(self.finite)
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):  # all stop, or none
            epoch = trainer.current_epoch
            kept = f"as it was after epoch {epoch}" if epoch else "before the first epoch"
            raise RunError(
                f"the loss of task {self.task!r} has become NaN or infinite in epoch {epoch + 1}; its state {kept} is "
                "kept. Resume with a lower learning rate, such as --resume true "
                "--model.optimizer.init_args.lr 1e-4, or with --trainer.gradient_clip_val 1"
            )


class LastEpoch(ModelCheckpoint):
    """Writes the state after each epoch, to resume from. Its type keeps it apart from checkpoints that a user asks for.

    Args:
        folder: Where `last.ckpt` is written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False)


class TrainingTime(Callback):
    """Measures the seconds of training, over all sessions of a task.

    Lightning's `Timer` cannot, because Lightning ignores `max_time` if there is one already.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._before, self._start = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the checkpoint kept."""
        self._before = state_dict["seconds"]


class CoefficientHistograms(Callback):
    """Writes a histogram of each piece's parameters to TensorBoard after each epoch.

    Pieces with more than a million parameters are left out: their histograms would take as long as their training.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the histograms."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for piece in pl_module.pieces if writers else ():
            if 0 < sum(p.numel() for p in piece.parameters.values()) <= 10**6:
                values = torch.cat([p.detach().flatten() for p in piece.parameters.values()]).float()
                for writer in writers:
                    writer.add_histogram(f"coefficients/{piece.name}", values, trainer.current_epoch)


class Resources(Callback):
    """Measures the time, processor use and GPU memory of training, as in table 5 of the paper."""

    def __init__(self) -> None:
        self._wall = self._cpu = self._memory = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clocks."""
        self._wall, self._cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if pl_module.device.type == "cuda":
            self._memory = torch.cuda.max_memory_allocated(pl_module.device) / 1e9

    def used(self) -> dict[str, float | None]:
        """Wall time, mean use of all cores, and peak of allocated GPU memory (None without a GPU)."""
        busy = 100 * self._cpu / self._wall / (os.cpu_count() or 1) if self._wall else 0.0
        return {"seconds": self._wall, "cpu_percent": busy, "gpu_gigabytes": self._memory or None}
