"""Refuses options of the trainer that cannot work here, before any work is done."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from recast_pl.compat.lightning import forks
from recast_pl.errors import RunError

_AVERAGE = "the best epoch is kept, not its average; use recast_pl.AverageEpochs"
_PRETRAINED = "the pretrained weights must stay as they are, because a patch holds only what is added to them"

_CALLBACKS: dict[type[Callback], str] = {
    LearningRateFinder: "a method may have several rates; leave it out, and compare rates with 'sweep'",
    BatchSizeFinder: "leave it out, and set --data.batch_size",
    StochasticWeightAveraging: _AVERAGE,
    WeightAveraging: _AVERAGE,
    ModelPruning: f"{_PRETRAINED}; leave it out",
    BaseFinetuning: f"{_PRETRAINED}; leave it out, and list the piece FineTune to train them",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks arguments of `Trainer`; raises RunError if one cannot work."""
    callbacks = listed(settings.get("callbacks"))
    for callback in callbacks:
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise RunError(f"callback {type(callback).__name__} does not work here: {reason}")
    if settings.get("max_time") is not None and any(isinstance(callback, Timer) for callback in callbacks):
        raise RunError("trainer.max_time and a Timer callback were both given; leave out one of them")
    if settings.get("barebones"):
        raise RunError(
            "--trainer.barebones true measures nothing, but the best epoch is chosen by measuring; leave it out. "
            "--trainer.logger false, --trainer.enable_checkpointing false and --trainer.enable_progress_bar false save "
            "the same time"
        )
    if settings.get("limit_test_batches") == 0:
        raise RunError("--trainer.limit_test_batches 0 leaves nothing to measure a task by; use at least 1")
    steps = settings.get("log_every_n_steps")
    if steps is not None and steps < 1:
        raise RunError(
            f"--trainer.log_every_n_steps {steps} must be at least 1; turn logs off by --trainer.logger false"
        )


def check_trainer(trainer: Trainer, strategy: object) -> None:
    """Checks what Lightning chose by the settings; raises RunError if the module cannot be trained by it.

    Args:
        trainer: The trainer.
        strategy: The setting, for the message.
    """
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy) or forks(trainer.strategy):
        name = strategy if isinstance(strategy, str) else type(trainer.strategy).__name__
        raise RunError(
            f"--trainer.strategy {name} does not work here; use --trainer.strategy ddp, which starts each process by "
            "the same command line"
        )
    check_precision(trainer)


def check_precision(trainer: Trainer) -> None:
    """Raises RunError if a trainer would round the pretrained weights."""
    if isinstance(trainer.precision_plugin, HalfPrecision):
        precision = trainer.precision_plugin.precision
        raise RunError(
            f"--trainer.precision {precision} would round the pretrained weights; use --trainer.precision "
            f"{precision.replace('true', 'mixed')}, which computes with 16 bits and keeps all weights in 32"
        )


def listed(setting: Any) -> list[Any]:
    """The values of a setting of `Trainer`, which may be None, one value or several."""
    if setting is None:
        return []
    return list(setting) if isinstance(setting, list | tuple) else [setting]
