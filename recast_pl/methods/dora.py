"""DoRA: a low-rank update of each weight's direction, and a trained magnitude for each row.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.

    W' = m · V / ‖V‖, with V = W + (alpha / r) · B·A and one norm and magnitude for each row; m starts at ‖W‖

As in section 4.3 of the paper, the gradient treats the norm as a constant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recast_pl.methods.lora import LoRA, LowRank


class MagnitudeDirection(LowRank):
    """m·V/‖V‖ with V = W + s·B·A; arguments as for `LowRank`."""

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: Sequence[int] | None) -> None:
        super().__init__(weight, rank, scale, parts)
        self.magnitude = nn.Parameter(weight.new_zeros(self.B.shape[:2]))  # (parts, rows of a part)

    def reset(self, weight: Tensor) -> None:
        """Magnitudes are the norms of the weight's rows, so that nothing changes."""
        super().reset(weight)
        self.magnitude.copy_(self._norms(self.updated(weight)))

    def change(self, weight: Tensor) -> Tensor:
        """m·V/‖V‖."""
        direction = self.updated(weight)  # (1 or 3, rows of a part, columns)
        scale = torch.ones_like(direction[..., 0])
        scale = scale.index_copy(0, self.blocks, self.magnitude / self._norms(direction.detach()))
        return (direction * scale[..., None]).view_as(weight)

    def _norms(self, direction: Tensor) -> Tensor:
        norms: Tensor = direction[self.blocks].norm(dim=-1)  # (parts, rows of a part)
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a row of zeros has norm 0


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al., 2024): LoRA on directions, and a magnitude for each row.

    Args:
        rank: r.
        alpha: α; None for r, so that the factor is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights to adapt (any sequence); None for all three.
        learning_rate: Learning rate of all parameters; None for that of the head.
    """

    adaptation = MagnitudeDirection
    default_parts = ("q", "k", "v")
