"""What a task costs: predicted from its first steps, measured, and kept within its budget.

    seconds = setup + epochs · (steps · step + validation) + f · (images that are read after training)

The setup (features of all images, and the probe) is over when training starts, so it is measured, and so is a step. f
is the time that the network needs for an image, of one batch. A validation is measured once there was one; before that,
it is f for each image that it reads and, if the head is solved again, the time that the probe took.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning import Callback, Trainer

from recast_pl.errors import RunError
from recast_pl.learning.budget import Budget, schedule_steps
from recast_pl.learning.patch import BITS, Precision

_STEPS = 4  # after which the cost is predicted; the first is slower than the others and does not count

_RECENT = 10  # steps that count for the time of a step, about


class TaskCost(Callback):
    """Measures a task while it is trained, predicts what it costs, and stops it within its budget.

    What a method does after training (such as the Fisher matrix of `EWC`) and tests of earlier tasks are not predicted.

    Args:
        budget: What the task may cost.
        tell: Called once, when the cost can be predicted.
        precision: How the patch is stored, if its size is within the budget.
        later: How many tasks come later, and how many times the cost of this one they probably have together.
    """

    def __init__(
        self,
        budget: Budget,
        tell: Callable[["TaskCost"], None] = lambda _: None,
        precision: Precision = "fp32",
        later: tuple[int, float] = (0, 0.0),
    ) -> None:
        self.budget, self.precision, self._tell, self._later = budget, precision, tell, later
        self.predicted: float | None = None
        """The seconds of the whole task, as its first steps predicted them."""
        self.epochs: float | None = None
        """The epochs that will be made, as the first steps predicted them; None if nothing ends the training."""
        self.solved_alone = False
        """Whether the setup has spent the budget, so that the head which it has solved is all that is learnt."""
        self.trainer: Any = None
        self._began = self._since = time.monotonic()
        self._steps = self._position = 0  # steps of training, and of the schedule
        self._image = self._step = self._solving = 0.0
        self._validation: float | None = None

    @property
    def spent(self) -> float:
        """The seconds so far, over all sessions of the task."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """The seconds that are probably left; None if nothing is known yet, or nothing ends the training."""
        if self._steps < _STEPS:
            return None
        left, limit = self._epochs_left * self._epoch + self._ending, self.budget.seconds
        left = min(left, float("inf") if limit is None else max(0.0, limit - self.spent))
        return None if left == float("inf") else float(left)

    @property
    def stream_left(self) -> float | None:
        """The seconds that are probably left of this task and the later ones; None if nothing is known yet."""
        if (left := self.left) is None:
            return None
        count, times = self._later
        later = times * (self.spent + left)
        return left + (later if self.budget.seconds is None else min(later, count * self.budget.seconds))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuses a task whose patch would be too large, or whose setup too long; starts to measure the setup."""
        self.trainer = trainer
        self.precision = self.budget.precision(pl_module.patch({}), self.precision)
        if self.budget.seconds is not None and not trainer.ckpt_path:
            self._check_setup(self.budget.seconds, pl_module)
        self._since = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measures the network on one batch; stops, or refuses, a task whose budget is spent before its first step."""
        setup, sizes = time.monotonic() - self._since, self._sizes
        self._image = _image_seconds(pl_module)
        if pl_module.head_kind != "sgd":
            probe = max(0.0, setup - self._image * sum(sizes.values()))
            self._solving = probe + self._image * sizes["train"]
        self.solved_alone = self._stops(0.0) and not trainer.global_step
        if self.solved_alone and pl_module.probes.start is None:
            raise RunError(
                f"budget.seconds={self.budget.seconds} of task {pl_module.task_name!r} are too few: {self.spent:.1f} "
                "are spent before its first step; set more, or use a solved head, such as --model.head logistic"
            )
        self._since = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Leaves what is between epochs out of the steps."""
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures a step, and stops if the next one would exceed the budget."""
        now, before = time.monotonic(), self._since
        self._since, self._steps = now, self._steps + 1
        share = 1 / min(_RECENT, max(1, self._steps - 1))
        self._step += share * (now - before - self._step)
        if self._steps == 1:
            self.budget.check_memory(pl_module.task_name, peak_memory(trainer.strategy.root_device))
        if self._steps == _STEPS and self.predicted is None and (left := self.left) is not None:
            self.predicted = self.spent + left
            self.epochs = self._epochs_done + min(self._epochs_left, self._epochs_within())
            self._tell(self)
        self._stops(self._step)

    def schedule_steps(self) -> int:
        """How many steps the schedule of learning rates makes after the epoch whose last step was just made."""
        whole = self._epochs_done + self._epochs_left
        if self.budget.seconds is None or whole == float("inf"):
            return 1
        left = self._epochs_left
        if self._steps >= _STEPS - 1:  # this step is not counted yet
            left = min(left, self._epochs_within(self._validating))
        steps = schedule_steps(whole, self._position, left)
        self._position += steps
        return steps

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts to measure a validation."""
        self._since = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measures a validation."""
        self._validation = time.monotonic() - self._since

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        kept = {"spent": self.spent, "predicted": self.predicted, "validation": self._validation}
        return kept | {"epochs": self.epochs, "position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts what earlier sessions have spent."""
        self._began -= state_dict["spent"]
        self.predicted, self._validation = state_dict["predicted"], state_dict["validation"]
        self.epochs, self._position = state_dict.get("epochs"), state_dict.get("position", 0)

    def _check_setup(self, limit: float, pl_module: Any) -> None:
        """Refuses a task if the network alone needs more seconds for its images than there are."""
        pl_module.to(self.trainer.strategy.root_device)
        _image_seconds(pl_module)  # the first batch is slower than the others
        self._image = _image_seconds(pl_module)
        count = sum(self._sizes.values())
        needed = self.spent + self._image * count + self._ending
        if self.trainer.strategy.reduce_boolean_decision(needed > limit, all=False):
            raise RunError(
                f"budget.seconds={limit} of task {pl_module.task_name!r} are too few: to read its {count:,} images "
                f"before the first step, and to test, takes about {needed:.1f}; set more, or fewer --budget.images"
            )

    @property
    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = self.trainer.datamodule.sizes
        return sizes

    @property
    def _validating(self) -> float:
        return self._image * self._sizes["val"] + self._solving if self._validation is None else self._validation

    @property
    def _ending(self) -> float:
        reads = ("test", "val", "train") if self.precision in BITS else ("test", "val")
        return self._image * sum(self._sizes[split] for split in reads)

    @property
    def _epoch(self) -> float:
        """The seconds of an epoch."""
        return float(self.trainer.num_training_batches * self._step + self._validating)

    @property
    def _epochs_done(self) -> float:
        trainer = self.trainer
        return float(trainer.global_step * trainer.accumulate_grad_batches / trainer.num_training_batches)

    @property
    def _epochs_left(self) -> float:
        """The epochs that are left without a budget, also a part of one."""
        trainer = self.trainer
        steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches / trainer.num_training_batches
        return float(steps - self._epochs_done)

    def _epochs_within(self, further: float = 0.0) -> float:
        """The epochs that there is time for, also a part of one, if some further seconds are spent before."""
        limit = float("inf") if self.budget.seconds is None else self.budget.seconds
        return max(0.0, limit - self.spent - further - self._ending) / self._epoch

    def _stops(self, step: float) -> bool:
        """Stops the training, on all processes, if a step of these seconds would leave too few for what follows."""
        limit = self.budget.seconds
        if limit is None:
            return False
        spent = self.spent + step + self._validating + self._ending > limit
        if stops := bool(self.trainer.strategy.reduce_boolean_decision(spent, all=False)):
            self.trainer.should_stop = True
        return stops


def _image_seconds(pl_module: Any) -> float:
    """The seconds that the network needs for an image, of one batch."""
    start = time.monotonic()
    with torch.no_grad(), pl_module.merged():
        images, _ = next(iter(pl_module.batches("val")))
        pl_module.current()[0](images)
    return (time.monotonic() - start) / len(images)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of the device, or of this process on a processor, so far; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):
        import resource  # noqa: PLC0415 Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
