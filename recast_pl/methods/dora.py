"""Weight-decomposed low-rank adaptation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Part
from recast_pl.methods.lora import LoRA, LowRank


class MagnitudeDirection(LowRank):
    """m·V/‖V‖ with V = W + s·B·A, norms by row; in the gradient the norm is a constant (section 4.3 of DoRA)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: Sequence[int] | None) -> None:
        super().__init__(weight, rank, scale, parts)
        self.magnitude = nn.Parameter(weight.new_zeros(self.B.shape[:2]))  # (parts, rows of a part)

    def reset(self, weight: Tensor) -> None:
        """Magnitudes are the norms of the weight's rows, so that nothing changes."""
        super().reset(weight)
        self.magnitude.copy_(self._norms(self.add(weight)))

    def change(self, weight: Tensor) -> Tensor:
        """m·V/‖V‖."""
        direction = self.add(weight)  # (1 or 3, rows of a part, columns)
        scale = torch.ones_like(direction[..., 0])
        scale = scale.index_copy(0, self.blocks, self.magnitude / self._norms(direction.detach()))
        return (direction * scale[..., None]).view_as(weight)

    def _norms(self, direction: Tensor) -> Tensor:
        norms: Tensor = direction[self.blocks].norm(dim=-1)  # (parts, rows of a part)
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)  # of rows that are zero


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al., 2024): LoRA on directions, and a magnitude for each row.

    Args:
        rank: r.
        alpha: α; None for r, so that the scale is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights (any sequence); other weights are adapted whole.
        learning_rate: Rate of all parameters; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or there are no parts.
    """

    adaptation = MagnitudeDirection

    def __init__(
        self,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] = ("q", "k", "v"),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(rank, alpha, targets, parts, learning_rate)
