"""What a learnt task is: one small file of tensors; and what tasks share, where a method does not keep them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

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
        tensors = {f"head/{name}": tensor for name, tensor in self.head.items()} | _flat("pieces", self.pieces)
        names = [f.name for f in fields(self) if f.name not in ("head", "pieces")]
        facts = {"format": _FORMAT, "kind": "patch"} | {name: getattr(self, name) for name in names}
        return pack_tensors(tensors, facts)

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
            head = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head/")}
            patch = cls(head=head, pieces=_nested("pieces", tensors, len(facts["method"])), **facts)
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
            heads, pieces = (_nested(k, tensors, len(facts[n])) for k, n in (("heads", "tasks"), ("pieces", "method")))
            return cls(heads=heads, pieces=pieces, **facts)
        except (KeyError, TypeError, ValueError, IndexError) as cause:
            raise PatchError(f"{path} is incomplete ({cause}); learn the tasks anew") from cause


def _flat(kind: str, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several states, named `KIND/INDEX/NAME`."""
    return {f"{kind}/{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def _nested(kind: str, tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The inverse of `_flat`; raises ValueError or IndexError where a name has no state."""
    states: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == kind:
            index, _, key = rest.partition("/")
            states[int(index)][key] = tensor
    return states
