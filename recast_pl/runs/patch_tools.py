"""Compares, checks, averages and shrinks patches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from recast_pl.errors import PatchError
from recast_pl.learning.patch import BITS, Precision, TaskPatch
from recast_pl.learning.quantization import Moments

FULL_PRECISION = "accuracy_fp32"
"""Metric of a patch that was shrunk: the accuracy of the same task before."""


@dataclass(frozen=True)
class TensorDifference:
    """The distance between two tensors a and b of one name and shape.

    Args:
        name: Name in the file.
        largest: max |b − a|.
        relative: ‖b − a‖ / ‖a‖; infinite if only a is zero, 0 if both are.
        cosine: Cosine of the flattened tensors; NaN if one is zero.
    """

    name: str
    largest: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class PatchDifference:
    """The differences between two patches.

    Args:
        facts: Name and both values of each fact that differs, such as a metric or a tensor's shape; None for missing.
        tensors: The distance of all tensors that both patches have in one shape.
    """

    facts: list[tuple[str, Any, Any]]
    tensors: list[TensorDifference]


def compare_patches(first: TaskPatch, second: TaskPatch) -> PatchDifference:
    """Compares the facts and the tensors of two patches."""
    one, two = _facts(first), _facts(second)
    differing = [(name, one.get(name), two.get(name)) for name in one | two if one.get(name) != two.get(name)]
    ours, theirs = first.tensors, second.tensors
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    return PatchDifference(differing, [_distance(name, ours[name], theirs[name]) for name in both])


def storage(patch: TaskPatch) -> str:
    """How the file of a patch keeps it, in words."""
    return "safetensors" if patch.rounded is None else f"compact, {patch.rounded.bits} bits for each weight of the head"


def average_patches(patches: Sequence[TaskPatch], weights: Sequence[float] = ()) -> TaskPatch:
    """Averages patches of one task, such as those of several seeds (Wortsman et al., 2022).

    Each tensor is averaged in double precision. The mean of coefficients generates the mean of the weights; the mean of
    factors such as those of LoRA does not. The result has no metrics, because it was not measured.

    Args:
        patches: Patches of one task, base and method, with the same classes.
        weights: The weight of each patch, at least 0; they are divided by their sum. Empty for equal weights.

    Raises:
        PatchError: If there are no patches, they do not belong together, or a tensor holds whole numbers.
    """
    weights = weights or [1.0] * len(patches)
    if not patches or len(weights) != len(patches) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise PatchError(
            f"weights {list(weights)} for {len(patches)} patches must be one for each, at least 0, and not all 0"
        )
    first, *others = patches
    for other in others:
        _check_same_task(first, other)
    shares, means = [weight / sum(weights) for weight in weights], {}
    for name, tensor in first.tensors.items():
        if not tensor.is_floating_point():
            raise PatchError(
                f"{name} of task {first.task!r} holds {tensor.dtype}; positions and masks have no mean; average "
                "patches of a method without them"
            )
        parts = [share * patch.tensors[name].double() for share, patch in zip(shares, patches, strict=True)]
        means[name] = torch.stack(parts).sum(0).to(tensor.dtype)
    return first.with_tensors(means, metrics={})


def quantize_patch(
    patch: TaskPatch, precision: Precision | Literal["fp16"] = "fp16", moments: Moments | None = None
) -> TaskPatch:
    """Converts a patch to another precision.

    The metric `accuracy` becomes `accuracy_fp32`, unless the patch keeps its values, because the new one was not
    measured.

    Args:
        patch: In any precision.
        precision: `fp16` for half precision, except for whole numbers; `int8`, `int4` or `int2` for a compact file;
            `fp32` for a file of safetensors in single precision.
        moments: Of the features of the task's training images, to round the head by; None to round to the nearest.

    Raises:
        PatchError: If a number is too large for half precision, or if moments are missing for `int2`: rounding to the
            nearest of so few values costs 6 points (`benchmarks/RESULTS.md`, heads of few bits).
    """
    if precision == "fp32":
        return patch.widened()
    if precision == "fp16":
        return _measured_before(_halved(patch))
    bits = BITS[precision]
    if patch.rounded is not None and patch.rounded.bits == bits:
        return patch
    if precision == "int2" and moments is None:
        raise PatchError(
            f"task {patch.task!r} cannot be rounded to int2 without its training images; give the --run_dir of its "
            "run, or choose int4"
        )
    return _measured_before(patch.compacted(bits, moments))


def _measured_before(patch: TaskPatch) -> TaskPatch:
    """A patch whose accuracy is that of other values, from before they were rounded."""
    metrics = {FULL_PRECISION if name == "accuracy" else name: value for name, value in patch.metrics.items()}
    return replace(patch, metrics=metrics)


def _halved(patch: TaskPatch) -> TaskPatch:
    half = {name: t.half() if t.is_floating_point() else t for name, t in patch.tensors.items()}
    too_large = [name for name, tensor in half.items() if not tensor.isfinite().all()]
    if too_large:
        raise PatchError(f"{too_large[0]} of task {patch.task!r} has numbers beyond 65,504; keep single precision")
    return patch.with_tensors(half)


def _facts(patch: TaskPatch) -> dict[str, Any]:
    """Everything that can be compared for equality, by name."""
    facts = patch.facts
    metrics = {f"metrics.{name}": value for name, value in facts.pop("metrics").items()}
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in patch.tensors.items()}
    return facts | metrics | {"file": storage(patch)} | shapes


def _distance(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    a, b = first.double().flatten(), second.double().flatten()
    size, distance = float(a.norm()), float((b - a).norm())
    relative = distance / size if size else (math.inf if distance else 0.0)
    both = size * float(b.norm())
    largest = float((b - a).abs().max()) if len(a) else 0.0
    return TensorDifference(name, largest, relative, float(a @ b) / both if both else math.nan)


def _check_same_task(first: TaskPatch, other: TaskPatch) -> None:
    for name, one in first.facts.items():
        two = other.facts[name]
        if name != "metrics" and one != two:
            raise PatchError(
                f"{name} is {str(one)[:80]} in one patch and {str(two)[:80]} in another; average patches of one task"
            )
    if {n: t.shape for n, t in first.tensors.items()} != {n: t.shape for n, t in other.tensors.items()}:
        raise PatchError(
            f"patches of task {first.task!r} have tensors of different shapes; average patches of one method"
        )
