"""Spectral templates."""

from recast_pl.methods.adaptation import EVERY_LAYER
from recast_pl.methods.lora_xs import LoRAXS


class Spectral(LoRAXS):
    """Spectral templates: the r leading singular directions σuvᵀ of each weight, with a coefficient for each.

    They are templates like those of equation 1 that no file holds, as they are worked out from the backbone. With r = 1
    this is `LoRAXS` of rank 1.

    Args:
        rank: r: there are r numbers for each weight.
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the coefficients; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or not below the rows and columns of a target.
    """

    diagonal = True

    def __init__(
        self, rank: int = 1, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = None
    ) -> None:
        super().__init__(rank, targets, learning_rate)
