"""DER++: replayed images keep their logits as well as their labels.

Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020.

    loss = cross-entropy(new images) + α · mean squared error(z, z₀) + β · cross-entropy(replayed images)

z₀ are the logits of a stored image when it was inserted, z its present ones; the two terms draw their images
independently. Deviation: z and z₀ are compared over the classes of the image's own head, as each task has one.
"""

import torch.nn.functional as F
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.buffer import Replay, widen
from recast_pl.methods.piece import Step


class DERPP(Replay):
    """Dark experience replay++ (Buzzega et al., 2020): α·‖z − z₀‖² and β·cross-entropy of replayed images.

    List it after `FineTune`, which trains the weights.

    Args:
        alpha: α.
        beta: β.
        per_class: Images kept of each class; None to bound them in total.
        total: Images kept in total; None to bound them by class.

    Raises:
        MethodError: If α or β is negative, or unless exactly one bound is given.
    """

    def __init__(
        self, alpha: float = 0.3, beta: float = 0.5, per_class: int | None = 120, total: int | None = None
    ) -> None:
        super().__init__(False, per_class, total)
        if alpha < 0 or beta < 0:
            raise MethodError(f"DERPP: alpha={alpha} and beta={beta} must not be negative")
        self.alpha, self.beta = alpha, beta

    def loss(self, step: Step) -> Tensor | None:
        """The two terms; then the batch is offered to the buffer."""
        term = None
        if len(self.buffer):
            (logits, dark), (others, again) = self.draw(step), self.draw(step)
            term = self.alpha * logit_distance(logits, dark.logits) + self.beta * F.cross_entropy(others, again.labels)
        self.keep(step)
        return term


def logit_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """Mean over images of the mean squared difference of the logits of each image's own head.

    Args:
        logits: (B, C); minus infinity beyond the classes of an image's head.
        stored: The same, with no more columns.
    """
    stored = widen(stored, logits.shape[1])
    own = stored.isfinite()
    difference = logits.masked_fill(~own, 0) - stored.masked_fill(~own, 0)
    return (difference.square().sum(1) / own.sum(1)).mean()
