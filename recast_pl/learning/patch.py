"""The files that hold a trained task: its patch, and the state that it shares with other tasks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from recast_pl.errors import PatchError, one_line
from recast_pl.files import pack_tensors, read_tensors, write_atomic
from recast_pl.learning.compact import is_compact, narrowed, pack_compact, read_compact, stored_tensors
from recast_pl.learning.quantization import Moments, RoundedHead, round_head
from recast_pl.methods.piece import check_state
from recast_pl.rules import (
    LABEL_RULE,
    LARGEST_SIDE,
    TASK_RULE,
    ImageSize,
    find_bad_label,
    is_label,
    is_task_name,
    read_size,
)

Precision = Literal["fp32", "int8", "int4", "int2"]
"""How a patch is stored: all in single precision, or compactly with 8, 4 or 2 bits for each weight of the head."""

BITS: dict[Precision, int] = {"int8": 8, "int4": 4, "int2": 2}
"""Bits for each weight of the head in a compact patch."""

_FORMAT = 1

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64)

_LARGEST = 1e9
"""The largest number of a patch: trained ones are far below, and products of larger ones overflow."""


@dataclass(frozen=True)
class TaskPatch:
    """A trained task: all that it adds to the frozen network.

    Args:
        task: Its name.
        classes: Class names; the index of each is its label.
        head: `weight` (classes, D) and `bias` (classes,) of the linear head.
        pieces: The task state of each piece of the method, in order.
        method: Names of the pieces.
        image_size: Height and width of the input in pixels, as one number if they are equal.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        base: SHA-256 of the frozen network (templates included) that the task was trained on.
        metrics: Accuracies in percent, by name.
        rounded: The head as a compact file keeps it, of which `head` is the value; None for a safetensors file.
    """

    task: str
    classes: list[str]
    head: dict[str, Tensor]
    pieces: list[dict[str, Tensor]]
    method: list[str]
    image_size: ImageSize
    mean: list[float]
    std: list[float]
    base: str
    metrics: dict[str, float] = field(default_factory=dict)
    rounded: RoundedHead | None = None

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # JSON has no tuples
            object.__setattr__(self, "image_size", tuple(self.image_size))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `head/0/weight`, `pieces/INDEX/NAME`."""
        return _flat("head", [self.head]) | _flat("pieces", self.pieces)

    @property
    def stored(self) -> dict[str, Tensor]:
        """All tensors as they are in the file, by name; `tensors`, unless the file is compact."""
        return self.tensors if self.rounded is None else stored_tensors(self.rounded, self.pieces)

    @property
    def facts(self) -> dict[str, Any]:
        """All fields that are not tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("head", "pieces", "rounded")}

    def with_tensors(self, tensors: Mapping[str, Tensor], **facts: Any) -> "TaskPatch":
        """A copy with other tensors, named as in `tensors`, and with other facts; its file is not compact."""
        parts = _nested(tensors, {"head": 1, "pieces": len(self.method)})
        return replace(self, head=parts["head"][0], pieces=parts["pieces"], rounded=None, **facts)

    def compacted(self, bits: int, moments: Moments | None = None) -> "TaskPatch":
        """A copy with the values that a compact file keeps: a rounded head, and states in half precision.

        Args:
            bits: For each weight of the head: 8, 4 or 2.
            moments: Of the features of training images, to choose codes and bias by; None to round to the nearest.
        """
        if self.rounded is not None and self.rounded.bits == bits and moments is None:
            return self
        head = round_head(self.head["weight"], self.head["bias"], bits, moments)
        pieces = [{name: _as_read(tensor) for name, tensor in state.items()} for state in self.pieces]
        mean, std = torch.tensor(self.mean).tolist(), torch.tensor(self.std).tolist()
        return replace(self, head=head.state, pieces=pieces, mean=mean, std=std, rounded=head)

    def widened(self) -> "TaskPatch":
        """A copy in single precision, in which networks compute."""
        return self.with_tensors({n: t.float() if t.is_floating_point() else t for n, t in self.tensors.items()})

    def validate(self) -> None:
        """Checks all that does not depend on a network: names, sizes, shapes, types and numbers. `load` calls it.

        Raises:
            PatchError: If a value is wrong.
        """
        _check_facts(self.facts, _PATCH_FACTS)
        if len(self.pieces) != len(self.method):
            raise PatchError(f"it holds the states of {len(self.pieces)} pieces for method {self.method}")
        _check_head(self.head, len(self.classes))
        for name, tensor in self.tensors.items():
            if not is_label(name):
                raise PatchError(f"a tensor is called {name!r:.80}, which must be {LABEL_RULE}")
            if tensor.dtype not in _TYPES:
                raise PatchError(f"{name!r:.80} has the type {tensor.dtype}, which patches do not have")
            if not (tensor.abs() <= _LARGEST).all():
                raise PatchError(f"{name!r:.80} holds NaN, infinity or a number beyond {_LARGEST:.0e}")

    def check(self, base: str, method: list[str], features: int) -> None:
        """Checks that the patch is valid, and belongs to a network with this base and method, and D features.

        Raises:
            PatchError: If a value is wrong, the base or the method is another one, or the head has a wrong shape.
        """
        try:
            self.validate()
        except PatchError as cause:
            raise PatchError(f"the patch of task {self.task!r:.80} cannot be used: {cause}; {_REMEDY}") from cause
        if self.base != base:
            raise PatchError(
                f"the patch of task {self.task!r} belongs to base {self.base[:12]}…, this base is {base[:12]}…; "
                "use the backbone and weights of its run, and give its decomposition.safetensors as decomposition in "
                "place of layout, because another kind of processor solves the same layout to other bits"
            )
        if self.method != method:
            raise PatchError(
                f"the patch of task {self.task!r} is of method {self.method}, not {method}; use the method of its run"
            )
        classes = len(self.classes)
        check_state("the head", self.head, {"weight": (classes, features), "bias": (classes,)})

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes; equal patches give equal bytes."""
        if self.rounded is not None:
            if not all(torch.equal(self.head[name], value) for name, value in self.rounded.state.items()):
                raise PatchError(f"the head of task {self.task!r:.80} was changed after rounding; call compacted again")
            return pack_compact(self.facts, self.rounded, self.pieces)
        return pack_tensors(self.tensors, {"format": _FORMAT, "kind": "patch"} | self.facts)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, or a compact one if the head is rounded, atomically."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "TaskPatch":
        """Reads a file that `save` wrote; raises PatchError if it is missing, damaged or of another kind or format."""
        if is_compact(Path(path)):
            facts, head, pieces = read_compact(Path(path))
            patch = cls(**facts, head=head.state, pieces=pieces, rounded=head)
        else:
            values = _read(path, "patch", _PATCH_FACTS, lambda facts: {"head": 1, "pieces": len(facts["method"])})
            patch = cls(**values | {"head": values["head"][0]})
        try:
            patch.validate()
        except PatchError as cause:
            raise PatchError(f"{path} cannot be used: {cause}; {_REMEDY}") from cause
        return patch


