"""Spectral templates: a coefficient for each of the leading singular directions of each weight.

    W' = W + Σ_j c_j · σ_j·u_j·v_jᵀ over the r leading singular directions of W

It is not from a paper. The directions are templates like those of RECAST's equation 1 that no file needs to hold, as
they are computed from the backbone. With r = 1 it equals LoRA-XS of rank 1.
"""

from recast_pl.methods.adaptation import EVERY_LAYER
from recast_pl.methods.lora_xs import LoRAXS


class Spectral(LoRAXS):
    """Spectral templates: the r leading singular directions σuvᵀ of each weight, with a coefficient for each.

    Args:
        rank: r, also the number of coefficients for each weight.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the coefficients; None for that of the head.
    """

    diagonal = True

    def __init__(
        self, rank: int = 1, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = None
    ) -> None:
        super().__init__(rank, targets, learning_rate)
