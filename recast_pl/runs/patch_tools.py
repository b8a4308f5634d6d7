"""Patches compared, checked, averaged and made smaller; all of them stay patches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recast_pl.errors import PatchError
from recast_pl.learning.patch import TaskPatch
from recast_pl.methods.piece import check_finite

_SAME = ("task", "base", "classes", "method", "image_size", "mean", "std")
"""What patches must have in common to be of one task."""

_FULL = "accuracy_fp32"
"""Metric of a patch in half precision: what the task reaches without."""


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors of one name and shape are from one another.

    Args:
        name: As in the file.
        largest: max |b − a|.
        relative: ‖b − a‖ / ‖a‖; infinite where only a is zero, 0 where both are.
        cosine: Of the two, flattened; NaN where one is zero.
    """

    name: str
    largest: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class PatchDifference:
    """What differs between two patches.

    Args:
        facts: Name, and how either patch has it, metrics and shapes of tensors included; None where it has not.
        tensors: Of those that both have in one shape, equal or not.
    """

    facts: list[tuple[str, Any, Any]]
    tensors: list[TensorDifference]


def compare_patches(first: TaskPatch, second: TaskPatch) -> PatchDifference:
    """What differs between two patches.

    Args:
        first: One.
        second: The other.
    """
    facts = [_facts(patch) for patch in (first, second)]
    names = dict.fromkeys((*facts[0], *facts[1]))
    differing = [(n, facts[0].get(n), facts[1].get(n)) for n in names if facts[0].get(n) != facts[1].get(n)]
    theirs = second.tensors
    both = [n for n, tensor in first.tensors.items() if n in theirs and tensor.shape == theirs[n].shape]
    return PatchDifference(differing, [_compare(n, first.tensors[n], theirs[n]) for n in both])


def check_patch(patch: TaskPatch) -> None:
    """Makes sure of what a patch by itself can show, beyond what loading it has shown.

    Args:
        patch: The patch.

    Raises:
        PatchError: If the head does not fit the class names, or a number is NaN or infinite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in patch.head.items()}
    weight, count = shapes.get("weight", ()), len(patch.classes)
    if len(weight) != 2 or shapes != {"weight": (count, weight[1]), "bias": (count,)}:
        raise PatchError(f"the head of task {patch.task!r} has {shapes} for {count} classes; learn the task anew")
    for owner, state in zip(["the head", *patch.method], [patch.head, *patch.pieces], strict=True):
        check_finite(owner, state)


def average_patches(patches: Sequence[TaskPatch], weights: Sequence[float] = ()) -> TaskPatch:
    """The mean of patches of one task, such as those of several seeds (Wortsman et al., 2022).

    Every tensor is averaged by itself, in double precision: of coefficients that is the mean of the weights that they
    generate, of factors such as those of LoRA it is not. Metrics are dropped, since nothing has been measured.

    Args:
        patches: Of one task, base and method, with the same classes.
        weights: How much each counts, at least 0; they are divided by their sum. Empty for all the same.

    Raises:
        PatchError: If there are none, or they do not belong together, or hold what has no mean.
    """
    shares = _shares(weights or [1.0] * len(patches), len(patches))
    first, *others = patches
    for other in others:
        _check_same(first, other)
    for name, tensor in first.tensors.items():
        if not tensor.is_floating_point():
            raise PatchError(
                f"{name} of task {first.task!r} holds {tensor.dtype}: places and masks have no mean; average "
                "patches of a method that has numbers alone"
            )
    sums = {name: _mean([patch.tensors[name] for patch in patches], shares) for name in first.tensors}
    return first.with_tensors(sums, metrics={})


def quantize_patch(patch: TaskPatch) -> TaskPatch:
    """The same patch in half precision; whole numbers stay. `TILModule.activate` computes in single precision.

    What it reaches has to be measured: its accuracy becomes that of `accuracy_fp32`.

    Args:
        patch: The patch.

    Raises:
        PatchError: If a number is too large for half precision.
    """
    half = {n: t.half() if t.is_floating_point() else t for n, t in patch.tensors.items()}
    too_large = [name for name, tensor in half.items() if not tensor.isfinite().all()]
    if too_large:
        raise PatchError(f"{too_large[0]} of task {patch.task!r} has numbers beyond 65,504; leave it as it is")
    metrics = {_FULL if name == "accuracy" else name: value for name, value in patch.metrics.items()}
    return patch.with_tensors(half, metrics=metrics)


def with_accuracies(patch: TaskPatch, before: float, after: float) -> TaskPatch:
    """A patch in half precision with what was measured.

    Args:
        patch: The patch.
        before: Accuracy in percent in single precision.
        after: The same in half precision.
    """
    return replace(patch, metrics={**patch.metrics, _FULL: before, "accuracy": after})


def _facts(patch: TaskPatch) -> dict[str, Any]:
    """All that can be compared by itself, flat."""
    metrics = {f"metrics.{name}": value for name, value in patch.metrics.items()}
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in patch.tensors.items()}
    return {name: fact for name, fact in patch.facts.items() if name != "metrics"} | metrics | shapes


def _compare(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    a, b = first.double().flatten(), second.double().flatten()
    size, distance = float(a.norm()), float((b - a).norm())
    relative = distance / size if size else (math.inf if distance else 0.0)
    both = size * float(b.norm())
    return TensorDifference(name, float((b - a).abs().max()), relative, float(a @ b) / both if both else math.nan)


def _shares(weights: Sequence[float], count: int) -> list[float]:
    if not count or len(weights) != count or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise PatchError(f"weights {list(weights)} for {count} patches must be as many, at least 0, and not all 0")
    return [weight / sum(weights) for weight in weights]


def _check_same(first: TaskPatch, other: TaskPatch) -> None:
    for name in _SAME:
        one, two = first.facts[name], other.facts[name]
        if one != two:
            raise PatchError(
                f"{name} is {str(one)[:80]} of one patch and {str(two)[:80]} of another; average patches of one task"
            )
    shapes: list[Mapping[str, torch.Size]] = [{n: t.shape for n, t in p.tensors.items()} for p in (first, other)]
    if shapes[0] != shapes[1]:
        raise PatchError(
            f"patches of task {first.task!r} have tensors of different shapes; average those of one method"
        )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.stack([share * tensor.double() for share, tensor in zip(shares, tensors, strict=True)]).sum(0)
    return total.to(tensors[0].dtype)
