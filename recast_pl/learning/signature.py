"""Signatures: where the classes of a task lie among the features of the frozen network.

    n_c, μ_c = the number of images of class c, and the mean of their features
    S = Σ (x − μ_y)(x − μ_y)ᵀ over all images x of class y, the scatter within classes

These sums are all that a router needs of a task's training images, see `recast_pl.learning.router`. The signatures of
two parts of the same images give that of the whole (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances", COMPSTAT 1982):

    S = S₁ + S₂ + Σ_c n₁·n₂/(n₁ + n₂)·(μ₁ − μ₂)(μ₁ − μ₂)ᵀ
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast_pl.errors import PatchError, RunError, one_line
from recast_pl.files import pack_tensors, read_tensors, write_atomic
from recast_pl.learning.compact import narrowed
from recast_pl.learning.features import Features
from recast_pl.learning.histogram import BINS
from recast_pl.learning.patch import check_identity
from recast_pl.learning.scatter import NO_SCATTER, Scatter
from recast_pl.methods.piece import check_state
from recast_pl.rules import ImageSize, read_size, size_text

_FORMAT = 1

_HELD_OUT = 256  # validation images that are kept of a task


@dataclass(frozen=True, eq=False)
class Signature:
    """What a router needs of a task; all tensors are on the CPU.

    Args:
        task: Its name.
        classes: Class names, in order of label.
        base: SHA-256 of the frozen network.
        image_size: Height and width of its input.
        counts: Training images of each class (C,), int64.
        means: Mean features of each class (C, D), double precision; 0 for a class without images.
        scatter: Scatter within classes; empty in a small signature.
        held_out: Features (V, D) and labels (V,) of some validation images, which temperatures and thresholds are
            fitted to.
        confidence: How many validation images the trained task was how sure of, a `histogram`; empty in a small
            signature and where it was not measured.
    """

    task: str
    classes: list[str]
    base: str
    image_size: ImageSize
    counts: Tensor
    means: Tensor
    scatter: Scatter
    held_out: Features
    confidence: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, train: Features, validation: Features, task: str, classes: Sequence[str], base: str, image_size: ImageSize
    ) -> "Signature":
        """Sums up features of the frozen network.

        Args:
            train: Features (N, D) and labels (N,) of the training images.
            validation: Those of the validation images, of which up to 256 are kept, evenly spaced.
            task: Name of the task.
            classes: Class names, in order of label.
            base: SHA-256 of the frozen network.
            image_size: Height and width of its input.

        Raises:
            RunError: If a feature is NaN or infinite.
        """
        if not train.features.isfinite().all():
            raise RunError(
                f"the frozen network gives NaN or infinity for images of task {task!r}; "
                "check the images and model.backbone.weights"
            )
        x, labels = train.features.cpu().double(), train.labels.cpu()
        counts = torch.bincount(labels, minlength=len(classes))
        sums = x.new_zeros(len(classes), x.shape[1]).index_add_(0, labels, x)
        means = (sums / counts.clamp_min(1)[:, None]).float().double()  # as the file keeps them
        scatter = Scatter.of_features(x - means[labels])
        return cls(task, list(classes), base, image_size, counts, means, scatter, _sample(validation, _HELD_OUT))

    @property
    def is_small(self) -> bool:
        """Whether it has counts and means alone."""
        return not self.scatter.values.numel()

    def small(self) -> "Signature":
        """A copy with counts and means alone: 772 bytes a class for 384 features.

        A router that knows the scatter of other tasks can find the task with it.
        """
        width = self.means.shape[1]
        means, nothing = (
            narrowed(self.means.float()).double(),
            Features(torch.zeros(0, width), self.held_out.labels[:0]),
        )
        return replace(self, means=means, scatter=NO_SCATTER, held_out=nothing, confidence=())

    def merged(self, other: "Signature") -> "Signature":
        """The signature of all images, from those of two parts of them, such as those of two machines.

        Raises:
            PatchError: If the other one has other classes, or belongs to another task, base or image size, or one of
                the two is small.
        """
        self.check(other.base, other.image_size)
        if self.is_small or other.is_small:
            raise PatchError(f"a small signature of task {self.task!r} cannot be merged; merge those of 'signatures/'")
        if (self.task, self.classes) != (other.task, other.classes):
            raise PatchError(
                f"signatures of task {self.task!r} with classes {self.classes} and of task {other.task!r} with classes "
                f"{other.classes} cannot be merged; merge parts of one task"
            )
        counts = self.counts + other.counts
        share = (other.counts / counts.clamp_min(1))[:, None]
        apart = other.means - self.means
        between = (self.counts[:, None] * share).sqrt() * apart
        held_out = Features(
            torch.cat([self.held_out.features, other.held_out.features]),
            torch.cat([self.held_out.labels, other.held_out.labels]),
        )
        return Signature(
            self.task,
            self.classes,
            self.base,
            self.image_size,
            counts,
            (self.means + share * apart).float().double(),
            self.scatter.merged(other.scatter, between),
            _sample(held_out, _HELD_OUT),
            tuple(map(sum, zip(self.confidence, other.confidence, strict=False))),
        )

    def check(self, base: str, image_size: ImageSize) -> None:
        """Raises PatchError unless the features are those of a network with this base and size of its input."""
        if self.base != base:
            raise PatchError(
                f"the signature of task {self.task!r} belongs to base {self.base[:12]}…, this base is {base[:12]}…; "
                "make it again with 'patch sign' in the run of this base"
            )
        if self.image_size != image_size:
            raise PatchError(
                f"the signature of task {self.task!r} is of images of {size_text(self.image_size)} pixels, not "
                f"{size_text(image_size)}; tasks can be told apart only if their images have the same size"
            )

    def check_task(self, task: str, classes: Sequence[str]) -> None:
        """Raises PatchError unless the signature is that of the task of this name with these classes."""
        if (self.task, self.classes) != (task, list(classes)):
            raise PatchError(
                f"the signature of task {self.task!r} with classes {self.classes} is not that of task {task!r} with "
                f"classes {list(classes)}; make it again with 'patch sign'"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name as the file keeps them."""
        return {
            "counts": self.counts.int(),
            "means": narrowed(self.means.float()) if self.is_small else self.means.float(),
            "scatter": self.scatter.values,
            "features": narrowed(self.held_out.features),
            "labels": self.held_out.labels,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """All fields that are not tensors, by name."""
        names = ("task", "classes", "base", "image_size")
        facts = {name: getattr(self, name) for name in names} | {"exponent": self.scatter.exponent}
        return facts | ({"confidence": list(self.confidence)} if self.confidence else {})

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "Signature":
        """The signature with these `tensors` and `facts`; raises PatchError if they do not go together."""
        try:
            scatter = Scatter(tensors["scatter"], facts.get("exponent", 0))  # which earlier versions did not write
            _check(tensors, facts, scatter)
        except (PatchError, KeyError, TypeError, ValueError) as cause:
            raise PatchError(f"a signature is damaged ({one_line(cause)}); make it again with 'patch sign'") from cause
        held_out = Features(tensors["features"].float(), tensors["labels"])
        size = read_size(facts["image_size"])
        assert size is not None  # it is checked
        values = (facts["task"], facts["classes"], facts["base"], size)
        confidence = tuple(facts.get("confidence", ()))
        return cls(*values, tensors["counts"].long(), tensors["means"].double(), scatter, held_out, confidence)

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes; equal signatures give equal bytes."""
        return pack_tensors(self.tensors, {"format": _FORMAT, "kind": "signature"} | self.facts)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "Signature":
        """Reads a file that `save` wrote; raises PatchError if it is missing, damaged or of another kind or format."""
        tensors, facts = read_tensors(path, PatchError)
        if (facts.pop("kind", None), facts.pop("format", None)) != ("signature", _FORMAT):
            raise PatchError(f"{path} is not a signature of format {_FORMAT}; check the path")
        try:
            return cls.from_parts(tensors, facts)
        except PatchError as cause:
            raise PatchError(f"{path}: {cause}") from cause


def _sample(features: Features, count: int) -> Features:
    """Up to `count` images, evenly spaced, with features as the file keeps them."""
    chosen = torch.linspace(0, len(features.labels) - 1, min(count, len(features.labels))).round().long()
    values, labels = features.features.cpu()[chosen], features.labels.cpu()[chosen]
    return Features(narrowed(values).float(), labels)


def _check(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], scatter: Scatter) -> None:
    """Raises an error unless the parts of a signature go together."""
    check_identity({name: fact for name, fact in facts.items() if name not in ("exponent", "confidence")})
    confidence = facts.get("confidence", [0] * BINS)
    if len(confidence) != BINS or not all(type(count) is int and count >= 0 for count in confidence):
        raise ValueError(f"its confidence is not {BINS} numbers of images")
    classes, width = len(facts["classes"]), tensors["means"].shape[-1]
    held = len(tensors["labels"])
    shapes = {"counts": (classes,), "means": (classes, width), "features": (held, width), "labels": (held,)}
    others = {name: tensor for name, tensor in tensors.items() if name != "scatter"}
    check_state("the signature", others, shapes, counts=torch.int32, labels=torch.int64)
    scatter.check(width)
    labels = tensors["labels"]
    if tensors["counts"].min() < 0 or (held and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise ValueError("a number of images is negative, or a label is beyond the classes")
