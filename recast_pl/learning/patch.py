"""The files that hold a trained task: its patch, and the state that it shares with other tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recast_pl.errors import PatchError
from recast_pl.files import pack_tensors, read_tensors, write_atomic
from recast_pl.methods.piece import check_state

_FORMAT = 1


@dataclass(frozen=True)
class TaskPatch:
    """A trained task: all that it adds to the frozen network.

    Args:
        task: Its name.
        classes: Class names; the index of each is its label.
        head: `weight` (classes, D) and `bias` (classes,) of the linear head.
        pieces: The task state of each piece of the method, in order.
        method: Names of the pieces.
        image_size: Height and width of the input in pixels.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        base: SHA-256 of the frozen network (templates included) that the task was trained on.
        metrics: Accuracies in percent, by name.
    """

    task: str
    classes: list[str]
    head: dict[str, Tensor]
    pieces: list[dict[str, Tensor]]
    method: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    base: str
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, named as in the file: `head/0/weight`, `pieces/INDEX/NAME`."""
        return _flat("head", [self.head]) | _flat("pieces", self.pieces)

    @property
    def facts(self) -> dict[str, Any]:
        """All fields that are not tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("head", "pieces")}

    def with_tensors(self, tensors: Mapping[str, Tensor], **facts: Any) -> "TaskPatch":
        """A copy with other tensors, named as in `tensors`, and with other facts."""
        parts = _nested(tensors, {"head": 1, "pieces": len(self.method)})
        return replace(self, head=parts["head"][0], pieces=parts["pieces"], **facts)

    def widened(self) -> "TaskPatch":
        """A copy in single precision, in which networks compute."""
        return self.with_tensors({n: t.float() if t.is_floating_point() else t for n, t in self.tensors.items()})

    def check(self, base: str, method: list[str], features: int) -> None:
        """Checks that the patch belongs to a network with this base and method, and D features.

        Raises:
            PatchError: If the base or the method is another one, or the head has a wrong shape or a NaN.
        """
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
        return pack_tensors(self.tensors, {"format": _FORMAT, "kind": "patch"} | self.facts)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "TaskPatch":
        """Reads a file that `save` wrote; raises PatchError if it is missing, damaged or of another kind or format."""
        values = _read(path, "patch", _PATCH_FACTS, lambda facts: {"head": 1, "pieces": len(facts["method"])})
        return cls(**values | {"head": values["head"][0]})


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


def load_head(state: Mapping[str, Tensor]) -> nn.Linear:
    """A head from its state; raises PatchError if the shapes do not fit, or a number is NaN or infinite."""
    classes, features = state["weight"].shape
    head = nn.Linear(features, classes)
    check_state("the head", state, {"weight": (classes, features), "bias": (classes,)})
    head.load_state_dict(state)
    return head


_Check = Callable[[Any], bool]

_text: _Check = lambda value: isinstance(value, str)  # noqa: E731
_texts: _Check = lambda value: isinstance(value, list) and all(map(_text, value))  # noqa: E731
_number: _Check = lambda value: isinstance(value, int | float) and not isinstance(value, bool)  # noqa: E731
_channels: _Check = lambda value: isinstance(value, list) and len(value) == 3 and all(map(_number, value))  # noqa: E731

_SHARED_FACTS: dict[str, _Check] = {"tasks": _texts, "method": _texts, "base": _text}

_PATCH_FACTS: dict[str, _Check] = {
    "task": _text,
    "classes": _texts,
    "method": _texts,
    "image_size": lambda value: isinstance(value, int) and value > 0,
    "mean": _channels,
    "std": lambda value: _channels(value) and min(value) > 0,
    "base": _text,
    "metrics": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
}


def _read(
    path: str | Path, kind: str, checks: Mapping[str, _Check], count: Callable[[Mapping[str, Any]], Mapping[str, int]]
) -> dict[str, Any]:
    """Reads the fields of a value, after a check of its metadata; `count` tells how many states it has of each kind."""
    tensors, facts = read_tensors(path, PatchError)
    found, version = facts.pop("kind", None), facts.pop("format", None)
    if (found, version) != (kind, _FORMAT):
        name = {"patch": "patch", "shared": "shared state"}[kind]
        raise PatchError(f"{path} is a {found} of format {version}, not a {name} of format {_FORMAT}; check the path")
    try:
        _check_facts(facts, checks)
        return facts | _nested(tensors, count(facts))
    except (KeyError, ValueError, IndexError) as cause:
        raise PatchError(f"{path} is incomplete or damaged ({cause}); train its tasks again") from cause


def _check_facts(facts: Mapping[str, Any], checks: Mapping[str, _Check]) -> None:
    """Raises ValueError unless the metadata has exactly the expected entries, each with a valid value."""
    if facts.keys() != checks.keys():
        raise ValueError(f"it states {', '.join(sorted(facts))}")
    wrong = [name for name, check in checks.items() if not check(facts[name])]
    if wrong:
        raise ValueError(f"{wrong[0]} is {str(facts[wrong[0]])[:80]}")


def _flat(kind: str, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several states, named `KIND/INDEX/NAME`."""
    return {f"{kind}/{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def _nested(tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, list[dict[str, Tensor]]]:
    """The inverse of `_flat` for several kinds of states; raises KeyError, ValueError or IndexError for other names."""
    states: dict[str, list[dict[str, Tensor]]] = {kind: [{} for _ in range(count)] for kind, count in counts.items()}
    for path, tensor in tensors.items():
        kind, index, name = path.split("/", 2)
        states[kind][int(index)][name] = tensor
    return states
