"""GDumb: every task trains again from the pretrained weights, on a balanced buffer of all tasks.

Prabhu, Torr and Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020.

When a task begins, its images are offered to the buffer ("greedy sampler"), and weights, heads and optimizer start
over; an epoch is one pass over the buffer ("dumb learner").

Deviations: there is no CutMix, and training starts from pretrained weights, as for every method here.
"""

import torch

from recast_pl.methods.buffer import Replay, Samples, to_uint8


class GDumb(Replay):
    """Greedy sampler and dumb learner (Prabhu et al., 2020): every task trains from the start on a balanced buffer.

    List it after `FineTune`, which trains the weights. Training augments the images as their own tasks ask.

    Args:
        per_class: Images kept of each class; None to bound them in total.
        total: Images kept in total; None to bound them by class.

    Raises:
        MethodError: Unless exactly one bound is given.
    """

    solvable_head = False  # it learns from its buffer alone

    def __init__(self, per_class: int | None = None, total: int | None = 4400) -> None:
        super().__init__(True, per_class, total)

    def begin_fit(self) -> None:
        """Fills the buffer and starts over, unless the task is resumed; then trains on the buffer."""
        if not bool((self.buffer.kept.tasks == self.task).any()):
            for images, labels in self.learner.batches("train"):
                tasks = torch.full_like(labels, self.task)
                self.buffer.add(Samples(to_uint8(images), labels, tasks, torch.empty(len(labels), 0)))
            self.learner.restart()
        kept = self.buffer.kept
        self.learner.train_on(kept.images, kept.labels, kept.tasks)
