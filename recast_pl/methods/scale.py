"""Scale: one factor for each weight, and one each for queries, keys and values.

    W' = s · W

It is not from a paper. It shows what a template bank can do if its templates are the pretrained weights and nothing is
mixed between layers.
"""

from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.methods.adaptation import EVERY_LAYER, Adaptation, CompactPiece, thirds


class Scales(Adaptation):
    """A factor for each of some equal parts of a weight's rows."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(weight.new_ones(parts))

    def reset(self, weight: Tensor) -> None:
        """All factors are 1, so that nothing changes."""
        nn.init.ones_(self.factors)

    def change(self, weight: Tensor) -> Tensor:
        """The weight with its parts scaled."""
        parts = weight.reshape(len(self.factors), -1)  # (parts, numbers of a part)
        return (self.factors[:, None] * parts).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Scales the parts of y."""
        factors = self.factors[:, None, :, None]  # (B, 1, parts, 1)
        y.unflatten(-1, (self.factors.shape[1], -1)).mul_(factors)  # (B, N, parts, rows of a part)


class Scale(CompactPiece[Scales]):
    """A factor for each weight, and for each of queries, keys and values: 72 numbers on ViT-S.

    Args:
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the factors; None for that of the head.
    """

    linear = True

    def __init__(self, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = None) -> None:
        super().__init__(targets, learning_rate)

    def adapt(self, name: str, weight: Tensor) -> Scales:
        """A factor for the weight, or three for a fused one."""
        return Scales(weight, len(thirds(name, ("q", "k", "v")) or [0]))
