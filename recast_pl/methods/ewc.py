"""EWC: a quadratic penalty on changes of the weights that mattered to earlier tasks.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.

    loss = cross-entropy + Σ_t ½·λ·F_t·(θ − θ_t)²

θ_t are the weights after task t; F_t is the diagonal of the task's empirical Fisher information: the mean over its
training images of the squared gradient of each image's own log-likelihood.

Implementation: up to a constant, the sum over tasks equals ½·λ·F·(θ − θ̄)² with F = Σ F_t and θ̄ = Σ F_t·θ_t / F. So two
numbers for each weight are kept, however many tasks there are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.guard import Guard
from recast_pl.methods.piece import Step, check_state, copies


class EWC(Guard):
    """Elastic weight consolidation (Kirkpatrick et al., 2017): Σ_t ½·λ·F_t·(θ − θ_t)² over the shared weights.

    List it after `FineTune`, which trains the weights.

    Args:
        strength: λ.

    Raises:
        MethodError: If λ is negative.
    """

    def __init__(self, strength: float = 5000.0) -> None:
        super().__init__()
        if strength < 0:
            raise MethodError(f"EWC: strength={strength} must not be negative")
        self.strength = strength

    def loss(self, step: Step) -> Tensor | None:
        """½·λ·Σ F·(θ − θ̄)²; None during the first task."""
        kept = self.memory.tensors
        if not kept:
            return None
        terms = [
            (kept[f"fisher:{name}"] * (weight - kept[f"anchor:{name}"]).square()).sum()
            for name, weight in self.shared_weights().items()
        ]
        return 0.5 * self.strength * torch.stack(terms).sum()

    @torch.no_grad()
    def end_task(self) -> None:
        """Adds the task's Fisher information to F, and moves θ̄ towards the present weights accordingly."""
        before, now, weights = self.memory.tensors, dict[str, Tensor](), self.shared_weights()
        for name, new in self._information().items():
            fisher = before.get(f"fisher:{name}", torch.zeros_like(new)) + new
            anchor = before.get(f"anchor:{name}", weights[name])
            share = torch.where(fisher > 0, new / fisher, 1.0)
            now |= {f"fisher:{name}": fisher, f"anchor:{name}": torch.lerp(anchor, weights[name], share)}
        self.memory.keep(now)

    def shared_state(self) -> dict[str, Tensor]:
        """F and θ̄ of every weight."""
        return copies(self.memory.tensors)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads F and θ̄."""
        shapes = {name: tuple(weight.shape) for name, weight in self.shared_weights().items()}
        check_state("EWC", state, {f"{k}:{n}": shape for k in ("fisher", "anchor") for n, shape in shapes.items()})
        self.memory.keep(state)

    @torch.enable_grad()
    def _information(self) -> dict[str, Tensor]:
        """The Fisher information of each shared weight from the current task."""
        (backbone, head), weights = self.learner.current(), self.shared_weights()
        squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        count = 0
        for images, labels in self.learner.batches("train"):
            for image, label in zip(images.split(1), labels.split(1), strict=True):  # not the square of a mean
                loss = F.cross_entropy(head(backbone(image)), label)
                gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)  # 0 if unused
                for square, gradient in zip(squares.values(), gradients, strict=True):
                    square.add_(gradient.square())
                count += 1
        return {name: square / count for name, square in squares.items()}
