"""What a checkpoint holds, how it is written, and learning rates that change when training is resumed."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from recast_pl.compat.torch import scale_schedule
from recast_pl.errors import RunError
from recast_pl.files import write_atomic


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically.

    Lightning writes them into the system's temporary folder first. If that is on another disk, it copies them over the
    previous checkpoint, and on a full disk neither of the two would be left.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replaces the previous checkpoint, or leaves it as it is if the new one cannot be written."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomic(path, content.getvalue())


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters that are trained, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Sets all parameters that are trained to what `trainable_state` returned."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state[name])


def change_rates(checkpoint: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Lets a task be resumed with other learning rates than it began with, each at the same place of its schedule.

    Args:
        checkpoint: Of a task with one optimizer and at most one schedule; its rates are changed.
        optimizer: A new one with the rates that the task would begin with now.

    Raises:
        RunError: If a rate that was 0 is to change.
    """
    (saved,) = checkpoint["optimizer_states"]
    for index, (new, old) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
        key = "initial_lr" if "initial_lr" in old else "lr"  # without a schedule, the rate is what it was at the start
        if new[key] != old[key]:
            if not old[key]:
                raise RunError(f"the learning rate of {old['name']} was 0 so far; keep it at 0, or start a new run")
            factor = new[key] / old[key]
            old.update({name: factor * old[name] for name in {key, "lr"}})
            for schedule in checkpoint["lr_schedulers"]:
                scale_schedule(schedule, index, factor)
