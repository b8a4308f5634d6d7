"""GDumb."""

import torch

from recast_pl.methods.buffer import Replay, Samples


class GDumb(Replay):
    """Greedy sampler and dumb learner (Prabhu et al., 2020): every task trains anew on a balanced buffer of all tasks.

    When a task begins, its images are offered to the buffer, and weights and heads start anew; an epoch is a pass
    over the buffer, without augmentation.

    Args:
        per_class: Images kept of each class; None to bound them in all.
        total: Images kept in all; None to bound them by class.

    Raises:
        MethodError: If not just one bound is given.
    """

    def __init__(self, per_class: int | None = None, total: int | None = 4400) -> None:
        super().__init__(True, per_class, total)

    def begin_fit(self) -> None:
        """Fills the buffer and starts anew, unless the task is resumed; then gives the buffer for training."""
        kept = self.buffer.kept
        if kept is None or not bool((kept.tasks == self.task).any()):
            self._fill()
            self.learner.restart()
        kept = self.buffer.kept
        assert kept is not None
        self.learner.train_on(kept.images, kept.labels, kept.tasks)

    def _fill(self) -> None:
        for images, labels in self.learner.batches("train"):
            pixels = (images * 255).round().to(torch.uint8)
            tasks = torch.full_like(labels, self.task)
            self.buffer.add(Samples(pixels, labels, tasks, torch.empty(len(labels), 0)))
