"""Merging: the numbers of several tasks become one vector, on which the heads of all of them work.

With the numbers θ₀ that every task starts from, those of the trained tasks θ_t, and their changes τ_t = θ_t − θ₀:

- task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023): θ₀ + λ·Σ τ_t
- TIES (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023): each τ_t keeps its
  largest entries; each entry gets the sign of its sum; λ times the mean of those that have this sign is added to θ₀
- TALL masks (Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024): with
  θ_m = θ₀ + Σ τ_t, task t uses θ_m where |θ₀ − θ_t| > λ_t·|θ_m − θ_t|, and θ₀ elsewhere
- consensus merging (the same paper): θ₀ + λ·Σ τ_t in the entries that at least two of these masks have, θ₀ elsewhere

Everything is computed in double precision. Where weights are linear in the numbers, the merged numbers give the merged
weights exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from recast_pl.errors import PatchError

States = Sequence[Mapping[str, Tensor]]
"""A tensor of each name, for each piece of a method."""


@dataclass(frozen=True)
class TaskVectors:
    """The numbers of tasks as vectors.

    Args:
        start: θ₀ (N,), in double precision.
        tuned: θ_t (T, N).
    """

    start: Tensor
    tuned: Tensor

    @property
    def changes(self) -> Tensor:
        """τ_t (T, N)."""
        return self.tuned - self.start


@dataclass(frozen=True)
class Merged:
    """What merging gives.

    Args:
        numbers: Those of all tasks (N,).
        masks: Which of them each task uses (T, N), with θ₀ elsewhere; None if every task uses all.
        settings: What was chosen, by name; a list has a value for each task.
    """

    numbers: Tensor
    masks: Tensor | None
    settings: dict[str, float | list[float]]

    def of_task(self, index: int, start: Tensor) -> Tensor:
        """The numbers (N,) that a task uses; `start` is θ₀."""
        return self.numbers if self.masks is None else torch.where(self.masks[index], self.numbers, start)


class Judge(Protocol):
    """Measures merged numbers on the validation images of the tasks."""

    def score(self, index: int, numbers: Tensor) -> tuple[float, float]:
        """Accuracy in [0, 1] of a task with its own head on these numbers (N,), and the negative cross-entropy."""

    def refine(self, steps: int, scale: float) -> Tensor:
        """θ₀ + Σ λ_lt·τ_t (N,) with a factor for each layer and task, fitted to validation images without labels.

        Args:
            steps: Of the optimizer.
            scale: The factors at the start.
        """


class Merger(Protocol):
    """A way to merge."""

    exact: ClassVar[bool]
    """Whether it needs pieces whose task states are the numbers, and not factors of them."""

    def merge(self, vectors: TaskVectors, judge: Judge) -> Merged:
        """Merges the numbers of tasks; raises PatchError if a setting or the number of tasks does not fit."""


@dataclass(frozen=True)
class Arithmetic:
    """Task arithmetic.

    Args:
        scale: λ. None to choose the best on validation images, of 0.05, 0.1, …, 1 as in the paper.
    """

    scale: float | None = None
    exact: ClassVar[bool] = False
    scales: ClassVar[tuple[float, ...]] = tuple(step / 20 for step in range(1, 21))

    def merge(self, vectors: TaskVectors, judge: Judge) -> Merged:
        """Adds the changes."""
        scales = self.scales if self.scale is None else (self.scale,)
        return _best([Merged(add_changes(vectors, scale), None, {"scale": scale}) for scale in scales], vectors, judge)


@dataclass(frozen=True)
class Ties:
    """TIES merging.

    Args:
        scale: λ; 1 in the paper where there are no validation images.
        keep: Share of the entries of each change to keep, above 0 and at most 1.
    """

    scale: float = 1.0
    keep: float = 0.2
    exact: ClassVar[bool] = False

    def merge(self, vectors: TaskVectors, judge: Judge) -> Merged:
        """Trims, elects signs, and takes the mean of what agrees."""
        if not 0 < self.keep <= 1:
            raise PatchError(f"keep={self.keep} must be above 0 and at most 1: the share of each change to keep")
        numbers = vectors.start + self.scale * agreed_change(vectors.changes, self.keep)
        return Merged(numbers, None, {"scale": self.scale, "keep": self.keep})


@dataclass(frozen=True)
class Tall:
    """One vector for all tasks, and a mask for each; every λ_t is the best of `factors` on validation images."""

    exact: ClassVar[bool] = True
    factors: ClassVar[tuple[float, ...]] = (0.2, 0.3, 0.4, 0.5, 0.6)

    def merge(self, vectors: TaskVectors, judge: Judge) -> Merged:
        """Adds the changes, and localizes the entries that matter to each task."""
        numbers, masks, chosen = add_changes(vectors, 1.0), list[Tensor](), list[float]()
        tried = [Merged(numbers, tall_mask(vectors, numbers, factor), {}) for factor in self.factors]
        for index in range(len(vectors.tuned)):
            scores = [judge.score(index, each.of_task(index, vectors.start)) for each in tried]
            best = scores.index(max(scores))
            masks.append(tall_mask(vectors, numbers, self.factors[best])[index])
            chosen.append(self.factors[best])
        return Merged(numbers, torch.stack(masks), {"factors": chosen})


@dataclass(frozen=True)
class Consensus:
    """Consensus merging: the entries that at least two tasks use.

    Args:
        scale: λ. None to choose the best on validation images, of those of `Arithmetic`.
    """

    scale: float | None = None
    exact: ClassVar[bool] = False

    def merge(self, vectors: TaskVectors, judge: Judge) -> Merged:
        """Adds the changes in the entries that are in at least two masks of `Tall`."""
        if len(vectors.tuned) < 2:
            raise PatchError("consensus merging needs at least two tasks; name more patches, or use another method")
        masks = Tall().merge(vectors, judge).masks
        assert masks is not None
        changes = torch.where(masks.sum(0) >= 2, vectors.changes, 0)
        return Arithmetic(self.scale).merge(TaskVectors(vectors.start, vectors.start + changes), judge)


@dataclass(frozen=True)
class AdaMerging:
    """Task arithmetic with a factor for each layer and task (Yang et al., "AdaMerging", ICLR 2024).

    The factors minimize the entropy of predictions on images whose labels are not used. The authors take test images;
    here they are validation images, so that test images stay unseen.

    Args:
        scale: The factors at the start; 0.3 as in the authors' code.
        steps: Of Adam at a rate of 1e-3, with 16 images of each task.
    """

    scale: float = 0.3
    steps: int = 500
    exact: ClassVar[bool] = True

    def merge(self, vectors: TaskVectors, judge: Judge) -> Merged:
        """Fits the factors."""
        if self.steps < 1:
            raise PatchError(f"steps={self.steps} must be at least 1: how often the factors are changed")
        return Merged(judge.refine(self.steps, self.scale), None, {"scale": self.scale, "steps": self.steps})


MERGERS: dict[str, type[Merger]] = {
    "arithmetic": Arithmetic,
    "ties": Ties,
    "tall": Tall,
    "consensus": Consensus,
    "adamerging": AdaMerging,
}
"""The ways to merge, by name."""


def add_changes(vectors: TaskVectors, scale: float) -> Tensor:
    """θ₀ + λ·Σ τ_t (N,), which is θ_1 in every bit for one task and λ = 1."""
    return vectors.start * (1 - scale * len(vectors.tuned)) + scale * vectors.tuned.sum(0)


def agreed_change(changes: Tensor, keep: float) -> Tensor:
    """The change (N,) of TIES from those of the tasks (T, N), of which each keeps the largest ⌊keep·N⌋, at least one.

    An entry whose sum is 0 counts as positive, as in PEFT; the authors give it the sign of most entries.
    """
    largest = changes.abs().topk(max(1, int(keep * changes.shape[1])), 1).indices
    trimmed = torch.zeros_like(changes).scatter(1, largest, changes.gather(1, largest))
    agrees = trimmed.sign() == torch.where(trimmed.sum(0) >= 0, 1, -1)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def tall_mask(vectors: TaskVectors, merged: Tensor, factor: float) -> Tensor:
    """Where |θ₀ − θ_t| > λ·|θ_m − θ_t| (T, N), with the merged numbers θ_m (N,)."""
    return vectors.changes.abs() > factor * (merged - vectors.tuned).abs()


def _best(candidates: Sequence[Merged], vectors: TaskVectors, judge: Judge) -> Merged:
    """The one with the best mean accuracy, then the best mean cross-entropy, over all tasks."""
    if len(candidates) == 1:
        return candidates[0]

    def mean_score(merged: Merged) -> list[float]:
        scores = [judge.score(index, merged.of_task(index, vectors.start)) for index in range(len(vectors.tuned))]
        return torch.tensor(scores, dtype=torch.float64).mean(0).tolist()

    return max(candidates, key=mean_score)


def flatten(states: States) -> Tensor:
    """All numbers of states (N,), in double precision, by piece and name."""
    parts = [state[name].detach().cpu().double().flatten() for state in states for name in sorted(state)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def unflatten(numbers: Tensor, like: States) -> list[dict[str, Tensor]]:
    """The states that have these numbers (N,), with the shapes and types of others."""
    parts = iter(numbers.split([state[name].numel() for state in like for name in sorted(state)]))
    return [
        {name: next(parts).view(state[name].shape).to(state[name].dtype) for name in sorted(state)} for state in like
    ]
