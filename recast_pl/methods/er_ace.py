"""ER-ACE."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.methods.buffer import Replay
from recast_pl.methods.piece import Step


class ERACE(Replay):
    """Experience replay with asymmetric cross-entropy (Caccia et al., 2022).

    The loss of the incoming batch knows only the classes that are in it; that of the replayed images, of all tasks
    seen, knows all classes of their heads. With a head for each task, classes of old tasks are out of reach of the
    incoming batch anyway, so that the mask does little where a batch holds most classes of its task.

    Args:
        per_class: Images kept of each class; None to bound them in all.
        total: Images kept in all; None to bound them by class.

    Raises:
        MethodError: If not just one bound is given.
    """

    def __init__(self, per_class: int | None = 120, total: int | None = None) -> None:
        super().__init__(False, per_class, total)

    def incoming(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, C), minus infinity for classes that are not in the batch."""
        present = F.one_hot(labels, logits.shape[1]).any(0)  # (C,)
        return logits.masked_fill(~present, -torch.inf)

    def loss(self, step: Step) -> Tensor | None:
        """Cross-entropy of as many replayed images as the batch has; then the batch goes to the buffer."""
        term = None
        if len(self.buffer):
            samples = self.buffer.draw(len(step.labels), step.images.device)
            term = F.cross_entropy(self.logits(samples), samples.labels)
        self.keep(step)
        return term
