"""What a predictor keeps of a task that it has read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from recast_pl.errors import RunError
from recast_pl.inference.mixed_batch import PackedState
from recast_pl.learning.signature import Signature
from recast_pl.rules import ImageSize

SignatureSource = str | Path | Signature | Callable[[], Signature] | None
"""The signature of a task, its file or a function that reads it; None if there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTask:
    """The states of the pieces, the head's weight (classes, D) and bias (classes,), and the signature."""

    state: PackedState
    classes: Sequence[str]
    weight: Tensor
    bias: Tensor
    image_size: ImageSize
    signature: SignatureSource

    def read_signature(self, name: str, base: str) -> Signature:
        """Reads the signature of the task.

        Args:
            name: Name of the task.
            base: SHA-256 of the frozen network.

        Raises:
            RunError: If it has none.
            PatchError: If it is damaged, or belongs to another task, base or image size.
        """
        source = self.signature
        if source is None:
            raise RunError(f"task {name!r} was added without its signature; remove it, and add it with its signature")
        source = source() if callable(source) else source
        signature = source if isinstance(source, Signature) else Signature.load(source)
        signature.check(base, self.image_size)
        signature.check_task(name, self.classes)
        return signature
