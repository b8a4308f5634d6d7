"""Learning without forgetting."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from recast_pl.errors import MethodError
from recast_pl.methods.guard import Guard, shared_weights
from recast_pl.methods.piece import Step


class LwF(Guard):
    """Learning without forgetting (Li and Hoiem, 2016): old heads shall say of new images what they said before.

    For each old head the term is the cross-entropy between softmax(z₀/T) of the network from before the task and
    softmax(z/T), summed over heads. As in the authors' formula there is no factor T². Old heads are trained, too.

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
        self.teacher: dict[str, Tensor] = {}
        """The shared weights by name, and..."""
        self.teacher_heads = nn.ModuleList()
        """... the old heads, as they were before the task."""

    def begin_task(self) -> None:
        """Remembers the network as it is; resuming finds it thus again."""
        self.teacher_heads = copy.deepcopy(self.learner.old_heads).requires_grad_(False)
        old = shared_weights(self.learner).items() if len(self.teacher_heads) else ()
        self.teacher = {name: weight.detach().clone() for name, weight in old}

    def begin_fit(self) -> None:
        """Takes the teacher to where the weights are."""
        weights = shared_weights(self.learner)
        self.teacher = {name: tensor.to(weights[name].device) for name, tensor in self.teacher.items()}
        self.teacher_heads.to(next(self.learner.old_heads.parameters(), torch.empty(0)).device)

    def loss(self, step: Step) -> Tensor | None:
        """The distillation of all old heads; None during the first task."""
        if not self.teacher:
            return None
        backbone = self.learner.backbone
        assert backbone is not None
        with torch.no_grad():
            features = functional_call(backbone, self.teacher, (step.images,))  # (B, D)
            targets = [(head(features) / self.temperature).softmax(1) for head in self.teacher_heads]
        terms = [
            F.cross_entropy(head(step.features) / self.temperature, target)
            for head, target in zip(self.learner.old_heads, targets, strict=True)
        ]
        return self.strength * torch.stack(terms).sum()

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing: the teacher is the network itself."""
        return {}
