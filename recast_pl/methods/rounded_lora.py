"""LoRA whose patch keeps 8, 4, 2 or 1 bits of each number.

W' = W + (alpha / r) · B·A as in `recast_pl.methods.lora`, rounded as in `recast_pl.methods.rounded_state`
"""

from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Part
from recast_pl.methods.lora import LoRA
from recast_pl.methods.rounded_state import Bits, RoundedState


class RoundedLoRA(RoundedState, LoRA):
    """LoRA whose numbers are rounded to few bits; each part of A and of B has a step of its own.

    Args:
        bits: Of each number in the patch of a task: 8, 4, 2 or 1.
        rank: r.
        alpha: α; None for r, so that the factor is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights to adapt (any sequence); None for q and v.
        learning_rate: Learning rate of all parameters; None for that of the head.
        shared: Whether all weights of one shape and with the same parts have the same A and B.

    Raises:
        MethodError: If the rank is below 1, there are no parts, or the bits are others.
    """

    def __init__(
        self,
        bits: Bits = 4,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] | None = None,
        learning_rate: float | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__(rank, alpha, targets, parts, learning_rate, shared)
        self.choose_bits(bits)
