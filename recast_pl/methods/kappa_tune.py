"""KappaTune: the weights with the lowest condition numbers are trained, in a copy for each task.

Ludwig, "The Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units", 2025
(arXiv:2506.16289).

    κ(W) = σ_max / σ_min, the largest singular value over the smallest

A weight with a low κ is close to a multiple of an orthogonal matrix: it has specialised little, so training it loses
little of the pretraining. A fifth of the weights is what the author's code for PEFT selects in its experiment.

Deviations: the paper trains one network further, where each task has a copy of its own here. A fused weight of queries,
keys and values is one matrix, and a convolution is flattened to (rows, columns).
"""

from collections.abc import Iterable, Mapping
from math import inf

import torch
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import EVERY_LAYER
from recast_pl.methods.partial_fine_tune import PartialFineTune


def condition_number(weight: Tensor) -> float:
    """σ_max/σ_min of a weight (rows, *columns) in double precision; infinite if σ_min is 0."""
    values = torch.linalg.svdvals(weight.detach().flatten(1).double())
    largest, smallest = float(values[0]), float(values[-1])
    return largest / smallest if smallest else inf


class KappaTune(PartialFineTune):
    """Trains the weights with the lowest condition numbers, in a copy for each task (Ludwig, 2025).

    Args:
        share: Fraction of the targets to train, rounded down; at least one weight is trained. A weight with an infinite
            condition number comes last. Of equal ones, the earlier in the network comes first.
        targets: Regular expressions for names of weights to choose from, with at least two dimensions each.
        learning_rate: Learning rate of the weights; None for that of the head, which is too high for whole weights.

    Raises:
        MethodError: If the share is not in (0, 1], or a target has fewer than two dimensions.
    """

    def __init__(
        self, share: float = 0.2, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = 2e-5
    ) -> None:
        super().__init__(targets, learning_rate)
        if not 0 < share <= 1:
            raise MethodError(f"KappaTune: share={share} must be above 0 and at most 1")
        self.share = share

    def choose(self, parameters: Mapping[str, Tensor]) -> Iterable[str]:
        """Those of the targets with the lowest condition numbers, in the order of the network."""
        names = list(super().choose(parameters))
        flat = [name for name in names if parameters[name].ndim < 2]
        if flat:
            raise MethodError(
                f"KappaTune: {flat[0]} has {parameters[flat[0]].ndim} dimensions, and only matrices and convolutions "
                "have a condition number; set targets to regular expressions that match only those"
            )
        numbers = {name: condition_number(parameters[name]) for name in names}
        lowest = sorted(names, key=lambda name: numbers[name])[: max(1, int(self.share * len(names)))]
        return [name for name in names if name in lowest]
