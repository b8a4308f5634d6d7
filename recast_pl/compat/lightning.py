"""Uses of Lightning beyond its documented interface."""

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from recast_pl.errors import RunError, one_line


def ignore_signals(trainer: Trainer) -> None:
    """Keeps a trainer from handling signals and from requeueing SLURM jobs.

    At SIGTERM, Lightning's handler would broadcast to the other processes in the middle of other communication, which
    can hang all of them. Under SLURM, it would write a checkpoint that every later task would be resumed from.

    A run of Lightning 2.6 calls `trainer._signal_connector.register_signal_handlers()` and registers nothing elsewhere.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def early_stopping(trainer: Trainer) -> Callable[[Mapping[str, float]], bool]:
    """Returns a function that decides as the trainer's `EarlyStopping` callbacks would, for training outside of it.

    It is called after each epoch with the metrics of that epoch; callbacks that watch another metric are left out.

    `EarlyStopping` of Lightning 2.6 counts in `_evaluate_stopping_criteria`, which returns whether to stop and why.
    """
    callbacks, epochs = copy.deepcopy(trainer.early_stopping_callbacks), 0

    def stops(measured: Mapping[str, float]) -> bool:
        nonlocal epochs
        epochs += 1
        known = [(callback, measured[callback.monitor]) for callback in callbacks if callback.monitor in measured]
        decisions = [callback._evaluate_stopping_criteria(torch.tensor(value))[0] for callback, value in known]
        return any(decisions) and epochs >= (trainer.min_epochs or 1)

    return stops


def forks(strategy: Strategy) -> bool:
    """Whether a strategy starts processes from this one (`ddp_spawn`, `ddp_fork`, `ddp_notebook`).

    They train copies of the module, and this process never gets what these have learnt. Lightning 2.6 does so by
    `_MultiProcessingLauncher`.
    """
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


@contextmanager
def lightning_errors() -> Iterator[None]:
    """A context in which an error that Lightning's own code raises is an error of the user's options, on one line.

    Lightning 2.6 refuses options with errors of any type, some only when training reaches them.
    """
    try:
        yield
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("lightning.", "lightning_utilities.")):
            raise
        raise RunError(f"the trainer cannot work with these options: {one_line(error)}") from error


def of_task(logger: Logger, task: str) -> Logger:
    """A copy of a logger that writes one task, named by the folder or else by a prefix of each metric.

    The loggers of Lightning 2.6 keep version and prefix in `_version` and `_prefix`.

    Args:
        logger: The user's logger.
        task: Names the task.
    """
    own: Any = copy.copy(logger)
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        own._version = f"{version}/{task}"
    elif isinstance(prefix := getattr(logger, "_prefix", None), str):
        own._prefix = f"{prefix}-{task}" if prefix else task
    return own  # type: ignore[no-any-return]
