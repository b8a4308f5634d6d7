"""A factor for each weight."""

import re

from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.methods.adaptation import EVERY_LAYER, Adaptation, MinimalPiece


class Scales(Adaptation):
    """A factor for each of the equal parts of a weight's rows.

    Args:
        weight: What is scaled (rows, *columns).
        parts: Number of parts.
    """

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(weight.new_ones(parts))

    def reset(self, weight: Tensor) -> None:
        """All factors 1, so that nothing changes."""
        nn.init.ones_(self.factors)

    def change(self, weight: Tensor) -> Tensor:
        """The scaled parts."""
        parts = weight.reshape(len(self.factors), -1)  # (parts, numbers of a part)
        return (self.factors[:, None] * parts).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """The scaled parts of y."""
        y.unflatten(-1, (self.factors.shape[1], -1)).mul_(
            self.factors[:, None, :, None]
        )  # (B, N, parts, rows of a part)


class Scale(MinimalPiece):
    """A factor for each weight, and for each of queries, keys and values: 72 numbers on ViT-S.

    What a bank can do of itself, were its templates the weights and nothing mixed.

    Args:
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the factors; None for that of the head.
    """

    def __init__(self, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = None) -> None:
        super().__init__(targets, learning_rate)

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """A factor for the weight, or three for a fused one."""
        return Scales(weight, 3 if re.search(r"qkv|in_proj", name) else 1)
