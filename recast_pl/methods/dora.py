"""DoRA: a low-rank update of each weight's direction, and a trained magnitude for each row.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.

    W' = m · V / ‖V‖, with V = W + (alpha / r) · B·A and one norm and magnitude for each row; m starts at ‖W‖

As in section 4.3 of the paper, the gradient treats ‖V‖ as a constant. RECAST prints its combination with DoRA without a
trained magnitude (equation 9): m is ‖W‖, which follows the coefficients that generate W. The gradient is then that of
the whole equation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Part
from recast_pl.methods.lora import LoRA, LowRank


class Direction(LowRank):
    """‖W‖·V/‖V‖ with V = W + s·B·A, by rows; arguments as for `LowRank`."""

    def change(self, weight: Tensor) -> Tensor:
        """V, with rows of other lengths."""
        direction = self.updated(weight)  # (1 or 3, rows of a part, columns)
        factors = torch.ones_like(direction[..., 0])
        factors = factors.index_copy(0, self.blocks, self.factors(weight, direction))
        return (direction * factors[..., None]).view_as(weight)

    def factors(self, weight: Tensor, direction: Tensor) -> Tensor:
        """‖W‖/‖V‖ (parts changed, rows of a part), from W (*shape) and V (1 or 3, rows of a part, columns)."""
        return self.norms(weight.reshape(direction.shape)) / self.norms(direction)

    def norms(self, direction: Tensor) -> Tensor:
        """The norms of rows (parts changed, rows of a part)."""
        norms: Tensor = direction[self.blocks].norm(dim=-1)
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a row of zeros has norm 0


class MagnitudeDirection(Direction):
    """m·V/‖V‖ with V = W + s·B·A, and a trained m for each row; arguments as for `LowRank`."""

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: Sequence[int] | None) -> None:
        super().__init__(weight, rank, scale, parts)
        self.magnitude = nn.Parameter(weight.new_zeros(self.B.shape[:2]))  # (parts, rows of a part)

    def reset(self, weight: Tensor) -> None:
        """Magnitudes are the norms of the weight's rows, so that nothing changes."""
        super().reset(weight)
        self.magnitude.copy_(self.norms(self.updated(weight)))

    def factors(self, weight: Tensor, direction: Tensor) -> Tensor:
        """m/‖V‖, where ‖V‖ has no gradient."""
        return self.magnitude / self.norms(direction.detach())


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al., 2024): LoRA on directions, and a magnitude for each row.

    Args:
        rank: r.
        alpha: α; None for r, so that the factor is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights to adapt (any sequence); None for all three.
        learning_rate: Learning rate of all parameters; None for that of the head.
        train_magnitude: Whether magnitudes are trained, as by DoRA's authors. If not, they are the norms of the weight
            that this piece receives, as in equation 9 of RECAST's paper.
    """

    linear = False
    default_parts = ("q", "k", "v")

    def __init__(
        self,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] | None = None,
        learning_rate: float | None = None,
        train_magnitude: bool = True,
    ) -> None:
        super().__init__(rank, alpha, targets, parts, learning_rate)
        self.adaptation = MagnitudeDirection if train_magnitude else Direction
