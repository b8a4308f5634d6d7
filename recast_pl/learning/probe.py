"""A linear probe on cached features: the reference for every method, and the warm start of a head."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recast_pl.errors import RunError, one_line
from recast_pl.learning.schedule import followed_metric, step_schedule


@dataclass(frozen=True)
class Features:
    """Features (N, D) and labels (N,) of one split."""

    features: Tensor
    labels: Tensor

    @torch.no_grad()
    def score(self, head: nn.Module) -> tuple[float, float]:
        """Accuracy in [0, 1] and cross-entropy of a head; both are NaN if there are no samples."""
        logits = head(self.features)
        accuracy = (logits.argmax(1) == self.labels).double().mean()
        return float(accuracy), float(F.cross_entropy(logits, self.labels))


@torch.no_grad()
def extract_features(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> Features:
    """Computes the features of a split, in single precision.

    Args:
        network: Maps images (B, 3, S, S) to features (B, D).
        batches: Images and labels (B,).
        precision: The trainer's.
    """
    features, labels = [], []
    for images, targets in batches:
        with precision.forward_context():
            features.append(network(images).float())
        labels.append(targets)
    return Features(torch.cat(features), torch.cat(labels))


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
        RunError: If the optimizer cannot train a head, or the schedule has too few steps.
    """
    optimizer, schedule = configure(head.parameters())
    best, state = (float("-inf"), 0.0), head.state_dict()
    for _ in range(epochs):
        order = torch.randperm(len(train.labels)).to(train.labels.device)
        batches = zip(train.features[order].split(batch_size), train.labels[order].split(batch_size), strict=True)
        for features, labels in batches:
            _set_gradients(head, features, labels)
            _step(optimizer)
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


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as cause:  # SparseAdam needs sparse gradients, LBFGS a closure
        raise RunError(
            f"optimizer {type(optimizer).__name__} cannot train a head ({one_line(cause)}); choose another, such as "
            "--model.optimizer torch.optim.AdamW"
        ) from cause


@torch.no_grad()
def _set_gradients(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Sets the gradients of cross-entropy by formula; autograd would double the time of so small a step."""
    error = (head(features).softmax(1) - F.one_hot(labels, head.out_features)) / len(labels)  # (B, C)
    head.weight.grad = error.T @ features  # (C, D)
    head.bias.grad = error.sum(0)  # (C,)
