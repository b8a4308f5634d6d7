"""What a learnt task is: one small file of tensors; and what tasks share, where a method does not keep them apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from recast_pl.errors import PatchError
from recast_pl.files import pack_tensors, read_tensors, write_atomic

_FORMAT = 1


@dataclass(frozen=True)
class TaskPatch:
    """A learnt task.

    Args:
        task: Its name.
        classes: Class names; the index of each is its label.
        head: `weight` (classes, D) and `bias` (classes,) of the linear head.
        pieces: The task state of each piece of the method, in order.
        method: Names of the pieces.
        image_size: Height and width of the input in pixels.
        mean: Mean of each channel that images in [0, 1] are normalised with.
        std: Standard deviation of each channel.
        base: SHA-256 of the frozen network (templates included) that it was learnt on.
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

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes; equal patches give equal bytes."""
        return pack_tensors(self.tensors, {"format": _FORMAT, "kind": "patch"} | self.facts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, named as in the file: `head/0/weight`, `pieces/INDEX/NAME`."""
        return _flat("head", [self.head]) | _flat("pieces", self.pieces)

    @property
    def facts(self) -> dict[str, Any]:
        """All but the tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("head", "pieces")}

    def with_tensors(self, tensors: Mapping[str, Tensor], **facts: Any) -> "TaskPatch":
        """The same task with other tensors.

        Args:
            tensors: Named as `tensors` names them.
            facts: What else is to change, by name.
        """
        parts = _nested(tensors, {"head": 1, "pieces": len(self.method)})
        return replace(self, head=parts["head"][0], pieces=parts["pieces"], **facts)

    def widened(self) -> "TaskPatch":
        """The same with numbers of half or double precision in single, in which networks compute."""
        return self.with_tensors({n: t.float() if t.is_floating_point() else t for n, t in self.tensors.items()})

    @classmethod
    def load(cls, path: str | Path) -> "TaskPatch":
        """Reads what `save` wrote.

        Raises:
            PatchError: If the file is missing, damaged, of another kind or of a newer format.
        """
        tensors, facts = read_tensors(path, PatchError)
        kind, version = facts.pop("kind", None), facts.pop("format", None)
        if kind != "patch" or version != _FORMAT:
            raise PatchError(f"{path} is a {kind} of format {version}, not a patch of format {_FORMAT}")
        try:
            _check_facts(facts, _FACTS)
            parts = _nested(tensors, {"head": 1, "pieces": len(facts["method"])})
            patch = cls(head=parts["head"][0], pieces=parts["pieces"], **facts)
        except (KeyError, TypeError, ValueError, IndexError) as cause:
            raise PatchError(f"{path} is incomplete ({cause}); learn the task anew") from cause
        return patch

    def check_base(self, base: str) -> None:
        """Refuses to work on another base.

        Raises:
            PatchError: If `base` is not the fingerprint that the patch was learnt on.
        """
        if self.base != base:
            raise PatchError(
                f"the patch of task {self.task!r} belongs to base {self.base[:12]}…, this base is {base[:12]}…; "
                "use the backbone, weights and decomposition of its run"
            )


@dataclass(frozen=True)
class SharedState:
    """What all tasks of a method that does not keep them apart need, as it is after the last one.

    Args:
        tasks: Names of the tasks whose heads are kept here, because later tasks train them, too.
        heads: `weight` (classes, D) and `bias` (classes,) of those heads.
        pieces: The shared state of each piece of the method, in order.
        method: Names of the pieces.
        base: SHA-256 of what no task changes.
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

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        facts = {"format": _FORMAT, "kind": "shared", "tasks": self.tasks, "method": self.method, "base": self.base}
        write_atomic(path, pack_tensors(_flat("heads", self.heads) | _flat("pieces", self.pieces), facts))

    @classmethod
    def load(cls, path: str | Path) -> "SharedState":
        """Reads what `save` wrote.

        Raises:
            PatchError: If the file is missing, damaged, of another kind or of a newer format.
        """
        tensors, facts = read_tensors(path, PatchError)
        kind, version = facts.pop("kind", None), facts.pop("format", None)
        if kind != "shared" or version != _FORMAT:
            raise PatchError(f"{path} is a {kind} of format {version}, not a shared state of format {_FORMAT}")
        try:
            _check_facts(facts, {"tasks": _TEXTS, "method": _TEXTS, "base": _TEXT})
            parts = _nested(tensors, {"heads": len(facts["tasks"]), "pieces": len(facts["method"])})
            return cls(heads=parts["heads"], pieces=parts["pieces"], **facts)
        except (KeyError, TypeError, ValueError, IndexError) as cause:
            raise PatchError(f"{path} is incomplete ({cause}); learn the tasks anew") from cause


Check = Callable[[Any], bool]

_TEXT: Check = lambda value: isinstance(value, str)  # noqa: E731

_TEXTS: Check = lambda value: isinstance(value, list) and all(map(_TEXT, value))  # noqa: E731

_NUMBER: Check = lambda value: isinstance(value, int | float) and not isinstance(value, bool)  # noqa: E731

_CHANNELS: Check = lambda value: isinstance(value, list) and len(value) == 3 and all(map(_NUMBER, value))  # noqa: E731

_FACTS: dict[str, Check] = {
    "task": _TEXT,
    "classes": _TEXTS,
    "method": _TEXTS,
    "image_size": lambda value: isinstance(value, int) and value > 0,
    "mean": _CHANNELS,
    "std": lambda value: _CHANNELS(value) and min(value) > 0,
    "base": _TEXT,
    "metrics": lambda value: isinstance(value, dict) and all(map(_NUMBER, value.values())),
}


def _check_facts(facts: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raises ValueError unless the metadata has just these entries, each of its type."""
    if facts.keys() != checks.keys():
        raise ValueError(f"it states {', '.join(sorted(facts))}")
    wrong = [name for name, check in checks.items() if not check(facts[name])]
    if wrong:
        raise ValueError(f"{wrong[0]} is {str(facts[wrong[0]])[:80]}")


def _flat(kind: str, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several states, named `KIND/INDEX/NAME`."""
    return {f"{kind}/{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def _nested(tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, list[dict[str, Tensor]]]:
    """The inverse of `_flat` for several kinds of states; raises KeyError, ValueError or IndexError at odd names."""
    states: dict[str, list[dict[str, Tensor]]] = {kind: [{} for _ in range(count)] for kind, count in counts.items()}
    for path, tensor in tensors.items():
        kind, index, name = path.split("/", 2)
        states[kind][int(index)][name] = tensor
    return states
