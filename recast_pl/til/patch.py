"""What a learnt task is: one small file of tensors, with all that is needed to use it."""

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
        tensors = {f"head/{name}": tensor for name, tensor in self.head.items()}
        for index, state in enumerate(self.pieces):
            tensors |= {f"pieces/{index}/{name}": tensor for name, tensor in state.items()}
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
            pieces: list[dict[str, Tensor]] = [{} for _ in facts["method"]]
            head = {}
            for name, tensor in tensors.items():
                part, _, rest = name.partition("/")
                if part == "head":
                    head[rest] = tensor
                else:
                    index, _, key = rest.partition("/")
                    pieces[int(index)][key] = tensor
            patch = cls(head=head, pieces=pieces, **facts)
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
