"""Callbacks that end a run in different ways."""

import os
import signal
import time
from pathlib import Path

from lightning import Callback


class KillAt(Callback):
    """Kills its own process, as a power cut would, in a given hook of a given task and epoch."""

    def __init__(self, hook: str, task: str, epoch: int) -> None:
        def kill(trainer, pl_module, *_):
            if pl_module.task_name == task and trainer.current_epoch == epoch:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, hook, kill)


class SignalAt(Callback):
    """Sends a signal to its own process in the middle of an epoch."""

    def __init__(self, number: int, task: str, epoch: int) -> None:
        self.number, self.task, self.epoch = number, task, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (pl_module.task_name, trainer.current_epoch, batch_idx) == (self.task, self.epoch, 1):
            os.kill(os.getpid(), self.number)


class Poison(Callback):
    """Sets the head to NaN, as too long a step would."""

    def __init__(self, task: str, epoch: int) -> None:
        self.task, self.epoch = task, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (pl_module.task_name, trainer.current_epoch) == (self.task, self.epoch):
            pl_module.head.bias.data.fill_(float("nan"))


class SignalOnce(SignalAt):
    """Sends the signal only the first time; a marker file tells later processes."""

    def __init__(self, number: int, task: str, epoch: int, marker: str) -> None:
        super().__init__(number, task, epoch)
        self.marker = Path(marker)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.marker.exists() and (pl_module.task_name, trainer.current_epoch) == (self.task, self.epoch):
            self.marker.touch()
            os.kill(os.getpid(), self.number)


class WaitOnce(Callback):
    """Waits in the middle of an epoch, the first time, until it is killed; the marker file names the node of Ray."""

    def __init__(self, task: str, epoch: int, marker: str) -> None:
        self.task, self.epoch, self.marker = task, epoch, Path(marker)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (pl_module.task_name, trainer.current_epoch) == (self.task, self.epoch) and not self.marker.exists():
            import ray

            here = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
            self.marker.write_text(here)
            time.sleep(600)
