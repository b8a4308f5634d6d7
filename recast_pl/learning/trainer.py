"""The Trainer of one task: fresh each time, with the callbacks every task needs."""

import copy
import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from recast_pl.data.tasks import derive_seed
from recast_pl.errors import RunError
from recast_pl.files import write_atomic
from recast_pl.learning.til_module import TILModule


@dataclass(frozen=True)
class TrainerFactory:
    """Makes a fresh `Trainer` for each task, so that no state of one reaches the next.

    Args:
        settings: Arguments of `Trainer`. A logger given here replaces TensorBoard's, False turns logging off;
            callbacks given here are copied for each task.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    def for_training(self, folder: Path, version: str, callbacks: Sequence[Callback]) -> Trainer:
        """A trainer that logs to `folder/tensorboard/version`."""
        settings = dict(self.settings)
        own = _listed(settings.get("callbacks"))
        if settings.get("logger") in (None, True):
            settings["logger"] = tensorboard(folder, version)
        off: list[type[Callback]] = []
        off += [LearningRateMonitor] if settings["logger"] is False else []
        off += [ModelCheckpoint] if settings.get("enable_checkpointing") is False else []
        callbacks = [callback for callback in callbacks if not isinstance(callback, tuple(off))]
        bar = settings.get("enable_progress_bar") in (None, True)
        if bar and not any(isinstance(callback, ProgressBar) for callback in own):
            callbacks = [*callbacks, TaskProgressBar()]
        settings["callbacks"] = [*copy.deepcopy(own), *callbacks]
        settings["plugins"] = [*_listed(settings.get("plugins")), WholeCheckpoints()]
        return _trainer({"default_root_dir": folder, **settings})

    def alone(self, **settings: Any) -> "TrainerFactory":
        """The same for a single process, whatever the run was trained on.

        Args:
            settings: Further arguments of `Trainer`.
        """
        return TrainerFactory({**self.settings, "devices": 1, "num_nodes": 1, "strategy": "auto", **settings})

    def without_checkpoints(self) -> "TrainerFactory":
        """The same for what is never gone on with: checkpoints are written only if the settings ask for them."""
        if self.settings.get("enable_checkpointing") is not None:
            return self
        asked = any(isinstance(callback, ModelCheckpoint) for callback in _listed(self.settings.get("callbacks")))
        return TrainerFactory({**self.settings, "enable_checkpointing": asked})

    def for_evaluation(self) -> Trainer:
        """A trainer that only tests or predicts, and says nothing."""
        quiet = {"logger": False, "callbacks": None, "enable_checkpointing": False, "enable_progress_bar": False}
        return _trainer({**self.settings, **quiet})


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints as all else is written.

    Lightning's own come by way of the system's temporary folder. From another disk they are copied over the checkpoint
    before, of which a full disk would leave neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replaces the checkpoint by a whole one, or leaves it."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomic(path, content.getvalue())


class TaskProgressBar(RichProgressBar):
    """Lightning's bar, less the number of the logger's version."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands right of the bar."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class BestEpoch(Callback):
    """Keeps what the task trains as it was in its best epoch: highest validation accuracy, then lowest loss.

    It is kept in the checkpoint itself, so that one file, written at once, holds all that resuming needs.
    """

    def __init__(self) -> None:
        self.score = (float("-inf"), 0.0)
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A warm start is a candidate too, as epoch 0."""
        assert isinstance(pl_module, TILModule)
        if pl_module.warm_start and not self.weights:
            accuracy, loss = pl_module.probe_score
            self._offer(pl_module, accuracy, loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the epoch that ended with the best before."""
        assert isinstance(pl_module, TILModule)
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self._offer(pl_module, float(metrics["val/accuracy"]), float(metrics["val/loss"]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the best epoch back, before the module ends the task; without any validation, leaves all as it is."""
        assert isinstance(pl_module, TILModule)
        if self.weights:
            pl_module.load_trainable_state(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"score": list(self.score), "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        accuracy, loss = state_dict["score"]
        self.score, self.weights = (accuracy, loss), state_dict["weights"]

    def _offer(self, module: TILModule, accuracy: float, loss: float) -> None:
        if (accuracy, -loss) > self.score:
            self.score, self.weights = (accuracy, -loss), module.trainable_state()


class SeedEpochs(Callback):
    """Seeds every epoch from (seed, task, epoch, process), so that a resumed run goes on as if never stopped.

    Args:
        seed: Of the run.
        task: Name of the task.
    """

    def __init__(self, seed: int, task: str) -> None:
        self.seed, self.task = seed, task

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds all generators before an epoch's first step: later than loaders, which draw a number of their own."""
        if batch_idx == 0:
            seed = derive_seed(self.seed, self.task, trainer.current_epoch, trainer.global_rank)
            seed_everything(seed, verbose=False)


class FiniteLoss(Callback):
    """Stops a task whose loss has become NaN or infinite, before the state of that epoch is kept.

    It looks at the loss every `log_every_n_steps` steps and at the end of the epoch: looking at each would make the
    processor wait for the device.

    Args:
        task: Name of the task.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.finite: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes in the loss of a step."""
        finite = outputs["loss"].isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comes before the checkpoint."""
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        finite = self.finite is None or bool(self.finite)
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):  # or the other processes would wait
            kept = f"as it was after epoch {trainer.current_epoch}" if trainer.current_epoch else "of before the task"
            raise RunError(
                f"the loss of task {self.task!r} has become NaN or infinite in epoch {trainer.current_epoch + 1}; its "
                f"state {kept} is kept. Resume with a lower learning rate, such as --resume true "
                "--model.optimizer.init_args.lr 1e-4, or with --trainer.gradient_clip_val 1"
            )


class CoefficientHistograms(Callback):
    """Writes, after each epoch, a histogram of each piece's parameters to TensorBoard.

    Not of pieces with more than a million, whose histogram would take as long as training them.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the histograms."""
        assert isinstance(pl_module, TILModule)
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for piece in pl_module.pieces if writers else ():
            if 0 < sum(p.numel() for p in piece.parameters.values()) <= 10**6:
                values = torch.cat([p.detach().flatten() for p in piece.parameters.values()]).float()
                for writer in writers:
                    writer.add_histogram(f"coefficients/{piece.name}", values, trainer.current_epoch)


class Resources(Callback):
    """Measures what training takes, as table 5 of the paper has it."""

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
        """Seconds of the clock, part of all cores that was busy in percent, and the GPU's peak memory in GB.

        The last is None without a GPU.
        """
        busy = 100 * self._cpu / self._wall / (os.cpu_count() or 1) if self._wall else 0.0
        return {"seconds": self._wall, "cpu_percent": busy, "gpu_gigabytes": self._memory or None}


def tensorboard(folder: Path, version: str) -> Logger:
    """A TensorBoard logger that shows new values within seconds."""
    return TensorBoardLogger(folder, name="tensorboard", version=version, flush_secs=5)


def _trainer(settings: Mapping[str, Any]) -> Trainer:
    """A trainer that leaves signals and requeueing alone.

    At SIGTERM, Lightning's would talk to the other processes in the midst of whatever they say, and could hang them
    all. Under srun, it would write a checkpoint of its own, which it would then take for that of each later task.
    """
    plugins = _listed(settings.get("plugins"))
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect() and not chosen:
        plugins += [SLURMEnvironment(auto_requeue=False)]
    trainer = Trainer(**{**settings, "plugins": plugins})
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _listed(setting: Any) -> list[Any]:
    """What a setting of `Trainer` gives: nothing, one or several."""
    if setting is None:
        return []
    return list(setting) if isinstance(setting, list | tuple) else [setting]
