"""What a stream will cost: told once the first steps are measured, and shown beside the progress bar."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NotRequired, TypedDict

from rich.console import Console

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.learning.budget import Budget, patch_size
from recast_pl.learning.cost import TaskCost, peak_memory
from recast_pl.learning.patch import Precision, TaskPatch


class Cost(TypedDict):
    """What a task has cost.

    `seconds` are those from its begin until it was tested, `predicted_seconds` what its first steps predicted, if there
    were enough. `memory_bytes` is the most that the process, or its GPU, has had so far. With a budget, `budget` has
    its limits, and `chosen` how the patch is stored and the epochs that seemed to fit after the first steps.
    """

    seconds: float
    predicted_seconds: NotRequired[float]
    memory_bytes: NotRequired[int]
    budget: NotRequired[dict[str, float]]
    chosen: NotRequired["Chosen"]


class Chosen(TypedDict):
    """What was chosen so that a task keeps its budget."""

    precision: Precision
    epochs: NotRequired[float]


class Forecast:
    """Predicts the cost of the tasks of a stream that are left. It assumes that it grows with their training images.

    Args:
        data: The stream.
        console: Where the prediction is printed.
        budget: What each task may cost.
        precision: How patches are stored.
    """

    def __init__(
        self, data: SequentialTaskDataModule, console: Console, budget: Budget, precision: Precision = "fp32"
    ) -> None:
        self._data, self._console, self._budget, self._precision = data, console, budget, precision
        self._images: dict[str, int] = {}  # of all tasks
        self._left = self._images_left = 0  # tasks that are to be trained, and their images
        self._told = False
        self._cost = TaskCost(budget)

    def expect(self, tasks: Sequence[str]) -> None:
        """Names the tasks that are to be trained, in order."""
        self._images, self._told = self._data.training_images(tasks), False
        self._left, self._images_left = len(tasks), sum(self._images[task] for task in tasks)

    def watch(self, task: str) -> TaskCost:
        """Begins a task; returns the callback of its trainer."""
        images = self._images[task]
        self._left, self._images_left = self._left - 1, self._images_left - images
        self._cost = TaskCost(self._budget, self._tell, self._precision, (self._left, self._images_left / images))
        return self._cost

    def precision(self, patch: TaskPatch) -> Precision:
        """How to store the patch of the latest task within its budget; raises RunError if it is too large."""
        return self._budget.precision(patch, self._precision)

    def record(self, precision: Precision) -> Cost:
        """What the latest task has cost, whose patch is stored so."""
        cost, memory = Cost(seconds=round(self._cost.spent, 2)), self._memory()
        if self._cost.solved_alone and self._cost.trainer.is_global_zero:
            self._console.print(
                f"budget.seconds={self._budget.seconds} left no time for a step: the head that was solved on the "
                "features of the base is kept"
            )
        if self._cost.predicted is not None:
            cost["predicted_seconds"] = round(self._cost.predicted, 2)
        if memory is not None:
            cost["memory_bytes"] = memory
        if self._budget.limits:
            cost["budget"], cost["chosen"] = self._budget.limits, Chosen(precision=precision)
            if self._cost.epochs is not None:
                cost["chosen"]["epochs"] = round(self._cost.epochs, 2)
        return cost

    def _memory(self) -> int | None:
        trainer = self._cost.trainer
        return None if trainer is None else peak_memory(trainer.strategy.root_device)

    def _tell(self, cost: TaskCost) -> None:
        """Prints what the tasks that are left will cost, once."""
        if self._told or not cost.trainer.is_global_zero:
            return
        self._told, module, memory = True, cost.trainer.lightning_module, self._memory()
        size = patch_size(module.patch({}), cost.precision)
        if module.signature is not None:
            size += len(module.signature.to_bytes())
        this, count, whole = duration(cost.predicted), self._left + 1, cost.stream_left
        every = "" if count == 1 or whole is None else f", {duration(whole + cost.spent)} for all {count}"
        most = "" if memory is None else f"; {memory / 1e9:.1f} GB of memory"
        epochs = "" if self._budget.seconds is None or cost.epochs is None else f" of {cost.epochs:.1f} epochs"
        self._console.print(
            f"about {this} for this task{epochs}{every}{most}; {size / 1e3:,.0f} kB on disk for a task like this"
        )


def duration(seconds: float | None) -> str:
    """A time span as H:MM:SS; `?` if it is not known."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