@dataclass(frozen=True)
class SharedState:
    """The state that all tasks share after the last one, if the method has pieces that are not isolated.

    Args:
        tasks: Names of the tasks whose heads are kept here, because later tasks train them too.
        heads: `weight` (classes, D) and `bias` (classes,) of those heads.
        pieces: The shared state of each piece of the method, in order.
        method: Names of the pieces.
        base: SHA-256 of the parts of the network that no task changes.
    """

    tasks: list[str]
    heads: list[dict[str, Tensor]]
    pieces: list[dict[str, Tensor]]
    method: list[str]
    base: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for state in (*self.heads, *self.pieces) for tensor in state.values())

    def check(self, base: str, method: list[str]) -> None:
        """Raises PatchError unless the state belongs to a network with this base and method."""
        if (self.base, self.method) != (base, method):
            raise PatchError(
                f"the shared state is of method {self.method} on base {self.base[:12]}…, not of {method} on base "
                f"{base[:12]}…; use the method and the backbone of its run"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        facts = {"format": _FORMAT, "kind": "shared", "tasks": self.tasks, "method": self.method, "base": self.base}
        write_atomic(path, pack_tensors(_flat("heads", self.heads) | _flat("pieces", self.pieces), facts))

    @classmethod
    def load(cls, path: str | Path) -> "SharedState":
        """Reads a file that `save` wrote; raises PatchError if it is missing, damaged or of another kind or format."""

        def counts(facts: Mapping[str, Any]) -> dict[str, int]:
            return {"heads": len(facts["tasks"]), "pieces": len(facts["method"])}

        return cls(**_read(path, "shared", _SHARED_FACTS, counts))


def _as_read(tensor: Tensor) -> Tensor:
    """The value of a tensor in a compact file, in the type that reading the file gives."""
    return narrowed(tensor).float() if tensor.is_floating_point() else tensor


def load_head(state: Mapping[str, Tensor]) -> nn.Linear:
    """A head from its state; raises PatchError if the shapes do not fit, or a number is NaN or infinite."""
    weight = state.get("weight")
    classes, features = weight.shape if weight is not None and weight.ndim == 2 else (0, 0)
    check_state("the head", state, {"weight": (classes, features), "bias": (classes,)})
    head = nn.Linear(features, classes)
    head.load_state_dict(state)
    return head


def _check_head(state: Mapping[str, Tensor], classes: int) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weight = shapes.get("weight", ())
    if len(weight) != 2 or shapes != {"weight": (classes, weight[1]), "bias": (classes,)}:
        raise PatchError(f"the head has {str(shapes)[:200]} for {classes} classes")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise PatchError(f"{name} of the head has the type {tensor.dtype}, which is not a floating-point type")


class _Rule(NamedTuple):
    """What a value of the metadata must be: a test, and its description."""

    holds: Callable[[Any], bool]
    text: str


_REMEDY = "get the original file, or train the task again"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (not value or is_label(value))


def _is_list_of(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(test, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_classes(value: Any) -> bool:
    return bool(value) and _is_list_of(value, lambda name: isinstance(name, str)) and find_bad_label(value) is None


def _is_size(value: Any) -> bool:
    size = read_size(value)
    return size is not None and size == (tuple(value) if isinstance(value, list) else value)


def _is_base(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


_METHOD = _Rule(lambda value: _is_list_of(value, _is_text), "a list of names of pieces")

_BASE = _Rule(_is_base, "a SHA-256 of 64 hexadecimal digits")

_SHARED_FACTS: dict[str, _Rule] = {
    "tasks": _Rule(lambda value: _is_list_of(value, _is_text), "a list of names of tasks"),
    "method": _METHOD,
    "base": _BASE,
}

_PATCH_FACTS: dict[str, _Rule] = {
    "task": _Rule(lambda value: isinstance(value, str) and is_task_name(value), TASK_RULE),
    "classes": _Rule(_is_classes, f"a list of at least one class, each once, and each {LABEL_RULE}"),
    "method": _METHOD,
    "image_size": _Rule(_is_size, f"1 to {LARGEST_SIDE} pixels, or two such numbers if they differ"),
    "mean": _Rule(lambda value: _is_list_of(value, _is_number) and len(value) == 3, "3 numbers"),
    "std": _Rule(
        lambda value: _is_list_of(value, _is_number) and len(value) == 3 and min(value) > 0, "3 numbers above 0"
    ),
    "base": _BASE,
    "metrics": _Rule(
        lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(_is_number, value.values())),
        "numbers by name",
    ),
}


def _read(
    path: str | Path, kind: str, rules: Mapping[str, _Rule], count: Callable[[Mapping[str, Any]], Mapping[str, int]]
) -> dict[str, Any]:
    """Reads the fields of a value, after a check of its metadata; `count` tells how many states it has of each kind."""
    tensors, facts = read_tensors(path, PatchError)
    found, version = facts.pop("kind", None), facts.pop("format", None)
    if (found, version) != (kind, _FORMAT):
        name = {"patch": "patch", "shared": "shared state"}[kind]
        what = f"a {found!r:.40} of format {version!r:.40}"
        raise PatchError(f"{path} is {what}, not a {name} of format {_FORMAT}; check the path")
    try:
        _check_facts(facts, rules)
        return facts | _nested(tensors, count(facts))
    except PatchError as cause:
        raise PatchError(f"{path} cannot be used: {cause}; {_REMEDY}") from cause
    except (KeyError, ValueError, IndexError) as cause:
        raise PatchError(f"{path} is incomplete or damaged ({one_line(cause)}); {_REMEDY}") from cause


def _check_facts(facts: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    """Raises PatchError unless the metadata has exactly the expected entries, each with a valid value."""
    if facts.keys() != rules.keys():
        raise PatchError(f"it states {str(sorted(facts))[:200]}, not {', '.join(rules)}")
    wrong = [name for name, rule in rules.items() if not rule.holds(facts[name])]
    if wrong:
        raise PatchError(f"{wrong[0]} is {facts[wrong[0]]!r:.80} and must be {rules[wrong[0]].text}")


def check_identity(facts: Mapping[str, Any]) -> None:
    """Raises PatchError unless facts are a task, classes, a base and an image size, each as a patch may have it."""
    _check_facts(facts, {name: _PATCH_FACTS[name] for name in ("task", "classes", "base", "image_size")})


def _flat(kind: str, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several states, named `KIND/INDEX/NAME`."""
    return {f"{kind}/{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def _nested(tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, list[dict[str, Tensor]]]:
    """The inverse of `_flat` for several kinds of states; raises KeyError, ValueError or IndexError for other names."""
    states: dict[str, list[dict[str, Tensor]]] = {kind: [{} for _ in range(count)] for kind, count in counts.items()}
    for path, tensor in tensors.items():
        kind, index, name = path.split("/", 2)
        states[kind][int(index)][name] = tensor
    read = {name for kind, parts in states.items() for name in _flat(kind, parts)}
    if read != tensors.keys():  # such as pieces/-1/a or pieces/00/a
        raise ValueError(f"tensors {sorted(tensors.keys() - read)[:3]} are unknown")
    return states
