"""Classifiers over the classes of all tasks, in closed form, from features of the frozen network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.errors import RunError

Scores = Callable[[Tensor], Tensor]
"""Maps features (B, D), in double precision, to scores (B, K)."""


class JointClassifier(ABC):
    """A classifier whose state is a few sums over training images.

    Sums are rounded to whole multiples of `unit` and added in double precision, which is exact up to 2⁵³ units. So
    neither the order of tasks nor one that was added and removed again changes a bit.

    Args:
        settings: What two classifiers must have in common to be merged.
    """

    unit: ClassVar[float] = 2.0**-30
    shared: ClassVar[frozenset[str]] = frozenset()
    """Names of the sums that have no row for each class."""

    def __init__(self, *settings: object) -> None:
        self.settings = settings
        self.sums: dict[str, Tensor] = {}
        self._scores: Scores | None = None  # solved for when it is needed

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds training images: features (N, D), and labels (N,) among the classes of all tasks."""
        self._add(self._sums_of(features, labels), 1)

    def remove(self, features: Tensor, labels: Tensor) -> None:
        """Removes images that one call of `update` added; nothing of them stays."""
        self._add(self._sums_of(features, labels), -1)

    def merge(self, other: "JointClassifier") -> None:
        """Adds the images of another classifier; raises RunError if it is of another kind or has other settings."""
        if (type(self), self.settings) != (type(other), other.settings):
            raise RunError(
                f"{type(self).__name__}{self.settings} cannot be merged with {type(other).__name__}{other.settings}; "
                "give both the same settings"
            )
        self._add(other.sums, 1)

    def scores(self, features: Tensor) -> Tensor:
        """Scores (B, K) of all classes for features (B, D); minus infinity for a class without images."""
        if not len(self.sums.get("counts", ())):
            raise RunError(f"{type(self).__name__} has seen no image; call update first")
        if self._scores is None:
            self._scores = self._solve()
        return self._scores(_double(features)).masked_fill(self.sums["counts"] <= 0, -torch.inf)

    @property
    def numbers(self) -> int:
        """How many numbers the sums hold."""
        return sum(tensor.numel() for tensor in self.sums.values())

    @property
    def means(self) -> Tensor:
        """Means (K, D) of the classes, from the sums `counts` and `sums`; 0 for a class without images."""
        return self.sums["sums"] / self.sums["counts"].clamp_min(1)[:, None]

    def _sums_of(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, labels = _double(features), labels.cpu()
        sums = {"counts": torch.bincount(labels).double()} | self._measure(x, labels)
        return {name: tensor.div_(self.unit).round_().mul_(self.unit) for name, tensor in sums.items()}  # may be large

    def _add(self, sums: Mapping[str, Tensor], sign: int) -> None:
        self._scores = None
        for name, more in sums.items():
            before = self.sums.get(name, more.new_zeros(0, *more.shape[1:]))
            rows = max(len(before), len(more))
            self.sums[name] = _with_rows(before, rows).add_(_with_rows(more, rows), alpha=sign)
        known = int(self.sums["counts"].count_nonzero()) and int(self.sums["counts"].nonzero().max()) + 1
        for name in self.sums.keys() - self.shared:  # the last classes may have been removed
            self.sums[name] = self.sums[name][:known]

    @abstractmethod
    def _measure(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sums of images: features (N, D) and labels (N,). `counts` are added to them."""

    @abstractmethod
    def _solve(self) -> Scores:
        """The solution for the present sums."""


def class_sums(x: Tensor, labels: Tensor) -> Tensor:
    """Sums (K, D) of features (N, D) by their labels (N,)."""
    return x.new_zeros(int(labels.max()) + 1, x.shape[1]).index_add_(0, labels, x)


def linear(weight: Tensor, bias: Tensor) -> Scores:
    """Scores of a linear head with weight (K, D) and bias (K,)."""
    return lambda x: F.linear(x, weight, bias)


def _double(features: Tensor) -> Tensor:
    return features.detach().cpu().double()


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with zeros behind it, so that its first dimension is `rows`; itself if it has as many."""
    return (
        tensor if len(tensor) == rows else torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
    )
