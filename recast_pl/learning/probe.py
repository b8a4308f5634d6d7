"""Linear probes on cached features: the reference for every method, and a start for heads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recast_pl.learning.features import Features
from recast_pl.learning.schedule import followed_metric, step_schedule


@dataclass(frozen=True)
class Probes:
    """What heads reach on the features that a task starts from.

    Args:
        converged: Test accuracy in [0, 1] of converged logistic regression.
        budgeted: Test accuracy in [0, 1] of a head that is trained with the optimizer and epochs of the task; None if
            there is none.
        start: Validation accuracy in [0, 1] and cross-entropy of the head that the task starts from; None if that is
            random.
    """

    converged: float = float("nan")
    budgeted: float | None = None
    start: tuple[float, float] | None = None

    @classmethod
    def of(cls, kept: Mapping[str, Any] | Sequence[float]) -> "Probes":
        """From what a checkpoint keeps; those of earlier versions have a budgeted probe alone."""
        return cls(**kept) if isinstance(kept, Mapping) else cls(budgeted=kept[0])


def fit_probe(
    head: nn.Linear,
    train: Features,
    validation: Features,
    epochs: int,
    batch_size: int,
    configure: Callable[[Iterable[nn.Parameter]], tuple[Optimizer, LRScheduler | None]],
    stops: Callable[[Mapping[str, float]], bool] = lambda measured: False,
) -> float:
    """Trains a head on cached features, with the optimizer, epochs and batch size of the method.

    Args:
        head: Trained in place; it ends with the weights of its best epoch by validation accuracy, then loss.
        train: The training split.
        validation: The split that the best epoch is chosen by.
        epochs: Passes over `train`.
        batch_size: Samples in a step.
        configure: Makes an optimizer, and its schedule or None, from parameters. It is stepped after each epoch.
        stops: Whether to stop after an epoch, by `val/accuracy` and `val/loss`.

    Returns:
        The best validation accuracy in [0, 1].

    Raises:
        RunError: If the schedule has too few steps.
    """
    optimizer, schedule = configure(head.parameters())
    best, state = (float("-inf"), 0.0), head.state_dict()
    for _ in range(epochs):
        order = torch.randperm(len(train.labels)).to(train.labels.device)
        batches = zip(train.features[order].split(batch_size), train.labels[order].split(batch_size), strict=True)
        for features, labels in batches:
            _set_gradients(head, features, labels)
            optimizer.step()
        accuracy, loss = validation.score(head)
        measured = {"val/accuracy": accuracy, "val/loss": loss}
        if schedule is not None:
            step_schedule(schedule, measured.get(followed_metric(schedule) or ""))
        if (accuracy, -loss) > best:
            best = (accuracy, -loss)
            state = {name: value.clone() for name, value in head.state_dict().items()}
        if stops(measured):
            break
    head.load_state_dict(state)
    return best[0]


@torch.no_grad()
def _set_gradients(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Sets the gradients of cross-entropy by formula; autograd would double the time of so small a step."""
    error = (head(features).softmax(1) - F.one_hot(labels, head.out_features)) / len(labels)  # (B, C)
    head.weight.grad = error.T @ features  # (C, D)
    head.bias.grad = error.sum(0)  # (C,)
