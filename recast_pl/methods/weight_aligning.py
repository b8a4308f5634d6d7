"""WA: one classifier over the classes of all tasks, whose new rows are scaled to the norm of the old ones.

Zhao, Xiao, Gan, Zhang and Xia, "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020.

    loss = (1 − λ)·cross-entropy over all classes + λ·cross-entropy(softmax(z₀ / T), softmax(z / T))
    after the task: w_c ← w_c · mean ‖w_old‖ / mean ‖w_new‖ for every new class c

z₀ and z are the logits of all old classes together, by the network before the task and by the present one, on images of
the current task. λ is the share of the old classes among all classes. The rows w of all heads are the joint classifier.

Deviations: there is no memory of old images; `ERACE` or `DERPP` beside it adds one, whose images are classified within
their tasks. Rows are not clipped to positive values, because the features of a transformer have either sign.
"""

import torch
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.lwf import LwF
from recast_pl.methods.piece import Step


class WeightAligning(LwF):
    """Weight aligning (Zhao et al., 2020): a joint classifier with distillation and rows of equal norm.

    List it after `FineTune`, which trains the weights. `--evaluation class` measures the joint classifier. Its head is
    trained, never solved, because its rows compete with those of earlier tasks.

    Args:
        temperature: T.

    Raises:
        MethodError: If T is not positive.
    """

    solvable_head = False

    def __init__(self, temperature: float = 2.0) -> None:
        if temperature <= 0:
            raise MethodError(f"WeightAligning: temperature={temperature} must be positive")
        super().__init__(temperature=temperature)

    def loss(self, step: Step) -> Tensor | None:
        """What the loss has beside the cross-entropy of the own head; None during the first task.

        Cross-entropy over all classes is that of the own head plus log Σ exp over all logits less that over the own.
        """
        before = self.teacher_logits(step)
        if not before:
            return None
        old = torch.cat([head(step.features) for head in self.learner.old_heads], 1)
        share = old.shape[1] / (old.shape[1] + self.learner.current()[1].out_features)
        own = step.logits
        apart = (torch.cat([old, own], 1).logsumexp(1) - own.logsumexp(1)).mean()
        distilled = self.distillation(torch.cat(before, 1), old)
        return (1 - share) * apart + share * (distilled - self.learner.loss(own, step.labels))

    @torch.no_grad()
    def end_task(self) -> None:
        """Scales the rows of the new classes, without their biases, to the mean norm of the old ones."""
        heads = list(self.learner.old_heads)
        if heads:
            old = torch.cat([head.get_parameter("weight") for head in heads])
            new = self.learner.current()[1].weight
            new.mul_(old.norm(dim=1).mean() / new.norm(dim=1).mean())
