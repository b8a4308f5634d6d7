"""Elastic weight consolidation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.guard import Guard, shared_weights
from recast_pl.methods.piece import Step, check_state


class EWC(Guard):
    """Elastic weight consolidation (Kirkpatrick et al., 2017): Σ_t ½·λ·F_t·(θ − θ_t)² over the shared weights.

    F_t is the diagonal of task t's empirical Fisher information: the mean over its training images of the squared
    gradient of each image's own log-likelihood. The sum over tasks is, but for a constant, ½·λ·F·(θ − θ̄)² with
    F = Σ F_t and θ̄ = Σ F_t·θ_t / F, so that two numbers a weight are kept, however many tasks there are.

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
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        """F and θ̄, by name of the weight; empty before the first task has ended."""

    def begin_fit(self) -> None:
        """Takes what is kept to where the weights are."""
        weights = shared_weights(self.learner)
        for kept in (self.fisher, self.anchor):
            kept.update({name: tensor.to(weights[name].device) for name, tensor in kept.items()})

    def loss(self, step: Step) -> Tensor | None:
        """½·λ·Σ F·(θ − θ̄)²; None during the first task."""
        if not self.fisher:
            return None
        weights = shared_weights(self.learner)
        terms = [(f * (weights[name] - self.anchor[name]).square()).sum() for name, f in self.fisher.items()]
        return 0.5 * self.strength * torch.stack(terms).sum()

    def end_task(self) -> None:
        """Adds the task's Fisher information to the sum."""
        for name, (weight, new) in self._information().items():
            old = self.fisher.get(name, torch.zeros_like(new)).to(new.device)
            anchor = self.anchor.get(name, weight).to(new.device)
            self.fisher[name] = old + new
            share = torch.where(self.fisher[name] > 0, new / self.fisher[name], 1.0)
            self.anchor[name] = torch.lerp(anchor, weight, share)

    def shared_state(self) -> dict[str, Tensor]:
        """F and θ̄ of every weight."""
        kept = {"fisher": self.fisher, "anchor": self.anchor}
        return {f"{kind}:{name}": t.cpu().clone() for kind, tensors in kept.items() for name, t in tensors.items()}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        shapes = {name: tuple(weight.shape) for name, weight in shared_weights(self.learner).items()}
        check_state(
            "EWC", state, {f"{k}:{name}": shape for k in ("fisher", "anchor") for name, shape in shapes.items()}
        )
        self.fisher, self.anchor = ({name: state[f"{k}:{name}"] for name in shapes} for k in ("fisher", "anchor"))

    def _information(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each shared weight its value, and its Fisher information from the current task."""
        backbone, head = self.learner.backbone, self.learner.head
        assert backbone is not None
        assert head is not None
        weights = shared_weights(self.learner)
        squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        count = 0
        for images, labels in self.learner.batches("train"):
            for image, label in zip(images.split(1), labels.split(1), strict=True):  # not the square of a mean
                loss = F.cross_entropy(head(backbone(image)), label)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for square, gradient in zip(squares.values(), gradients, strict=True):
                    if gradient is not None:
                        square.add_(gradient.square())
                count += 1
        return {name: (weight.detach().clone(), squares[name] / count) for name, weight in weights.items()}
