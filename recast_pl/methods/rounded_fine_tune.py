"""Fine-tuning of some parameters whose patch keeps 8, 4, 2 or 1 bits of each difference to the pretrained ones.

It trains as `recast_pl.methods.partial_fine_tune` and rounds as `recast_pl.methods.rounded_state`.
"""

from torch import Tensor

from recast_pl.methods.partial_fine_tune import PartialFineTune
from recast_pl.methods.rounded_state import Bits, RoundedState


class RoundedFineTune(RoundedState, PartialFineTune):
    """Trains some parameters of the network in a copy for each task, and rounds their differences to few bits.

    A vector, such as a bias, has one step, and a weight one for each of its rows.

    Args:
        bits: Of each difference in the patch of a task: 8, 4, 2 or 1.
        targets: Regular expressions for names of parameters; all biases by default.
        learning_rate: Learning rate of the parameters; None for that of the head.

    Raises:
        MethodError: If no parameter matches that is left by the pieces before, or the bits are others.
    """

    def __init__(
        self, bits: Bits = 4, targets: tuple[str, ...] = (r"bias$",), learning_rate: float | None = 1e-3
    ) -> None:
        super().__init__(targets, learning_rate)
        self.choose_bits(bits)

    def origin(self, name: str) -> Tensor:
        """The pretrained parameter."""
        return self.start[name]
