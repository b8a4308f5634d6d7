"""LwF: on new images, the heads of earlier tasks should output what they did before the task.

Li and Hoiem, "Learning without Forgetting", ECCV 2016.

    loss = cross-entropy + α · Σ_heads cross-entropy(softmax(z₀ / T), softmax(z / T))

z₀ are the logits of the network as it was before the task (the teacher), z those of the present one, both on images of
the current task. As in the authors' formula there is no factor T². The heads of earlier tasks are trained, too.

Deviation: there is no warm-up in which only the new head is trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.guard import Guard
from recast_pl.methods.piece import Step


class LwF(Guard):
    """Learning without forgetting (Li and Hoiem, 2016): keeps what the heads of earlier tasks output for new images.

    List it after `FineTune`, which trains the weights.

    Args:
        strength: α, the weight of the term.
        temperature: T.

    Raises:
        MethodError: If α is negative, or T not positive.
    """

    keeps_heads = True

    def __init__(self, strength: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()
        if strength < 0 or temperature <= 0:
            raise MethodError(f"LwF: strength={strength} must not be negative, temperature={temperature} be positive")
        self.strength, self.temperature = strength, temperature

    def begin_task(self) -> None:
        """Copies the network and the heads of earlier tasks."""
        self.remember_network()

    def loss(self, step: Step) -> Tensor | None:
        """The distillation of all earlier heads; None during the first task."""
        heads = zip(self.teacher_logits(step), self.learner.old_heads, strict=True)
        terms = [self.distillation(before, head(step.features)) for before, head in heads]
        return self.strength * torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def teacher_logits(self, step: Step) -> list[Tensor]:
        """What each earlier head (B, C) gave for the images of a step before the task; empty during the first task."""
        return self.logits_before(step.images)

    def distillation(self, before: Tensor, now: Tensor) -> Tensor:
        """Cross-entropy of logits (B, C) with those of the teacher (B, C), at the temperature T."""
        return F.cross_entropy(now / self.temperature, (before / self.temperature).softmax(1))

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing: the next teacher is the network itself."""
        return {}
