"""Head scales: a factor for what each attention head adds.

    W'_h = s_h · W_h, where W_h are the columns of the attention's projection that head h multiplies

So the output of head h is scaled by s_h. It is not from a paper.
"""

from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import PROJECTION, CompactPiece
from recast_pl.methods.scale import Scales


class ColumnScales(Scales):
    """A factor for each of some equal parts of a weight's columns."""

    def change(self, weight: Tensor) -> Tensor:
        """The weight (rows, columns) with its parts scaled."""
        parts = weight.unflatten(1, (len(self.factors), -1))  # (rows, parts, columns of a part)
        scaled: Tensor = self.factors[:, None] * parts
        return scaled.flatten(1)


class HeadScale(CompactPiece[ColumnScales]):
    """A factor for each attention head: 72 numbers on ViT-S.

    Args:
        targets: Regular expressions for names of projections that follow attention.
        learning_rate: Learning rate of the factors; None for that of the head of the task.

    Raises:
        MethodError: If a target does not belong to a module that knows its number of heads.
    """

    linear = True

    def __init__(self, targets: tuple[str, ...] = (PROJECTION,), learning_rate: float | None = None) -> None:
        super().__init__(targets, learning_rate)
        self._heads: dict[str, int] = {}

    def attach(self, network: nn.Module) -> None:
        """Puts factors on every target; raises a MethodError if no weight matches."""
        heads = {name: getattr(module, "num_heads", None) for name, module in network.named_modules()}
        self._heads = {name: count for name, count in heads.items() if isinstance(count, int)}
        super().attach(network)

    def adapt(self, name: str, weight: Tensor) -> ColumnScales:
        """A factor for each head that the weight projects."""
        attention = ".".join(name.split(".")[:-2])
        if attention not in self._heads:
            raise MethodError(
                f"HeadScale: {attention or name} has no num_heads; target projections that follow attention"
            )
        return ColumnScales(weight, self._heads[attention])
