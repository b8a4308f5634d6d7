"""Schedules of the learning rate: how one is stepped, and those that can be written in YAML beside torch's."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from recast_pl.errors import RunError, one_line


class WarmUp(SequentialLR):
    """Raises the learning rate linearly, and then follows another schedule.

    Args:
        optimizer: The optimizer.
        epochs: Epochs of the warm-up, at least 1.
        then: Makes the schedule that follows from an optimizer.
        start_factor: Fraction of the learning rate in the first epoch, above 0 and at most 1.

    Raises:
        RunError: If `epochs` is below 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epochs: int,
        then: Callable[[Optimizer], LRScheduler],
        start_factor: float = 0.1,
    ) -> None:
        if epochs < 1:
            raise RunError(f"WarmUp: epochs={epochs} must be at least 1")
        super().__init__(optimizer, [LinearLR(optimizer, start_factor, total_iters=epochs), then(optimizer)], [epochs])


class QuarterCosine(LRScheduler):
    """Lowers the learning rate along a quarter of a cosine to 1.6 % in the last epoch, as the code of InfLoRA does.

    The factor in epoch t, from 0 on, is cos(0.99·π/2 · t/(epochs − 1)).

    Args:
        optimizer: The optimizer.
        epochs: Epochs of the training; the rate stays as it is after them.

    Raises:
        RunError: If `epochs` is below 1.
    """

    def __init__(self, optimizer: Optimizer, epochs: int) -> None:
        if epochs < 1:
            raise RunError(f"QuarterCosine: epochs={epochs} must be at least 1")
        self.epochs = epochs
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group."""
        done = min(self.last_epoch / max(1, self.epochs - 1), 1)
        return [rate * math.cos(0.99 * math.pi / 2 * done) for rate in self.base_lrs]


def followed_metric(schedule: LRScheduler) -> str | None:
    """The metric that a schedule reacts to; None for all schedules but `ReduceLROnPlateau`."""
    if not isinstance(schedule, ReduceLROnPlateau):
        return None
    default = "val/loss" if schedule.mode == "min" else "val/accuracy"
    return str(getattr(schedule, "monitor", default))  # Lightning's subclass names its metric


def step_schedule(schedule: LRScheduler, metric: Any) -> None:
    """Makes the step that follows an epoch.

    Args:
        schedule: The schedule.
        metric: What it reacts to, or None.

    Raises:
        RunError: If the schedule cannot make it.
    """
    try:
        if metric is None:
            schedule.step()
        else:
            schedule.step(metric)
    except (ValueError, ZeroDivisionError) as cause:  # OneCycleLR has only so many steps; a StepLR may have size 0
        raise RunError(
            f"{type(schedule).__name__} cannot make another step ({one_line(cause)}); it steps after every epoch: give "
            "it a length of at least --trainer.max_epochs steps"
        ) from cause
