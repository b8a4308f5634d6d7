"""ER-ACE: experience replay in which the loss of new images ignores classes that the batch does not hold.

Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022.

    loss = cross-entropy(new images, classes of the batch) + cross-entropy(replayed images, all classes of their heads)

Deviation: with a head for each task, new images cannot reach the classes of earlier tasks anyway. So the mask has
little effect where a batch holds most classes of its task.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.methods.buffer import Replay
from recast_pl.methods.piece import Step


class ERACE(Replay):
    """Experience replay with asymmetric cross-entropy (Caccia et al., 2022).

    List it after `FineTune`, which trains the weights.

    Args:
        per_class: Images kept of each class; None to bound them in total.
        total: Images kept in total; None to bound them by class.

    Raises:
        MethodError: Unless exactly one bound is given.
    """

    def __init__(self, per_class: int | None = 120, total: int | None = None) -> None:
        super().__init__(False, per_class, total)

    def incoming(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, C), minus infinity for classes that the batch does not hold."""
        present = F.one_hot(labels, logits.shape[1]).any(0)  # (C,)
        return logits.masked_fill(~present, -torch.inf)

    def loss(self, step: Step) -> Tensor | None:
        """Cross-entropy of as many replayed images as the batch has; then the batch is offered to the buffer."""
        term = None
        if len(self.buffer):
            logits, samples = self.draw(step)
            term = F.cross_entropy(logits, samples.labels)
        self.keep(step)
        return term
