"""L2-SP: weight decay towards where training starts, in place of 0.

Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018.

    loss = cross-entropy + ½·α·‖θ − θ⁰‖²

θ is what the pieces before train, and θ⁰ is what it is when the task starts: the pretrained network. AdamW's own weight
decay pulls towards 0, which is the pretrained network only for pieces that add something to it. The coefficients of
`Recast` and the factors of `Scale` start elsewhere.

Deviation: the paper's second term, weight decay of the head towards 0, is left to the optimizer or to the solved head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.piece import Piece, Step, copies


class L2SP(Piece):
    """L2-SP (Li et al., 2018): weight decay of what the pieces before it train, towards where the task starts.

    Args:
        strength: α. Choose it on validation images; it depends on the scale of the numbers.

    Raises:
        MethodError: If α is negative, or the pieces before train nothing.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        if strength < 0:
            raise MethodError(f"L2SP: strength={strength} must not be negative")
        self.strength = strength
        self._before: Sequence[Piece] = ()

    def join(self, pieces: Sequence[Piece]) -> None:
        """Finds the pieces before."""
        super().join(pieces)
        self._before = pieces[: pieces.index(self)]

    def attach(self, network: nn.Module) -> None:
        """Refuses pieces that train nothing."""
        if not any(piece.parameters for piece in self._before):
            raise MethodError("L2SP: the pieces before it train nothing; list it after those whose numbers it decays")

    def begin_training(self, head: nn.Linear) -> None:
        """Keeps where the task starts."""
        self.memory.keep({"start": self._numbers().clone()})

    def loss(self, step: Step) -> Tensor:
        """½·α·‖θ − θ⁰‖²."""
        return 0.5 * self.strength * (self._numbers() - self.memory.tensors["start"]).square().sum()

    def training_state(self) -> dict[str, Tensor]:
        """Where the task started."""
        return copies(self.memory.tensors)

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads where the task started."""
        self.memory.keep(state)

    def _numbers(self) -> Tensor:
        """θ (Σ,)."""
        return torch.cat([p.flatten() for piece in self._before for p in piece.parameters.values()])
