"""What a task may cost, and what is chosen so that it does not cost more.

1. `images`: as many training images are used as are allowed.
2. `bytes`: of the ways to store the patch, from that of the run on to 8, 4 and 2 bits, the first that fits is taken.
3. `seconds`: as many epochs are made as fit. The schedule of learning rates advances faster, so that it ends with them.
4. `memory`: nothing is chosen; the task is refused after its first step.

Two more settings would save seconds or memory, and stay as they are. All tasks of a run need the same image size,
because they share the base and the router. And `gradient_tokens` saves only 5 to 11 % of a step
(`benchmarks/RESULTS.md`, speed and memory), while accuracy may suffer.
"""

from dataclasses import dataclass, replace
from typing import get_args

from recast_pl.errors import RunError
from recast_pl.learning.patch import BITS, Precision, TaskPatch

_PRECISIONS: tuple[Precision, ...] = get_args(Precision)  # from most to fewest bits


@dataclass(frozen=True)
class Budget:
    """What each task may cost; None for no limit.

    Args:
        seconds: From when the task begins until it is tested. If the network alone needs more for the images, the task
            is refused. Training stops in time to validate and test, and what was best so far is kept. The schedule of
            learning rates advances faster, so that it ends with the last epoch.
        memory: The most bytes that the process, or its GPU, has had after the first step, earlier tasks included. If
            they are more, the task is refused.
        bytes: Size of the patch on disk, without its signature. If it is larger with `patch_precision`, its head is
            stored with 8, 4 or 2 bits for each weight. If it is too large even so, it is refused before training.
        images: Training images; about as many of each class, by their names and the seed. At least one of each class.

    Raises:
        RunError: If a limit is not above 0.
    """

    seconds: float | None = None
    memory: float | None = None
    bytes: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.limits.items():
            if not value > 0:
                raise RunError(f"budget.{name}={value} must be above 0, or null for no limit")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def precision(self, patch: TaskPatch, wanted: Precision) -> Precision:
        """How to store a patch: as is wanted, or with fewer bits.

        Args:
            patch: The patch; its accuracy need not be known.
            wanted: What is used if it fits.

        Raises:
            RunError: If it is too large with the fewest bits.
        """
        if self.bytes is None:
            return wanted
        for precision in _PRECISIONS[_PRECISIONS.index(wanted) :]:
            size = patch_size(patch, precision)
            if size <= self.bytes:
                return precision
        raise RunError(
            f"budget.bytes={self.bytes} is too small for task {patch.task!r}: its patch takes {size:,} bytes with 2 "
            "bits for each weight of the head; set at least these, or use a method that trains fewer numbers"
        )

    def check_memory(self, task: str, used: int | None) -> None:
        """Raises RunError if a task has used too many bytes of memory; None if that is not known."""
        if self.memory is not None and used is not None and used > self.memory:
            raise RunError(
                f"budget.memory={self.memory:.3g} is too small for task {task!r}: its first step takes {used:,} bytes; "
                "set more, or a smaller --data.batch_size"
            )


def patch_size(patch: TaskPatch, precision: Precision) -> int:
    """The bytes of a patch on disk; if the accuracy is not known yet, with another one of as many digits."""
    patch = replace(patch, metrics={"accuracy": 12.3456} | patch.metrics)
    bits = BITS.get(precision)
    return len((patch if bits is None else patch.compacted(bits)).to_bytes())


def schedule_steps(epochs: float, position: int, left: float) -> int:
    """How many steps the schedule of learning rates makes after an epoch, so that it ends with the last one.

    Each epoch that is left, and the one that just ended, gets an equal part of what is left of the schedule. So rates
    depend on the share of the training that is done, as in Li, Yumer and Ramanan, "Budgeted Training", ICLR 2020.

    Args:
        epochs: Of the whole schedule.
        position: Steps that were made before.
        left: Epochs that will probably follow; may be a fraction.
    """
    return max(0, round((epochs - position) / (left + 1)))
