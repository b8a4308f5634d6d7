"""A linear probe on cached features: the reference beside every method, and a head's warm start."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Features:
    """Features and labels of one split.

    Args:
        features: (N, D).
        labels: (N,).
    """

    features: Tensor
    labels: Tensor

    @torch.no_grad()
    def score(self, head: nn.Module) -> tuple[float, float]:
        """Accuracy in [0, 1] and cross-entropy of a head; NaN where there are no samples."""
        logits = head(self.features)
        accuracy = (logits.argmax(1) == self.labels).double().mean()
        return float(accuracy), float(F.cross_entropy(logits, self.labels))


def fit_probe(
    head: nn.Linear,
    train: Features,
    validation: Features,
    epochs: int,
    batch_size: int,
    configure: Callable[[Iterable[nn.Parameter]], tuple[list[Optimizer], list[LRScheduler]]],
) -> float:
    """Trains a head on cached features, with the optimizer, epochs and batches that the method gets.

    Args:
        head: Trained in place; it ends with the weights of its best epoch by validation accuracy.
        train: What to learn.
        validation: What to choose the epoch by.
        epochs: Passes over `train`.
        batch_size: Samples in a step.
        configure: Makes an optimizer and its schedules (stepped after each epoch) from parameters.

    Returns:
        The best validation accuracy in [0, 1].
    """
    (optimizer,), schedules = configure(head.parameters())
    best, state = (float("-inf"), 0.0), head.state_dict()
    for _ in range(epochs):
        order = torch.randperm(len(train.labels)).to(train.labels.device)
        batches = zip(train.features[order].split(batch_size), train.labels[order].split(batch_size), strict=True)
        for features, labels in batches:
            _set_gradients(head, features, labels)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        accuracy, loss = validation.score(head)
        if (accuracy, -loss) > best:
            best = (accuracy, -loss)
            state = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(state)
    return best[0]


@torch.no_grad()
def _set_gradients(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Those of cross-entropy, written out: for so small a step, autograd would cost as much as all else together."""
    error = (head(features).softmax(1) - F.one_hot(labels, head.out_features)) / len(labels)  # (B, C)
    head.weight.grad = error.T @ features  # (C, D)
    head.bias.grad = error.sum(0)  # (C,)
